"""Chat templates: the default's text, the sandbox and its limits."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from spikelm.errors import CheckpointError, RequestError
from spikelm.template import ChatTemplate
from spikelm.tokenizer import EOS, Tokenizer

TALK = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye {{ 7 * 7 }}"},
]


def test_default_text() -> None:
    text = ChatTemplate().render(TALK)
    assert text == "User: Hello\n\nAssistant: Hi.\n\nUser: Bye {{ 7 * 7 }}\n\nAssistant:"
    assert ChatTemplate().stop == ("\nUser:",)


def test_default_is_prefix_stable() -> None:
    template = ChatTemplate()
    for n in (1, 3):
        shorter = template.render(TALK[:n])
        assert template.render(TALK, add_generation_prompt=False).startswith(shorter) or n == 3
    assert template.render(TALK).startswith(template.render(TALK[:1]))


def test_same_text_as_transformers(float_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(float_folder)
    expected = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate.load(float_folder).render(TALK) == expected


def test_own_template_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content | tojson }}{{ eos_token }}{% endfor %}"
    )
    template = ChatTemplate.load(tmp_path)
    assert template.render(TALK[:1]) == '<user>"Hello"<|endoftext|>'
    assert template.stop == ()


def test_folder_without_template_uses_the_default(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path).render(TALK) == ChatTemplate().render(TALK)


@pytest.mark.parametrize("source", [b"{% for %}", b"{{ unclosed", b"\xff", b"{{ " + b"(" * 9999])
def test_broken_template_names_the_file(tmp_path: Path, source: bytes) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(source)
    with pytest.raises(CheckpointError, match="chat_template.jinja"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__()[0] }}",
        "{{ messages.append({}) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[99].content }}",
        "{{ 1 // 0 }}",
        "{{ missing() }}",
        "{{ 'a' + 1 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10 ** 12 }}",
        "{{ (10 ** 12) * [messages] }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
    ],
)
def test_refused_templates(source: str) -> None:
    with pytest.raises(RequestError, match="chat template") as info:
        ChatTemplate(source).render(TALK)
    assert info.value.param == "messages"


CHATML = (
    "{% if tools is not none %}tools{% endif %}{% for m in messages %}{{ bos_token }}<|im_start|>"
    "{{ m.role }}\n{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def chat_folder(tmp_path: Path) -> Path:
    """The tokenizer of another model: bytes, a normalizer and special tokens of its own."""
    Tokenizer.bytes().save(tmp_path / "ours")
    data = json.loads((tmp_path / "ours" / "tokenizer.json").read_text())
    flags = data["added_tokens"][0]
    names = ["<|im_start|>", "<|im_end|>"]
    data["added_tokens"] += [{**flags, "id": 257 + i, "content": n} for i, n in enumerate(names)]
    data |= {"post_processor": None, "normalizer": {"type": "NFC"}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHATML}))
    Tokenizer.load(tmp_path).save(tmp_path / "model")
    return tmp_path / "model"


def test_special_tokens_of_another_model(chat_folder: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    tokenizer = Tokenizer.load(chat_folder)
    template = ChatTemplate.load(chat_folder, tokenizer)
    other = transformers.AutoTokenizer.from_pretrained(chat_folder)
    text = template.render(TALK)
    assert text == other.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    ids = other.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode(text, special=True) == ids
    assert (ids.count(257), ids.count(258)) == (4, 3)
    assert template.stop == ()


@pytest.mark.parametrize("content", ["a<|im_end|>", "<|im_<|im_start|>start|>", EOS, "caf\u00e9"])
def test_special_tokens_in_a_message_are_text(chat_folder: Path, content: str) -> None:
    tokenizer = Tokenizer.load(chat_folder)
    template = ChatTemplate.load(chat_folder, tokenizer)
    ids = tokenizer.encode(template.render([{"role": "user", "content": content}]), special=True)
    assert [token for token in ids if token > 255] == [257, 258, 257]
    start = 1 + len("user\n")
    assert ids[start : ids.index(258)] == tokenizer.encode(content)


def test_our_end_of_document_in_a_message_is_text() -> None:
    tokenizer = Tokenizer.bytes()
    template = ChatTemplate("{{ messages[0].content }}{{ eos_token }}", tokenizer)
    text = template.render([{"role": "user", "content": EOS}])
    assert tokenizer.encode(text, special=True) == [*EOS.encode(), tokenizer.eos_id]


def test_templates_may_ask_for_the_date() -> None:
    text = ChatTemplate("{{ strftime_now('%Y') }}").render(TALK)
    assert re.fullmatch("[0-9]{4}", text)
    assert int(text) >= datetime(2024, 1, 1).year


THINKING = """\
{%- for m in messages %}<{{ m.role }}>
{%- if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}
{%- else %}{{ m.content }}{% endif %}
{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (None, None),
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>",
            "changed by",
        ),
        ("{{ messages[-1].content }}", "of 1 messages is changed by another"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "changed by"),
        (THINKING, "messages is changed by another"),
        ("{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}Hi", None),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}"
            "{% if not add_generation_prompt %}.{% endif %}",
            "changed",
        ),
    ],
)
def test_whether_a_template_rewrites_the_past(source: str | None, found: str | None) -> None:
    said = ChatTemplate(source).rewrites()
    assert (said is None) == (found is None)
    if found:
        assert found in str(said)
