from __future__ import annotations

import itertools

import numpy as np
import pytest

from spikelm.errors import ConfigError
from spikelm_train.samplers import (
    CYCLE,
    CarriedWindows,
    MixedLanes,
    Mixture,
    PackedDocuments,
    RandomWindows,
    shares,
)

EOS = 9999


def stream(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Documents of distinct tokens, each begun by the separator, and where they start."""
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    starts = np.cumsum([0, *lengths[:-1]])
    tokens[starts] = EOS
    return tokens, starts


def test_random_windows_are_distinct_deterministic_and_rank_independent() -> None:
    tokens = np.arange(500, dtype=np.uint16)
    sampler = RandomWindows(tokens, 8, rows_per_step=64, seed=3)
    rows = sampler.rows(5, 0, 64)
    assert rows.shape == (64, 9)
    assert (np.diff(rows) == 1).all()
    assert len(set(rows[:, 0])) == 64
    parts = [RandomWindows(tokens, 8, 64, 3).rows(5, i, i + 16) for i in range(0, 64, 16)]
    assert np.array_equal(np.concatenate(parts), rows)
    assert not np.array_equal(sampler.rows(6, 0, 64), rows)
    assert not np.array_equal(RandomWindows(tokens, 8, 64, 4).rows(5, 0, 64), rows)


def test_random_windows_reach_both_ends_and_may_repeat_when_they_must() -> None:
    tokens = np.arange(10, dtype=np.uint16)
    sampler = RandomWindows(tokens, 8, rows_per_step=6, seed=0)
    rows = np.concatenate([sampler.rows(step, 0, 6) for step in range(10)])
    assert set(rows[:, 0]) == {0, 1}
    assert rows.max() == 9


def test_packed_documents_use_every_token_once_per_epoch() -> None:
    tokens, starts = stream([5, 1, 17, 3, 30, 4])
    sampler = PackedDocuments(tokens, starts, 10, rows_per_step=3, seed=1)
    targets = np.concatenate([sampler.rows(step, 0, 3)[:, 1:].ravel() for step in range(2)])
    # The 60 targets of two steps are the epoch's tokens 1..59 and the next epoch's separator.
    assert sorted(targets) == sorted(tokens)
    assert targets[-1] == EOS


def test_packed_documents_stay_whole_and_are_reshuffled() -> None:
    lengths = [5, 1, 17, 3, 30, 4]
    tokens, starts = stream(lengths)
    sampler = PackedDocuments(tokens, starts, 6, rows_per_step=1, seed=1)
    rows = [sampler.rows(step, 0, 1)[0] for step in range(20)]
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(rows))
    whole = np.concatenate([row[:-1] for row in rows])
    expected = sorted(tuple(part) for part in np.split(tokens, np.cumsum(lengths)[:-1]))
    orders = []
    for epoch in (whole[:60], whole[60:]):
        found = [tuple(part) for part in np.split(epoch, np.flatnonzero(epoch == EOS)[1:])]
        assert sorted(found) == expected
        orders.append(found)
    assert orders[0] != orders[1]


def test_packed_documents_are_a_pure_function_of_the_row() -> None:
    tokens, starts = stream([5, 1, 17, 3, 30, 4])
    whole = PackedDocuments(tokens, starts, 7, rows_per_step=8, seed=1)
    rows = np.concatenate([whole.rows(step, 0, 8) for step in range(4)])
    fresh = PackedDocuments(tokens, starts, 7, rows_per_step=8, seed=1)
    assert np.array_equal(fresh.rows(3, 2, 6), rows[26:30])
    longer = PackedDocuments(tokens, starts, 200, rows_per_step=1, seed=1).rows(0, 0, 1)
    assert longer.shape == (1, 201)


def test_carried_windows_go_on_where_they_were() -> None:
    tokens, starts = stream([5, 1, 17, 3, 30, 4])
    sampler = CarriedWindows(tokens, starts, 6, rows_per_step=4, seed=1)
    steps = [sampler.rows(step, 0, 4) for step in range(25)]
    for a, b in itertools.pairwise(steps):
        assert np.array_equal(a[:, -1], b[:, 0])
    lanes = np.concatenate([rows[:, :-1] for rows in steps], axis=1)
    # Each lane reads whole documents, the cut ones at both ends aside.
    documents = {tuple(part) for part in np.split(tokens, starts[1:])}
    for lane in lanes:
        parts = np.split(lane, np.flatnonzero(lane == EOS))[1:-1]
        assert len(parts) > 5
        assert {tuple(part) for part in parts} <= documents
    # At first the lanes together are one epoch.
    assert sorted(lanes[:, :15].ravel()) == sorted(tokens)
    again = CarriedWindows(tokens, starts, 6, rows_per_step=4, seed=1)
    assert np.array_equal(again.rows(17, 1, 3), steps[17][1:3])


def mixture(rows_per_step: int) -> Mixture:
    """Three of four rows from tokens below 1000, the others from those above."""
    low, starts = stream([5, 1, 17, 3, 30, 4])
    high, _ = stream([8, 40, 12])
    high[high != EOS] += 1000
    return Mixture(
        [
            PackedDocuments(low, starts, 6, rows_per_step, seed=1),
            PackedDocuments(high, np.array([0, 8, 48]), 6, rows_per_step, seed=1),
        ],
        [3, 1],
        rows_per_step,
        seed=2,
    )


def test_a_mixture_has_its_weights_and_its_texts_in_order() -> None:
    whole = mixture(8)
    assert whole.counts == [7500, 2500]
    rows = np.concatenate([whole.rows(step, 0, 8) for step in range(CYCLE // 8, CYCLE // 4)])
    is_high = np.where(rows == EOS, 0, rows).max(1) >= 1000
    assert is_high.sum() == 2500
    # Not in turns.
    assert 300 < np.diff(is_high.astype(int)).clip(0).sum() < 2200
    for mine in (rows[is_high], rows[~is_high]):
        assert np.array_equal(mine[:-1, -1], mine[1:, 0])


def test_a_mixture_is_a_pure_function_of_the_row() -> None:
    rows = np.concatenate([mixture(8).rows(step, 0, 8) for step in (1249, 1250, 1251)])
    parts = [mixture(8).rows(1249 + i // 4, i % 4 * 2, i % 4 * 2 + 2) for i in range(12)]
    assert np.array_equal(np.concatenate(parts), rows)
    # Packed rows follow the row's number in the run, however many make a step.
    assert np.array_equal(mixture(4).rows(2 * 1250, 0, 4), rows[8:12])


def test_a_mixture_of_random_windows() -> None:
    parts = [RandomWindows(np.arange(n, n + 400, dtype=np.uint16), 8, 6, 0) for n in (0, 1000)]
    sampler = Mixture(parts, [0.5, 0.5], 6, seed=0)
    rows = np.concatenate([sampler.rows(step, 0, 6) for step in range(50)])
    assert (np.diff(rows) == 1).all()
    assert 100 < (rows[:, 0] >= 1000).sum() < 200


def test_mixed_lanes_stay_in_their_text() -> None:
    low, starts = stream([5, 1, 17, 3, 30, 4])
    parts = [CarriedWindows(t, starts, 6, n, seed=0) for t, n in ((low, 3), (low + 1000, 1))]
    sampler = MixedLanes(parts)
    for step in range(3):
        rows = sampler.rows(step, 0, 4)
        assert np.array_equal(rows[:3], parts[0].rows(step, 0, 3))
        assert np.array_equal(rows[3:], parts[1].rows(step, 0, 1))
        assert np.array_equal(sampler.rows(step, 2, 4), rows[2:])


def test_shares() -> None:
    assert shares([1, 1, 1], 10) == [4, 3, 3]
    assert shares([0.7, 0.3], 4) == [3, 1]
    assert shares([5], 3) == [3]
    with pytest.raises(ConfigError, match=r"weight 0.01 of 1.01 is less than one of 4 rows"):
        shares([1, 0.01], 4)
