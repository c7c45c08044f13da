from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spikelm import checkpoint
from spikelm.cli import main
from spikelm.config import ExpertsConfig, FFNConfig, ModelConfig, NeuronConfig, NeuronsConfig
from spikelm.conversion.upcycle import expert_scale, upcycle
from spikelm.errors import ConfigError
from spikelm.models.spikelm import LanguageModel
from spikelm.tokenizer import Tokenizer

Make = Callable[..., ModelConfig]


def dense(make: Make, kind: str) -> LanguageModel:
    ffn = FFNConfig(kind=kind, hidden_dim=24)  # type: ignore[arg-type]
    return LanguageModel(make(neurons=NeuronsConfig(), ffn=ffn)).initialise(0).double().eval()


def test_scale_of_the_76b() -> None:
    assert expert_scale(ExpertsConfig()) == pytest.approx(0.98, abs=0.001)
    assert expert_scale(ExpertsConfig(router="sigmoid")) == pytest.approx((1 / 1.5) ** (1 / 3))


@pytest.mark.parametrize(
    "experts",
    [
        ExpertsConfig(num_experts=4),
        ExpertsConfig(num_experts=3, top_k=2, num_shared=0, router="sigmoid"),
        ExpertsConfig(num_experts=4, num_shared=2, dense_layers=(1,)),
    ],
)
def test_a_mixture_begins_where_the_dense_model_was(
    experts: ExpertsConfig, tiny_config: Make
) -> None:
    model = dense(tiny_config, "reglu")
    mixture = upcycle(model, experts).double()
    ids = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(0))
    # The scale is rounded to float32 with the weights.
    torch.testing.assert_close(mixture(ids)[0], model(ids)[0], rtol=1e-5, atol=1e-5)
    assert mixture.config.ffn.experts == experts


def test_swiglu_is_near(tiny_config: Make) -> None:
    model = dense(tiny_config, "swiglu")
    mixture = upcycle(model, ExpertsConfig(num_experts=16)).double()
    ids = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = model(ids)[0]
    assert 0 < (mixture(ids)[0] - expected).norm() < 0.02 * expected.norm()


def test_command(tiny_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "dense", tmp_path / "mixture"
    checkpoint.save(source, dense(tiny_config, "swiglu").float(), Tokenizer.bytes())
    asked = ["--experts", "4", "--dense-layers", "0"]
    assert main(["upcycle", str(source), str(out), *asked]) == 0
    assert "parameters" in capsys.readouterr().out
    found = checkpoint.load(out).model.config.ffn.experts
    assert found == ExpertsConfig(num_experts=4, dense_layers=(0,))
    for arguments, message in (
        ([str(source), str(out)], "exists and is not empty"),
        ([str(out), str(tmp_path / "again")], "experts already"),
        ([str(source), str(tmp_path / "x"), "--top-k", "20"], "top_k: 20 given; allowed: 1 to 16"),
        ([str(source), str(tmp_path / "x"), "--dense-layers", "9"], "allowed: 0 to 1"),
    ):
        assert main(["upcycle", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_channel_mix_cannot_be_upcycled(tiny_config: Make) -> None:
    model = LanguageModel(dataclasses.replace(tiny_config()))
    with pytest.raises(Exception, match="experts need kind: swiglu or reglu"):
        upcycle(model, ExpertsConfig())


@pytest.mark.parametrize(
    "hidden",
    [
        NeuronConfig(kind="step", v_threshold=0.5),
        NeuronConfig(kind="integer", scale="fixed"),
        NeuronConfig(kind="lif"),
    ],
)
def test_hidden_thresholds_that_do_not_follow_are_refused(
    hidden: NeuronConfig, tiny_config: Make
) -> None:
    ffn = FFNConfig(kind="reglu", hidden_dim=24)
    model = LanguageModel(tiny_config(neurons=NeuronsConfig(ffn_hidden=hidden), ffn=ffn))
    with pytest.raises(ConfigError, match="ffn_hidden: kind .* given; allowed: off, or integer"):
        upcycle(model, ExpertsConfig())
