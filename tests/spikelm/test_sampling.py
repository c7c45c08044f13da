from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikelm.errors import RequestError, SpikelmError
from spikelm.sampling import Sampler, SamplingParams

PROBABILITIES = [0.4, 0.3, 0.15, 0.1, 0.05]
LOGITS = torch.tensor(PROBABILITIES).log()


def draws(logits: torch.Tensor, count: int = 4000, **params: Any) -> torch.Tensor:
    """Relative frequency of each token over `count` draws of one seeded request."""
    sampler = Sampler(SamplingParams(**{"seed": 0, **params}))
    tokens = torch.tensor([sampler.sample(logits) for _ in range(count)])
    return torch.bincount(tokens, minlength=len(logits)) / count


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, 2.1, math.nan, math.inf, "1", True, None, 10**400]),
        ("top_k", [0, -1, 1.5, True, "5", 2**63]),
        ("top_p", [-0.1, 1.1, math.nan, None]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("typical_p", [-0.1, 1.1, math.nan]),
        ("penalty_decay", [-0.1, 1.1, math.nan, None]),
        ("repetition_penalty", [0, -1, 11, math.inf, math.nan]),
        ("presence_penalty", [-2.1, 2.1, math.nan]),
        ("frequency_penalty", [-2.1, 2.1, -math.inf]),
        ("seed", [1.0, "7", 2**63, -(2**63) - 1, False]),
        ("max_tokens", [0, -5, 1.0, None, True]),
    ],
)
def test_params_refuse_values_out_of_range(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(RequestError, match=f"^{name}: .* given; allowed: ") as caught:
            SamplingParams(**{name: value})
        assert caught.value.param == name
        assert caught.value.status == 400


@pytest.mark.parametrize(
    "corner",
    [
        {"temperature": 0, "top_k": 1, "top_p": 0, "min_p": 1, "repetition_penalty": 0.1},
        {"temperature": 2, "top_p": 1, "presence_penalty": -2, "frequency_penalty": 2},
        {"max_tokens": 1, "seed": -(2**63)},
    ],
)
def test_params_accept_the_corners(corner: dict[str, Any]) -> None:
    params = SamplingParams(**corner)
    assert {name: getattr(params, name) for name in corner} == corner
    assert 0 <= Sampler(params).sample(LOGITS) < len(LOGITS)


def test_defaults_draw_from_the_distribution_itself() -> None:
    # Five standard deviations of a binomial share.
    for share, p in zip(draws(LOGITS).tolist(), PROBABILITIES, strict=True):
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / 4000)


def test_same_seed_same_tokens_whatever_else_runs() -> None:
    alone = Sampler(SamplingParams(seed=7))
    first = [alone.sample(LOGITS) for _ in range(50)]
    torch.manual_seed(1)
    again, other = Sampler(SamplingParams(seed=7)), Sampler(SamplingParams(seed=8))
    second, different = [], []
    for _ in range(50):
        torch.rand(3)
        different.append(other.sample(LOGITS))
        second.append(again.sample(LOGITS))
    assert second == first
    assert different != first


def test_sampling_leaves_the_global_generator_and_the_logits_alone() -> None:
    torch.manual_seed(3)
    before, logits = torch.random.get_rng_state(), LOGITS.clone()
    sampler = Sampler(SamplingParams(repetition_penalty=2.0, temperature=0.5), [0])
    unseeded = [sampler.sample(logits) for _ in range(40)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(logits, LOGITS)
    other = Sampler(SamplingParams(repetition_penalty=2.0, temperature=0.5), [0])
    assert [other.sample(logits) for _ in range(40)] != unseeded


def test_temperature_zero_takes_the_lowest_id_of_the_best() -> None:
    sampler = Sampler(SamplingParams(temperature=0))
    assert sampler.sample(torch.tensor([0.0, 2.0, 1.0, 2.0, 2.0])) == 1
    assert sampler.sample(torch.zeros(1000)) == 0


def test_temperature_sharpens_and_survives_extremes() -> None:
    squared = [p * p / sum(q * q for q in PROBABILITIES) for p in PROBABILITIES]
    assert draws(LOGITS, temperature=0.5)[0] == pytest.approx(squared[0], abs=0.04)
    assert draws(LOGITS, count=20, temperature=1e-300)[0] == 1
    huge = torch.tensor([3e38, -3e38, 3e38, 0.0, 0.0])
    assert draws(huge, count=400)[[0, 2]].tolist() == pytest.approx([0.5, 0.5], abs=0.15)


def test_top_k_keeps_k_tokens_and_breaks_ties_by_id() -> None:
    shares = draws(LOGITS, top_k=2)
    assert shares[:2].tolist() == pytest.approx([4 / 7, 3 / 7], abs=0.04)
    assert shares[2:].sum() == 0
    assert (draws(torch.zeros(6), count=200, top_k=3) > 0).tolist() == [True] * 3 + [False] * 3
    assert draws(LOGITS, top_k=99).gt(0).all()


@pytest.mark.parametrize(("top_p", "kept"), [(0.0, 1), (0.39, 1), (0.41, 2), (0.8, 3), (0.99, 5)])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: int) -> None:
    assert (draws(LOGITS, count=800, top_p=top_p) > 0).sum() == kept


def test_top_p_counts_what_top_k_left() -> None:
    # 0.4 of the 0.7 that top_k leaves is 0.57, so 0.5 is reached by one token.
    assert draws(LOGITS, count=200, top_k=2, top_p=0.5)[0] == 1


@pytest.mark.parametrize(("min_p", "kept"), [(0.0, 5), (0.2, 4), (0.7, 2), (0.76, 1), (1.0, 1)])
def test_min_p_is_a_fraction_of_the_best(min_p: float, kept: int) -> None:
    assert (draws(LOGITS, count=800, min_p=min_p) > 0).sum() == kept


@pytest.mark.parametrize(
    ("typical_p", "kept"), [(0.1, [1]), (0.35, [1, 0]), (0.75, [1, 0, 2]), (1.0, [0, 1, 2, 3, 4])]
)
def test_typical_p_keeps_what_surprises_as_expected(typical_p: float, kept: list[int]) -> None:
    # Entropy 1.393 nats; surprises 0.92, 1.20, 1.90, 2.30, 3.00.
    drawn = draws(LOGITS, typical_p=typical_p)
    assert sorted(kept) == drawn.nonzero()[:, 0].tolist()
    total = sum(PROBABILITIES[token] for token in kept)
    for token in kept:
        assert drawn[token] == pytest.approx(PROBABILITIES[token] / total, abs=0.03)


def test_typical_p_leaves_something_whatever_the_logits() -> None:
    for logits in (torch.tensor([0.0, -1e30, 50.0]), torch.zeros(9), torch.tensor([3.0])):
        for temperature in (1e-6, 1.0, 2.0):
            params = SamplingParams(typical_p=0.0, temperature=temperature, seed=1)
            assert 0 <= Sampler(params).sample(logits) < len(logits)
    allowed = torch.tensor([False, True, True])
    params = SamplingParams(typical_p=0.5, seed=1)
    assert Sampler(params).sample(torch.tensor([9.0, 0.0, 1.0]), allowed) in (1, 2)


def test_penalties_decay() -> None:
    logits = torch.tensor([1.0, 0.0])
    # Token 0 was drawn 1, 1.5 and 1.75 times when it is asked for again, instead of 1, 2 and 3.
    sampler = Sampler(SamplingParams(temperature=0, frequency_penalty=0.6, penalty_decay=0.5))
    assert [sampler.sample(logits) for _ in range(5)] == [0, 0, 0, 1, 0]
    lasting = Sampler(SamplingParams(temperature=0, frequency_penalty=0.6))
    assert [lasting.sample(logits) for _ in range(5)] == [0, 0, 1, 0, 1]


def test_filters_see_the_tempered_distribution() -> None:
    # At temperature 0.5 the best token alone has 0.56 of the mass.
    assert draws(LOGITS, count=200, temperature=0.5, top_p=0.5)[0] == 1


def greedy(logits: list[float], count: int, prompt: tuple[int, ...] = (), **params: Any) -> Any:
    sampler = Sampler(SamplingParams(temperature=0, **params), prompt)
    return [sampler.sample(torch.tensor(logits)) for _ in range(count)]


def test_presence_penalty_counts_generated_tokens_once() -> None:
    # 3.0 drops to 1.5 after its first use, then stays; the prompt does not count.
    assert greedy([3.0, 2.0, 1.0], 5, (0, 0), presence_penalty=1.5) == [0, 1, 0, 0, 0]


def test_frequency_penalty_counts_every_generated_token() -> None:
    # 3 2 1 -> 2 2 1 -> 1 2 1 -> 1 1 1 -> 0 1 1
    assert greedy([3.0, 2.0, 1.0], 5, (1, 1), frequency_penalty=1.0) == [0, 0, 1, 0, 1]


def test_repetition_penalty_counts_prompt_and_generated_tokens() -> None:
    # 4 / 2 = 2 for the prompt's token; 3 is used and becomes 1.5.
    assert greedy([4.0, 3.0, 1.0], 3, (0, 0), repetition_penalty=2.0) == [1, 0, 0]
    # Negative logits are multiplied: -1 becomes -3, below -2.
    assert greedy([-1.0, -2.0], 1, (0,), repetition_penalty=3.0) == [1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature))
    with pytest.raises(SpikelmError, match="1 of 3 logits are NaN or infinite"):
        sampler.sample(torch.tensor([0.0, bad, 1.0]))


def test_low_precision_logits_draw_as_their_float32_values() -> None:
    half = LOGITS.to(torch.bfloat16)
    for one, other in ((half, half.float()), (LOGITS.double(), LOGITS)):
        assert torch.equal(draws(one, count=100), draws(other, count=100))


@settings(deadline=None, max_examples=200)
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12),
    temperature=st.floats(0, 2),
    top_k=st.one_of(st.none(), st.integers(1, 15)),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_a_draw_is_one_of_the_tokens_the_filters_keep(
    logits: list[float],
    temperature: float,
    top_k: int | None,
    top_p: float,
    min_p: float,
    seed: int,
) -> None:
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    token = Sampler(params).sample(torch.tensor(logits))
    assert sum(other > logits[token] for other in logits) < (top_k or len(logits))
    if temperature > 0.01:
        relative = math.exp((logits[token] - max(logits)) / temperature)
        assert relative > 0.999 * min_p
    else:
        assert logits[token] >= max(logits) - 2


def by_sorting_everything(scores: torch.Tensor, params: SamplingParams, uniform: float) -> int:
    """The draw as its definition says: sort, if there is something to filter, filter, find the
    place.
    """
    ordered, ids = torch.sort(scores, descending=True, stable=True)
    if params.top_k is None and (params.top_p, params.min_p) == (1, 0):
        weights = torch.exp((scores - ordered[0]) / params.temperature).double()
        return int((weights.cumsum(0) <= uniform * weights.sum()).sum())
    weights = torch.exp((ordered - ordered[0]) / params.temperature).double()[: params.top_k]
    cumulative = weights.cumsum(0)
    kept = int((cumulative < params.top_p * cumulative[-1]).sum()) + 1
    kept = min(kept, int((weights >= params.min_p).sum()), len(weights))
    return int(
        ids[int((cumulative[:kept] <= uniform * cumulative[kept - 1]).sum().clamp(max=kept - 1))]
    )


@pytest.mark.parametrize(
    "fields",
    [{}, {"top_p": 0.9}, {"top_p": 0.999}, {"min_p": 0.01}, {"top_k": 7}, {"temperature": 2.0}]
    + [{"top_k": 3000, "top_p": 0.99}, {"top_p": 0.95, "min_p": 0.3, "temperature": 0.5}],
)
def test_a_draw_sorts_only_what_it_needs(fields: dict[str, float]) -> None:
    g = torch.Generator().manual_seed(0)
    for seed, spread in enumerate([0.0, 0.1, 1.0, 4.0, 20.0] * 4):
        scores = (torch.randn(5000, generator=g) * spread).round(decimals=1)  # with ties
        params = SamplingParams(seed=seed, **fields)  # type: ignore[arg-type]
        uniform = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = Sampler(params).sample(scores)
        assert found == by_sorting_everything(scores, params, float(uniform)), (fields, spread)


def test_which_logits_matter() -> None:
    assert SamplingParams(temperature=0).logits_within == 0
    assert SamplingParams(temperature=0.5).logits_within == pytest.approx(4.5)
    assert SamplingParams(temperature=0, frequency_penalty=0.1).logits_within is None
    assert SamplingParams(repetition_penalty=1.1).logits_within is None
