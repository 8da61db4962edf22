# SPDX-License-Identifier: Apache-2.0
"""Sample statistics against hand counts, brute force and simulated coverage."""

import itertools
import math

import numpy as np
import pytest

from opd_jax.problems import intervals


@pytest.mark.parametrize("num_samples,k", [(1, 1), (5, 1), (5, 3), (5, 5), (7, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(num_samples, k):
    rows = np.array(list(itertools.product([False, True], repeat=num_samples)))
    expected = [np.mean([any(s) for s in itertools.combinations(row, k)]) for row in rows]
    np.testing.assert_allclose(intervals.pass_at_k(rows, k), expected, atol=1e-12)


def test_pass_at_k_by_hand_and_at_sizes_that_overflow_factorials():
    correct = np.zeros((1, 4), bool)
    correct[0, :2] = True  # 2 of 4: 1 - C(2,2)/C(4,2) = 5/6
    assert intervals.pass_at_k(correct, 2)[0] == pytest.approx(5 / 6)
    many = np.zeros((1, 2000), bool)
    many[0, :10] = True
    exact = 1 - math.comb(1990, 500) / math.comb(2000, 500)
    assert intervals.pass_at_k(many, 500)[0] == pytest.approx(exact, rel=1e-9)


def test_majority_votes_ties_abstentions_and_blocks():
    def vote(answers, right, k=None):
        correct = np.array([[a == right for a in answers]])
        return intervals.majority_at_k([answers], correct, k or len(answers))[0]

    assert vote(["7", "7", "3"], "7") == 1.0
    assert vote(["7", "3", "3"], "7") == 0.0
    assert vote(["7", "3"], "7") == 0.5  # a tie, broken at random
    assert vote(["7", None, None, None], "7") == 1.0  # no answer does not vote
    assert vote([None, None], "7") == 0.0
    assert vote(["7", "3", "7", "7", "3"], "7", k=2) == 0.75  # blocks (7, 3) and (7, 7)


def test_bootstrap_covers_the_truth_and_is_reproducible():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        value = rng.binomial(4, rng.beta(2, 3, size=60)) / 4  # problems differ in difficulty
        interval = intervals.bootstrap(value, num_resamples=500, seed=trial)
        hits += interval.low <= 0.4 <= interval.high
    assert 0.89 <= hits / 200 <= 0.99
    value = rng.uniform(size=20)
    assert intervals.bootstrap(value) == intervals.bootstrap(value)


def test_bootstrap_of_many_problems_is_nearly_the_normal_interval():
    value = np.random.default_rng(0).uniform(size=3000)
    interval, half = intervals.bootstrap(value), 1.96 * value.std() / math.sqrt(3000)
    assert interval.low == pytest.approx(value.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(value.mean() + half, abs=0.1 * half)


def test_bootstrap_of_values_that_do_not_vary():
    perfect = intervals.bootstrap(np.ones(30))
    assert perfect.high == 1.0 and 0.85 < perfect.low < 0.9  # Wilson: 30 of 30
    assert np.isnan(intervals.bootstrap(np.full(3, 0.25)).low)
    assert np.isnan(intervals.bootstrap(np.array([])).mean)


@pytest.mark.parametrize("num_correct, num", [(10, 20), (0, 1), (1, 1), (30, 30), (1, 272), (7, 9)])
def test_wilson_inverts_the_score_test(num_correct, num):
    """Its ends are the p at which |p_hat - p| = 1.96 standard errors *of p*; 10 of 20 is published
    as 0.299 to 0.701 (Brown, Cai and DasGupta 2001).
    """
    interval = intervals.wilson(num_correct, num)
    assert interval.mean == num_correct / num
    for end, edge in ((interval.low, 0.0), (interval.high, 1.0)):
        squared = (interval.mean - end) ** 2 * num
        assert end == edge == interval.mean or squared == pytest.approx(
            1.959964**2 * end * (1 - end), rel=1e-6
        )
    if (num_correct, num) == (10, 20):
        assert (round(interval.low, 3), round(interval.high, 3)) == (0.299, 0.701)


def test_bootstrap_of_three_problems_is_the_exact_percentile():
    """27 equally likely resamples of 0, 0, 1: a mean of 0 has 8/27, of 1 has 1/27 > 2.5 %."""
    interval = intervals.bootstrap(np.array([0.0, 0.0, 1.0]))
    assert (interval.low, interval.high) == (0.0, 1.0)
    assert interval.mean == pytest.approx(1 / 3)


def test_seed_interval_uses_student_t():
    interval = intervals.over_seeds(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)  # t table, 4 degrees of freedom
    assert interval.mean == 3.0
    assert interval.high - 3.0 == pytest.approx(half, rel=1e-5)
    assert np.isnan(intervals.over_seeds(np.array([1.0])).low)


def test_paired_difference_removes_what_the_seeds_share():
    full = {0: 0.10, 1: 0.50, 2: 0.90, 9: 0.0}
    rule = {0: 0.12, 1: 0.51, 2: 0.93, 7: 1.0}
    interval, pairs = intervals.paired_over_seeds(rule, full)
    assert pairs == 3 and interval.mean == pytest.approx(0.02)
    assert interval.high - interval.low < 0.06  # the seeds alone span 0.8
