"""Softmax attention over a window with sinks (constant memory) or over all tokens (growing).

The memory is a ring buffer of rotated keys and values plus the document's first tokens. A slot's
position follows from the number of tokens seen, so there is nothing else to keep: slot s of a
ring of W holds the largest position p < seen with p = s (mod W). `full` attention is the same
ring, grown to hold every token.

B sequences, T tokens, H query heads, G key/value heads, K channels, W ring slots, s sinks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spikelm.kernels.rope import rotate

FULL_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Memory:
    """Keys and values remembered by an attention layer."""

    k: Tensor
    """Rotated keys [B, W, G, K]."""
    v: Tensor
    """[B, W, G, K]."""
    sink_k: Tensor
    """Rotated keys of the first tokens [B, s, G, K]."""
    sink_v: Tensor
    """[B, s, G, K]."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Memory,
    position: Tensor,
    segment: Tensor | None = None,
    *,
    window: int | None,
    rope_theta: float | None,
) -> tuple[Tensor, Memory]:
    """Causal attention of T new tokens over the memory and each other.

    q [B, T, H, K]; k, v [B, T, G, K]; position [B, T] within the document; segment [B, T] counts
    the documents begun in this call. A query sees itself, the window - 1 tokens before it and the
    document's first tokens; window None sees all. Returns out [B, T, H, K] and the new memory.
    """
    T = q.shape[1]
    if segment is None:
        segment = torch.zeros_like(position)
    # A chunk no longer than the window needs no sinks of its own: they are still in reach.
    size = FULL_CHUNK if window is None else window
    outputs = []
    for start in range(0, T, size):
        part = slice(start, start + size)
        seen = segment[:, start - 1] if start else torch.zeros_like(segment[:, 0])
        out, memory = _chunk(
            q[:, part],
            k[:, part],
            v[:, part],
            memory,
            position[:, part],
            segment[:, part] - seen[:, None],
            window,
            rope_theta,
        )
        outputs.append(out)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), memory


def _chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Memory,
    position: Tensor,
    segment: Tensor,
    window: int | None,
    rope_theta: float | None,
) -> tuple[Tensor, Memory]:
    T, sinks = q.shape[1], memory.sink_k.shape[1]
    first = position[:, :1]  # tokens of the open document seen before the chunk
    q_recent, q_sink = q, q
    if rope_theta is not None:
        k = rotate(k, position, rope_theta)
        q_recent = rotate(q, position, rope_theta)
        if window is not None and sinks:
            q_sink = rotate(q, position.clamp(max=sinks + window - 1), rope_theta)

    ring = _slot_positions(memory.k.shape[1], first)
    continues = segment == 0
    sees_ring = continues[..., None] & (ring >= 0)[:, None]
    order = torch.arange(T, device=q.device)
    sees_new = (segment[:, :, None] == segment[:, None]) & (order[:, None] >= order)
    keys, values, visible = [memory.k, k], [memory.v, v], [sees_ring, sees_new]
    # Matrix products may round a row differently in another batch; in decode that would show.
    exact = T == 1 and window is not None
    scores = [_scores(q_recent, memory.k, exact), _scores(q_recent, k, exact)]
    if window is not None:
        visible[0] = sees_ring & (position[..., None] - ring[:, None] < window)
        if sinks:
            at = torch.arange(sinks, device=q.device)
            left_window = position[..., None] - at >= window
            visible.append(continues[..., None] & (at < first)[:, None] & left_window)
            scores.append(_scores(q_sink, memory.sink_k, exact))
            values.append(memory.sink_v)
    mask = torch.cat(visible, -1)[:, None, None]
    weights = torch.cat(scores, -1).masked_fill(~mask, -torch.inf).softmax(-1)
    out = _mix(weights.to(v.dtype), torch.cat(values, 1), exact).permute(0, 3, 1, 2, 4)

    seen = position[:, -1:] + 1
    written = torch.minimum((segment == segment[:, -1:]).sum(-1, keepdim=True), seen)
    capacity = memory.k.shape[1] if window is not None else max(int(seen.max()), memory.k.shape[1])
    slots = _slot_positions(capacity, seen)
    sink_slots = torch.arange(sinks, device=q.device).expand(q.shape[0], -1)
    return out.flatten(2, 3), Memory(
        k=_store(memory.k, keys[1], slots, seen, written),
        v=_store(memory.v, v, slots, seen, written),
        sink_k=_store(memory.sink_k, k, sink_slots, seen, written),
        sink_v=_store(memory.sink_v, v, sink_slots, seen, written),
    )


def _scores(q: Tensor, k: Tensor, exact: bool) -> Tensor:
    """q [B, T, H, K], k [B, S, G, K] -> scaled products [B, G, H / G, T, S]."""
    grouped: Tensor = q.unflatten(2, (k.shape[2], -1))
    q = grouped.permute(0, 2, 3, 1, 4) * q.shape[-1] ** -0.5
    k = k.permute(0, 2, 1, 3)[:, :, None]
    return (q * k).sum(-1)[..., None, :] if exact else q @ k.transpose(-1, -2)


def _mix(weights: Tensor, v: Tensor, exact: bool) -> Tensor:
    """weights [B, G, H / G, T, S], v [B, S, G, K] -> [B, G, H / G, T, K]."""
    v = v.permute(0, 2, 1, 3)[:, :, None]
    return (weights.mT * v).sum(-2, keepdim=True) if exact else weights @ v


def _slot_positions(capacity: int, seen: Tensor) -> Tensor:
    """The position each slot holds once `seen` [B, 1] tokens have passed; negative if none."""
    slot = torch.arange(capacity, device=seen.device)
    return seen - 1 - (seen - 1 - slot) % capacity if capacity else slot.expand(seen.shape[0], 0)


def _store(old: Tensor, new: Tensor, slots: Tensor, seen: Tensor, written: Tensor) -> Tensor:
    """The slots refilled; `slots` [B, W] is the position each of them holds.

    One of the last `written` positions comes from `new`, an older one from `old`; a slot without
    one is zero, so a state tells nothing of the document before.
    """
    order = torch.arange(slots.shape[1], device=old.device)
    recent = slots >= seen - written
    source = torch.where(recent, old.shape[1] + new.shape[1] - seen + slots, order) + 1
    source = source * ((slots >= 0) & (slots < seen))
    new = new.to(old.dtype)
    joined = torch.cat([torch.zeros_like(new[:, :1]), old, new], 1)
    return joined.gather(1, source[..., None, None].expand(-1, -1, *old.shape[2:]))
