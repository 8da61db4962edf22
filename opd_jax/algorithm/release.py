# SPDX-License-Identifier: Apache-2.0
"""The release rule and the controls that move its release point. Host, numpy."""

import dataclasses
from typing import ClassVar

import numpy as np

from opd_jax.algorithm import change_point, segments
from opd_jax.algorithm.selector import Selection, Selector, Signals, selection
from opd_jax.settings import choice, number

ROBUST_SIDE, ROBUST_SEGMENTS = 3, 6  # the least of both that the robust preset asks for


@dataclasses.dataclass(frozen=True)
class Release(change_point.Settings, Selector):
    """The paper's rule: supervise up to the drop of the segments' margins. Paper, eq. (2) to (4).

      S_i = log(1 + mean of M_t over segment i)            `score`, eq. (2)
      tau* = where the S_i drop, if BIC prefers a drop     `find_drop`, eq. (3)
      q_t = 1 before the first token of segment tau* + 1   `supervise`, the mask of eq. (5)

    Defaults are the paper's, or our reading where it is silent. Segments without a usable token are
    left out of the search. Where no drop is accepted the whole response is supervised.
    """

    aggregate: str = choice("mean", segments.AGGREGATES)  # of a segment, segments.segment_scores
    trim: float = number(0.1, least=0, below=0.5)
    transform: str = choice("log1p", segments.TRANSFORMS)
    robust: bool = False  # change_point.robust_scores, >= 6 segments, >= 3 per side; not the paper
    on_no_change: str = choice("full", ("full", "prefix"))  # "prefix": the first no_change_length
    no_change_length: int = number(4096, least=1)  # tokens
    keep_eos: bool = False  # True: a released EOS stays supervised, so that ending is trained
    min_supervised_tokens: int = number(0, least=0)  # the release point is never before this token
    tail_weight: float = number(0.0, least=0, most=1)  # of released tokens; 0 = the paper

    needs: ClassVar[frozenset[str]] = frozenset({"teacher_logp_btk", "spans"})

    def __call__(self, signals: Signals) -> Selection:
        return self.supervise(signals, *self.find_release(signals))

    def find_release(self, signals: Signals) -> tuple[np.ndarray, np.ndarray]:
        """release_b int[B] (= length: nothing released), and gain_b float[B], nats."""
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
        return release_b, gain_b

    def score(self, signals: Signals, b: int, spans: segments.Spans) -> np.ndarray:
        """float64[S], the segment scores of row b; NaN = no usable token."""
        return segments.segment_scores(
            signals.margin_bt[b],
            spans,
            signals.usable[b],
            aggregate=self.aggregate,
            trim=self.trim,
            transform=self.transform,
        )

    def find_drop(self, score_s: np.ndarray) -> change_point.Drop:
        """`change_point.find_drop` with this selector's settings."""
        if not self.robust:
            return change_point.find_drop(score_s, self)
        return change_point.find_drop(
            change_point.robust_scores(score_s),
            self,
            min_side=max(self.min_side, ROBUST_SIDE),
            min_segments=max(self.min_segments, ROBUST_SEGMENTS),
        )

    def supervise(self, signals: Signals, release_b: np.ndarray, gain_b: np.ndarray) -> Selection:
        """`Selection` for the given release points."""
        length_b = signals.length_b
        least_b = np.minimum(self.min_supervised_tokens, length_b)
        release_b = np.clip(release_b, least_b, length_b)
        supervised_bt = signals.position_1t < release_b[:, None]
        if self.keep_eos:
            last_bt = signals.position_1t == length_b[:, None] - 1
            supervised_bt = supervised_bt | (last_bt & signals.finished_b[:, None])
        weight_bt = np.where(supervised_bt, 1.0, self.tail_weight)
        return selection(signals, supervised_bt, weight_bt, release_b, gain_b)


@dataclasses.dataclass(frozen=True)
class ShuffledRelease(Release):
    """Control: the batch's own release points, dealt to other rows. Paper, ablations.

    A release point travels as its share of the response, so that about as many tokens stay
    supervised; a row that released nothing passes that on. `gain_b` stays with its row.
    """

    scope: ClassVar[str] = "batch"

    def deal(self, rng: np.random.Generator, num_rows: int) -> np.ndarray:
        """int[num_rows], the row whose release point each row gets."""
        return rng.permutation(num_rows)

    def __call__(self, signals: Signals) -> Selection:
        release_b, gain_b = self.find_release(signals)
        length_b = signals.length_b
        local_share_b = np.where(length_b > 0, release_b / np.maximum(length_b, 1), 1.0)
        share_b = signals.gather(local_share_b)
        share_b = signals.local(share_b[self.deal(signals.rng, len(share_b))])
        release_b = np.ceil(share_b * length_b - 1e-9).astype(np.int64)
        return self.supervise(signals, release_b, gain_b)


@dataclasses.dataclass(frozen=True)
class RandomRelease(ShuffledRelease):
    """Control: release points drawn with replacement from the batch's own; else as shuffled."""

    def deal(self, rng: np.random.Generator, num_rows: int) -> np.ndarray:
        return rng.integers(max(num_rows, 1), size=num_rows)


@dataclasses.dataclass(frozen=True)
class AdvantageStdRelease(Release):
    """Control: the drop of std(A_t) over each segment of the sampled path. Paper, ablations.

    `aggregate` and `trim` are not read: the segment's value is the standard deviation.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"teacher_logp_bt", "spans"})

    def score(self, signals: Signals, b: int, spans: segments.Spans) -> np.ndarray:
        return segments.segment_scores(
            signals.advantage_bt[b],
            spans,
            signals.usable[b],
            aggregate="std",
            transform=self.transform,
        )


SELECTORS: dict[str, type[Selector]] = {
    "bic": Release,
    "shuffled_bic": ShuffledRelease,
    "random_bic": RandomRelease,
    "advantage_std_bic": AdvantageStdRelease,
}
