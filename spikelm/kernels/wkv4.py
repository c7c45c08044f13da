"""RWKV-4's time mixing (Peng et al. 2023): a weighted mean of the values, channel by channel.

    wkv_t = (sum_{i<t} e^{(t-1-i) W + k_i} v_i + e^{u + k_t} v_t)
          / (sum_{i<t} e^{(t-1-i) W + k_i}     + e^{u + k_t})

W < 0 is the decay, u the bonus of the present token. The state (p, q, o) stands for the two sums
p e^o and q e^o; o is the largest exponent so far, so every factor e^{...} here is at most 1. Then
q >= 1, and q = 0 is free to say that no token was seen, whatever o: the all-zero state is the empty
one. Gradients treat the o that is returned as a constant, since nothing depends on it but through
p e^o and q e^o. B sequences, T tokens, C channels, N chunks of L tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from spikelm.kernels import native
from spikelm.kernels.documents import first_tokens

# The exponent of a weight that is 0; twice its size is still finite in float32.
EMPTY = -1e38

WKVState = tuple[Tensor, Tensor, Tensor]
"""(p, q, o)."""


def wkv4_step(
    k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, state: WKVState
) -> tuple[Tensor, WKVState]:
    """One token: k, v and each of the state [B, C]; decay = W and bonus = u [C].

    Returns (out, state). All is elementwise: a row's result does not depend on the other rows.
    """
    state = _filled(state)
    return _read(k, v, bonus, state), _write(state, v, torch.ones_like(v), k, decay)


def wkv4(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    state: WKVState,
    segment: Tensor | None = None,
) -> tuple[Tensor, WKVState]:
    """Many tokens: k, v [B, T, C]; decay = W < 0 and bonus = u [C]; state (p, q, o), each [B, C],
    zeros being the empty one; segment [B, T] counts the documents begun in this call (0 continues
    `state`). Returns (out [B, T, C], state), in the dtype of the state.

    Runs in native code on the CPU where that is there, else in about 3 sqrt(T) vectorised steps.
    The backward pass keeps the inputs only.
    """
    dtype = state[0].dtype
    k, v, decay, bonus = (x.to(dtype).contiguous() for x in (k, v, decay, bonus))
    begins = None if segment is None else first_tokens(segment)
    p, q, o = (x.contiguous() for x in state)
    if not torch.is_grad_enabled():
        return _forward(k, v, decay, bonus, (p, q, o), begins)
    out, *after = _WKV4.apply(  # type: ignore[no-untyped-call]
        begins, k, v, decay, bonus, p, q, o
    )
    return out, (after[0], after[1], after[2])


class _WKV4(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        begins: Tensor | None,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        bonus: Tensor,
        p: Tensor,
        q: Tensor,
        o: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out, after = _forward(k, v, decay, bonus, (p, q, o), begins)
        ctx.save_for_backward(begins, k, v, decay, bonus, p, q, o)
        ctx.mark_non_differentiable(after[2])
        return out, *after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        begins, k, v, decay, bonus, p, q, o = ctx.saved_tensors
        run = native.wkv4_backward if native.serves(k) else _backward
        out, grad_p, grad_q = (grad.contiguous() for grad in grads[:3])
        return None, *run(k, v, decay, bonus, (p, q, o), begins, out, grad_p, grad_q)


def _forward(
    k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, state: WKVState, begins: Tensor | None
) -> tuple[Tensor, WKVState]:
    if native.serves(k):
        return native.wkv4_forward(k, v, decay, bonus, state, begins)
    if k.shape[1] == 1:
        state = state if begins is None else _emptied(state, begins)
        out, after = wkv4_step(k[:, 0], v[:, 0], decay, bonus, state)
        return out[:, None], after
    before, after = _scan(v, torch.ones_like(v), k, decay, _filled(state), begins)
    return _read(k, v, bonus, before), after


def _backward(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    state: WKVState,
    begins: Tensor | None,
    grad: Tensor,
    grad_p: Tensor,
    grad_q: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of k, v, decay, bonus, p, q, o.

    With N_t / D_t = out_t, the gradients of the sums P_t, Q_t that token t finds obey
    gP_t = e^W gP_{t+1} + grad_t / D_t and gQ_t = e^W gQ_{t+1} - grad_t out_t / D_t: the same
    recurrence, run backwards.
    """
    state = _filled(state)
    (p, q, o), after = _scan(v, torch.ones_like(v), k, decay, state, begins)
    largest = torch.maximum(o, bonus + k)
    past, present = (o - largest).exp(), (bonus + k - largest).exp()
    n = grad / (past * q + present)
    d = -n * (past * p + present * v) / (past * q + present)
    reversed_begins = None
    if begins is not None:
        reversed_begins = F.pad(begins[:, 1:].flip(1), (1, 0))
    (gp, gq, go), first = _scan(
        n.flip(1), d.flip(1), -largest.flip(1), decay, (grad_p, grad_q, -after[2]), reversed_begins
    )
    gp, gq, go = gp.flip(1), gq.flip(1), go.flip(1)
    written = (k + go).exp()
    grad_v = present * n + written * gp
    of_bonus = present * (n * v + d)
    grad_k = of_bonus + written * (gp * v + gq)
    grad_decay = (decay + go + o).exp() * (gp * p + gq * q)
    to_state = (state[2] + first[2]).exp()
    if begins is not None:
        to_state = to_state * ~begins[:, :1]
    grad_p, grad_q = to_state * first[0], to_state * first[1]
    return (
        grad_k,
        grad_v,
        grad_decay.sum((0, 1)),
        of_bonus.sum((0, 1)),
        grad_p,
        grad_q,
        grad_p * state[0] + grad_q * state[1],
    )


def _filled(state: WKVState) -> WKVState:
    """The state with an exponent that makes an empty one weigh nothing."""
    p, q, o = state
    return p, q, torch.where(q == 0, EMPTY, o)


def _read(k: Tensor, v: Tensor, bonus: Tensor, state: WKVState) -> Tensor:
    """The weighted mean of what the state holds and of the present token."""
    p, q, o = state
    largest = torch.maximum(o, bonus + k).detach()
    past, present = (o - largest).exp(), (bonus + k - largest).exp()
    return (past * p + present * v) / (past * q + present)


def _write(state: WKVState, a: Tensor, b: Tensor, e: Tensor, decay: Tensor) -> WKVState:
    """The sums decayed by e^decay, plus (a, b) e^e."""
    p, q, o = state
    largest = torch.maximum(o + decay, e).detach()
    past, present = (o + decay - largest).exp(), (e - largest).exp()
    return past * p + present * a, past * q + present * b, largest


def _scan(
    a: Tensor, b: Tensor, e: Tensor, decay: Tensor, state: WKVState, begins: Tensor | None
) -> tuple[WKVState, WKVState]:
    """`_write` for every token of a, b, e [B, T, C]: (the states that the tokens find, the last).

    Every chunk is walked twice, all chunks at once: from an empty state, for what it adds, and
    from the state that it really finds.
    """
    B, T, C = e.shape
    L = max(1, round(T**0.5))
    padding = -T % L
    tokens = [
        F.pad(x, (0, 0, 0, padding), value=fill).unflatten(1, (-1, L)).unbind(2)
        for x, fill in ((a, 0.0), (b, 0.0), (e, EMPTY))
    ]
    starts = None
    if begins is not None:
        starts = F.pad(begins, (0, padding)).unflatten(1, (-1, L))[..., None].unbind(2)
    N = (T + padding) // L
    empty = a.new_zeros(B, N, C), a.new_zeros(B, N, C), a.new_full((B, N, C), EMPTY)
    _, added = _walk(tokens, decay, empty, starts)
    found, carried = [], state
    for n in range(N):
        found.append(carried)
        if begins is not None:
            opened = begins[:, n * L : (n + 1) * L].any(1, keepdim=True)
            carried = _emptied(carried, opened)
        carried = _write(carried, added[0][:, n], added[1][:, n], added[2][:, n], L * decay)
    joined = [torch.stack(x, 1) for x in zip(*found, strict=True)]
    states, _ = _walk(tokens, decay, (joined[0], joined[1], joined[2]), starts)
    p, q, o = (torch.stack(x, 2).flatten(1, 2)[:, :T] for x in zip(*states, strict=True))
    last = _write((p[:, -1], q[:, -1], o[:, -1]), a[:, -1], b[:, -1], e[:, -1], decay)
    return (p, q, o), last


def _walk(
    tokens: list[tuple[Tensor, ...]],
    decay: Tensor,
    state: WKVState,
    starts: tuple[Tensor, ...] | None,
) -> tuple[list[WKVState], WKVState]:
    """`_write` over L tokens of all chunks: (the states [B, N, C] the tokens find, the last)."""
    found = []
    for i, (a, b, e) in enumerate(zip(*tokens, strict=True)):
        if starts is not None:
            state = _emptied(state, starts[i])
        found.append(state)
        state = _write(state, a, b, e, decay)
    return found, state


def _emptied(state: WKVState, where: Tensor) -> WKVState:
    p, q, o = state
    return p * ~where, q * ~where, torch.where(where, EMPTY, o)
