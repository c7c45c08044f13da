"""Spike-coded linears: int8 weights of which only the spikes' rows are read.

y = v_threshold * scale * (W counts),   the product in exact integers
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikelm.config import ModelConfig
from spikelm.kernels import event
from spikelm.models.layers import Linear, Projection
from spikelm.models.spikelm import LanguageModel
from spikelm.neurons import Spikes


class CodedLinear(nn.Module):
    """weight int8 [in, out], input-major; scale [out / group], shared by groups of outputs.

    Scales lie along the output, never along the input, so the sum over input neurons stays an
    exact integer and a silent neuron's scale is not read either.
    """

    weight: Tensor | None
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, group_size: int) -> None:
        super().__init__()
        groups = -(-out_features // group_size)
        self.group_size = group_size
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(in_features, out_features, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(groups))
        self.backend = "matmul"
        self.table: Tensor | None = None

    def pack(self, backend: str) -> None:
        """Moves the weights into the backend's layout: for running, no longer for saving.

        `matmul` uses the weights as they are.
        """
        assert self.weight is not None
        if backend == "matmul":
            return
        self.backend, self.table = backend, event.pack(self.weight, backend)
        self.weight = None

    def forward(self, spikes: Spikes) -> Tensor:
        assert spikes.counts is not None, "a spike-coded linear needs a neuron in front of it"
        assert spikes.v_threshold is not None
        table = self.weight if self.table is None else self.table
        assert table is not None
        rows = event.product(spikes.counts.flatten(0, -2), table, self.backend)
        y = (rows * self._out_scale()).to(spikes.values.dtype)
        return y.view(*spikes.counts.shape[:-1], -1) * spikes.v_threshold

    def dequantised(self) -> Tensor:
        """The float weights [out, in] these integers stand for."""
        assert self.weight is not None
        return self.weight.T * self._out_scale()[:, None]

    def _out_scale(self) -> Tensor:
        if self.group_size == 1:
            return self.scale
        return self.scale.repeat_interleave(self.group_size)[: self.out_features]


def quantise(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8 of weight [out, in]: (integers [in, out], scale [out / group]).

    The largest |weight| of a group maps to 127, so nothing is clamped.
    """
    absmax = weight.float().abs().amax(1)
    groups = F.pad(absmax, (0, -absmax.numel() % group_size))
    scale = groups.unflatten(0, (-1, group_size)).amax(1).clamp(min=1e-12) / 127
    per_output = scale.repeat_interleave(group_size)[: absmax.numel()]
    integers = torch.round(weight.float() / per_output[:, None])
    return integers.to(torch.int8).T.contiguous(), scale


def use_coded_linears(model: LanguageModel, group_size: int) -> None:
    """Replaces every projection's float linear by an empty spike-coded one."""
    for projection in projections(model):
        if isinstance(projection.linear, Linear):
            out_features, in_features = projection.linear.weight.shape
            projection.linear = CodedLinear(in_features, out_features, group_size)


def coded_copy(model: LanguageModel, config: ModelConfig, group_size: int) -> LanguageModel:
    """The float `model` with int8 weights, under `config`, which puts a neuron before every
    projection. Neurons `model` lacks keep their initial thresholds.
    """
    with torch.device("meta"):
        coded = LanguageModel(config)
    use_coded_linears(coded, group_size)
    coded.to_empty(device="cpu")
    for neuron in coded.neurons():
        neuron.reset_parameters()
    kept = {name: t for name, t in model.state_dict().items() if not name.endswith("linear.weight")}
    coded.load_state_dict(kept, strict=False)
    for source, target in zip(projections(model), projections(coded), strict=True):
        assert isinstance(target.linear, CodedLinear)
        weight = source.linear.get_parameter("weight")
        target.linear.weight, target.linear.scale = quantise(weight, group_size)
    return coded.eval().requires_grad_(False)


def projections(model: LanguageModel) -> list[Projection]:
    """Every projection, first layer to last."""
    return [module for module in model.modules() if isinstance(module, Projection)]


def pack(model: LanguageModel, backend: str) -> None:
    """Resolves `backend` once and lays out every spike-coded linear for it."""
    chosen = event.resolve(backend, model.device.type)
    for projection in projections(model):
        if isinstance(projection.linear, CodedLinear):
            projection.linear.pack(chosen)
