from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spikelm.kernels import attention as module
from spikelm.kernels import reference
from spikelm.kernels.attention import Memory, attention, pack, unpack
from spikelm.kernels.rope import rotate

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
) -> tuple[Tensor, Memory]:
    """Position code and kernel over a sequence cut into `lengths` (the rest in one piece)."""
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
        q_n, k_n, q_sink = q[:, part], k[:, part], None
        if rope is not None:
            if window is not None:
                q_sink = rotate(q_n, position.clamp(max=sinks + window - 1), rope)
            q_n, k_n = rotate(q_n, position, rope), rotate(k_n, position, rope)
        out, memory = attention(
            q_n, k_n, v[:, part], memory, position, segment, window=window, q_sink=q_sink
        )
        outputs.append(out)
        seen = position[:, -1] + 1
        start += length
    return torch.cat(outputs, 1), memory


def remembered(
    k: Tensor, v: Tensor, *, window: int | None, sinks: int, rope: float | None
) -> list[Tensor]:
    """What the memory must hold after whole sequences: rotated keys and values by slot."""
    T = k.shape[1]
    if rope is not None:
        k = rotate(k, torch.arange(T).expand(B, T), rope)
    kept = range(T) if window is None else range(max(0, T - window), T)
    slots = T if window is None else window
    ring = [torch.zeros(B, slots, G, K, dtype=torch.float64) for _ in range(2)]
    for p in kept:
        for store, source in zip(ring, (k, v), strict=True):
            store[:, p % slots] = source[:, p]
    return [*ring, k[:, :sinks], v[:, :sinks]]


CASES = [(None, 0), (1, 0), (1, 3), (5, 0), (5, 2), (64, 4)]


@pytest.mark.parametrize(("window", "sinks"), CASES)
@pytest.mark.parametrize("rope", [None, 100.0])
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65])
def test_equals_the_loop_with_gradients(
    T: int, window: int | None, sinks: int, rope: float | None
) -> None:
    check(T, window, sinks, rope)


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (5, 2), (64, 4)])
def test_equals_the_loop_over_1000_tokens(window: int | None, sinks: int) -> None:
    check(1000, window, sinks, 100.0)


def check(T: int, window: int | None, sinks: int, rope: float | None) -> None:
    """Outputs, final memory and the gradients of a loss over both."""
    tensors = [x.requires_grad_() for x in inputs(T)]
    out, memory = run(*tensors, window=window, sinks=sinks, rope=rope)
    stored = [memory.k, memory.v, memory.sink_k[:, :T], memory.sink_v[:, :T]]
    expected = reference.attention(*tensors, window=window, sinks=sinks, rope_theta=rope)
    kept = remembered(*tensors[1:], window=window, sinks=sinks, rope=rope)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(stored, kept, rtol=1e-10, atol=1e-10)
    grads = []
    for parts in ((out, *stored), (expected, *kept)):
        g = torch.Generator().manual_seed(4)
        loss = sum((x * torch.randn(x.shape, dtype=x.dtype, generator=g)).sum() for x in parts)
        grads.append(torch.autograd.grad(loss, tensors))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (7, 2)])
def test_packed_documents_with_gradients(window: int | None, sinks: int) -> None:
    tensors = [x.requires_grad_() for x in inputs(63)]
    reset = torch.rand(B, 63, generator=torch.Generator().manual_seed(3)) < 0.08
    weights = torch.randn(B, 63, H, K, dtype=torch.float64)
    expected = reference.attention(
        *tensors, window=window, sinks=sinks, rope_theta=50.0, reset=reset
    )
    expected_grads = torch.autograd.grad((expected * weights).sum(), tensors)
    for lengths in ((), (1, 20, 7, 1)):
        out, _ = run(*tensors, window=window, sinks=sinks, rope=50.0, reset=reset, lengths=lengths)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        grads = torch.autograd.grad((out * weights).sum(), tensors)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [None, 7])
def test_nothing_of_the_document_before_is_remembered(window: int | None) -> None:
    q, k, v = inputs(20)
    reset = torch.zeros(B, 20, dtype=torch.bool)
    reset[:, 17] = True
    _, packed = run(q, k, v, window=window, sinks=4, rope=50.0, reset=reset)
    _, alone = run(q[:, 17:], k[:, 17:], v[:, 17:], window=window, sinks=4, rope=50.0)
    for a, b in ((packed.k, alone.k), (packed.v, alone.v), (packed.sink_k, alone.sink_k)):
        torch.testing.assert_close(a[:, : b.shape[1]], b)
        assert not a[:, b.shape[1] :].any()


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
    whole, memory = run(*tensors, window=window, sinks=sinks, rope=100.0)
    parts, after = run(*tensors, window=window, sinks=sinks, rope=100.0, lengths=tuple(cuts))
    torch.testing.assert_close(after.k[:, : memory.k.shape[1]], memory.k)
    torch.testing.assert_close(after.sink_v, memory.sink_v)
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("G", "K", "window"), [(3, 64, 128), (2, 24, 37)])
def test_a_row_of_one_token_does_not_depend_on_its_batch(G: int, K: int, window: int) -> None:
    rows = 5
    q, k, v = torch.randn(3, rows, 1, G, K).unbind()
    ring = torch.randn(2, rows, window, G, K).unbind()
    sink = torch.randn(2, rows, 4, G, K).unbind()
    position = torch.tensor([[0], [9], [36], [500], [120]])

    def step(keep: slice) -> Tensor:
        memory = Memory(ring[0][keep], ring[1][keep], sink[0][keep], sink[1][keep])
        return attention(q[keep], k[keep], v[keep], memory, position[keep], window=window)[0]

    together = step(slice(None))
    for row in range(rows):
        assert torch.equal(step(slice(row, row + 1)), together[row : row + 1])


def test_the_window_counts_the_query_itself() -> None:
    q, k, v = inputs(6)
    out, _ = run(q, k, v, window=1, sinks=0, rope=None)
    torch.testing.assert_close(out, v.repeat_interleave(H // G, 2))


@pytest.mark.parametrize("window", [None, 300])
def test_a_call_longer_than_a_chunk(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(290)
    reset = torch.zeros(B, 290, dtype=torch.bool)
    reset[0, [5, 40]] = reset[1, 70] = True
    found = []
    for size in (1024, 32):
        monkeypatch.setattr(module, "CHUNK", size)
        found.append(run(q, k, v, window=window, sinks=2, rope=100.0, reset=reset))
    torch.testing.assert_close(found[0][0], found[1][0])
    ring = found[0][1].k.shape[1]
    torch.testing.assert_close(found[0][1].k, found[1][1].k[:, :ring])
    torch.testing.assert_close(found[0][1].sink_v, found[1][1].sink_v)


@pytest.mark.parametrize("channels", [1, 2, 3, 10])
def test_packed_heads_of_any_width_decode(channels: int) -> None:
    x = torch.randn(1, 1, 1, channels)
    ring = pack(torch.zeros(1, 4, 1, channels))
    sinks = ring[:, :0]
    position = torch.zeros(1, 1, dtype=torch.int64)
    out, memory = attention(x, x, x, Memory(ring, ring, sinks, sinks), position, window=4)
    torch.testing.assert_close(out, x, rtol=0, atol=0.02)
    torch.testing.assert_close(unpack(memory.v, torch.float32)[:, :1], out)


def test_more_tokens_than_a_chunk_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)
    q, k, v = inputs(9)
    position = torch.arange(9).expand(B, -1)
    out, _ = attention(q, k, v, empty(0, 0), position, window=None, causal=False)
    keys, values = (x.repeat_interleave(H // G, 2) for x in (k, v))
    weights = torch.einsum("bthk,bshk->bhts", q, keys) * K**-0.5
    expected = torch.einsum("bhts,bshk->bthk", weights.softmax(-1), values)
    torch.testing.assert_close(out, expected)
