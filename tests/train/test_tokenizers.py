"""Recipes with other tokenizers than the one that is learned from their text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spikelm import checkpoint
from spikelm.errors import ConfigError
from spikelm.eval.evaluate import evaluate
from spikelm.generate import Engine, prompt_ids, stream_text
from spikelm.sampling import SamplingParams
from spikelm.tokenizer import EOS, Tokenizer
from spikelm_train.cli import main
from spikelm_train.config import TokenizerConfig, load_recipe
from spikelm_train.data import prepare

Recipe = Callable[..., Path]


def world(folder: Path) -> Path:
    """A World vocabulary of every byte and three words."""
    tokens = [bytes([byte]) for byte in range(256)] + [b" cat", b" the", b"Document "]
    lines = (f"{i} {t!r} {len(t)}\n" for i, t in enumerate(tokens, 1))
    (folder / "rwkv_vocab_v1.txt").write_text("".join(lines))
    return folder / "rwkv_vocab_v1.txt"


def foreign(folder: Path) -> Path:
    """A folder as transformers writes it, whose texts end with `</s>`."""
    Tokenizer.train_bpe(["Document 7 says that the cat number 49 sat"] * 9, 290).save(folder)
    data = json.loads((folder / "tokenizer.json").read_text().replace(EOS, "</s>"))
    data["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(data))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["world", "foreign"])
def test_a_model_is_trained_on_another_vocabulary(
    kind: str, recipe: Recipe, tmp_path: Path, text: Path
) -> None:
    (tmp_path / "tokens").mkdir()
    path = (world if kind == "world" else foreign)(tmp_path / "tokens")
    tokenizer = {"kind": "file", "path": str(path), "pad_to": 64}
    out = tmp_path / "run"
    assert main([str(recipe(tokenizer=tokenizer, steps=4)), "--out", str(out)]) == 0
    entries = Tokenizer.from_file(path).vocab_size
    config = load_recipe(str(out / "config.yaml"))
    assert config.model.vocab_size == 320 > config.tokenizer.vocab_size == entries

    loaded = checkpoint.load(out)
    separator = loaded.tokenizer.eos_id
    assert loaded.tokenizer.reset_id == separator == 0
    assert not loaded.tokenizer.decode_bytes([separator])
    corpus = prepare(config, out / "data")
    starts = corpus.train.starts
    assert set(corpus.train.tokens[:][starts].tolist()) == {separator}
    first = corpus.train.tokens[1 : int(starts[1])].tolist()
    assert loaded.tokenizer.decode(first).startswith("Document ")
    assert len(first) < len(loaded.tokenizer.decode(first))
    assert evaluate(out, [text.read_text()[:500]])["bits_per_byte"] > 0


def test_rows_without_a_token_are_never_sampled(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pad = ["--set", "tokenizer.pad_to=100", "--set", "steps=1"]
    assert main([str(recipe()), "--out", str(out), *pad]) == 0
    loaded = checkpoint.load(out)
    assert loaded.model.config.vocab_size == 300
    weight = loaded.model.head.linear.weight
    assert 0.5 < float(weight[257:].std() / weight[:257].std()) < 2
    # From here on one of them is the likeliest of all.
    weight[257:] *= 50
    engine = Engine(loaded)
    prompt = prompt_ids(loaded.tokenizer, "The cat")
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=100)
    ids = [i for chunk in stream_text(engine, prompt, params) for i in chunk.token_ids]
    assert max(ids) < 257

    transformers = pytest.importorskip("transformers")
    pytest.importorskip("spikelm.hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        model.model.head.linear.weight[257:] *= 50
        tokens = torch.tensor([prompt])
        assert int(model(tokens).logits[0, -1].argmax()) >= 257
    found = model.generate(tokens, do_sample=True, top_k=0, max_new_tokens=100)
    assert int(found.max()) < 257


def test_sizes_and_contradictions(tmp_path: Path, recipe: Recipe) -> None:
    assert TokenizerConfig(vocab_size=1000, pad_to=64).num_rows == 1024
    assert TokenizerConfig(kind="bytes", pad_to=1).num_rows == 257
    for changes, message in (
        ({"kind": "file"}, "path: None given with kind file"),
        ({"path": "x"}, "path: x given with kind bpe"),
        ({"eos": "x"}, "eos: x given with kind bpe"),
        ({"pad_to": 0}, "pad_to: 0"),
        ({"train_bytes": 0}, "train_bytes: 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            TokenizerConfig(**changes)  # type: ignore[arg-type]
    path = foreign(tmp_path / "tokens")
    other = {"kind": "file", "path": str(path), "eos": "a"}
    config = load_recipe(str(recipe(tokenizer=other)))
    with pytest.raises(ConfigError, match=r"stands for 'a'; name one that no text has"):
        prepare(config, tmp_path / "data")
