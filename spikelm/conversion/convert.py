"""A float checkpoint becomes a spike-coded one: integer weights, integer spikes, a manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from spikelm import checkpoint
from spikelm.coding.meter import Meter, Tally
from spikelm.config import (
    TENSOR_CLASSES,
    WEIGHTLESS_CLASSES,
    ModelConfig,
    NeuronConfig,
    NeuronsConfig,
    WeightsConfig,
    to_dict,
)
from spikelm.conversion.calibrate import calibrate
from spikelm.conversion.quantise import compensate
from spikelm.errors import CheckpointError, ConfigError, did_you_mean
from spikelm.kernels.event import MAX_COUNT
from spikelm.models.coded import (
    coded_copy,
    coding,
    projections,
    read_by_output,
    relu_projections,
    trained_grid,
)
from spikelm.models.grid import RoundedLinear, resolve_bits
from spikelm.models.spikelm import LanguageModel

FORMAT = "spikelm-spikes-1"

# Small matrices stay in a cache, where finding what to skip takes longer than reading it; rows of
# outputs here and there come at half the rate or so of rows of inputs.
BY_OUTPUT_WEIGHTS = 2**20
BY_OUTPUT_SHARE = 0.5

Rounding = Literal["nearest", "compensated"]


def convert(
    source: Path,
    out: Path,
    windows: Tensor,
    *,
    silence: Mapping[str, float] | None = None,
    group_size: int | None = None,
    bits: int | None = None,
    bits_of: Mapping[str, int] | None = None,
    rounding: Rounding | None = None,
    by_output_weights: int | None = None,
) -> dict[str, Any]:
    """Converts the float folder `source` into the spike-coded folder `out`; returns the manifest.

    Trained neurons keep their thresholds; projections without one are calibrated on the token
    `windows` [B, T], with dead zones for the silent fractions in `silence` (per tensor class).
    Weights have `bits`, 4 or 8 (null: 8), where `bits_of` does not say otherwise, by tensor class
    or by the name of the population in front (`head`). Rounding to 4 bits is compensated on the
    `windows` (`conversion.quantise`) and to 8 bits is to nearest, unless `rounding` says one for
    both. Weights that were rounded in training keep the integers, scales, bits and groups of that.
    Projections in front of a ReLU that have `by_output_weights` or more (null: a million) are laid
    out to be read by output if that is less to read.

    Raises: ConfigError for a silence, bits, group size or rounding that do not apply,
    CheckpointError for a bad source.
    """
    loaded = checkpoint.load(source)
    if loaded.manifest is not None:
        raise ConfigError(f"{source} is spike-coded already; give the float folder it came from")
    broken = [n for n, t in loaded.model.state_dict().items() if not bool(t.isfinite().all())]
    if broken:
        raise CheckpointError(
            f"{source}: {broken[0]} holds values that are not finite; convert an earlier checkpoint"
        )
    silence = dict(silence or {})
    _check_silence(silence, loaded.model.config)
    trained = {
        p.neuron.name: grid
        for p in projections(loaded.model)
        if (grid := trained_grid(p)) is not None
    }
    bits_by_name = _resolve_bits(bits, bits_of or {}, loaded.model, trained)
    group_size = _resolve_group_size(group_size, trained)
    if rounding is not None and trained.keys() == bits_by_name.keys():
        raise ConfigError(
            f"rounding {rounding} given, but all weights were rounded in training; leave it out"
        )
    calibrated = calibrate(loaded.model, windows, silence)
    config = coded_config(loaded.model.config)
    model = coded_copy(loaded.model, config, group_size, bits_by_name)
    with torch.no_grad():
        for neuron in model.neurons():
            if neuron.name in calibrated:
                k, dead_zone = calibrated[neuron.name]
                neuron.k.fill_(k)
                neuron.dead_zone.fill_(dead_zone)
    roundings = {
        name: "trained"
        if name in trained
        else rounding or ("compensated" if own == 4 else "nearest")
        for name, own in bits_by_name.items()
    }
    weights = {
        p.neuron.name: p.linear.get_parameter("weight")
        for p in projections(loaded.model)
        if roundings[p.neuron.name] == "compensated"
    }
    compensate(model, weights, windows)
    meter = Meter()
    with torch.inference_mode():
        for window in windows.split(1):
            model(window, probe=meter)
    least = BY_OUTPUT_WEIGHTS if by_output_weights is None else by_output_weights
    read_by_output(model, _mostly_negative(model, meter.tallies, least))
    manifest = {
        "format": FORMAT,
        "source": {"name": loaded.name, "fingerprint": loaded.fingerprint},
        **coding(model),
        "calibration_tokens": windows.numel(),
        "silence_asked": silence,
        "silent_fraction": meter.silent_fractions(),
        "neurons": [
            _entry(meter.tallies.get(neuron.name, Tally(neuron)), neuron.name in calibrated)
            | {"bits": bits_by_name.get(neuron.name), "rounding": roundings.get(neuron.name)}
            for neuron in model.neurons()
        ],
    }
    checkpoint.save(out, model, loaded.tokenizer, manifest=manifest)
    return manifest


def _mostly_negative(model: LanguageModel, tallies: Mapping[str, Tally], least: int) -> list[str]:
    """The projections of at least so many weights of which less is read by output than by input:
    what a ReLU makes of them is positive far less often than their inputs fire.
    """
    found = []
    for name, (_, behind) in relu_projections(model).items():
        weights = tallies[name].neuron.channels * behind.neuron.channels
        positive = 1 - tallies[behind.neuron.name].zero_input_fraction
        fired = 1 - tallies[name].silent_fraction
        if weights >= least and positive < BY_OUTPUT_SHARE * fired:
            found.append(name)
    return found


def coded_config(config: ModelConfig) -> ModelConfig:
    """The configuration after conversion: every projection spikes, counts fit into int8."""
    neurons: dict[str, NeuronConfig] = {}
    for name in TENSOR_CLASSES:
        neuron: NeuronConfig = getattr(config.neurons, name)
        if neuron.kind == "off" and name not in WEIGHTLESS_CLASSES:
            neuron = NeuronConfig(kind="integer", max_count=MAX_COUNT)
        elif neuron.kind == "integer" and neuron.max_count is None:
            neuron = dataclasses.replace(neuron, max_count=MAX_COUNT)
        # Softness is for training; what it approaches is the hard threshold.
        neurons[name] = dataclasses.replace(neuron, softness=None)
    return dataclasses.replace(
        config,
        neurons=NeuronsConfig(**neurons),
        weights=WeightsConfig(),
        tie_embeddings=False,
    )


def _check_silence(silence: Mapping[str, float], config: ModelConfig) -> None:
    for name, fraction in silence.items():
        if name not in TENSOR_CLASSES:
            raise ConfigError(
                f"unknown tensor class '{name}'; {did_you_mean(name, TENSOR_CLASSES)}"
            )
        if not 0 <= fraction < 1:
            raise ConfigError(f"silence {name}={fraction} given; allowed: 0 <= fraction < 1")
        if name in WEIGHTLESS_CLASSES or getattr(config.neurons, name).kind != "off":
            raise ConfigError(
                f"silence for '{name}' given, but its threshold was trained or it feeds no "
                "weights; silence can be asked for projections whose neuron is off"
            )


def _resolve_bits(
    bits: int | None,
    bits_of: Mapping[str, int],
    model: LanguageModel,
    trained: Mapping[str, RoundedLinear],
) -> dict[str, int]:
    """The bits of every projection, by the name of the population in front: as asked for, else as
    `trained`, else 8.
    """
    found = {}
    for name, asked in resolve_bits(bits, bits_of, projections(model)).items():
        own = trained[name].bits if name in trained else 8
        if name in trained and asked not in (None, own):
            raise ConfigError(
                f"bits {asked} given for {name}, whose weights were trained with {own}; leave the "
                "bits of trained weights out, or convert a model of float weights"
            )
        found[name] = own if asked is None else asked
    return found


def _resolve_group_size(asked: int | None, trained: Mapping[str, RoundedLinear]) -> int:
    """Outputs that share one scale: as asked for, else as trained, else 1."""
    if asked is not None and asked < 1:
        raise ConfigError(f"group size {asked} given; allowed: 1 or more outputs")
    own = next((linear.group_size for linear in trained.values()), None)
    if None not in (asked, own) and asked != own:
        raise ConfigError(f"group size {asked} given, but the weights were trained with {own}")
    return asked or own or 1


def _entry(tally: Tally, calibrated: bool) -> dict[str, Any]:
    """One row of the manifest."""
    neuron, code = tally.neuron, tally.code
    return {
        "name": neuron.name,
        "tensor_class": neuron.tensor_class,
        "channels": neuron.channels,
        "neuron": to_dict(neuron.config),
        "threshold": "calibrated" if calibrated else "trained",
        "code": code[0].name if code else None,
        "steps": code[1] if code else None,
        "silent_fraction": tally.silent_fraction,
        "slot_sparsity": tally.slot_sparsity,
        "largest_count": tally.largest,
        "saturated_fraction": tally.saturated / max(1, tally.entries),
    }
