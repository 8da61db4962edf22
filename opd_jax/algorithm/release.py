# SPDX-License-Identifier: Apache-2.0
"""The release rule and the controls that move its release point. Host, numpy."""

import dataclasses
from typing import ClassVar

import numpy as np

from opd_jax.algorithm import change_point, segments
from opd_jax.algorithm.selector import Selector, check, check_in, selection

ROBUST_SIDE, ROBUST_SEGMENTS = 3, 6  # the least of both that the robust preset asks for


@dataclasses.dataclass(frozen=True)
class Release(Selector):
    """The paper's rule: supervise up to the drop of the segments' margins. Paper, eq. (2) to (4).

    Defaults are the paper's, or our reading where it is silent; `change_point.find_drop` explains
    the BIC knobs, `segments.segment_scores` the score's. Segments without a usable token are left
    out of the search. Where no drop is accepted the whole response is supervised.
    """

    aggregate: str = "mean"
    trim: float = 0.1
    transform: str = "log1p"
    eps: float = 1e-12
    min_side: int = 1  # 2 or 3 is recommended: change_point says how often noise is cut
    min_gain: float = 0.0
    min_drop: float = 0.0
    min_segments: int = 2
    drop_inside_search: bool = True
    penalty_none: float = 1.0
    penalty_change: float = 3.0
    robust: bool = False  # change_point.robust_scores, >= 6 segments, >= 3 per side; not the paper
    on_no_change: str = "full"  # "prefix": then only the first no_change_length tokens
    no_change_length: int = 4096
    keep_eos: bool = False  # True: a released EOS stays supervised, so that ending is trained
    min_supervised_tokens: int = 0  # the release point is never before this token
    tail_weight: float = 0.0  # weight of released tokens; 0 = the paper

    needs: ClassVar[frozenset] = frozenset({"teacher_logp_btk", "spans"})

    def __post_init__(self):
        change_point.Settings(self.eps, self.min_side, self.min_gain, self.min_drop)
        check_in(self.aggregate, "aggregate", segments.AGGREGATES)
        check_in(self.transform, "transform", segments.TRANSFORMS)
        check_in(self.on_no_change, "on_no_change", ("full", "prefix"))
        check(0 <= self.trim < 0.5, "trim", self.trim, "in [0, 0.5)", 0.1)
        check(0 <= self.tail_weight <= 1, "tail_weight", self.tail_weight, "in [0, 1]", 0.0)
        length = self.no_change_length
        check(length >= 1, "no_change_length", length, "at least 1 token", 4096)
        least = self.min_supervised_tokens
        check(least >= 0, "min_supervised_tokens", least, "not negative", 0)

    def __call__(self, signals):
        return self.supervise(signals, *self.find_release(signals))

    def find_release(self, signals):
        """release_b int[B] (= length: nothing released), gain_b nats[B], num_segments_b int[B]."""
        release_b = signals.length_b
        gain_b = np.full(len(release_b), -np.inf)
        for b, spans in enumerate(signals.spans_b):
            score_s = self.score(signals, b, spans)
            kept_s = np.flatnonzero(np.isfinite(score_s))
            drop = self.find_drop(score_s[kept_s])
            gain_b[b] = drop.gain
            if drop.index < len(kept_s):
                release_b[b] = spans[kept_s[drop.index]][0]
            elif self.on_no_change == "prefix":
                release_b[b] = min(release_b[b], self.no_change_length)
        return release_b, gain_b, np.array([len(spans) for spans in signals.spans_b], np.int64)

    def score(self, signals, b, spans):
        """float64[S], the segment scores of row b; NaN = no usable token."""
        return segments.segment_scores(
            signals.margin_bt[b],
            spans,
            signals.usable[b],
            aggregate=self.aggregate,
            trim=self.trim,
            transform=self.transform,
        )

    def find_drop(self, score_s):
        """`change_point.find_drop` with this selector's knobs."""
        min_side, min_segments = self.min_side, self.min_segments
        if self.robust:
            score_s = change_point.robust_scores(score_s)
            min_side, min_segments = max(min_side, ROBUST_SIDE), max(min_segments, ROBUST_SEGMENTS)
        return change_point.find_drop(
            score_s,
            eps=self.eps,
            min_side=min_side,
            min_gain=self.min_gain,
            min_drop=self.min_drop,
            min_segments=min_segments,
            drop_inside_search=self.drop_inside_search,
            penalty_none=self.penalty_none,
            penalty_change=self.penalty_change,
        )

    def supervise(self, signals, release_b, gain_b, num_segments_b):
        """`Selection` for the given release points."""
        length_b = signals.length_b
        least_b = np.minimum(self.min_supervised_tokens, length_b)
        release_b = np.clip(release_b, least_b, length_b)
        supervised_bt = signals.position_1t < release_b[:, None]
        if self.keep_eos:
            last_bt = signals.position_1t == length_b[:, None] - 1
            supervised_bt = supervised_bt | (last_bt & signals.finished_b[:, None])
        weight_bt = np.where(supervised_bt, 1.0, self.tail_weight)
        return selection(signals, supervised_bt, weight_bt, release_b, gain_b, num_segments_b)


@dataclasses.dataclass(frozen=True)
class ShuffledRelease(Release):
    """Control: the batch's own release points, dealt to other rows. Paper, ablations.

    A release point travels as its share of the response, so that about as many tokens stay
    supervised; a row that released nothing passes that on. `gain_b` stays with its row.
    """

    scope: ClassVar[str] = "batch"

    def deal(self, rng, num_rows):
        """int[num_rows], the row whose release point each row gets."""
        return rng.permutation(num_rows)

    def __call__(self, signals):
        release_b, gain_b, num_segments_b = self.find_release(signals)
        length_b = signals.length_b
        own_share_b = np.where(length_b > 0, release_b / np.maximum(length_b, 1), 1.0)
        share_b = signals.gather(own_share_b)
        share_b = signals.own(share_b[self.deal(signals.rng, len(share_b))])
        release_b = np.ceil(share_b * length_b - 1e-9).astype(np.int64)
        return self.supervise(signals, release_b, gain_b, num_segments_b)


@dataclasses.dataclass(frozen=True)
class RandomRelease(ShuffledRelease):
    """Control: release points drawn with replacement from the batch's own; else as shuffled."""

    def deal(self, rng, num_rows):
        return rng.integers(max(num_rows, 1), size=num_rows)


@dataclasses.dataclass(frozen=True)
class AdvantageStdRelease(Release):
    """Control: the drop of std(A_t) over each segment of the sampled path. Paper, ablations.

    `aggregate` and `trim` are not read: the segment's value is the standard deviation.
    """

    needs: ClassVar[frozenset] = frozenset({"teacher_logp_bt", "spans"})

    def score(self, signals, b, spans):
        return segments.segment_scores(
            signals.advantage_bt[b],
            spans,
            signals.usable[b],
            aggregate="std",
            transform=self.transform,
        )


SELECTORS = {
    "bic": Release,
    "shuffled_bic": ShuffledRelease,
    "random_bic": RandomRelease,
    "advantage_std_bic": AdvantageStdRelease,
}
