"""spikelm.coding"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spikelm.coding import CODES, Code, Train, event_matmul, statistics
from spikelm.errors import CodingError

ALL = pytest.mark.parametrize("code", CODES.values(), ids=list(CODES))


@st.composite
def coded_counts(draw: st.DrawFn) -> tuple[Code, int, Tensor]:
    """A code, a number of steps, and integers in its range."""
    code = CODES[draw(st.sampled_from(sorted(CODES)))]
    most = 62 if code.positional else 40
    steps = draw(st.integers(code.min_steps, most))
    values = draw(st.lists(st.integers(*code.range(steps)), max_size=12))
    return code, steps, torch.tensor(values, dtype=torch.int64)


@given(coded_counts())
def test_every_vector_in_range_round_trips(case: tuple[Code, int, Tensor]) -> None:
    code, steps, counts = case
    train = code.encode(counts, steps)
    assert train.spikes.dtype == torch.int8
    assert train.spikes.shape == (steps, *counts.shape)
    assert train.saturated == 0
    allowed = {-1, 0, 1} if code.negative == "sign" else {0, 1}
    assert set(train.spikes.flatten().tolist()) <= allowed
    assert torch.equal(code.decode(train), counts)
    # The definition, in Python integers.
    for column, count in zip(train.spikes.T.tolist(), counts.tolist(), strict=True):
        assert sum(w * s for w, s in zip(train.weights, column, strict=True)) == count


@given(coded_counts())
def test_steps_for_is_the_smallest_that_holds(case: tuple[Code, int, Tensor]) -> None:
    code, _, counts = case
    steps = code.steps_for(counts)
    assert torch.equal(code.decode(code.encode(counts)), counts)
    assert len(code.encode(counts).weights) == steps
    if steps > code.min_steps:
        with pytest.raises(CodingError):
            code.encode(counts, steps - 1)


@ALL
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_exhaustive_at_small_steps(code: Code, steps: int) -> None:
    if steps < code.min_steps:
        with pytest.raises(CodingError, match="allowed: 2 to"):
            code.range(steps)
        return
    low, high = code.range(steps)
    counts = torch.arange(low, high + 1)
    train = code.encode(counts, steps)
    assert torch.equal(code.decode(train), counts)
    # The trains of different counts differ, and only count 0 is silent.
    assert len({tuple(column) for column in train.spikes.T.tolist()}) == len(counts)
    assert train.spikes.any(dim=0).sum() == len(counts) - 1


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [
        ("binary", 15, (0, 15)),
        ("ternary", 8, (-8, 8)),
        ("bitwise", 8, (0, 255)),
        ("bitwise_signed", 7, (-127, 127)),
        ("twos_complement", 8, (-128, 127)),
    ],
)
def test_range(name: str, steps: int, expected: tuple[int, int]) -> None:
    assert CODES[name].range(steps) == expected


@pytest.mark.parametrize(
    ("name", "weights", "spikes"),
    [
        ("ternary", (1, 1, 1, 1, 1, 1), [(1, 1, 1, 1, 1, 1), (-1, -1, -1, 0, 0, 0)]),
        ("bitwise_signed", (1, 2, 4), [(0, 1, 1), (-1, -1, 0)]),
        ("twos_complement", (1, 2, 4, -8), [(0, 1, 1, 0), (1, 0, 1, 1)]),
    ],
)
def test_hand_coded(name: str, weights: tuple[int, ...], spikes: list[tuple[int, ...]]) -> None:
    """6 is 110 and -3 is -011 in binary digits; low bit first, two's complement 1101 -> 1011."""
    train = CODES[name].encode(torch.tensor([6, -3]))
    assert train.weights == weights
    assert [tuple(column) for column in train.spikes.T.tolist()] == spikes


@pytest.mark.parametrize(("name", "steps"), [("binary", 5), ("bitwise", 3)])
def test_hand_coded_unsigned(name: str, steps: int) -> None:
    train = CODES[name].encode(torch.tensor([5, 0, 1]))
    expected = {"binary": [[1] * 5, [0] * 5, [1, 0, 0, 0, 0]]}
    expected["bitwise"] = [[1, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert train.steps == steps
    assert train.spikes.T.tolist() == expected[name]


@ALL
@pytest.mark.parametrize("values", [[[0, 0], [0, 0]], [[3, 1], [2, 9]], [], [[]]])
def test_all_zero_all_positive_and_empty(code: Code, values: list[object]) -> None:
    counts = torch.tensor(values, dtype=torch.int32)
    assert torch.equal(code.decode(code.encode(counts)), counts.long())


@ALL
def test_scalar(code: Code) -> None:
    assert code.decode(code.encode(torch.tensor(5))).item() == 5


@pytest.mark.parametrize("name", ["ternary", "bitwise_signed", "twos_complement"])
def test_int8_extremes(name: str) -> None:
    counts = torch.tensor([-128, 127, -1], dtype=torch.int8)
    train = CODES[name].encode(counts)
    assert train.steps == {"ternary": 128, "bitwise_signed": 8, "twos_complement": 8}[name]
    assert CODES[name].decode(train).tolist() == [-128, 127, -1]


@pytest.mark.parametrize("name", ["binary", "bitwise"])
def test_unsigned_codes_refuse_negative_counts(name: str) -> None:
    counts = torch.tensor([-2, 0, 3])
    with pytest.raises(CodingError, match=r"1 of 3 counts, -2 to 3, are outside 0 to 3;"):
        CODES[name].encode(counts)
    train = CODES[name].encode(counts, saturate=True)
    assert train.saturated == 1
    assert train.counts().tolist() == [0, 0, 3]


@ALL
def test_out_of_range_is_an_error_or_is_counted(code: Code) -> None:
    low, high = code.range(3)
    counts = torch.tensor([low - 1, low, 0, high, high + 1, high + 100])
    with pytest.raises(CodingError, match=f"{code.name}: 3 of 6 .* outside {low} to {high};"):
        code.encode(counts, 3)
    train = code.encode(counts, 3, saturate=True)
    assert train.saturated == 3
    assert code.decode(train).tolist() == [low, low, 0, high, high, high]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_that_hold_integers(dtype: torch.dtype) -> None:
    counts = torch.tensor([-7.0, 0.0, -0.0, 12.0], dtype=dtype)
    assert CODES["ternary"].encode(counts).counts().tolist() == [-7, 0, 0, 12]


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf"), 1e30])
def test_floats_that_do_not(value: float) -> None:
    for saturate in (False, True):
        with pytest.raises(CodingError, match="must be integers"):
            CODES["ternary"].encode(torch.tensor([1.0, value]), 4, saturate=saturate)


def test_absurd_counts_are_refused() -> None:
    with pytest.raises(CodingError, match=r"inside \+-2\*\*62"):
        CODES["bitwise_signed"].encode(torch.tensor([-(2**63)]))
    with pytest.raises(CodingError, match="allowed: 1 to 65536"):
        CODES["binary"].encode(torch.tensor([10**9]))
    with pytest.raises(CodingError, match="complex64"):
        CODES["binary"].encode(torch.tensor([1 + 0j]))


def test_decode_refuses_a_train_of_another_code() -> None:
    train = CODES["twos_complement"].encode(torch.tensor([-3]))
    with pytest.raises(CodingError, match="another code's"):
        CODES["bitwise"].decode(train)


@ALL
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
def test_event_matmul_is_the_integer_product(
    code: Code, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    limits = torch.iinfo(dtype)
    counts = torch.randint(-9 if code.negative != "none" else 0, 10, shape)
    weight = torch.randint(limits.min, limits.max + 1, (4, shape[-1])).to(dtype)
    product = event_matmul(code.encode(counts), weight)
    assert product.dtype == torch.int64
    assert torch.equal(product, counts @ weight.long().T)


def test_event_matmul_reads_only_what_fired() -> None:
    train = CODES["ternary"].encode(torch.tensor([[0, 2, 0], [0, -1, 0]]))
    weight = torch.tensor([[100, 3, 100]], dtype=torch.int16)
    poisoned = weight.clone()
    poisoned[:, [0, 2]] = -32768
    assert event_matmul(train, weight).tolist() == [[6], [-3]]
    assert torch.equal(event_matmul(train, weight), event_matmul(train, poisoned))


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(4, 2, dtype=torch.int8), torch.zeros(3, dtype=torch.int8), torch.zeros(4, 3)],
)
def test_event_matmul_refuses_other_weights(weight: Tensor) -> None:
    with pytest.raises(CodingError, match=r"allowed: \[N, 3\] integers"):
        event_matmul(CODES["binary"].encode(torch.tensor([1, 0, 2])), weight)


@pytest.mark.parametrize(
    ("name", "slot_sparsity", "steps"),
    # 4 counts: 0 silent, 1 and -3 and 0; spikes 0 + 1 + 3 + 0 of 12, and 0 + 1 + 2 + 0 of 8.
    [("ternary", 1 - 4 / 12, 3), ("bitwise_signed", 1 - 3 / 8, 2)],
)
def test_statistics(name: str, slot_sparsity: float, steps: int) -> None:
    found = statistics(CODES[name].encode(torch.tensor([0, 1, -3, 0])))
    assert found.silent_fraction == 0.5
    assert found.slot_sparsity == pytest.approx(slot_sparsity)
    assert found.steps == steps


@given(coded_counts())
def test_silent_fraction_does_not_depend_on_the_code(case: tuple[Code, int, Tensor]) -> None:
    code, steps, counts = case
    silent = float((counts == 0).double().mean()) if counts.numel() else 1.0
    found = statistics(code.encode(counts, steps))
    assert found.silent_fraction == pytest.approx(silent)
    assert 0 <= found.slot_sparsity <= 1


def test_statistics_of_nothing() -> None:
    train = Train(torch.zeros(3, 0, dtype=torch.int8), (1, 2, 4))
    assert (statistics(train).silent_fraction, statistics(train).steps) == (1.0, 3)
