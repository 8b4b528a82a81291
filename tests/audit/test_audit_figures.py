"""The audit's estimators, against exact counts and published values."""

from __future__ import annotations

import itertools
import math

import pytest

from unierase_plugin.audit.figures import (
    auc,
    bootstrap,
    depth_score,
    difference,
    extraction_strength,
    interval,
    leak_at_k,
    wilson,
)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_leak_at_k_is_the_share_of_subsets_with_a_hit(n: int) -> None:
    for hits, k in itertools.product(range(n + 1), range(1, n + 1)):
        right = [index < hits for index in range(n)]
        subsets = list(itertools.combinations(right, k))
        assert leak_at_k(n, hits, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_leak_at_k_is_unbiased() -> None:
    n, k, chance = 6, 3, 0.3
    weights = [math.comb(n, hits) * chance**hits * (1 - chance) ** (n - hits) for hits in range(n + 1)]
    expected = sum(weight * leak_at_k(n, hits, k) for hits, weight in enumerate(weights))
    assert expected == pytest.approx(1 - (1 - chance) ** k, abs=1e-12)


@pytest.mark.parametrize(("n", "hits", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_leak_at_k_refuses_what_cannot_be(n: int, hits: int, k: int) -> None:
    with pytest.raises(ValueError, match="leak@"):
        leak_at_k(n, hits, k)


def test_wilson_solves_its_equation() -> None:
    """The limits are the shares p at which |hits/n - p| is 1.96 standard errors of p."""
    for hits, n in [(1, 10), (5, 20), (19, 20)]:
        for limit in wilson(hits, n):
            assert abs(hits / n - limit) == pytest.approx(1.959964 * math.sqrt(limit * (1 - limit) / n), rel=1e-6)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 20) == (0.0, pytest.approx(0.16113, abs=1e-4))  # type: ignore[comparison-overlap]
    assert wilson(20, 20) == (pytest.approx(0.83887, abs=1e-4), 1.0)  # type: ignore[comparison-overlap]
    assert wilson(0, 0) == (0.0, 1.0)


def test_difference_is_newcombes() -> None:
    # Newcombe 1998, table II, example (a): 56/70 against 48/80 gives 0.0524 to 0.3339 by method 10.
    low, high = difference(56 / 70, wilson(56, 70), 48 / 80, wilson(48, 80))
    assert (low, high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))  # type: ignore[comparison-overlap]


def test_bootstrap_has_the_width_of_a_mean() -> None:
    values = [0.0, 1.0] * 50
    low, high = bootstrap(values)
    assert low == pytest.approx(0.4, abs=0.02)
    assert high == pytest.approx(0.6, abs=0.02)
    assert bootstrap(values) == (low, high)


def test_interval_of_like_fractions_is_not_a_point() -> None:
    low, high = interval([0.1] * 10)
    assert low < 0.05
    assert high > 0.2


def test_auc_counts_pairs() -> None:
    assert auc([3, 4], [1, 2]) == 1.0
    assert auc([1, 2], [3, 4]) == 0.0
    assert auc([1, 3], [1, 2]) == pytest.approx((0.5 + 0 + 1 + 1) / 4)
    assert auc([], [1]) == 0.5


@pytest.mark.parametrize(
    ("wanted", "predicted", "strength"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 2, 3, 4], [9, 2, 3, 4], 0.75),
        ([1, 2, 3, 4], [1, 9, 3, 4], 0.5),
        ([1, 2, 3, 4], [1, 2, 3, 9], 0.0),
        ([1, 2, 3, 4], [9, 9, 9, 9], 0.0),
    ],
)
def test_extraction_strength(wanted: list[int], predicted: list[int], strength: float) -> None:
    assert extraction_strength(wanted, predicted) == strength


def test_depth_of_unlearning() -> None:
    baseline = [0.04, 1.0, 3.0]
    assert depth_score(baseline, baseline) == 1.0
    assert depth_score(baseline, [9.0, 0.0, 0.0]) == 0.0
    # The blocks weigh what they hold; what goes beyond the reference, or helps, counts as all or nothing.
    assert depth_score(baseline, [0.0, 5.0, 1.5]) == pytest.approx((1.0 + 1.5) / 4.0)
    assert depth_score(baseline, [0.0, -5.0, 3.0]) == pytest.approx(3.0 / 4.0)
    assert depth_score([0.05, 0.0], [1.0, 1.0]) is None
