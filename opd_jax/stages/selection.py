# SPDX-License-Identifier: Apache-2.0
"""From a rollout and its scores to every token's weight: the host's stage of a step.

  start    hands the responses to worker processes, which cut them into segments while the device
           does the teacher pass (they know token ids and bytes, and no JAX)
  finish   margins -> segment scores -> change point -> supervised tokens -> weights, on this
           host's rows

Trouble in the data is counted and masked, never raised: one host's exception would leave the
others waiting. A token with a value that is not finite, of those that the selector or the objective
reads, is unusable: out of margins, supervision, weights and denominators. What is there for a log
alone decides nothing.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from opd_jax import structs, workers
from opd_jax.algorithm import margin, segments, weights
from opd_jax.algorithm.objective import Objective
from opd_jax.algorithm.selector import NEEDS, Selector, Signals, local_rows

CHUNKS_PER_WORKER = 4  # small enough that workers end together, large enough to pay for a message
RNG_DOMAIN = 0x5E1EC7  # keeps the selectors' draws apart from others of the same seed


@dataclasses.dataclass(frozen=True)
class Run:
    """What selection has to know of the run that it is part of."""

    seed: int = 0
    num_steps: int = 1  # growing_prefix reads it
    gather: Callable[[np.ndarray], np.ndarray] = local_rows  # this host's rows -> rows of all hosts
    host_group: int = 0  # this host's, among those that hold different rows


LOCAL = Run()


@dataclasses.dataclass
class Stage:
    """The selection stage; made by `build`. Call `start`, then `finish`, once per step."""

    selector: Selector
    token_bytes: list[bytes]
    margin: margin.Settings
    segment: segments.Settings
    objective: Objective
    run: Run
    reads_spans: bool  # by the selector, or for the profiles by sentence
    pool: workers.Pool | None  # None = segment in line
    _pending: list | None = None  # rows and future of every chunk handed out by `start`

    @property
    def needs(self) -> frozenset[str]:
        """Fields of structs.Scores that selection reads."""
        sampled = {"teacher_logp_bt"} if self.margin.include_sampled else set()
        return (self.selector.needs - {"spans"}) | sampled

    def start(self, rollout: structs.Rollout) -> None:
        """Begins to segment the responses, if anybody reads segments; returns at once."""
        self._pending = None
        if not self.reads_spans:
            return
        rows = [t[v] for t, v in zip(rollout.tokens_bt, rollout.valid_bt, strict=True)]
        if self.pool is None:
            self._pending = [(range(len(rows)), None)]
            return
        # Longest rows first, dealt round: chunks of like size, whatever the order of lengths.
        order = np.argsort([-len(row) for row in rows], kind="stable")
        num = min(len(rows), self.segment.num_workers * CHUNKS_PER_WORKER)
        chunks = [order[i::num] for i in range(num)]
        self._pending = [(chunk, self.pool.submit([rows[b] for b in chunk])) for chunk in chunks]

    def finish(
        self, rollout: structs.Rollout, scores: structs.Scores, step: int
    ) -> structs.Supervision:
        """Selects. Every host must call it when the selector's scope is "batch"."""
        usable_bt, stats = _usable(rollout, scores, self.needs | self.objective.needs)
        spans_b, failures = self._spans(rollout)
        margin_bt = self._margins(rollout, scores, usable_bt)
        signals = self._signals(rollout, scores, usable_bt, margin_bt, spans_b, step)
        chosen = self.selector(signals)
        weight_bt, denominator, factor_b = weights.loss_weights(
            chosen.supervised_bt, chosen.weight_bt, usable_bt, self.objective, self.run.gather
        )
        num_segments_b = np.zeros(len(usable_bt), np.int64)
        if "spans" in self.selector.needs:
            num_segments_b[:] = [len(spans) for spans in spans_b]
        return structs.Supervision(
            supervised_bt=chosen.supervised_bt,
            weight_bt=weight_bt,
            denominator=denominator,
            release_b=chosen.release_b,
            gain_b=chosen.gain_b,
            num_segments_b=num_segments_b,
            rescale_b=factor_b,
            usable_bt=usable_bt,
            margin_bt=margin_bt,
            spans_b=spans_b,
            stats=stats | {"selection/segmented_in_line": (float(failures), 1.0)},
        )

    def close(self) -> None:
        """Ends the worker processes."""
        if self.pool is not None:
            self.pool.close()

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _spans(self, rollout: structs.Rollout) -> tuple[Any, int]:
        """Spans of every row (None if nobody reads them), and chunks whose worker was lost."""
        if not self.reads_spans:
            return None, 0
        if self._pending is None:
            raise RuntimeError("selection.finish was called before selection.start of its rollout")
        spans_b: list = [None] * len(rollout.tokens_bt)
        failures = 0
        for chunk, future in self._pending:
            spans_c = None
            if future is not None:
                try:
                    spans_c = [[tuple(span) for span in spans] for spans in future.result()]
                except (OSError, EOFError):  # the worker was killed, twice: this process can do it
                    failures += 1
            if spans_c is None:
                rows = [rollout.tokens_bt[b][rollout.valid_bt[b]] for b in chunk]
                settings = dataclasses.asdict(self.segment)
                spans_c = segments.segment_rows(
                    rows, token_bytes=self.token_bytes, settings=settings
                )
            for b, spans in zip(chunk, spans_c, strict=True):
                spans_b[b] = spans
        self._pending = None
        return spans_b, failures

    def _margins(self, rollout, scores, usable_bt):
        """float32[B, T], NaN where not usable; None where the teacher's candidates are not there.

        The selector may not have asked for them: then they are for the log alone.
        """
        if scores.teacher_logp_btk is None:
            return None
        present_btk = None
        teacher_btk = _finite(scores.teacher_logp_btk)
        student_btk = _finite(rollout.candidate_logp_btk)
        if self.margin.include_sampled:
            teacher_bt, student_bt = scores.teacher_logp_bt, rollout.sampler_logp_bt
            sampled = (rollout.tokens_bt, _finite(teacher_bt), _finite(student_bt))
            teacher_btk, student_btk, present_btk = margin.with_sampled(
                teacher_btk, student_btk, rollout.candidates_btk, sampled
            )
        margin_bt = margin.margin(self.margin, teacher_btk, student_btk, present_btk)
        finite_bt = usable_bt & np.isfinite(scores.teacher_logp_btk).all(axis=-1)
        return np.where(finite_bt, margin_bt, np.float32(np.nan))

    def _signals(self, rollout, scores, usable_bt, margin_bt, spans_b, step):
        """What the selector named in `needs`, and what every rollout brings with it."""
        needs, named = self.selector.needs, {}
        if "teacher_logp_bt" in needs:
            gap_bt = _finite(scores.teacher_logp_bt) - _finite(rollout.sampler_logp_bt)
            named["advantage_bt"] = np.where(usable_bt, gap_bt, 0.0)
        if "teacher_logp_btk" in needs:
            named |= {"margin_bt": margin_bt, "teacher_logp_btk": scores.teacher_logp_btk}
        if "spans" in needs:
            named["spans_b"] = spans_b
        return Signals(
            valid_bt=rollout.valid_bt,
            usable_bt=usable_bt,
            finished_b=rollout.finished_b,
            student_entropy_bt=rollout.entropy_bt,
            candidate_logp_btk=rollout.candidate_logp_btk,
            **named,
            step=step,
            num_steps=self.run.num_steps,
            rng=np.random.default_rng([RNG_DOMAIN, self.run.seed, step]),
            gather=self.run.gather,
            first_row=self.run.host_group * len(usable_bt),
        )


def build(
    selector: Selector,
    token_bytes: Iterable[bytes],
    margin: margin.Settings = margin.DEFAULT,
    segment: segments.Settings = segments.DEFAULT,
    objective: Objective = weights.DEFAULT,
    *,
    want_spans: bool = False,
    run: Run = LOCAL,
) -> Stage:
    """The selection stage.

    Args:
      selector: of `selectors.build`.
      token_bytes: bytes of every id, b"" for special ones.
      margin, segment, objective: the config's sections; of the objective, eq. (5) and what it reads
        of the teacher's scores, as a token whose values are not finite takes part in nothing.
      want_spans: True = segment even if the selector does not read it (profiles by sentence do).
      run: the run's seed and length, and how rows lie on its hosts.

    Raises:
      ValueError: punkt_tab is not installed, or the selector needs what nobody can deliver.
    """
    if unknown := sorted(selector.needs - set(NEEDS)):
        raise ValueError(
            f"{type(selector).__name__}.needs names {', '.join(unknown)}; a selector can ask for "
            f"{', '.join(NEEDS)}"
        )
    if segment.kind.startswith("nltk"):
        segments.load_punkt(segment.punkt)  # missing data stops the run here, not a worker later
    token_bytes = list(token_bytes)
    reads_spans = want_spans or "spans" in selector.needs
    pool = None
    if reads_spans and segment.num_workers:
        pool = workers.Pool(
            "opd_jax.algorithm.segments:segment_rows",
            segment.num_workers,
            token_bytes=token_bytes,
            settings=dataclasses.asdict(segment),
        )
    return Stage(selector, token_bytes, margin, segment, objective, run, reads_spans, pool)


def _usable(rollout, scores, reads):
    """bool[B, T], valid tokens whose values are all finite; and how many are not.

    Args:
      reads: fields of the scores that decide what is trained.
    """
    usable_bt = rollout.valid_bt.copy()
    values = [getattr(scores, name) for name in sorted(reads)]
    for value in (*values, rollout.sampler_logp_bt, rollout.candidate_logp_btk):
        # Teacher states may stay on the device; the head masks and counts those.
        if isinstance(value, np.ndarray) and not np.issubdtype(value.dtype, np.integer):
            finite = np.isfinite(value)
            usable_bt &= finite if finite.ndim == 2 else finite.all(axis=-1)
    bad = int(rollout.valid_bt.sum() - usable_bt.sum())
    return usable_bt, {"selection/nonfinite_tokens": (float(bad), float(rollout.valid_bt.sum()))}


def _finite(value):
    """Zeros for what is not finite: such tokens are unusable, and arithmetic must not warn."""
    return np.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)
