# SPDX-License-Identifier: Apache-2.0
"""Where a row's segment scores drop for good: the BIC test of the paper, eq. (3). Host, float64.

How often a series without any change is cut, in percent: 20,000 rows (5,000 at n = 200) of scores
log1p(x), x exponential with mean 1, independent. The figures in brackets are those that came with
the description of the paper's rule ("at most 11 everywhere" for min_side 3).

   n     min_side=1     min_side=2   min_side=3   min_gain=6, min_side=1 / 3
   2      49.5 (50)        0            0            49.5 / 0
   5      28.5 (29)       16.6          0             6.6 / 0
   10     16.6 (17)       12.9          9.6           2.6 / 1.3
   20      9.9  (9)        8.4          7.3           1.1 / 0.7
   50      5.4  (4)        4.7          4.3           0.4 / 0.3
   100     3.3  (4)        3.0          2.8           0.3 / 0.2
   200     2.8  (1)        2.5          2.3           0.3 / 0.2

So short responses are cut by noise at the paper's letter (min_side = 1; two segments: every
decrease is accepted, as RSS_1 = 0). min_side 2 or 3, or min_gain 6, is recommended; the default
stays the letter.
"""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from opd_jax.settings import Section, number

STRONG_GAIN = 6.0  # nats of BIC gain the paper calls significant
TIE = 1e-9  # BICs this close are a tie, and the smallest change point wins
ROUNDING = 1e-12  # two equal means come out of different sums; relative to the largest score


@dataclasses.dataclass(frozen=True)
class Settings(Section):
    """The test's settings, part of config.selector. The defaults are the paper's letter."""

    section = "selector"

    # Added to every RSS, so that a perfect step has a finite BIC.
    eps: float = number(1e-12, above=0, why="it keeps log(RSS) finite on a perfect step")
    # Fewest segments on either side; the module says how often 1, 2 and 3 cut noise.
    min_side: int = number(1, least=1, why="each side of a change needs a mean")
    min_gain: float = number(0.0)  # nats that the gain must exceed; 6: "strong evidence"
    min_drop: float = number(0.0, least=0)  # least mean before - mean after; 0: any drop
    min_segments: int = number(2, least=0)  # rows with fewer are never cut, but report their gain
    # True: only drops compete for tau*, our reading of "H1 = single drop". False: find the best
    # change of either sign, then reject it if it is not a drop.
    drop_inside_search: bool = True
    penalty_none: float = number(1.0)  # k_0, the paper's count of parameters
    penalty_change: float = number(3.0)  # k_1


DEFAULT = Settings()


@dataclasses.dataclass(frozen=True)
class Drop:
    """Result of `find_drop`. BICs are in nats, lower is better."""

    index: int  # first segment after the drop; n = nothing is released
    gain: float  # bic_none - bic_change of the best drop; -inf when no drop exists
    bic_none: float  # one mean for all segments
    bic_change: float  # one drop, at its best place; inf when no drop exists
    best: int  # first segment after the best drop, accepted or not; n when no drop exists


def find_drop(score_s: ArrayLike, settings: Settings = DEFAULT, **changes: Any) -> Drop:
    r"""The single downward change point of one row, if BIC prefers one. Paper, eq. (3).

    .. math::
      BIC_0 = n \log((RSS_0 + eps) / n) + k_0 \log n, \quad
      BIC_1(\tau) = n \log((RSS_1(\tau) + eps) / n) + k_1 \log n

    RSS_0 is about one mean, RSS_1(tau) about the means of x[:tau] and x[tau:]; k_0 = 1, k_1 = 3.
    tau* minimises BIC_1 among the drops (mean before > mean after); what follows is released iff
    BIC_0 - BIC_1(tau*) > min_gain. BICs within 1e-9 are a tie, which the smallest tau wins.

    Args:
      score_s: float[n], finite, one score per segment.
      settings: eps, min_side, min_gain and the others of `Settings`.
      changes: single settings by name, as `min_side=3`.

    Returns:
      `Drop`. For n = 0 or 1: index n, gain -inf, both BICs NaN.

    Raises:
      ValueError: scores that are not finite or not one row; a setting out of range.
    """
    if changes:
        settings = dataclasses.replace(settings, **changes)
    x = centred(score_s)
    n = len(x)
    if n < 2:
        return Drop(n, -np.inf, np.nan, np.nan, best=n)
    curve = bic_curve(x, settings)
    tau = np.arange(n + 1)
    legal = (tau >= settings.min_side) & (tau <= n - settings.min_side)
    drops = (curve.drop > ROUNDING * np.max(np.abs(x))) & (curve.drop >= settings.min_drop)
    competes = legal & drops if settings.drop_inside_search else legal
    bic_change = np.where(competes, curve.bic_change, np.inf)
    lowest = float(bic_change.min())
    best = int(np.argmax(bic_change <= lowest + TIE))
    if not (legal & drops)[best]:
        return Drop(n, -np.inf, curve.bic_none, np.inf, best=n)
    gain = curve.bic_none - lowest
    accepted = gain > settings.min_gain and n >= settings.min_segments
    return Drop(best if accepted else n, gain, curve.bic_none, lowest, best)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Both hypotheses of eq. (3) on one row; index tau = 0 .. n counts the segments before."""

    bic_none: float  # nats
    bic_change: np.ndarray  # float64[n + 1], nats
    drop: np.ndarray  # float64[n + 1], mean before - mean after


def bic_curve(x: np.ndarray, settings: Settings = DEFAULT) -> Curve:
    """BIC_0, and BIC_1 and the drop for every tau, of scores float64[n], n > 0. Paper, eq. (3)."""
    n, eps = len(x), settings.eps
    rss_before, mean_before = running(x)  # of x[:tau]
    rss_after, mean_after = (value[::-1] for value in running(x[::-1]))  # of x[tau:]
    bic_none = n * np.log((rss_before[n] + eps) / n) + settings.penalty_none * np.log(n)
    bic_change = n * np.log((rss_before + rss_after + eps) / n) + settings.penalty_change * np.log(
        n
    )
    return Curve(float(bic_none), bic_change, mean_before - mean_after)


def running(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """RSS about their own mean, and mean, of the first 0, 1, ..., n values: two float64[n + 1].

    RSS_k = RSS_{k-1} + (x_k - mean_{k-1})^2 (k-1)/k only adds terms >= 0. The textbook sum of
    squares minus squared sum cancels, and a rounding error of 1e-14 is large beside eps = 1e-12.
    """
    count = np.arange(1, len(x) + 1)
    mean = np.concatenate([[0.0], np.cumsum(x) / count])
    growth = (x - mean[:-1]) ** 2 * ((count - 1) / count)
    return np.concatenate([[0.0], np.cumsum(growth)]), mean


def centred(score_s: ArrayLike) -> np.ndarray:
    """A row of finite scores minus its own median, float64[n]; raises ValueError for others.

    Squares of a large common offset would swallow the residuals. The median rather than the mean:
    it leaves a flat row at exactly zero.
    """
    score_s = np.asarray(score_s, np.float64)
    if score_s.ndim != 1:
        raise ValueError(f"score_s has shape {score_s.shape}; find_drop takes one row, float[n]")
    if not np.all(np.isfinite(score_s)):
        raise ValueError(
            "segment scores must be finite to compare BICs: leave out segments without a usable "
            "token, which segment_scores marks as NaN (selectors do)"
        )
    return score_s - np.sort(score_s)[len(score_s) // 2] if len(score_s) else score_s


def robust_scores(score_s: ArrayLike) -> np.ndarray:
    """Scores clipped to their 5 to 95 % quantiles, then a running median of three.

    Not the paper's: the preset of a public re-implementation, which goes with at least 6 segments
    and 3 per side. float[n] -> float64[n].
    """
    score_s = np.asarray(score_s, np.float64)
    if not len(score_s):
        return score_s
    clipped_s = np.clip(score_s, *np.quantile(score_s, [0.05, 0.95]))
    padded_s = np.pad(clipped_s, 1, mode="edge")
    return np.median(np.stack([padded_s[:-2], padded_s[1:-1], padded_s[2:]]), axis=0)
