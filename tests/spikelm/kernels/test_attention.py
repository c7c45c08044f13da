from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spikelm.kernels import reference
from spikelm.kernels.attention import Memory, attention

B, H, G, K = 2, 4, 2, 6


def inputs(T: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(B, T, H, K, dtype=torch.float64, generator=g),
        torch.randn(B, T, G, K, dtype=torch.float64, generator=g),
        torch.randn(B, T, G, K, dtype=torch.float64, generator=g),
    )


def empty(slots: int, sinks: int) -> Memory:
    ring = torch.zeros(B, slots, G, K, dtype=torch.float64)
    sink = torch.zeros(B, sinks, G, K, dtype=torch.float64)
    return Memory(ring, ring, sink, sink)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    sinks: int,
    rope: float | None,
    reset: Tensor | None = None,
    lengths: tuple[int, ...] = (),
) -> Tensor:
    """The kernel over a sequence cut into `lengths` (the rest in one piece)."""
    T = q.shape[1]
    reset = torch.zeros(B, T, dtype=torch.bool) if reset is None else reset
    memory = empty(window or 0, sinks if window else 0)
    seen = torch.zeros(B, dtype=torch.int64)
    outputs, start = [], 0
    for length in (*lengths, T - sum(lengths)):
        if not length:
            continue
        part = slice(start, start + length)
        segment = reset[:, part].long().cumsum(1)
        order = torch.arange(length)
        begun = torch.where(reset[:, part], order, -1).cummax(1).values
        position = torch.where(segment == 0, seen[:, None] + order, order - begun)
        out, memory = attention(
            q[:, part],
            k[:, part],
            v[:, part],
            memory,
            position,
            segment,
            window=window,
            rope_theta=rope,
        )
        outputs.append(out)
        seen = position[:, -1] + 1
        start += length
    return torch.cat(outputs, 1)


CASES = [(None, 0), (1, 0), (1, 3), (5, 0), (5, 2), (64, 4)]


@pytest.mark.parametrize(("window", "sinks"), CASES)
@pytest.mark.parametrize("rope", [None, 100.0])
@pytest.mark.parametrize("T", [1, 2, 65])
def test_equals_the_loop_with_gradients(
    T: int, window: int | None, sinks: int, rope: float | None
) -> None:
    tensors = [x.requires_grad_() for x in inputs(T)]
    weights = torch.randn(B, T, H, K, dtype=torch.float64, generator=torch.Generator())
    out = run(*tensors, window=window, sinks=sinks, rope=rope)
    expected = reference.attention(*tensors, window=window, sinks=sinks, rope_theta=rope)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    actual_grads = torch.autograd.grad((out * weights).sum(), tensors)
    expected_grads = torch.autograd.grad((expected * weights).sum(), tensors)
    torch.testing.assert_close(actual_grads, expected_grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (7, 2)])
def test_packed_documents(window: int | None, sinks: int) -> None:
    tensors = inputs(63)
    reset = torch.rand(B, 63, generator=torch.Generator().manual_seed(3)) < 0.08
    expected = reference.attention(
        *tensors, window=window, sinks=sinks, rope_theta=50.0, reset=reset
    )
    for lengths in ((), (1, 20, 7, 1)):
        out = run(*tensors, window=window, sinks=sinks, rope=50.0, reset=reset, lengths=lengths)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 25), max_size=5),
    case=st.sampled_from(CASES),
    seed=st.integers(0, 99),
)
def test_any_split_carries_the_memory(
    cuts: list[int], case: tuple[int | None, int], seed: int
) -> None:
    window, sinks = case
    tensors = inputs(sum(cuts) + 10, seed)
    whole = run(*tensors, window=window, sinks=sinks, rope=100.0)
    parts = run(*tensors, window=window, sinks=sinks, rope=100.0, lengths=tuple(cuts))
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10)


def test_the_window_counts_the_query_itself() -> None:
    q, k, v = inputs(6)
    out = run(q, k, v, window=1, sinks=0, rope=None)
    torch.testing.assert_close(out, v.repeat_interleave(H // G, 2))
