"""From their tensors to a model of ours, with every tensor accounted for."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from spikelm.config import ModelConfig
from spikelm.conversion.importing.keys import SCALES, Rule
from spikelm.conversion.importing.read import Tensors
from spikelm.conversion.importing.sources import Source
from spikelm.errors import CheckpointError
from spikelm.models.spikelm import LanguageModel
from spikelm.neurons import Neuron


@dataclass
class Report:
    """What an import did."""

    kind: str
    parameters: int = 0
    """Numbers in the imported tensors; neurons' own parameters are not counted."""
    read: int = 0
    """Tensors of the source that were used."""
    ignored: list[str] = field(default_factory=list)
    """Tensors of the source that carry nothing."""
    codes: int = 0
    """Weights of a quantised source."""
    clamped: int = 0
    """Those whose code lay outside int8 and was clamped."""


class _Part(NamedTuple):
    """A tensor of theirs: its name, the shape it must have, and its scales' name if it has them."""

    name: str
    shape: tuple[int, ...]
    scales: str | None


@torch.no_grad()
def build(source: Source, *, keep_dtype: bool = False) -> tuple[LanguageModel, Report]:
    """The model with the source's weights, in float32, and what was done.

    `keep_dtype` leaves tensors that are copied unchanged in the source's own precision.
    Raises: CheckpointError naming every missing, unknown and misshapen tensor, and those with
    numbers that are not finite.
    """
    with torch.device("meta"):
        model = LanguageModel(source.config)
    # Neurons have parameters that no source knows.
    state: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, Neuron):
            module.to_empty(device="cpu")
            module.reset_parameters()
            state |= {f"{path}.{name}": tensor for name, tensor in module.named_parameters()}
    wanted = {name: t for name, t in model.state_dict().items() if name not in state}
    if source.config.tie_embeddings:
        wanted.pop("head.linear.weight")
    plan = {name: _plan(name, t, source) for name, t in wanted.items()}
    report = Report(source.kind)
    report.ignored = _check(plan, source)
    broken: list[str] = []
    for name, (rule, parts) in plan.items():
        state[name] = _tensor(wanted[name], rule, parts, source.tensors, keep_dtype, report)
        report.parameters += state[name].numel()
        if not state[name].isfinite().all():
            broken.append(name)
    if broken:
        raise CheckpointError(
            f"{source.tensors.path} has weights that are not finite, in {', '.join(broken)}; "
            "copy it again"
        )
    model.load_state_dict(state, strict=not source.config.tie_embeddings, assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False), report


def _plan(name: str, target: Tensor, source: Source) -> tuple[Rule, list[_Part]]:
    """The rule for our tensor `name` and the tensors of theirs that it needs."""
    layout, config = source.layout, source.config
    prefix, inner, mixer = "", name, ""
    if name.startswith("layers."):
        _, index, inner = name.split(".", 2)
        prefix, mixer = layout.prefix.format(index), config.mixers[int(index)]
    table = {**layout.layer, **layout.mixers[mixer]} if mixer else layout.model
    rule = table[inner]
    counts = _row_counts(config, mixer)
    scaled = layout.quantised and bool(mixer) and inner.endswith(".linear.weight")
    shape = tuple(target.shape)
    parts = []
    for part, count in rule.parts:
        size = shape if count is None else (counts[count], *shape[1:])
        theirs = size[::-1] if rule.form == "transpose" else size
        scales = prefix + part.removesuffix("weight") + SCALES if scaled else None
        parts.append(_Part(prefix + part, theirs, scales))
    return rule, parts


def _row_counts(config: ModelConfig, mixer: str) -> dict[str, int]:
    """Rows of the parts that are put one below the other."""
    a, g = config.attention, config.gla
    if mixer == "gla":
        keys = g.num_kv_heads * g.key_dim
        sizes = (g.num_heads * g.key_dim, keys, g.num_kv_heads * g.value_dim, g.gate_rank or keys)
    else:
        keys = a.num_kv_heads * a.head_dim
        sizes = (a.num_heads * a.head_dim, keys, keys, 0)
    counts = dict(zip(("queries", "keys", "values", "gate"), sizes, strict=True))
    return {**counts, "hidden": config.ffn.hidden_dim}


def _check(plan: dict[str, tuple[Rule, list[_Part]]], source: Source) -> list[str]:
    """Compares names and shapes with the source; returns what is ignored."""
    shapes, config = source.tensors.shapes, source.config
    missing: list[str] = []
    misshapen: list[str] = []
    used: set[str] = set()
    for _, parts in plan.values():
        for part in parts:
            names = [name for name in (part.name, part.scales) if name is not None]
            used.update(names)
            missing += [name for name in names if name not in shapes]
            found = shapes.get(part.name, part.shape)
            if _without_unit_axes(found) != _without_unit_axes(part.shape):
                misshapen.append(f"{part.name} {list(found)} for {list(part.shape)}")
            scales = shapes.get(part.scales or "")
            if scales is not None and not _groups(part.shape, scales):
                misshapen.append(f"{part.scales} {list(scales)} for a weight {list(part.shape)}")
    rest = [name for name in shapes if name not in used]
    patterns = (*source.layout.ignored, *(("lm_head.weight",) if config.tie_embeddings else ()))
    ignored = [name for name in rest if any(fnmatchcase(name, p) for p in patterns)]
    unknown = [name for name in rest if name not in ignored]
    problems = [
        f"{len(names)} tensor(s) {what}: {', '.join(names)}"
        for what, names in (
            ("missing", missing),
            ("of another shape", misshapen),
            ("unknown", unknown),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source.tensors.path} is no complete {source.kind} checkpoint: " + "; ".join(problems)
        )
    return ignored


def _without_unit_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """RWKV keeps vectors as [1, 1, D]."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _groups(weight: tuple[int, ...], scales: tuple[int, ...]) -> bool:
    """Whether scales [out, groups, 1] divide a weight [out, in] into equal groups."""
    if len(scales) != 3 or scales[0] != weight[0] or scales[2] != 1 or scales[1] < 1:
        return False
    return weight[1] % scales[1] == 0


def _tensor(
    target: Tensor,
    rule: Rule,
    parts: list[_Part],
    tensors: Tensors,
    keep_dtype: bool,
    report: Report,
) -> Tensor:
    """Our tensor from theirs, read one at a time."""
    out: Tensor | None = None
    row = 0
    for part in parts:
        theirs = tensors.read(part.name)
        if not theirs.is_floating_point():
            raise CheckpointError(f"{tensors.path}: {part.name} is {theirs.dtype}, not a float")
        report.read += 1
        if part.scales is not None:
            theirs = _int8_values(theirs, tensors.read(part.scales), report)
            report.read += 1
        if rule.form == "complement":
            theirs = 1 - theirs.float()
        elif rule.form == "transpose":
            theirs = theirs.T
        if out is None:
            out = torch.empty(target.shape, dtype=theirs.dtype if keep_dtype else torch.float32)
        elif keep_dtype:
            out = out.to(torch.promote_types(out.dtype, theirs.dtype))
        piece = theirs.reshape(-1, *target.shape[1:])
        out[row : row + len(piece)] = piece
        row += len(piece)
    assert out is not None
    assert row == len(out), "the table's row counts are not those of the model"
    return out


def _int8_values(weight: Tensor, scales: Tensor, report: Report) -> Tensor:
    """clamp(round(w / scale), -128, 127) * scale, group by group.

    SpikingBrain's own code does not clamp; about one weight in a hundred lies outside.
    """
    scales = scales.float()
    groups = weight.float().reshape(len(scales), scales.shape[1], -1)
    codes = torch.round(groups / scales)
    clamped = codes.clamp(-128, 127)
    report.codes += codes.numel()
    report.clamped += int((clamped != codes).sum())
    return (clamped * scales).reshape(weight.shape)
