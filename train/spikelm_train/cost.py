"""What a run costs before it runs: parameters by kind, FLOPs, memory by category.

Nothing here is a rule of thumb per model: one layer of every kind is run forward on a few hundred
tokens, on the device and in the precision of the run. torch's counter adds up its matrix products,
and what autograd keeps is what the backward pass will find in memory. B sequences of T tokens,
D width, N vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from spikelm import checkpoint
from spikelm.config import ModelConfig
from spikelm.doctor import memory_bytes
from spikelm.eval import process
from spikelm.eval.inspect import describe_state
from spikelm.models.layers import Context, reset_parameters
from spikelm.models.spikelm import LanguageModel, Layer
from spikelm_train.config import TrainConfig
from spikelm_train.lora import num_trained

PROBED = 256, 512
"""Tokens of the two sequences a layer is run on: the longest chunk, and twice that."""
BACKWARD = 2.0
"""FLOPs of a matrix product's backward pass over those of its forward pass."""
GROWING = ("full", "parallel_full")
"""Mixers that do more for a token the more came before it."""
ALLOCATOR = {"cpu": 0.35, "cuda": 0.1}
"""What lies free between the tensors at the peak, in units of the activations: measured with
glibc's malloc on steps of 2,048 and 8,192 tokens; CUDA's caching allocator rounds."""


@dataclass(frozen=True, slots=True)
class LayerCost:
    """A layer's forward pass over one sequence."""

    flops: float
    """Of its matrix products and triangular solves, per token."""
    saved_bytes: float
    """Kept for the backward pass, per token."""
    fixed_bytes: float
    """Kept once per call, such as weights cast to bfloat16."""


def meta_model(config: ModelConfig) -> LanguageModel:
    """The model without memory for its tensors."""
    with torch.device("meta"):
        return LanguageModel(config)


def parameters_by_kind(model: LanguageModel) -> dict[str, int]:
    """How many there are of embedding, mixers, FFN, norms, head and neurons; a tied head is 0."""
    counts = dict.fromkeys(("embedding", "mixers", "ffn", "head", "neurons", "other"), 0)
    thresholds = {id(p) for neuron in model.neurons() for p in neuron.parameters()}
    for name, parameter in model.named_parameters():
        top, _, rest = name.partition(".")
        part = rest.split(".")[1] if top == "layers" else top
        kind = {"mixer": "mixers", "head_qk": "head"}.get(part, part)
        kind = "neurons" if id(parameter) in thresholds else kind
        counts[kind if kind in counts else "other"] += parameter.numel()
    return counts


def layer_costs(
    config: ModelConfig, tokens: int, device: torch.device, precision: str
) -> dict[str, LayerCost]:
    """The cost of the last layer of every mixer kind, in sequences of `tokens`."""
    model = meta_model(config)
    last = {kind: index for index, kind in enumerate(config.mixers)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            kind: _layer_cost(model.layers[index], kind, tokens, device, precision)
            for kind, index in last.items()
        }


def _layer_cost(
    layer: torch.nn.Module, kind: str, tokens: int, device: torch.device, precision: str
) -> LayerCost:
    assert isinstance(layer, Layer)
    layer.to_empty(device=device).train()
    for module in layer.modules():
        reset_parameters(module)
    short, long = (min(tokens, length) for length in PROBED)
    flops, saved = _run_layer(layer, short, precision)
    more_flops, more_saved = _run_layer(layer, long, precision)
    layer.to_empty(device="meta")
    if long == short:
        return LayerCost(flops / short, saved / short, 0.0)
    if kind in GROWING:
        ends = (flops / short, more_flops / long), (saved / short, more_saved / long)
        beyond = (tokens - short) / (long - short)
        at_end, kept = (a + (b - a) * beyond for a, b in ends)
        return LayerCost(at_end, kept, 0.0)
    slope = (more_saved - saved) / (long - short)
    return LayerCost(more_flops / long, slope, max(0.0, saved - slope * short))


def _run_layer(layer: Layer, tokens: int, precision: str) -> tuple[int, int]:
    """FLOPs of a forward pass over one sequence, and bytes that it keeps for backward."""
    weight = next(layer.parameters())
    x = torch.randn(1, tokens, layer_width(layer)).to(weight.device).requires_grad_()
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            # Freed memory would be handed out again and counted once.
            alive.append(storage)
        return tensor

    position = torch.arange(tokens, device=weight.device)[None]
    # Training batches hold documents, whose borders are masks that backward needs too.
    context = Context(position, torch.zeros_like(position))
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.linalg_solve_triangular: _solve_flops}
    )
    kind = weight.device.type
    with (
        counter,
        saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"),
    ):
        layer(x, layer.zero_state(1, x), context)
    flops: int = counter.get_total_flops()
    return flops, sum(kept.values())


def layer_width(layer: Layer) -> int:
    """D of the residual stream."""
    return int(layer.mixer_norm.weight.numel())


def _solve_flops(matrix: Any, right: Any, *_: Any, **__: Any) -> int:
    """A unit-triangular system of C equations for n columns takes C^2 n FLOPs."""
    flops: int = math.prod(right) * matrix[-1]
    return flops


def forward_flops(config: ModelConfig, layers: dict[str, LayerCost]) -> float:
    """FLOPs per token of one forward pass: all layers, and the head. Additions and
    elementwise work, neurons included, are not counted.
    """
    head = 2 * config.vocab_size * config.width
    if config.head_qk_dim:
        head += 4 * config.width * config.head_qk_dim
    return head + sum(layers[kind].flops for kind in config.mixers)


def training_flops(config: ModelConfig, layers: dict[str, LayerCost]) -> float:
    """FLOPs per token of forward and backward; what is computed a second time to save memory is
    not counted, as in PaLM's MFU (Chowdhery et al. 2022, arXiv 2204.02311).
    """
    return (1 + BACKWARD) * forward_flops(config, layers)


def memory_by_category(
    config: TrainConfig, layers: dict[str, LayerCost], device: torch.device, context: int = 1
) -> dict[str, int]:
    """Bytes of one process at the peak of a step, unsharded, if `context` of them share a row.

    Two moments per trained parameter; three copies of the logits (cross-entropy and its gradient);
    `process`: what Python and its libraries hold already.
    """
    weights, trained = _weight_bytes(config)
    tokens = config.micro_batch_size * config.data.sequence_length // context
    kept = [
        tokens * layers[kind].saved_bytes + layers[kind].fixed_bytes for kind in config.model.mixers
    ]
    activations = sum(kept)
    if config.activation_checkpointing == "layers":
        # The inputs of all layers, and what the one that is computed again keeps.
        activations = max(kept) + 4 * tokens * config.model.width * len(kept)
    logits = 12 * min(tokens, config.loss_chunk or tokens) * config.model.vocab_size
    teacher = 0
    if config.distill.teacher is not None:
        # Its weights and logits, and probabilities of both.
        teacher = logits + sum(p.nbytes for p in meta_model(_teacher(config)).parameters())
    on_cpu = device.type == "cpu"
    return {
        "weights": weights,
        "gradients": trained,
        "moments": 2 * trained,
        "average": weights if config.ema is not None else 0,
        "activations": round(activations),
        "logits": logits,
        "teacher": teacher,
        "data": 24 * tokens,
        "allocator": round(ALLOCATOR.get(device.type, 0.0) * activations),
        "process": process.memory_bytes("VmRSS") if on_cpu else 0,
    }


def _teacher(config: TrainConfig) -> ModelConfig:
    folder = config.distill.teacher
    assert folder is not None
    return checkpoint.model_config_of(checkpoint.read_config(Path(folder)), folder)


def least_bytes(config: TrainConfig) -> int:
    """Weights, gradients and moments alone: needs no device to count."""
    weights, trained = _weight_bytes(config)
    return weights + 3 * trained


def _weight_bytes(config: TrainConfig) -> tuple[int, int]:
    """Of all parameters, and of those that are trained."""
    model = meta_model(config.model)
    weights = sum(p.nbytes for p in model.parameters())
    if config.lora.rank:
        trained = 4 * num_trained(model, config.lora)
        return weights + trained, trained
    return weights, sum(p.nbytes for p in model.parameters() if p.requires_grad)


def present_bytes(device: torch.device) -> int | None:
    """Memory of the device; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory_bytes()


def state_bytes(config: ModelConfig) -> dict[str, int]:
    """What one sequence carries from token to token, and what a token adds to it."""
    found = describe_state(meta_model(config))
    return {name: int(found[name]) for name in ("bytes", "bytes_per_token")}
