"""What attention-like mixers share: the split of one projection, and gates on their output."""

from __future__ import annotations

from torch import Tensor

from spikelm.kernels.activation import sigmoid


def gate_size(kind: str, num_heads: int, channels: int) -> int:
    """Rows of the input projection that an output gate takes."""
    return {"none": 0, "headwise": num_heads, "elementwise": num_heads * channels}[kind]


def split_qkv(
    projected: Tensor, sizes: list[int], bias: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """q, k, v (with their bias) of `sizes` and the rest of the projection's outputs."""
    width = sum(sizes)
    qkv, rest = projected[..., :width], projected[..., width:]
    if bias is not None:
        qkv = qkv + bias.to(qkv.dtype)
    return list(qkv.split(sizes, -1)), rest


def gated(out: Tensor, logits: Tensor) -> Tensor:
    """out [B, T, H, V] * sigmoid(logits [B, T, 0, H or H V]) (Qiu et al. 2025, Gated Attention)."""
    if not logits.shape[-1]:
        return out
    gate: Tensor = sigmoid(logits).unflatten(-1, (out.shape[2], -1))
    return out * gate
