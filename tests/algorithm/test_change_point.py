# SPDX-License-Identifier: Apache-2.0
import math

import hypothesis
import hypothesis.extra.numpy
import numpy as np
import oracle
import pytest
from hypothesis import strategies as st

from opd_jax.algorithm import change_point

NUM_SERIES = 10_000


def series(rng):
    """One row of scores of a random kind: noise, drop, rise, flat, tied, short, offset."""
    n = int(rng.choice([0, 1, 2, 3, *range(4, 13)]))
    kind = rng.integers(8)
    if kind == 0:
        return np.full(n, rng.choice([0.0, 0.1, 1 / 3, 7.7]))
    if kind == 1:
        return rng.integers(0, 3, n).astype(float)
    if kind == 2:
        return rng.integers(0, 3, n) / 10
    step = np.where(np.arange(n) < rng.integers(0, n + 1), rng.normal(), rng.normal())
    if kind == 3:
        return step  # no noise: RSS1 is 0, eps decides
    noise = step + 0.3 * rng.normal(size=n)
    if kind == 4:
        return noise + 1e8
    if kind == 5:
        return np.log1p(rng.exponential(size=n))
    if kind == 6:
        return noise * 1e-6
    return noise


def assert_same(scores, drop, expected):
    index, gain, bic_none, bic_change = expected
    if math.isinf(gain) or math.isnan(bic_none):
        assert drop.gain == gain and drop.index == index, (scores, drop, expected)
        np.testing.assert_allclose([drop.bic_none, drop.bic_change], [bic_none, bic_change], 1e-6)
        return
    found = [drop.gain, drop.bic_none, drop.bic_change]
    np.testing.assert_allclose(found, [gain, bic_none, bic_change], 1e-6, 1e-6, err_msg=str(scores))
    assert drop.index == index, (scores, drop, expected)


def test_find_drop_agrees_with_brute_force_on_ten_thousand_series():
    rng = np.random.default_rng(0)
    seen = {"cut": 0, "kept": 0, "no drop": 0}
    for _ in range(NUM_SERIES):
        scores = series(rng)
        min_side = int(rng.integers(1, 4))
        min_gain = float(rng.choice([0.0, 6.0, -10.0]))
        expected = oracle.find_drop(scores, min_side, min_gain)
        drop = change_point.find_drop(scores, min_side=min_side, min_gain=min_gain)
        assert_same(scores, drop, expected)
        kind = "no drop" if math.isinf(drop.gain) else "cut" if drop.index < len(scores) else "kept"
        seen[kind] += 1
    assert min(seen.values()) > 500, seen  # the comparison saw every outcome


@pytest.mark.parametrize(
    "scores, index, gain",
    [
        ([], 0, -math.inf),
        ([1.0], 1, -math.inf),
        ([1.0, 1.0], 2, -math.inf),
        ([1.0, 2.0], 2, -math.inf),
        ([2.0, 1.0], 1, 2 * math.log((0.5 + 1e-12) / 1e-12) - 2 * math.log(2)),  # n = 2 accepts
        ([3.0, 3.0, 1.0], 2, 3 * math.log((8 / 3 + 1e-12) / 1e-12) - 2 * math.log(3)),
    ],
)
def test_short_series_by_hand(scores, index, gain):
    drop = change_point.find_drop(scores)
    assert drop.index == index
    assert drop.gain == pytest.approx(gain, rel=1e-12)


@pytest.mark.parametrize(
    "scores",
    [
        [2.0, 1.0, 1.0, 0.0],
        # In tenths the later cut comes out a rounding error lower, which is no reason to take it.
        [5 / 10 + 2 / 10, 5 / 10, 5 / 10 - 2 / 10],
        [8 / 10 + 6 / 10, 8 / 10, 8 / 10 - 6 / 10],
    ],
)
def test_equal_bics_release_at_the_smallest_index(scores):
    # Cutting after the first or before the last: the same RSS, mirrored.
    assert change_point.find_drop(scores, min_gain=-100.0).index == 1


def test_a_long_perfect_step_keeps_its_exact_bic():
    # Sum of squares minus squared sum leaves 1e-14 here, which is not small beside eps.
    scores = np.repeat([0.7, 0.1], 400)
    expected = oracle.find_drop(scores)
    assert change_point.find_drop(scores).gain == pytest.approx(expected[1], abs=1e-6)


def test_min_drop_and_min_segments_and_drop_after_the_search():
    scores = np.array([0.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 5.0])  # the best change: the rise at 1
    after = change_point.find_drop(scores, min_gain=-100.0, drop_inside_search=False)
    assert (after.index, after.gain) == (8, -math.inf)
    assert change_point.find_drop(scores, min_gain=-100.0).index == 7
    assert change_point.find_drop(scores, min_gain=-100.0, min_drop=10.0).gain == -math.inf
    few = change_point.find_drop([2.0, 1.0], min_segments=3)
    assert (few.index, few.best) == (2, 1) and few.gain > 0


def test_penalties_count_parameters():
    scores = [3.0, 2.9, 1.0, 1.1]
    drop = change_point.find_drop(scores)
    wide = change_point.find_drop(scores, penalty_none=0.0, penalty_change=5.0)
    assert drop.gain - wide.gain == pytest.approx(3 * math.log(4))


finite_scores = hypothesis.extra.numpy.arrays(
    np.float64,
    st.integers(0, 30),
    elements=st.floats(0, 8, allow_nan=False).map(lambda x: round(x, 3)),
)


@hypothesis.given(finite_scores, st.sampled_from([1.0, 1024.0, -4096.0]))
def test_a_constant_added_to_all_scores_moves_nothing(scores, constant):
    # Scores in multiples of 2**-10, so that the sum with the constant is exact.
    scores = np.round(scores * 1024) / 1024
    one, other = change_point.find_drop(scores), change_point.find_drop(scores + constant)
    assert one.index == other.index
    np.testing.assert_allclose(one.gain, other.gain, rtol=1e-9, atol=1e-9)


@hypothesis.given(finite_scores)
def test_the_index_is_a_segment_and_splits_high_from_low(scores):
    drop = change_point.find_drop(scores)
    assert 0 <= drop.index <= len(scores)
    if drop.index < len(scores):
        assert scores[: drop.index].mean() > scores[drop.index :].mean()
        assert drop.gain > 0


def test_robust_scores_ignore_one_outlier():
    scores = np.array([1.0, 1.1, 9.0, 1.0, 1.1, 1.0, 1.1, 1.0])
    robust = change_point.robust_scores(scores)
    assert robust.max() <= 1.1 and len(robust) == len(scores)
    assert len(change_point.robust_scores([])) == 0


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        change_point.find_drop([1.0, math.nan, 2.0])
    with pytest.raises(ValueError, match="one row"):
        change_point.find_drop([[1.0, 2.0]])
