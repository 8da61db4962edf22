# SPDX-License-Identifier: Apache-2.0
"""Accuracy over repeated samples, and what may be said from few problems or few seeds.

Dims: P problems, n samples per problem, R runs (seeds). Host numpy, float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval; low and high are nan where nothing can be said."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def pass_at_k(correct_pn: np.ndarray, k: int) -> np.ndarray:
    """Chance that at least one of k samples is correct, without bias from reusing n >= k samples.

    1 - C(n - c, k) / C(n, k) with c correct samples (Chen et al. 2021, arXiv 2107.03374), as a
    product so that large n does not overflow.

    Args:
      correct_pn: bool[P, n].
      k: at most n.

    Returns:
      float64[P].
    """
    num_samples = correct_pn.shape[1]
    check_k(k, num_samples)
    wrong_p = num_samples - correct_pn.sum(axis=1)
    # C(w, k) / C(n, k) = prod over i < k of (w - i) / (n - i); zero as soon as w < k.
    i_k = np.arange(k)
    ratio_pk = np.maximum(wrong_p[:, None] - i_k, 0) / (num_samples - i_k)
    return 1.0 - ratio_pk.prod(axis=1)


def majority_at_k(answer_pn: Sequence[Sequence], correct_pn: np.ndarray, k: int) -> np.ndarray:
    """Accuracy of the most frequent answer among k samples, averaged over disjoint blocks of k.

    Answers are compared as given; None does not vote. A tie counts as the mean over the tied
    answers: what breaking it at random comes to. Nobody votes: wrong.

    Args:
      answer_pn: P sequences of n hashable answers or None.
      correct_pn: bool[P, n]; an answer counts as correct by the mean over its samples.
      k: at most n; the last n % k samples are left out.

    Returns:
      float64[P].
    """
    num_samples = correct_pn.shape[1]
    check_k(k, num_samples)
    blocks = [slice(i, i + k) for i in range(0, num_samples - k + 1, k)]
    return np.array(
        [
            np.mean([_vote(answer_n[b], correct_n[b]) for b in blocks])
            for answer_n, correct_n in zip(answer_pn, np.asarray(correct_pn, float), strict=True)
        ]
    )


def _vote(answer_n: Sequence, correct_n: np.ndarray) -> float:
    votes: dict = {}
    for answer, correct in zip(answer_n, correct_n, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(correct)
    most = max((len(v) for v in votes.values()), default=0)
    return float(np.mean([np.mean(v) for v in votes.values() if len(v) == most])) if votes else 0.0


def bootstrap(value_p: np.ndarray, *, num_resamples: int = 4000, seed: int = 0) -> Interval:
    """Mean over problems with a 95 % percentile bootstrap interval; problems are the unit.

    Says how far the mean would move with other problems of the same kind. It knows nothing of
    other training seeds: that is `over_seeds`. All values equal (or one problem): Wilson's interval
    for 0/1 values, because resampling cannot leave the value it saw.
    """
    value_p = np.asarray(value_p, dtype=np.float64)
    P = value_p.size
    if P == 0:
        return Interval(np.nan, np.nan, np.nan)
    if np.all(value_p == value_p[0]):
        binary = value_p[0] in (0.0, 1.0)
        return (
            wilson(int(value_p.sum()), P) if binary else Interval(float(value_p[0]), np.nan, np.nan)
        )
    from scipy import stats  # takes seconds to import: not at the start of every command

    found = stats.bootstrap(
        (value_p,),
        np.mean,
        n_resamples=num_resamples,
        batch=max(1, 10_000_000 // P),  # resamples at once: bounds the memory
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(value_p.mean()), float(found.low), float(found.high))


def wilson(num_correct: int, num: int) -> Interval:
    """Wilson's 95 % score interval of a proportion."""
    from scipy import stats

    found = stats.binomtest(num_correct, num).proportion_ci(method="wilson")
    return Interval(num_correct / num, float(found.low), float(found.high))


def over_seeds(value_r: np.ndarray) -> Interval:
    """Mean over runs with Student's 95 % t interval (R - 1 degrees of freedom).

    Says how far the mean would move with other seeds on the same problems. One run: no interval.
    """
    value_r = np.asarray(value_r, dtype=np.float64)
    R = value_r.size
    if R == 0:
        return Interval(np.nan, np.nan, np.nan)
    mean = float(value_r.mean())
    if R == 1:
        return Interval(mean, np.nan, np.nan)
    half = special.stdtrit(R - 1, 0.975) * value_r.std(ddof=1) / np.sqrt(R)
    return Interval(mean, mean - half, mean + half)


def paired_over_seeds(value: dict, baseline: dict) -> tuple[Interval, int]:
    """Difference to a baseline, seed by seed: (t interval of value - baseline, number of pairs).

    Args:
      value, baseline: seed -> value. Seeds that only one of them has are left out.
    """
    seeds = sorted(set(value) & set(baseline))
    return over_seeds(np.array([value[s] - baseline[s] for s in seeds])), len(seeds)


def check_k(k: int, num_samples: int) -> None:
    if not 1 <= k <= num_samples:
        raise ValueError(
            f"k={k} with {num_samples} samples per problem: pass@k and majority@k need 1 <= k <= "
            f"samples. Set --num_samples={max(k, 1)} or a smaller k"
        )
