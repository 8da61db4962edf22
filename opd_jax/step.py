# SPDX-License-Identifier: Apache-2.0
"""One step of on-policy distillation: its stages on one mesh, and what came out of them.

  rollout   the student samples responses; the sampler also keeps its top-K candidates
  segment   worker processes cut the responses into sentences, while ...
  score     ... the teacher gives log-probs of the sampled tokens and of the candidates
  select    margin -> sentence scores -> change point -> which tokens are supervised (host)
  update    rows cropped at their last supervised token, packed, gradients summed, one update

Until the update nothing of a run has changed, so a step can be abandoned between two stages.
Training calls a whole step; a diagnosis stops before the update; a plan compiles the stages.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from opd_jax.stages import rollout, score, selection, update
from opd_jax.structs import Prompts, Rollout, Scores, Supervision


class Clock:
    """Seconds of each named stage; every stage ends on the host, so wall time is its time."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def go_on() -> None:
    """The check of who never wants to stop."""


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Parameters that are read and never updated, as inference wants them."""

    teacher: Any = None
    teacher_head_vd: jax.Array | None = None  # for objectives that read its hidden states
    reference: Any = None


@dataclasses.dataclass
class Step:
    """What one step produced; rows are this host's."""

    prompts: Prompts
    rollout: Rollout
    stats: rollout.Stats
    scores: Scores
    supervision: Supervision
    seconds: dict[str, float]  # of each stage
    sums: dict[str, tuple] = dataclasses.field(
        default_factory=dict
    )  # of the update, over all hosts


@dataclasses.dataclass
class Stages:
    """The stages on one mesh. `select` and `frozen` are left out where nothing runs (plans)."""

    mesh: jax.sharding.Mesh
    sampler: rollout.Sampler
    sampled_by: str  # "student", or "teacher" for supervised training on the teacher's samples
    score: score.Score
    update: update.Update
    select: selection.Stage | None = None
    frozen: Frozen = Frozen()

    def __call__(
        self,
        state: update.TrainState,
        prompts: Prompts,
        key: jax.Array,
        step: int,
        check: Callable[[], None] = go_on,
    ) -> tuple[update.TrainState, Step]:
        """A whole step after `step` updates. Every host calls it.

        Args:
          state: donated to the update.
          key: of this step's rollout.
          check: called between stages and between chunks of decoding, equally often on all hosts;
            it may raise to abandon the step.
        """
        params = state.params if self.sampled_by == "student" else self.frozen.teacher
        taken = self.observe(params, prompts, key, step, check=check)
        clock = Clock()
        with clock("update"):
            state, sums = self.learn(state, taken.rollout, taken.scores, taken.supervision)
        return state, dataclasses.replace(taken, sums=sums, seconds=taken.seconds | clock.seconds)

    def observe(
        self,
        params: Any,
        prompts: Prompts,
        key: jax.Array,
        step: int,
        *,
        check: Callable[[], None] = go_on,
        sampler: rollout.Sampler | None = None,
    ) -> Step:
        """All stages before the update. `sampler`, with its `params`: another model's answers."""
        clock = Clock()
        with clock("rollout"):
            sampled, stats = (sampler or self.sampler).run(params, prompts, key, between=check)
        check()
        scores, supervision = self.supervise(sampled, step, clock=clock, check=check)
        return Step(prompts, sampled, stats, scores, supervision, clock.seconds)

    def supervise(
        self,
        sampled: Rollout,
        step: int,
        *,
        clock: Clock | None = None,
        check: Callable[[], None] = go_on,
    ) -> tuple[Scores, Supervision]:
        """Scores of a rollout, and what the selector makes of them."""
        clock = clock or Clock()
        with clock("score"):
            self.select.start(sampled)
            scores = self.score(self.frozen.teacher, sampled, self.frozen.reference)
        check()
        with clock("select"):
            supervision = self.select.finish(sampled, scores, step)
        check()
        return scores, supervision

    def learn(
        self,
        state: update.TrainState,
        sampled: Rollout,
        scores: Scores,
        supervision: Supervision,
    ) -> tuple[update.TrainState, dict[str, tuple[np.ndarray, np.ndarray]]]:
        """One update; the new state, and sums name -> (sum, count) over all hosts."""
        weight_bt, denominator = supervision.weight_bt, supervision.denominator
        head_vd = self.frozen.teacher_head_vd
        state, sums = self.update(state, sampled, scores, weight_bt, denominator, head_vd)
        return state, jax.device_get(sums)

    def close(self) -> None:
        """Ends the worker processes."""
        if self.select is not None:
            self.select.close()
