"""Sparse upcycling: the dense feed-forward layers of a model become mixtures of experts.

Every expert, shared ones too, begins as a copy of the dense layer with its three matrices scaled
by alpha = (1 / (S + k p))^(1/3), p being the weight of an expert under a router that begins at
zero, so that the sum over S shared and k routed experts begins where the dense layer was. Exact
for ReGLU; SwiGLU's gate is not homogeneous, so there it is near. Source: Pan et al. 2025
(SpikingBrain-76B).
"""

from __future__ import annotations

import dataclasses
import re

import torch

from spikelm.config import ExpertsConfig
from spikelm.errors import ConfigError
from spikelm.models.ffn import ExpertsFFN
from spikelm.models.spikelm import LanguageModel

_DENSE = re.compile(r"layers\.(\d+)\.ffn\.(.+)")


def expert_scale(experts: ExpertsConfig) -> float:
    """alpha: what each of an expert's three matrices is multiplied with."""
    weight = 1 / experts.num_experts if experts.router == "softmax" else 0.5
    return float((experts.num_shared + experts.top_k * weight) ** (-1 / 3))


@torch.no_grad()
def upcycle(model: LanguageModel, experts: ExpertsConfig) -> LanguageModel:
    """A model with `experts` in place of the dense layers, except in `experts.dense_layers`.

    Raises: ConfigError if the model's feed-forward layers are not gated, or experts already, or if
    their hidden neurons have thresholds that would not follow the smaller matrices.
    """
    if model.config.ffn.experts is not None:
        raise ConfigError("the model has experts already; give a dense one")
    hidden = model.config.neurons.ffn_hidden
    if hidden.kind in ("lif", "step") or (hidden.kind, hidden.scale) == ("integer", "fixed"):
        raise ConfigError(
            f"neurons.ffn_hidden: kind {hidden.kind} with a threshold of its own given; allowed: "
            "off, or integer with scale: adaptive, as every expert's hidden vector is smaller"
        )
    ffn = dataclasses.replace(model.config.ffn, experts=experts)
    with torch.device("meta"):
        mixture = LanguageModel(dataclasses.replace(model.config, ffn=ffn))
    mixture.to_empty(device="cpu")
    for layer in mixture.modules():
        if isinstance(layer, ExpertsFFN):
            layer.router.reset_parameters()
    scale = expert_scale(experts)
    wanted, source = mixture.state_dict(), model.state_dict()
    for name, tensor in source.items():
        match = _DENSE.fullmatch(name)
        if match is None or int(match[1]) in experts.dense_layers:
            wanted[name].copy_(tensor)
            continue
        factor = scale if name.endswith(("linear.weight", "linear.step")) else 1.0
        copies = [f"experts.{e}" for e in range(experts.num_experts)]
        copies += [f"shared.{s}" for s in range(experts.num_shared)]
        for copy in copies:
            wanted[f"layers.{match[1]}.ffn.{copy}.{match[2]}"].copy_(factor * tensor)
    return mixture.eval().requires_grad_(False)
