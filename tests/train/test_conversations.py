"""Conversations: what is read, what is learned, and that a chat asks for what was trained on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spikelm.errors import ConfigError, DataError
from spikelm.generate import prompt_ids
from spikelm.template import ChatTemplate
from spikelm.tokenizer import EOS, Tokenizer
from spikelm_train.cli import main as train
from spikelm_train.config import DataConfig, TokenizerConfig, load_recipe
from spikelm_train.data import make_batch, prepare
from spikelm_train.objective import IGNORED, Objective
from spikelm_train.report import read_metrics
from spikelm_train.texts.cli import main
from spikelm_train.texts.prepare import Text, write_text
from spikelm_train.texts.shards import open_prepared
from spikelm_train.trainer import Trainer

ROOT = Path(__file__).parents[2]
Make = Callable[..., Trainer]
Recipe = Callable[..., Path]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def talk(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def write(path: Path, conversations: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in conversations))
    return path


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    """Forty conversations of one or two answers."""
    return write(
        tmp_path / "dialogues.jsonl",
        [talk(*(f"Part {i} {j} of {i * i}?" for j in range(2 + 2 * (i % 2)))) for i in range(40)],
    )


def chats(dialogues: Path, *more: str) -> tuple[str, ...]:
    return (f"data.sources=[{dialogues}]", "data.messages_key=messages", *more)


def encoded(tmp_path: Path, conversations: list[Any], tokenizer: Tokenizer) -> list[int]:
    """What is stored of the training side."""
    held_out = write(tmp_path / "held_out.jsonl", [talk("held", "out")])
    data = DataConfig(
        sources=(str(write(tmp_path / "train.jsonl", conversations)),),
        validation_sources=(str(held_out),),
        messages_key="messages",
    )
    config = TokenizerConfig(kind="bytes")
    write_text(Text(data), config, tokenizer, tmp_path / "out", workers=1)
    found: list[int] = open_prepared(tmp_path / "out").train.tokens[:].tolist()
    return found


def parts(stored: list[int], tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    """Runs of learned and of other tokens as text."""
    found: list[tuple[bool, list[int]]] = []
    for value in stored:
        learned, token = value >= 0, value if value >= 0 else ~value
        if not found or found[-1][0] != learned:
            found.append((learned, []))
        found[-1][1].append(token)
    return [(learned, tokenizer.decode_bytes(ids).decode()) for learned, ids in found]


def test_answers_and_what_ends_them_are_learned(tmp_path: Path) -> None:
    tokenizer = Tokenizer.bytes()
    stored = encoded(tmp_path, [talk("a", "b", "c", "d", "e")], tokenizer)
    assert stored[0] == tokenizer.eos_id
    assert parts(stored[1:], tokenizer) == [
        (False, "User: a\n\nAssistant:"),
        (True, " b\n\nUser:"),
        (False, " c\n\nAssistant:"),
        # What follows is another document's separator, which is learned.
        (True, " d\n\n"),
    ]


def test_a_chat_asks_for_what_was_trained_on(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train_bpe(["User: Assistant: what is that? a thing.\n\n"] * 9, 300)
    messages = talk("What is that?", "A thing.", "And this?", "Another.")
    stored = encoded(tmp_path, [messages], tokenizer)
    whole = [value if value >= 0 else ~value for value in stored]
    for answer in (1, 3):
        prompt = prompt_ids(tokenizer, ChatTemplate().render(messages[:answer]), special=True)
        if answer == 1:
            assert whole[: len(prompt)] == prompt
            assert stored[len(prompt)] >= 0 > stored[len(prompt) - 1]
        text = tokenizer.decode_bytes(prompt)
        assert tokenizer.decode_bytes(whole).startswith(text)


def test_batches_learn_answers_alone() -> None:
    rows = np.array([[9, ~1, ~2, 3, 9, ~1]], dtype=np.int64)
    batch = make_batch(rows, eos_id=9)
    assert batch.inputs.tolist() == [[9, 1, 2, 3, 9]]
    assert batch.targets.tolist() == [[IGNORED, IGNORED, 3, 9, IGNORED]]
    assert batch.reset.tolist() == [[True, False, False, False, True]]


@pytest.mark.parametrize("chunk", [0, 2])
def test_the_loss_is_the_mean_over_answers(chunk: int) -> None:
    logits = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[1, IGNORED, 3, IGNORED], [IGNORED, IGNORED, 2, 6]])
    objective = Objective(0.1, chunk)
    output = logits
    if chunk:
        read = objective.options(targets)["read"]
        output = torch.cat([read(logits[:, s : s + 2], slice(s, s + 2)) for s in (0, 2)], 1)
    loss, (z,) = objective.terms(output, targets, count=4)
    rows = logits[targets != IGNORED]
    nats = -rows.log_softmax(-1)[range(4), targets[targets != IGNORED]]
    torch.testing.assert_close(loss, nats.mean())
    torch.testing.assert_close(z, 0.1 * rows.logsumexp(-1).square().mean())
    (grad,) = torch.autograd.grad(loss + z, logits)
    assert not grad[targets == IGNORED].any()


def test_every_answer_counts_the_same_however_a_step_is_divided(
    make: Make, dialogues: Path
) -> None:
    settings = chats(dialogues, "data.sampling=packed", "data.sequence_length=24")
    whole = make(*settings, "micro_batch_size=8", out="whole")
    parted = make(*settings, "micro_batch_size=1", "grad_accum_steps=8", out="parted")
    for _ in range(3):
        one, two = whole.advance(0.0), parted.advance(0.0)
        assert one is not None
        assert two is not None
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["gradient_norm"] == pytest.approx(two["gradient_norm"], rel=1e-4)


def test_only_answers_are_learned(make: Make, dialogues: Path) -> None:
    trainer = make(*chats(dialogues, "data.sampling=packed", "micro_batch_size=8"))
    assert trainer.corpus.has_conversations
    before, bits = trainer.validate()
    for _ in range(40):
        trainer.advance(0.0)
    after, _ = trainer.validate()
    assert after < 0.6 * before
    assert before == pytest.approx(6.0, abs=0.5)  # log 257, and what random logits add
    assert bits == pytest.approx(before / 0.6931, rel=1e-3)  # a byte per token
    # Questions are nearly as unlikely as they were: nothing learned from them.
    tokens = torch.tensor([[256, *b"User: Part 3 0 of 9?\n\nAssistant:"]])
    logits, _ = trainer.module.eval()(tokens)
    nats = torch.nn.functional.cross_entropy(logits[0, :5], tokens[0, 1:6])
    assert nats > after + 1.0


def test_conversations_beside_text(recipe: Recipe, dialogues: Path, text: Path) -> None:
    sets = [
        {"weight": 1, "sources": [str(text)]},
        {"weight": 1, "sources": [str(dialogues)], "messages_key": "messages"},
    ]
    config = load_recipe(str(recipe()), ["data.sources=[]", f"data.mixture={json.dumps(sets)}"])
    corpus = prepare(config, dialogues.parent / "data")
    assert corpus.has_conversations
    plain, talks = (part.tokens[:] for _, part in corpus.sets)
    assert plain.min() >= 0 > talks.min()
    again = prepare(config, dialogues.parent / "data")
    assert len(again.train.tokens) == len(plain) + len(talks)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "no key 'messages'; keys present: text"),
        ({"messages": "a"}, "must be a list of messages, got str"),
        ({"messages": [{"role": "user"}]}, "needs messages with a role and a content"),
        ({"messages": [{"role": "user", "content": None}]}, "needs messages with a role"),
        ({"messages": talk("nobody answers")}, "no answers of an assistant"),
        ({"messages": [{"role": "gpt", "content": "a"}]}, "role 'gpt' given; allowed: system, "),
    ],
)
def test_bad_conversations(row: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row) + "\n")
    text = Text(DataConfig(sources=(str(path),), messages_key="messages"))
    with pytest.raises(DataError, match=message):
        list(text.read("reading"))


def test_bad_conversations_can_be_skipped(tmp_path: Path, dialogues: Path) -> None:
    with dialogues.open("a") as file:
        file.write('{"messages": 3}\n' + json.dumps({"messages": talk("alone")}) + "\n")
    data = DataConfig(sources=(str(dialogues),), messages_key="messages", on_error="skip")
    text = Text(data)
    assert len(list(text.read("reading"))) == 40
    assert (text.faults.skipped, text.faults.unanswered) == (1, 1)


def test_a_template_that_changes_the_beginning_is_refused(tmp_path: Path) -> None:
    source = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer.bytes().with_chat_template(source)
    with pytest.raises(DataError, match="changes the beginning of a conversation"):
        encoded(tmp_path, [talk("a", "b", "c", "d")], tokenizer)


def test_a_template_that_ends_turns_with_the_separator_is_refused(tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = Tokenizer.bytes().with_chat_template(source)
    with pytest.raises(DataError, match="writes the token that separates documents"):
        encoded(tmp_path, [talk("a", "b")], tokenizer)


def test_text_files_have_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hello")
    text = Text(DataConfig(sources=(str(tmp_path / "a.txt"),), messages_key="messages"))
    with pytest.raises(DataError, match="is a text file"):
        list(text.read("reading"))


def test_conversations_need_sources() -> None:
    with pytest.raises(ConfigError, match="messages_key: messages given without sources"):
        DataConfig(messages_key="messages")


def test_prepared_ahead_with_its_template(
    tmp_path: Path, dialogues: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(CHATML)
    out = tmp_path / "prepared"
    arguments = ["--tokenizer", "bytes", "--messages-key", "messages", "--workers", "1"]
    command = ["prepare", str(dialogues), "--out", str(out), *arguments]
    assert main([*command, "--chat-template", str(template)]) == 0
    assert "documents" in capsys.readouterr().out
    found = open_prepared(out)
    runs = parts(found.train.tokens[1:110].tolist(), found.tokenizer)
    assert runs[0][1].startswith("<|im_start|>user\nPart ")
    assert runs[1][1].startswith("Part ")
    assert runs[1][1].endswith("<|im_end|>\n")
    trainer = make("data.sources=[]", f"data.prepared={out}")
    trainer.export(tmp_path / "model")
    assert (tmp_path / "model" / "chat_template.jinja").read_text() == CHATML
    assert Tokenizer.load(tmp_path / "model").chat_template == CHATML
    with pytest.raises(ConfigError, match="tokenizer.chat_template: cannot read it"):
        main([*command[:3], str(tmp_path / "x"), *arguments, "--chat-template", "missing.jinja"])


def prepared(tmp_path: Path, dialogues: Path, *more: str) -> Path:
    out = tmp_path / "prepared"
    arguments = ["--tokenizer", "bytes", "--messages-key", "messages", "--workers", "1", *more]
    assert main(["prepare", str(dialogues), "--out", str(out), *arguments]) == 0
    return out


def test_prepared_conversations_are_not_given_another_template(
    tmp_path: Path, dialogues: Path, text: Path, make: Make
) -> None:
    one, two = tmp_path / "one.jinja", tmp_path / "two.jinja"
    one.write_text(CHATML)
    two.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    talks = f"data.prepared={prepared(tmp_path, dialogues, '--chat-template', str(one))}"
    trainer = make("data.sources=[]", talks, "data.messages_key=messages")
    assert trainer.corpus.tokenizer.chat_template == CHATML
    with pytest.raises(ConfigError, match=r"prepared with another one; .* --chat-template"):
        make("data.sources=[]", talks, f"tokenizer.chat_template={two}")
    out = str(tmp_path / "text")
    assert main(["prepare", str(text), "--out", out, "--tokenizer", "bytes"]) == 0
    with pytest.raises(ConfigError, match="was prepared as text; prepare it with --messages-key"):
        make("data.sources=[]", f"data.prepared={out}", "data.messages_key=messages")
    trainer = make("data.sources=[]", f"data.prepared={out}", f"tokenizer.chat_template={two}")
    assert trainer.corpus.tokenizer.chat_template == two.read_text()


def test_data_takes_the_place_of_prepared_texts(
    tmp_path: Path, dialogues: Path, recipe: Recipe
) -> None:
    folder = str(prepared(tmp_path, dialogues))
    path = str(recipe(data={"sources": [], "prepared": folder}))
    assert load_recipe(path).data.prepared == folder
    data = load_recipe(path, (), [str(dialogues)]).data
    assert (data.prepared, data.sources) == (None, (str(dialogues),))
    with pytest.raises(ConfigError, match="one of sources, prepared and mixture"):
        load_recipe(path, [f"data.prepared={folder}"], [str(dialogues)])


def test_a_template_whose_answers_have_no_end_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoded(tmp_path, [talk("a", "b")], Tokenizer.bytes())
    assert not caplog.text
    encoded(tmp_path, [talk("a", "b")], Tokenizer.bytes().with_chat_template(CHATML))
    assert r"ends an answer with 'b<|im_end|>\n', where a chat does not stop" in caplog.text


@pytest.mark.parametrize("sampling", ["packed", "carried"])
def test_a_step_without_answers_changes_nothing(make: Make, tmp_path: Path, sampling: str) -> None:
    path = write(tmp_path / "long.jsonl", [talk(f"word {i} " * 400, "b") for i in range(4)])
    settings = chats(path, f"data.sampling={sampling}", "micro_batch_size=1", "l1_hidden=0.1")
    trainer = make(*settings, "data.validation_fraction=0.3")
    trainer.step = next(s for s in range(9) if (trainer.sampler.rows(s, 0, 1) < 0).all())
    step, carried = trainer.step, trainer.carried and trainer.carried.state_dict()
    before = {name: tensor.clone() for name, tensor in trainer.module.state_dict().items()}
    assert trainer.advance(0.0) is None
    assert trainer.step == step + 1
    torch.testing.assert_close(trainer.module.state_dict(), before, rtol=0, atol=0)
    if trainer.carried:
        assert trainer.carried.state_dict() != carried, "the state has gone on"


def test_the_run_says_what_is_learned_and_cut(
    recipe: Recipe, dialogues: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(recipe()), "--out", str(tmp_path / "run"), "--set", "steps=1"]
    command += ["--data", str(dialogues), "--set", "data.messages_key=messages"]
    command += ["--set", "data.sampling=packed", "--set", "data.sequence_length=80"]
    command += ["--set", "sample_every=1", "--set", "sample_prompt=Who?"]
    assert train(command) == 0
    shown = capsys.readouterr().out
    corpus = prepare(load_recipe(str(tmp_path / "run" / "config.yaml")), tmp_path / "run" / "data")
    tokens = corpus.train.tokens[:]
    assert f"{(tokens >= 0).mean():.0%} learned; {corpus.validation.num_bytes} held out" in shown
    longer = int((np.diff(corpus.train.starts, append=len(tokens)) > 80).sum())
    assert 0 < longer < corpus.train.num_documents
    assert f"{longer} of {corpus.train.num_documents} conversations are longer than a row" in shown
    assert r"sample: 'User: Who?\n\nAssistant:" in shown


def test_a_special_token_in_a_message_is_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train_bpe(["some text"] * 3, 260)
    stored = encoded(tmp_path, [talk(f"a {EOS} b", f"c {EOS}")], tokenizer)
    assert [v for v in stored if v in (tokenizer.eos_id, ~tokenizer.eos_id)] == stored[:1]
    text = tokenizer.decode_bytes([v if v >= 0 else ~v for v in stored]).decode()
    assert text == f"User: a {EOS} b\n\nAssistant: c {EOS}\n\n"


@pytest.mark.parametrize("shared", [[], ["--context", "2"]])
def test_two_processes_train_as_one(
    shared: list[str], tiny: dict[str, Any], dialogues: Path, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    data = {"sources": [str(dialogues)], "messages_key": "messages", "sampling": "packed"}
    changes = {"data": {**tiny["data"], **data}, "micro_batch_size": 2, "steps": 4}
    path.write_text(json.dumps({**tiny, **changes}))
    accumulated = ["--set", f"grad_accum_steps={1 if shared else 2}"]
    one, two = ([str(path), "--out", str(tmp_path / name)] for name in ("one", "two"))
    assert train([*one, *accumulated]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "spikelm_train", *two, *shared]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True)
    curves = [read_metrics(tmp_path / name) for name in ("one", "two")]
    for left, right in zip(*curves, strict=True):
        for name in left.keys() & {"loss", "gradient_norm", "validation_loss"}:
            assert left[name] == pytest.approx(right[name], rel=1e-4), (name, left, right)
