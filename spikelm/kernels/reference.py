"""The specification: every recurrence as a plain loop over tokens, for any float dtype.

Nothing here is fast. The forms in the modules beside this one must equal these in outputs,
final states and every gradient.

B sequences, T tokens, H heads, G key/value heads, K key and V value channels per head.
`reset` [B, T] is true at tokens before which the memory is forgotten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.kernels.delta import delta_step
from spikelm.kernels.gla import gla_step
from spikelm.kernels.rope import rotate
from spikelm.kernels.rwkv7 import rwkv7_step
from spikelm.kernels.wkv4 import WKVState, wkv4_step


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    erase: Tensor,
    write: Tensor,
    state: Tensor,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`delta_step` token by token; shapes as in `delta.delta_rule`."""
    outputs = []
    for t in range(q.shape[1]):
        if reset is not None:
            state = state * ~reset[:, t, None, None, None]
        out, state = delta_step(
            q[:, t], k[:, t], v[:, t], log_decay[:, t], erase[:, t], write[:, t], state
        )
        outputs.append(out)
    return torch.stack(outputs, 1), state


def causal_taps(
    x: Tensor, size: int, reset: Tensor | None = None, history: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For each token the last `size` inputs, oldest first: [B, T, size, C], and the history.

    Inputs before the document's start are zero. `history` is the last size - 1 inputs
    [B, size - 1, C].
    """
    B, T, C = x.shape
    past = x.new_zeros(B, size - 1, C) if history is None else history
    taps = []
    for t in range(T):
        if reset is not None:
            past = past * ~reset[:, t, None, None]
        window = torch.cat([past, x[:, t : t + 1]], 1)
        taps.append(window)
        past = window[:, 1:]
    return torch.stack(taps, 1), past


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    sinks: int,
    rope_theta: float | None,
    reset: Tensor | None = None,
) -> Tensor:
    """Softmax attention over whole sequences, from an empty memory, by its definition.

    q [B, T, H, K]; k, v [B, T, G, K]. A query sees itself, the window - 1 tokens before it and
    the document's first `sinks` tokens; window None sees all. Distances are those within the
    remembered set: a sink that has left the window keeps the distance it has in a full memory of
    sinks + window tokens (StreamingLLM, Xiao et al. 2023, section 3.2). Returns [B, T, H, K].
    """
    B, T, H, K = q.shape
    group = H // k.shape[2]
    rows = []
    for b in range(B):
        start = 0
        outputs = []
        for t in range(T):
            if reset is not None and bool(reset[b, t]):
                start = t
            position = t - start
            reach = position + 1 if window is None else window
            p = torch.arange(position + 1, device=q.device)
            recent = position - p < reach
            p, recent = p[recent | (p < sinks)], recent[recent | (p < sinks)]
            keys, values = (x[b, start + p].repeat_interleave(group, 1) for x in (k, v))
            query = q[b, t].expand_as(keys)
            if rope_theta is not None:
                at = torch.where(recent, position, min(position, sinks + reach - 1))
                query, keys = rotate(query, at, rope_theta), rotate(keys, p, rope_theta)
            weights = torch.softmax((query * keys).sum(-1) * K**-0.5, 0)
            outputs.append((weights[..., None] * values).sum(0))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def lif(
    x: Tensor,
    v: Tensor,
    *,
    tau: float,
    v_threshold: float,
    hard_reset: bool,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Leaky integrate-and-fire on the token axis: x [B, T, C], membrane v [B, C].

    v += (x - v) / tau; spike = [v >= v_threshold]; then v = 0 or v -= v_threshold where it fired.
    Forward only: the gradient needs a surrogate (`neurons.lif`). Returns spikes and membrane.
    """
    spikes = []
    for t in range(x.shape[1]):
        if reset is not None:
            v = v * ~reset[:, t, None]
        v = v + (x[:, t] - v) / tau
        fired = v >= v_threshold
        v = torch.where(fired, torch.zeros_like(v) if hard_reset else v - v_threshold, v)
        spikes.append(fired.to(x.dtype))
    return torch.stack(spikes, 1), v


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    reset: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`gla_step` token by token; shapes as in `gla.gla`."""
    outputs = []
    for t in range(q.shape[1]):
        if reset is not None:
            state = state * ~reset[:, t, None, None, None]
        out, state = gla_step(q[:, t], k[:, t], v[:, t], log_decay[:, t], state, scale=scale)
        outputs.append(out)
    return torch.stack(outputs, 1), state


def rwkv7(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    removal_key: Tensor,
    rate: Tensor,
    state: Tensor,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`rwkv7_step` token by token; shapes as in `rwkv7.rwkv7`."""
    outputs = []
    for t in range(r.shape[1]):
        if reset is not None:
            state = state * ~reset[:, t, None, None, None]
        out, state = rwkv7_step(
            r[:, t], log_decay[:, t], k[:, t], v[:, t], removal_key[:, t], rate[:, t], state
        )
        outputs.append(out)
    return torch.stack(outputs, 1), state


def wkv4(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    state: WKVState,
    reset: Tensor | None = None,
) -> tuple[Tensor, WKVState]:
    """`wkv4_step` token by token; shapes as in `wkv4.wkv4`."""
    outputs = []
    for t in range(k.shape[1]):
        if reset is not None:
            p, q, o = (x * ~reset[:, t, None] for x in state)
            state = p, q, o
        out, state = wkv4_step(k[:, t], v[:, t], decay, bonus, state)
        outputs.append(out)
    return torch.stack(outputs, 1), state
