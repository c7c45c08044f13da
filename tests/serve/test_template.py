"""Chat templates: the default's text, the sandbox and its limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikelm.errors import CheckpointError, RequestError
from spikelm_serve.template import ChatTemplate

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


def test_same_text_as_transformers(tiny_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    expected = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate.load(tiny_folder).render(TALK) == expected


def test_own_template_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content | tojson }}{{ eos_token }}{% endfor %}"
    )
    template = ChatTemplate.load(tmp_path)
    assert template.render(TALK[:1]) == '<user>"Hello"<|endoftext|>'
    assert template.stop == ()


def test_folder_without_template_uses_the_default(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path).render(TALK) == ChatTemplate().render(TALK)


@pytest.mark.parametrize("source", [b"{% for %}", b"{{ unclosed", b"\xff"])
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
    ],
)
def test_refused_templates(source: str) -> None:
    with pytest.raises(RequestError, match="chat template") as info:
        ChatTemplate(source).render(TALK)
    assert info.value.param == "messages"
