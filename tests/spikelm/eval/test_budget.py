"""spikelm.eval.budget, and what `spikelm eval --spike-budget` makes of it"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spikelm import checkpoint
from spikelm.checkpoint import Checkpoint
from spikelm.coding.meter import Meter
from spikelm.config import ExpertsConfig, FFNConfig, ModelConfig, NeuronConfig, NeuronsConfig
from spikelm.errors import ConfigError, DataError
from spikelm.eval.budget import TOLERANCE, Throttle, parse_budget, raisable
from spikelm.eval.cli import main_eval
from spikelm.eval.evaluate import score, token_stream
from spikelm.eval.tables import budget_line
from spikelm.eval.traffic import weight_traffic
from spikelm.generate import Engine
from spikelm.models.spikelm import LanguageModel
from spikelm.tokenizer import Tokenizer

# Short enough that all of it is measured on.
TEXT = ["Return the absolute value of x, as fabs() does for floats. " * 3, "h\u00e9llo world " * 4]


def zones(loaded: Checkpoint) -> dict[str, Tensor]:
    return {neuron.name: neuron.dead_zone.clone() for neuron in raisable(loaded.model)}


def measured(loaded: Checkpoint) -> tuple[float, Meter]:
    """Bytes per token on TEXT, counted row by row of every matrix."""
    meter = Meter()
    score(loaded.model, token_stream(loaded.tokenizer, TEXT), meter)
    traffic = weight_traffic(loaded.model)
    tokens = next(
        t.entries for t in meter.tallies.values() if t.neuron.tensor_class == "head_input"
    )
    tokens //= loaded.model.config.width
    rows = {n: (t.entries - t.silent) / tokens for n, t in meter.tallies.items()}
    read = sum(rows[n] * matrix.row_bytes for n, matrix in traffic.matrices.items())
    return traffic.other_bytes + read, meter


@pytest.mark.parametrize("kind", ["float", "coded"])
def test_reads_what_the_budget_allows(kind: str, float_folder: Path, coded_folder: Path) -> None:
    loaded = checkpoint.load({"float": float_folder, "coded": coded_folder}[kind])
    before = zones(loaded)
    now, _ = measured(loaded)
    throttle = Throttle(loaded, TEXT)
    assert throttle.now == pytest.approx(now)
    for share in (0.9, 0.7):
        spent = throttle.spend(parse_budget(f"{100 * share}%"))
        assert spent["bytes_asked"] == pytest.approx(share * now)
        found, _ = measured(loaded)
        assert spent["bytes_reached"] == pytest.approx(found)
        assert (1 - TOLERANCE) * share * now <= found <= share * now
        raised = zones(loaded)
        assert all(bool((raised[name] >= zone).all()) for name, zone in before.items())
        assert any(bool((raised[name] > zone).any()) for name, zone in before.items())
    skips = kind == "coded" and loaded.model.layers[0].ffn.input.linear.backend != "matmul"
    assert ("silent neurons too" in budget_line(spent)) == (not skips)
    # From the first thresholds again, and not from those of the last budget.
    assert throttle.spend(parse_budget("100 %"))["bytes_reached"] == throttle.now
    assert all(torch.equal(zone, before[name]) for name, zone in zones(loaded).items())


def test_a_population_keeps_its_largest_spikes(coded_folder: Path) -> None:
    loaded = checkpoint.load(coded_folder, backend="matmul")
    inputs: list[Tensor] = []

    def spikes_of_first() -> Tensor:
        inputs.clear()
        score(
            loaded.model,
            token_stream(loaded.tokenizer, TEXT),
            lambda n, x, s: inputs.extend([x, s.values]) if n.name == first else None,
        )
        return inputs[1] != 0

    # Nothing in front of the first population changes, so its spikes are counted by hand.
    first = next(n.name for n in loaded.model.neurons() if n in raisable(loaded.model))
    assert first.startswith("layers.0.")
    before = spikes_of_first()
    kept = Throttle(loaded, TEXT).spend(parse_budget("60%"))["spikes_kept"]
    after = spikes_of_first()
    assert not bool((after & ~before).any())
    assert int(after.sum()) / int(before.sum()) == pytest.approx(kept, abs=0.01)
    ratio = inputs[0].abs() / inputs[0].abs().mean(-1, keepdim=True)
    assert ratio[after].min() >= ratio[before & ~after].max()


def test_budgets_that_cannot_be_met_or_need_nothing(coded_folder: Path) -> None:
    loaded = checkpoint.load(coded_folder)
    throttle = Throttle(loaded, TEXT)
    spent = throttle.spend(parse_budget("1 GiB"))
    assert (spent["spikes_kept"], spent["bytes_reached"]) == (1.0, throttle.now)
    assert "no threshold was raised" in budget_line(spent)
    # All that is left where nothing spikes is read for no neuron.
    assert throttle.least == pytest.approx(weight_traffic(loaded.model).other_bytes)
    with pytest.raises(ConfigError, match=r"cannot read less than \d+ bytes, \d+\.\d% of what"):
        throttle.spend(parse_budget(f"{throttle.least - 1}"))
    spent = throttle.spend(parse_budget(f"{throttle.least + 1}"))
    assert spent["bytes_reached"] <= throttle.least + 1
    with pytest.raises(DataError, match="no text to measure the budget on"):
        Throttle(loaded, ["", ""])


def test_a_model_without_dead_zones(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    fixed = NeuronConfig(kind="integer", scale="fixed", max_count=127)
    for number, neurons in enumerate((NeuronsConfig(), NeuronsConfig(mixer_input=fixed))):
        folder = tmp_path / str(number)
        model = LanguageModel(tiny_config(neurons=neurons)).initialise(0)
        checkpoint.save(folder, model, Tokenizer.bytes())
        with pytest.raises(ConfigError, match=f"{folder} has no thresholds"):
            Throttle(checkpoint.load(folder), TEXT)


def test_experts(tiny_config: Callable[..., ModelConfig], tmp_path: Path) -> None:
    integer = NeuronConfig(kind="integer", k=6.0, max_count=127)
    config = tiny_config(
        ffn=FFNConfig(kind="reglu", hidden_dim=64, experts=ExpertsConfig(num_experts=4)),
        neurons=NeuronsConfig(
            mixer_input=integer,
            mixer_output=integer,
            gate_input=integer,
            ffn_input=integer,
            ffn_hidden=integer,
            head_input=integer,
        ),
    )
    checkpoint.save(tmp_path / "experts", LanguageModel(config).initialise(0), Tokenizer.bytes())
    loaded = checkpoint.load(tmp_path / "experts")
    throttle = Throttle(loaded, TEXT[:1])
    # Where all is silent the router sends every token the same way: the other experts read nothing.
    assert throttle.least == pytest.approx(weight_traffic(loaded.model).other_bytes)
    spent = throttle.spend(parse_budget("60%"))
    assert (0.6 - TOLERANCE) * throttle.now <= spent["bytes_reached"] <= 0.6 * throttle.now
    # One that no token was sent to has a sibling's threshold.
    short = Throttle(checkpoint.load(tmp_path / "experts"), ["a"])
    short.spend(parse_budget("50%"))
    assert all(bool((neuron.dead_zone > 0).all()) for neuron in short.neurons)


def test_decoding_follows(coded_folder: Path) -> None:
    silent = []
    for budget in ("100%", "50%"):
        loaded = checkpoint.load(coded_folder)
        Throttle(loaded, TEXT).spend(parse_budget(budget))
        engine = Engine(loaded)
        _, state = engine.prefill([256])
        for token in TEXT[0].encode()[:40]:
            _, state = engine.step(torch.tensor([token]), state)
        silent.append(engine.silent_fraction)
    assert silent[1] is not None
    assert silent[0] is not None
    assert silent[1] > silent[0] + 0.15


def test_parse() -> None:
    assert parse_budget("60%").num_bytes(200) == pytest.approx(120)
    for text in ("4MiB", " 4 MiB", "4096KiB", "4194304", "4194304B", "4.0MiB"):
        assert parse_budget(text).num_bytes(1) == 4 * 2**20
    for text in ("", "0", "0%", "-1", "4MB", "4mib", "x", "1e6", "nan", "60%%"):
        with pytest.raises(ConfigError, match="such as 4MiB"):
            parse_budget(text)


def test_eval_draws_the_curve(
    float_folder: Path, coded_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(TEXT))
    plot = tmp_path / "new" / "curve.png"
    words = [
        str(coded_folder),
        "--data",
        str(text),
        "--budget-data",
        str(text),
        "--plot",
        str(plot),
    ]
    assert main_eval([*words, "--spike-budget", "100%,60%", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert list(models) == ["coded 100%", "coded 60%"]
    whole, less = models.values()
    assert less["spike_budget"]["asked"] == "60%"
    # Measured on the text that was evaluated.
    assert less["spike_bytes_per_token"] == pytest.approx(less["spike_budget"]["bytes_reached"])
    assert less["spike_bytes_per_token"] <= 0.6 * whole["spike_bytes_per_token"]
    assert less["bits_per_byte"] != whole["bits_per_byte"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="give --spike-budget"):
        main_eval([str(float_folder), "--plot", str(plot)])
    with pytest.raises(ConfigError, match="cannot read less than"):
        main_eval([*words, "--spike-budget", "100%,1B"])


def test_twins_that_cannot_spike_less_are_measured_as_they_are(
    coded_folder: Path,
    tiny_config: Callable[..., ModelConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(TEXT))
    dense = tmp_path / "dense"
    model = LanguageModel(tiny_config(neurons=NeuronsConfig())).initialise(0)
    checkpoint.save(dense, model, Tokenizer.bytes())
    words = ["--data", str(text), "--budget-data", str(text), "--spike-budget", "70%"]
    twins = ["--twin", f"again={coded_folder}", "--twin", str(dense)]
    assert main_eval([str(coded_folder), *twins, *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["coded", "70%", "again", "70%", "dense"]
    row = next(line for line in lines if line.startswith("budget of weight bytes"))
    _, coded, again, none = row.rsplit("  ", 3)
    assert coded.strip() == again.strip() != none.strip() == "-"
    with pytest.raises(ConfigError, match="has no thresholds"):
        main_eval([str(dense), *words])
