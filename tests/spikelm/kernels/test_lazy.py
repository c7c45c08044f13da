"""Decays that wait are those of the dense steps, whatever calls the tokens come in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from spikelm.kernels import reference
from spikelm.kernels.delta import delta_rule
from spikelm.kernels.gla import gla
from spikelm.kernels.lazy import lazily, settled

B, H, K, V = 2, 2, 6, 3
DECAYS = ("scalar", "channel")
Inputs = tuple[Tensor, ...]


def inputs(T: int, decay: str, dtype: torch.dtype = torch.float64) -> Inputs:
    """q, k, v, log_decay, erase, write; a tenth of the queries and keys spike."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(B, T, H, *shape, dtype=torch.float64, generator=g)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(B, T, H, *shape, dtype=torch.float64, generator=g)

    q, k = (normal(K) * (uniform(K) < 0.1) for _ in range(2))
    k = k / k.norm(dim=-1, keepdim=True).clamp(min=1)
    log_decay = -0.3 * uniform(K if decay == "channel" else 1)
    return tuple(x.to(dtype) for x in (q, k, normal(V), log_decay, uniform(K), uniform(V)))


def in_calls(
    mixer: str, tensors: Inputs, calls: Sequence[int], segment: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, and the state and what its rows owe, behind calls of so many tokens each."""
    state, pending = (tensors[0].new_zeros(B, H, K, *more) for more in ((V,), ()))
    outputs, start = [], 0
    for tokens in calls:
        q, k, v, log_decay, erase, write = (x[:, start : start + tokens] for x in tensors)
        part = None if segment is None else segment[:, start : start + tokens]
        # Documents are counted from the call's first token.
        if part is not None and segment is not None and start:
            part = part - segment[:, start - 1 : start]

        def rule(decay: Tensor, S: Tensor, begun: Tensor | None) -> tuple[Tensor, Tensor]:
            if mixer == "gla":
                return gla(q, k, v, decay, S, begun)  # noqa: B023
            return delta_rule(q, k, v, decay, erase, write, S, begun)  # noqa: B023

        out, state, pending = lazily(rule, k, log_decay, state, pending, part)
        outputs.append(out)
        start += tokens
    return torch.cat(outputs, 1), state, pending


def dense(mixer: str, tensors: Inputs, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    empty = tensors[0].new_zeros(B, H, K, V)
    if mixer == "gla":
        return reference.gla(*tensors[:4], empty, reset)
    return reference.delta_rule(*tensors, empty, reset)


def assert_same(found: tuple[Tensor, Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    out, state, pending = found
    torch.testing.assert_close(out, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(settled(state, pending), expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("mixer", ["delta", "gla"])
def test_steps_are_the_dense_steps_over_thousands_of_tokens(mixer: str, decay: str) -> None:
    tensors = inputs(3000, decay)
    found = in_calls(mixer, tensors, [1] * 3000)
    assert_same(found, dense(mixer, tensors))
    assert (found[2] < 0).any()


@pytest.mark.parametrize("calls", [[1] * 90, [7, 1, 1, 40, 1, 23, *[1] * 17], [90]])
@pytest.mark.parametrize("mixer", ["delta", "gla"])
def test_documents_and_calls_of_any_length(mixer: str, calls: list[int]) -> None:
    tensors = inputs(90, "channel")
    reset = torch.rand(B, 90, generator=torch.Generator().manual_seed(1)) < 0.05
    reset[0, [20, 80]] = True
    segment = reset.long().cumsum(1)
    assert_same(in_calls(mixer, tensors, calls, segment), dense(mixer, tensors, reset))


def test_rows_are_rewritten_where_the_key_fires_and_nowhere_else() -> None:
    tensors = inputs(40, "channel")
    _, before, owed = in_calls("delta", tensors, [1] * 39)
    _, after, pending = in_calls("delta", tensors, [1] * 40)
    fired = tensors[1][:, 39] != 0
    assert fired.any()
    assert torch.equal(after[~fired], before[~fired])
    assert (pending[fired] == 0).all()
    torch.testing.assert_close(pending[~fired], (owed + tensors[3][:, 39])[~fired])
    # Many tokens settle everything.
    assert not in_calls("delta", tensors, [1, 39])[2].any()


@pytest.mark.parametrize("per_token", [-1e-3, -0.3, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_that_is_silent_for_10_000_tokens(per_token: float, dtype: torch.dtype) -> None:
    """One write, and a read that far behind it."""
    state, pending = torch.zeros(1, 1, 2, 1, dtype=dtype), torch.zeros(1, 1, 2, dtype=dtype)
    one, zero = torch.ones(1, 1, 1, 2, dtype=dtype), torch.zeros(1, 1, 1, 2, dtype=dtype)
    log_decay = torch.full_like(zero, per_token)
    for t in range(10_001):
        q, k = (one if t == 10_000 else zero), (one if t == 0 else zero)

        def rule(decay: Tensor, S: Tensor, begun: Tensor | None) -> tuple[Tensor, Tensor]:
            return gla(q, k, one[..., :1], decay, S, begun)  # noqa: B023

        out, state, pending = lazily(rule, k, log_decay, state, pending)
    expected = 2 * math.exp(10_000 * per_token)
    assert out.item() == pytest.approx(expected, rel=1e-11 if dtype == torch.float64 else 1e-3)
    assert state.flatten().tolist() == [1.0, 1.0], "nobody touched them"


def test_silent_keys_keep_their_gradients() -> None:
    """The slope of a key that is 0 is that of the dense step, token by token too."""
    tensors = inputs(12, "channel")
    grads = []
    for calls in ([12], [1] * 12):
        leaves = tuple(x.clone().requires_grad_() for x in tensors)
        out, state, pending = in_calls("delta", leaves, calls)
        loss = out.square().sum() + settled(state, pending).square().sum()
        grads.append(torch.autograd.grad(loss, leaves))
    silent = tensors[1] == 0
    assert (grads[0][1][silent] != 0).any()
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
