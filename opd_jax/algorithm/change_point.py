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

import numpy as np

STRONG_GAIN = 6.0  # nats of BIC gain the paper calls significant
TIE = 1e-9  # BICs this close are a tie, and the smallest change point wins


@dataclasses.dataclass(frozen=True)
class Drop:
    """Result of `find_drop`. BICs are in nats, lower is better."""

    index: int  # first segment after the drop; n = nothing is released
    gain: float  # bic_none - bic_change of the best drop; -inf when no drop exists
    bic_none: float  # one mean for all segments
    bic_change: float  # one drop, at its best place; inf when no drop exists
    best: int  # first segment after the best drop, accepted or not; n when no drop exists


def find_drop(
    score_s,
    *,
    eps: float = 1e-12,
    min_side: int = 1,
    min_gain: float = 0.0,
    min_drop: float = 0.0,
    min_segments: int = 2,
    drop_inside_search: bool = True,
    penalty_none: float = 1.0,
    penalty_change: float = 3.0,
) -> Drop:
    r"""The single downward change point of one row, if BIC prefers one. Paper, eq. (3).

    .. math::
      BIC_0 = n \log((RSS_0 + eps) / n) + k_0 \log n, \quad
      BIC_1(\tau) = n \log((RSS_1(\tau) + eps) / n) + k_1 \log n

    RSS_0 is about one mean, RSS_1 about one mean per side; k_0 = 1, k_1 = 3. tau* minimises BIC_1
    among the drops (mean before > mean after); what follows is released iff
    BIC_0 - BIC_1(tau*) > min_gain. BICs within 1e-9 are a tie, which the smallest tau wins.

    Args:
      score_s: float[n], finite, one score per segment.
      eps: added to every RSS, so that a perfect step has a finite BIC. 1e-12: the paper.
      min_side: fewest segments on either side. 1: the paper's letter; see the module for 2 and 3.
      min_gain: nats that the gain must exceed. 0: the paper; 6: "strong evidence".
      min_drop: least mean before - mean after. 0: any drop; the paper names no threshold.
      min_segments: rows with fewer are never cut, but still report their gain.
      drop_inside_search: True: only drops compete for tau*, our reading of "H1 = single drop".
        False: the best change of either sign is found first and rejected if it is no drop.
      penalty_none, penalty_change: k_0 and k_1; 1 and 3 are the paper's count of parameters.

    Returns:
      `Drop`. For n = 0 or 1: index n, gain -inf, both BICs NaN.

    Raises:
      ValueError: scores that are not finite or not one row; a knob out of range.
    """
    score_s = np.asarray(score_s, np.float64)
    if score_s.ndim != 1:
        raise ValueError(f"score_s has shape {score_s.shape}; find_drop takes one row, float[n]")
    drops = find_drops(
        score_s[None],
        np.array([len(score_s)]),
        eps=eps,
        min_side=min_side,
        min_gain=min_gain,
        min_drop=min_drop,
        min_segments=min_segments,
        drop_inside_search=drop_inside_search,
        penalty_none=penalty_none,
        penalty_change=penalty_change,
    )
    return Drop(
        index=int(drops.index[0]),
        gain=float(drops.gain[0]),
        bic_none=float(drops.bic_none[0]),
        bic_change=float(drops.bic_change[0]),
        best=int(drops.best[0]),
    )


def find_drops(
    score_bs,
    num_segments_b,
    *,
    eps: float = 1e-12,
    min_side: int = 1,
    min_gain: float = 0.0,
    min_drop: float = 0.0,
    min_segments: int = 2,
    drop_inside_search: bool = True,
    penalty_none: float = 1.0,
    penalty_change: float = 3.0,
) -> Drop:
    """`find_drop` for every row of a padded batch at once, by prefix sums.

    Args:
      score_bs: float[B, S], finite where s < num_segments_b; anything behind.
      num_segments_b: int[B].
      (others): see `find_drop`.

    Returns:
      `Drop` whose fields are arrays [B].
    """
    check_drop(eps, min_side, min_gain, min_drop)
    num_b = np.asarray(num_segments_b, np.int64)
    score_bs = np.asarray(score_bs, np.float64)
    real_bs = np.arange(score_bs.shape[1]) < num_b[:, None]
    if not np.all(np.isfinite(score_bs[real_bs])):
        raise ValueError(
            "segment scores must be finite to compare BICs: leave out segments without a usable "
            "token before "
            "find_drop (selectors do), as segment_scores marks them NaN"
        )
    centred_bs, spread_b = _centre(np.where(real_bs, score_bs, 0.0), real_bs, num_b)
    rss_none_b, rss_change_bs, drop_bs = _residuals(centred_bs, num_b)

    n_b = np.maximum(num_b, 1).astype(np.float64)
    bic_none_b = n_b * np.log((rss_none_b + eps) / n_b) + penalty_none * np.log(n_b)
    bic_bs = n_b[:, None] * np.log((rss_change_bs + eps) / n_b[:, None])
    bic_bs += penalty_change * np.log(n_b)[:, None]

    tau_s = np.arange(
        score_bs.shape[1]
    )  # segments before the change: also the first segment after it
    legal_bs = (tau_s >= min_side) & (tau_s <= num_b[:, None] - min_side)
    # Two equal means come out of different sums: a difference of rounding size is no drop.
    is_drop_bs = (drop_bs > 1e-12 * spread_b[:, None]) & (drop_bs >= min_drop)
    legal_bs &= is_drop_bs if drop_inside_search else True
    bic_bs = np.where(legal_bs, bic_bs, np.inf)
    bic_change_b = np.min(bic_bs, axis=1, initial=np.inf)
    best_b = np.argmax(bic_bs <= bic_change_b[:, None] + TIE, axis=1) if tau_s.size else num_b
    found_b = np.isfinite(bic_change_b)
    if not drop_inside_search and tau_s.size:
        found_b &= is_drop_bs[np.arange(len(num_b)), best_b]
    best_b = np.where(found_b, best_b, num_b)
    bic_change_b = np.where(found_b, bic_change_b, np.inf)
    gain_b = np.where(found_b, bic_none_b - bic_change_b, -np.inf)
    released_b = found_b & (gain_b > min_gain) & (num_b >= min_segments)
    undefined_b = num_b < 2
    return Drop(
        index=np.where(released_b, best_b, num_b),
        gain=gain_b,
        bic_none=np.where(undefined_b, np.nan, bic_none_b),
        bic_change=np.where(undefined_b, np.nan, bic_change_b),
        best=best_b,
    )


def robust_scores(score_s):
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


def check_drop(eps, min_side, min_gain, min_drop) -> None:
    """Raises ValueError naming the flag unless the knobs of `find_drop` are in range."""
    if not eps > 0:
        raise ValueError(
            f"eps={eps} must be positive, it keeps log(RSS) finite on a perfect step. "
            "Set --config.selector.eps=1e-12"
        )
    if min_side < 1:
        raise ValueError(
            f"min_side={min_side} must be at least 1: each side of a change needs a mean. "
            "Set --config.selector.min_side=1 (the paper) or 3 (few false cuts)"
        )
    if np.isnan(min_gain) or not min_drop >= 0:
        raise ValueError(
            f"min_gain={min_gain} must be a number and min_drop={min_drop} must not be negative. "
            "Set --config.selector.min_gain=0.0 --config.selector.min_drop=0.0"
        )


def _centre(score_bs, real_bs, num_b):
    """Rows minus their own median, and the largest distance from it.

    Squares of a large common offset would swallow the residuals. The median rather than the mean:
    it leaves a flat row at exactly zero.
    """
    if not score_bs.size:
        return score_bs, np.zeros(len(score_bs))
    sorted_bs = np.sort(np.where(real_bs, score_bs, np.inf), axis=1)
    middle_b = np.clip(num_b // 2, 0, score_bs.shape[1] - 1)
    middle_b = sorted_bs[np.arange(len(num_b)), middle_b]
    middle_b = np.where(num_b > 0, middle_b, 0.0)
    centred_bs = np.where(real_bs, score_bs - middle_b[:, None], 0.0)
    return centred_bs, np.max(np.abs(centred_bs), axis=1)


def _residuals(x_bs, num_b):
    """RSS about one mean [B]; over tau [B, S]: RSS about two means, mean before - mean after."""
    B, S = x_bs.shape
    before_bs, mean_before_bs = _running(x_bs)
    # The same from the end: rows reversed within their own length.
    source_bs = num_b[:, None] - 1 - np.arange(S)
    reversed_bs = np.where(
        source_bs >= 0, np.take_along_axis(x_bs, np.maximum(source_bs, 0), axis=1), 0.0
    )
    after_bs, mean_after_bs = _running(reversed_bs)
    last_b = np.maximum(num_b, 0)
    rss_none_b = before_bs[np.arange(B), last_b]
    tau_s = np.arange(S)
    rest_bs = np.clip(num_b[:, None] - tau_s, 0, S)
    rss_change_bs = before_bs[:, :S] + np.take_along_axis(after_bs, rest_bs, axis=1)
    drop_bs = mean_before_bs[:, :S] - np.take_along_axis(mean_after_bs, rest_bs, axis=1)
    return rss_none_b, rss_change_bs, drop_bs


def _running(x_bs):
    """RSS about their own mean, and mean, of the first 0, 1, ..., S values: two arrays [B, S + 1].

    RSS_k = RSS_{k-1} + (x_k - mean_{k-1})^2 (k-1)/k only adds terms >= 0. The textbook sum of
    squares minus squared sum cancels, and a rounding error of 1e-14 is large beside eps = 1e-12.
    """
    B, S = x_bs.shape
    zero_b1 = np.zeros((B, 1))
    count_s = np.arange(1, S + 1)
    mean_bs = np.concatenate([zero_b1, np.cumsum(x_bs, axis=1) / count_s], axis=1)
    growth_bs = (x_bs - mean_bs[:, :-1]) ** 2 * ((count_s - 1) / count_s)
    return np.concatenate([zero_b1, np.cumsum(growth_bs, axis=1)], axis=1), mean_bs
