# SPDX-License-Identifier: Apache-2.0
"""From a rollout and its scores to every token's weight: the host's stage of a step.

  start    hands the responses to worker processes, which cut them into segments while the device
           does the teacher pass (they know token ids and bytes, and no JAX)
  finish   margins -> segment scores -> change point -> supervised tokens -> weights, on this
           host's rows

Trouble in the data is counted and masked, never raised: one host's exception would leave the
others waiting. A token with a teacher value that is not finite is unusable: out of margins,
supervision, weights and denominators.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from opd_jax import structs, workers
from opd_jax.algorithm import margin, segments, selectors

CHUNKS_PER_WORKER = 4  # small enough that workers end together, large enough to pay for a message
RNG_DOMAIN = 0x5E1EC7  # keeps the selectors' draws apart from others of the same seed


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What a step does with each token of this host's rows; index t is response token t."""

    supervised_bt: np.ndarray  # bool[B, T], True = supervised at full strength
    weight_bt: np.ndarray  # float32[B, T], of the token's loss, rescaling included; 0 = none
    denominator: float  # this host's: loss = sum(weight * token_loss) / sum(denominator)
    release_b: np.ndarray  # int[B], first token no longer supervised; = length: nothing released
    gain_b: np.ndarray  # float[B], nats; -inf = no drop, NaN = not sought
    num_segments_b: np.ndarray  # int[B]
    rescale_b: (
        np.ndarray
    )  # float[B], how much a row's tokens weigh more than if all were supervised
    usable_bt: np.ndarray  # bool[B, T], valid and every value finite
    margin_bt: np.ndarray | None  # float32[B, T], nats; NaN where not usable
    spans_b: list | None  # per row, token spans of its segments; None = not asked for
    stats: dict  # name -> (sum, count) over this host's rows


@dataclasses.dataclass
class Stage:
    """The selection stage; made by `build`. Call `start`, then `finish`, once per step."""

    selector: selectors.Selector
    segment_knobs: dict  # of segments.segment_rows
    margin_knobs: dict  # of margin.margin, and include_sampled
    loss_knobs: dict  # of selectors.loss_weights
    pool: workers.Pool | None  # None = segment in line
    num_workers: int
    reads_spans: bool  # by the selector, or for the signals by sentence
    seed: int
    num_steps: int
    gather: Callable
    feed_index: int
    _pending: list | None = None  # rows and future of every chunk handed out by `start`

    @property
    def needs(self) -> frozenset[str]:
        """Fields of structs.Scores that selection reads."""
        sampled = {"teacher_logp_bt"} if self.margin_knobs["include_sampled"] else set()
        return (self.selector.needs - {"spans"}) | sampled

    def start(self, rollout: structs.Rollout) -> None:
        """Begins to segment the responses, if anybody reads segments; returns at once."""
        self._pending = None
        if not self.reads_spans:
            return
        rows = [t[v] for t, v in zip(rollout.tokens_bt, rollout.valid_bt, strict=True)]
        if self.pool is None:
            self._pending = [(rows, None)]
            return
        # Longest rows first, dealt round: chunks of like size, whatever the order of lengths.
        order = np.argsort([-len(row) for row in rows], kind="stable")
        num = min(len(rows), self.num_workers * CHUNKS_PER_WORKER)
        chunks = [order[i::num] for i in range(num)]
        self._pending = [(chunk, self.pool.submit([rows[b] for b in chunk])) for chunk in chunks]

    def finish(self, rollout: structs.Rollout, scores: structs.Scores, step: int) -> Chosen:
        """Selects. Every host must call it when the selector's scope is "batch"."""
        usable_bt, stats = _usable(rollout, scores)
        spans_b, failures = self._spans(rollout)
        signals = self._signals(rollout, scores, usable_bt, spans_b, step)
        chosen = self.selector(signals)
        weight_bt, denominator = selectors.loss_weights(
            chosen.supervised_bt,
            chosen.weight_bt,
            chosen.usable_bt,
            gather=self.gather,
            **self.loss_knobs,
        )
        stats["selection/segmented_in_line"] = (failures, 1)
        return Chosen(
            supervised_bt=chosen.supervised_bt,
            weight_bt=weight_bt,
            denominator=denominator,
            release_b=chosen.release_b,
            gain_b=chosen.gain_b,
            num_segments_b=chosen.num_segments_b,
            rescale_b=_rescale(chosen, weight_bt, self.loss_knobs["aggregate"]),
            usable_bt=chosen.usable_bt,
            margin_bt=signals.margin_bt,
            spans_b=spans_b,
            stats=stats,
        )

    def close(self) -> None:
        """Ends the worker processes."""
        if self.pool is not None:
            self.pool.close()

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _spans(self, rollout):
        """Spans of every row (None if nobody reads them), and chunks whose worker was lost."""
        if not self.reads_spans:
            return None, 0
        if self._pending is None:
            raise RuntimeError("selection.finish was called before selection.start of its rollout")
        spans_b, failures = [None] * len(rollout.tokens_bt), 0
        for chunk, future in self._pending:
            if future is None:
                spans_b = segments.segment_rows(chunk, **self.segment_knobs)
                continue
            try:
                spans_c = [[tuple(span) for span in spans] for spans in future.result()]
            except (OSError, EOFError):  # the worker was killed, twice: this process can do it
                failures += 1
                rows = [rollout.tokens_bt[b][rollout.valid_bt[b]] for b in chunk]
                spans_c = segments.segment_rows(rows, **self.segment_knobs)
            for b, spans in zip(chunk, spans_c, strict=True):
                spans_b[b] = spans
        self._pending = None
        return spans_b, failures

    def _signals(self, rollout, scores, usable_bt, spans_b, step):
        advantage_bt = advantage_std_bt = margin_bt = None
        if scores.teacher_logp_bt is not None:
            gap_bt = _finite(scores.teacher_logp_bt) - _finite(rollout.sampler_logp_bt)
            advantage_bt = np.where(usable_bt, gap_bt, 0.0)
        if scores.teacher_logp_btk is not None:
            teacher_btk = _finite(scores.teacher_logp_btk)
            student_btk = _finite(rollout.candidate_logp_btk)
            margin_bt = self._margins(rollout, scores, teacher_btk, student_btk)
            margin_bt = np.where(usable_bt, margin_bt, np.float32(np.nan))
            advantage_std_bt = np.sqrt(margin.advantage_variance(teacher_btk, student_btk))
        return selectors.Signals(
            valid_bt=rollout.valid_bt,
            usable_bt=usable_bt,
            finished_b=rollout.finished_b,
            margin_bt=margin_bt,
            advantage_bt=advantage_bt,
            advantage_std_bt=advantage_std_bt,
            student_entropy_bt=rollout.entropy_bt,
            teacher_entropy_bt=scores.teacher_entropy_bt,
            candidate_logp_btk=rollout.candidate_logp_btk,
            teacher_logp_btk=scores.teacher_logp_btk,
            spans_b=spans_b,
            step=step,
            num_steps=self.num_steps,
            rng=np.random.default_rng([RNG_DOMAIN, self.seed, step]),
            gather=self.gather,
            first_row=self.feed_index * len(usable_bt),
        )

    def _margins(self, rollout, scores, teacher_btk, student_btk):
        knobs, present_btk = dict(self.margin_knobs), None
        if knobs.pop("include_sampled"):
            teacher_btk, student_btk, present_btk = margin.with_sampled(
                teacher_btk,
                student_btk,
                rollout.candidates_btk,
                (
                    rollout.tokens_bt,
                    _finite(scores.teacher_logp_bt),
                    _finite(rollout.sampler_logp_bt),
                ),
            )
        return margin.margin(
            teacher_logp_btk=teacher_btk,
            student_logp_btk=student_btk,
            present_btk=present_btk,
            **knobs,
        )


def build(
    selector: selectors.Selector,
    token_bytes: list[bytes],
    *,
    segment_kind: str = "nltk",
    punkt: str = "embedded",
    fixed_tokens: int = 32,
    max_tokens: int = 0,
    num_workers: int = 0,
    margin_kind: str = "top1_top2",
    include_sampled: bool = False,
    margin_temperature: float = 1.0,
    aggregate: str = "row_mean",
    rescale: str = "sequence",
    max_rescale: float = 0.0,
    want_spans: bool = False,
    seed: int = 0,
    num_steps: int = 1,
    gather: Callable = selectors.own_rows,
    feed_index: int = 0,
) -> Stage:
    """The selection stage.

    Args:
      selector: of `selectors.build`.
      token_bytes: bytes of every id, b"" for special ones.
      segment_kind, punkt, fixed_tokens, max_tokens: see `segments.segment`.
      num_workers: processes that segment; 0 = in line, in `finish`.
      margin_kind, include_sampled, margin_temperature: see `margin.margin`, `margin.with_sampled`.
      aggregate, rescale, max_rescale: see `selectors.loss_weights`.
      want_spans: True = segment even if the selector does not read it (signals by sentence do).
      seed: of the run.
      num_steps: of the run; growing_prefix reads it.
      gather: rows of this host -> rows of all hosts (parallel.gather_rows of a mesh).
      feed_index: this host's place among those that hold different rows (parallel.feed).

    Raises:
      ValueError: a knob out of range, or punkt_tab is not installed.
    """
    segments.check_segment(segment_kind, punkt, fixed_tokens, max_tokens)
    if segment_kind.startswith("nltk"):
        segments.load_punkt(punkt)  # missing data stops the run here, not a worker in mid-step
    margin.check_margin(margin_kind, margin_temperature)
    selectors.check_loss_weights(aggregate, rescale, max_rescale)
    if num_workers < 0:
        raise ValueError(
            f"num_workers={num_workers} must not be negative; 0 segments in line. "
            "Set --config.segment.num_workers=1"
        )
    spans = want_spans or "spans" in selector.needs
    knobs = dict(kind=segment_kind, punkt=punkt, fixed_tokens=fixed_tokens, max_tokens=max_tokens)
    token_bytes = list(token_bytes)
    pool = None
    if spans and num_workers:
        pool = workers.Pool(
            "opd_jax.algorithm.segments:segment_rows",
            num_workers,
            token_bytes=token_bytes,
            **knobs,
        )
    return Stage(
        selector=selector,
        segment_knobs=dict(token_bytes=token_bytes, **knobs),
        margin_knobs=dict(
            kind=margin_kind, include_sampled=include_sampled, temperature=margin_temperature
        ),
        loss_knobs=dict(aggregate=aggregate, rescale=rescale, max_rescale=max_rescale),
        pool=pool,
        num_workers=num_workers,
        reads_spans=spans,
        seed=seed,
        num_steps=num_steps,
        gather=gather,
        feed_index=feed_index,
    )


def _usable(rollout, scores):
    """bool[B, T], valid tokens whose values are all finite; and how many are not."""
    usable_bt = rollout.valid_bt.copy()
    values = [getattr(scores, field.name) for field in dataclasses.fields(scores)]
    for value in (*values, rollout.sampler_logp_bt, rollout.candidate_logp_btk):
        # Teacher states may stay on the device; the head masks and counts those.
        if isinstance(value, np.ndarray) and not np.issubdtype(value.dtype, np.integer):
            finite = np.isfinite(value)
            usable_bt &= finite if finite.ndim == 2 else finite.all(axis=-1)
    bad = int(rollout.valid_bt.sum() - usable_bt.sum())
    return usable_bt, {"selection/nonfinite_tokens": (bad, int(rollout.valid_bt.sum()))}


def _finite(value):
    """Zeros for what is not finite: such tokens are unusable, and arithmetic must not warn."""
    return np.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)


def _rescale(chosen, weight_bt, aggregate):
    """float[B], final weight over the selector's own, with the row's mean undone; 1 for no row."""
    before_b = chosen.weight_bt.sum(axis=1, dtype=np.float64)
    after_b = weight_bt.sum(axis=1, dtype=np.float64)
    if aggregate == "row_mean":
        after_b = after_b * chosen.usable_bt.sum(axis=1)
    return np.where(after_b > 0, after_b / np.where(before_b > 0, before_b, 1.0), 1.0)
