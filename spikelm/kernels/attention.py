"""Softmax attention over a window with sinks (constant memory) or over all tokens (growing).

The memory is a ring buffer of keys and values plus the document's first tokens, in float or as
int8 with one scale per token and head. A slot's position follows from the number of tokens seen,
so there is nothing else to keep: slot s of a ring of W holds the largest position p < seen with
p = s (mod W). `full` attention is the same ring, grown to hold every token.

B sequences, T tokens, H query heads, G key/value heads, K channels, W ring slots, s sinks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 256
_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class Memory:
    """Keys and values remembered by an attention layer."""

    k: Tensor
    """[B, W, G, K]; `pack`ed ones are int8 [B, W, G, K + 4]."""
    v: Tensor
    """[B, W, G, K], or packed."""
    sink_k: Tensor
    """Keys of the first tokens [B, s, G, K], or packed."""
    sink_v: Tensor
    """[B, s, G, K], or packed."""


def pack(x: Tensor) -> Tensor:
    """Symmetric int8 of x [..., K]: the codes and, in the last four bytes, their float32 scale.

    The largest |x| maps to 127. Zero bytes stand for zeros.
    """
    scale = x.detach().float().abs().amax(-1, keepdim=True) / 127
    codes = torch.round(x.detach().float() / scale.clamp(min=1e-30)).to(torch.int8)
    return torch.cat([codes, scale.contiguous().view(torch.int8)], -1)


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The values [..., K] that packed codes [..., K + 4] stand for."""
    # A copy, as a float must not begin at just any byte.
    scale = packed[..., -_SCALE_BYTES:].clone(memory_format=torch.contiguous_format)
    scale = scale.view(torch.float32)
    return packed[..., :-_SCALE_BYTES].to(dtype) * scale.to(dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Memory,
    position: Tensor,
    segment: Tensor | None = None,
    *,
    window: int | None,
    q_sink: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Memory]:
    """Causal attention of T new tokens over the memory and each other.

    q [B, T, H, K] and k [B, T, G, K] carry their position code; v [B, T, G, K]; position [B, T]
    within the document; segment [B, T] counts the documents begun in this call. A query sees
    itself, the window - 1 tokens before it and the document's first tokens; window None sees all.
    `q_sink` are the queries that meet sinks which have left the window, q if None. `causal` False
    lets the new tokens, which must fit the window, see each other in both directions. If the
    memory is packed, new keys and values are rounded to int8 before anything sees them; gradients
    pass straight through. Returns out [B, T, H, K] and the new memory.
    """
    T = q.shape[1]
    resets = segment is not None
    if segment is None:
        segment = torch.zeros_like(position)
    if q_sink is None:
        q_sink = q
    # A chunk no longer than the window needs no sinks of its own: they are still in reach.
    size = CHUNK if window is None else min(CHUNK, window)
    if not causal:
        assert window is None or window >= T
        size = T
    outputs = []
    # split, as the backward of slicing would fill a whole tensor per chunk.
    parts = (x.split(size, 1) for x in (q, q_sink, k, v, position, segment))
    for start, (*part, segments) in zip(range(0, T, size), zip(*parts, strict=True), strict=True):
        seen = segment[:, start - 1] if start else torch.zeros_like(segment[:, 0])
        since = segments - seen[:, None]
        new_q, new_q_sink, new_k, new_v, at = part
        out, memory = _chunk(
            new_q, new_q_sink, new_k, new_v, memory, at, since, window, resets, causal
        )
        outputs.append(out)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), memory


def _chunk(
    q: Tensor,
    q_sink: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Memory,
    position: Tensor,
    segment: Tensor,
    window: int | None,
    resets: bool,
    causal: bool,
) -> tuple[Tensor, Memory]:
    T, sinks = q.shape[1], memory.sink_k.shape[1]
    first = position[:, :1]  # tokens of the open document seen before the chunk
    new_k, new_v, kept = k, v, memory
    if memory.k.dtype == torch.int8:
        new_k, new_v = pack(k), pack(v)
        k, v = (unpack(p, x.dtype) + (x - x.detach()) for x, p in ((k, new_k), (v, new_v)))
        parts = (memory.k, memory.v, memory.sink_k, memory.sink_v)
        memory = Memory(*(unpack(part, k.dtype) for part in parts))

    ring = _slot_positions(memory.k.shape[1], first)
    continues = segment == 0
    sees_ring = continues[..., None] & (ring >= 0)[:, None]
    order = torch.arange(T, device=q.device)
    sees_new = segment[:, :, None] == segment[:, None]
    if causal:
        sees_new = sees_new & (order[:, None] >= order)
    values, visible = [memory.v, v], [sees_ring, sees_new]
    # Matrix products may round a row differently in another batch; in decode that would show.
    exact = T == 1 and window is not None
    scores = [_scores(q, memory.k, exact), _scores(q, k, exact)]
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

    # The open document's tokens go to their slots, the others to one past the end.
    last = position[:, -1:]
    mine = segment == segment[:, -1:]
    ring_slots = int(last.max()) + 1 if window is None else window
    ring_slots = max(ring_slots, memory.k.shape[1])
    at_ring = torch.where(mine, position % ring_slots, ring_slots)
    at_sink = torch.where(mine & (position < sinks), position, sinks)
    goes_on = continues[:, -1] if resets else None
    return out.flatten(2, 3), Memory(
        k=_store(kept.k, new_k, at_ring, ring_slots, goes_on),
        v=_store(kept.v, new_v, at_ring, ring_slots, goes_on),
        sink_k=_store(kept.sink_k, new_k, at_sink, sinks, goes_on),
        sink_v=_store(kept.sink_v, new_v, at_sink, sinks, goes_on),
    )


def _scores(q: Tensor, k: Tensor, exact: bool) -> Tensor:
    """q [B, T, H, K], k [B, S, G, K] -> scaled products [B, G, H / G, T, S]."""
    grouped: Tensor = q.unflatten(2, (k.shape[2], -1))
    q = grouped.permute(0, 2, 3, 1, 4) * q.shape[-1] ** -0.5
    if exact:
        return (q * k.permute(0, 2, 1, 3)[:, :, None]).sum(-1)[..., None, :]
    # One product per group: a broadcast one would copy the keys for every head.
    scores: Tensor = (q.flatten(2, 3) @ k.permute(0, 2, 3, 1)).unflatten(2, q.shape[2:4])
    return scores


def _mix(weights: Tensor, v: Tensor, exact: bool) -> Tensor:
    """weights [B, G, H / G, T, S], v [B, S, G, K] -> [B, G, H / G, T, K]."""
    v = v.permute(0, 2, 1, 3)
    if exact:
        return (weights.mT * v[:, :, None]).sum(-2, keepdim=True)
    out: Tensor = (weights.flatten(2, 3) @ v).unflatten(2, weights.shape[2:4])
    return out


def _slot_positions(capacity: int, seen: Tensor) -> Tensor:
    """The position each slot holds once `seen` [B, 1] tokens have passed; negative if none."""
    slot = torch.arange(capacity, device=seen.device)
    return seen - 1 - (seen - 1 - slot) % capacity if capacity else slot.expand(seen.shape[0], 0)


def _store(old: Tensor, new: Tensor, at: Tensor, size: int, goes_on: Tensor | None) -> Tensor:
    """`old` with the tokens of `new` at the slots `at` [B, T], those at `size` left out.

    Where `goes_on` [B] is False the old document is forgotten, so a state tells nothing of it.
    """
    room = size + 1 - old.shape[1]
    kept = torch.cat([old, old.new_zeros(old.shape[0], room, *old.shape[2:])], 1)
    if goes_on is not None:
        kept = kept * goes_on[:, None, None, None]
    index = at[..., None, None].expand(new.shape)
    return kept.scatter_(1, index, new.to(kept.dtype))[:, :size]
