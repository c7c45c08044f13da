from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spikelm import checkpoint
from spikelm.conversion.convert import convert
from spikelm.errors import CheckpointError, ConfigError
from spikelm.generate import Engine, prompt_ids, stream_text
from spikelm.sampling import SamplingParams

transformers = pytest.importorskip("transformers")
import spikelm.hf  # noqa: E402

PROMPTS = ["Hello there", "A much longer prompt than the first one, " * 3, "x"]


@pytest.fixture(scope="module", params=["float_folder", "coded_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def padded(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def test_generate_equals_the_engine_token_for_token(folder: Path, model: Any) -> None:
    engine = Engine(checkpoint.load(folder))
    ids, mask = padded(engine.tokenizer)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    for row, prompt in zip(out[:, ids.shape[1] :].tolist(), PROMPTS, strict=True):
        chunks = stream_text(
            engine,
            prompt_ids(engine.tokenizer, prompt),
            SamplingParams(temperature=0.0, max_tokens=20),
        )
        expected = [token for chunk in chunks for token in chunk.token_ids]
        assert row[: len(expected)] == expected


def test_padding_changes_nothing(folder: Path, model: Any) -> None:
    tokenizer = checkpoint.load(folder).tokenizer
    ids, mask = padded(tokenizer)
    logits = model(ids, attention_mask=mask).logits
    for row, prompt in enumerate(PROMPTS):
        alone = model(torch.tensor([prompt_ids(tokenizer, prompt)])).logits[0]
        torch.testing.assert_close(logits[row, -alone.shape[0] :], alone)
        assert not logits[row, : -alone.shape[0]].any()
    mask[0, -3] = 0
    with pytest.raises(ConfigError, match="one run of real tokens"):
        model(ids, attention_mask=mask)


def test_save_pretrained_round_trip(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(30)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert type(again.config) is spikelm.hf.SpikelmConfig


def test_saved_float_folders_load_here_too(float_folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(float_folder)
    model.save_pretrained(tmp_path)
    checkpoint.load(float_folder).tokenizer.save(tmp_path)
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        torch.testing.assert_close(checkpoint.load(tmp_path).model(ids)[0], expected)


def test_cached_steps_equal_the_whole(model: Any) -> None:
    ids = torch.arange(24)[None]
    with torch.inference_mode():
        whole = model(ids).logits
        first = model(ids[:, :10], use_cache=True)
        second = model(ids[:, 10:], past_key_values=first.past_key_values, use_cache=True)
    joined = torch.cat([first.logits, second.logits], 1)
    # Pieces agree to rounding, and in float32 a count on its edge may flip.
    assert ((joined - whole).abs().amax(-1) < 1e-3).float().mean() > 0.8


def test_beams_and_several_sequences(model: Any) -> None:
    ids = torch.arange(10)[None]
    beams = model.generate(ids, num_beams=3, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert beams.shape[0] == 1
    several = model.generate(
        ids, num_return_sequences=4, max_new_tokens=5, do_sample=True, pad_token_id=0
    )
    assert several.shape[0] == 4


def test_cached_beams_equal_uncached_ones(model: Any) -> None:
    """Beams change places on the way, and two prompts must not mix."""
    ids = torch.tensor([list(range(65, 75)), list(range(80, 90))])
    settings = {"num_beams": 4, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


def test_output_options(model: Any) -> None:
    ids = torch.arange(12)[None]
    assert model(ids, logits_to_keep=3).logits.shape[1] == 3
    assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)
    with pytest.raises(ConfigError, match="vocabulary is the tokenizer's"):
        model.resize_token_embeddings(300)


def test_loss_has_gradients(float_folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(float_folder)
    ids = torch.randint(0, 257, (2, 20))
    loss = model(ids, labels=ids).loss
    logits = model(ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.model.embedding.weight.grad.abs().sum() > 0


def test_auto_classes_know_the_model(folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.num_hidden_layers == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # The start of a document stands in front, as in the engine.
    assert tokenizer("Hello").input_ids == prompt_ids(checkpoint.load(folder).tokenizer, "Hello")


def test_damaged_folders_are_refused(float_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(float_folder, tmp_path / "broken"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.embedding.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing keys \(model.embedding.weight\)"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_saved_spike_coded_model_loads_everywhere(coded_folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(coded_folder)
    model.save_pretrained(tmp_path)
    checkpoint.load(coded_folder).tokenizer.save(tmp_path)
    assert checkpoint.load(tmp_path).manifest == checkpoint.load(coded_folder).manifest


def test_a_spike_coded_model_keeps_its_thresholds_in_any_dtype(coded_folder: Path) -> None:
    ids = torch.arange(12)[None]
    expected = transformers.AutoModelForCausalLM.from_pretrained(coded_folder)(ids).logits
    half = transformers.AutoModelForCausalLM.from_pretrained(coded_folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.state_dict().values()} == {torch.int8, torch.float32}
    torch.testing.assert_close(half(ids).logits, expected, rtol=0, atol=0)


def test_four_bit_weights(float_folder: Path, tmp_path: Path) -> None:
    ids = torch.arange(60)[None]
    coded, saved = tmp_path / "coded", tmp_path / "saved"
    convert(float_folder, coded, ids, bits=4, bits_of={"ffn_hidden": 8})
    expected = checkpoint.load(coded).model(ids)[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(coded, dtype=torch.bfloat16)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
    model.save_pretrained(saved)
    checkpoint.load(coded).tokenizer.save(saved)
    torch.testing.assert_close(checkpoint.load(saved).model(ids)[0], expected, rtol=0, atol=0)
