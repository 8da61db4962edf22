# SPDX-License-Identifier: Apache-2.0
"""State and bookkeeping of a run: keys, due dates, evaluation, checkpoints, export."""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath

from opd_jax.model import hf
from opd_jax.model.source import Student
from opd_jax.recorder import Recorder
from opd_jax.stages.evaluate import Suite
from opd_jax.stages.prompts import PromptStream
from opd_jax.stages.update import TrainState
from opd_jax.step import Stages, Step
from opd_jax.workdir import faults, preemption, records, summary
from opd_jax.workdir.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins or goes on."""

    state: TrainState
    step: int  # updates done
    row: dict | None  # metrics of that update that are not yet written; None = all are
    skipped: tuple[str, ...] = ()  # newer checkpoints that could not be used, and why


@dataclasses.dataclass
class Run:
    """A run's parts, made by `build.build`; only the last field changes."""

    workdir: epath.Path
    config: dict  # resolved, as it is written down
    key: jax.Array  # of the run; a step's keys are folded from it
    num_steps: int
    evaluate_every_steps: int  # 0: before the first and after the last update
    checkpoint_every_steps: int  # 0: after the last
    max_skipped: int  # more non-finite updates in a row stop the run
    start: Start
    prompts: PromptStream
    stages: Stages
    suite: Suite  # held-out problems, answered by the student
    teacher_suite: Suite | None  # the same, answered by the teacher; None = not evaluated
    recorder: Recorder
    checkpoints: Checkpoints
    guard: preemption.Guard
    student: Student  # its directory lends the trained student its tokenizer
    skipped_in_a_row: int = 0

    def __enter__(self) -> "Run":
        for line in self.start.skipped:
            self.recorder.say(f"WARNING: checkpoint not usable, an earlier one is: {line}")
        return self

    def __exit__(self, *error) -> None:
        for part in (self.stages, self.recorder, self.checkpoints):
            part.close()

    # --- randomness and due dates ---

    ROLLOUT, EVALUATION = 0, 1  # what a key is for

    def fold(self, step: int, use: int) -> jax.Array:
        """The key of one use in one step: the same on all hosts, and whenever it is asked for."""
        key = self.key
        for number in (step, use):  # put explicitly: hidden transfers are errors in the tests
            key = jax.random.fold_in(key, jax.device_put(np.uint32(number)))
        return key

    def due(self, step: int, every_steps: int) -> bool:
        """True before the first update, after the last, and every so many between."""
        return step in (0, self.num_steps) or bool(every_steps and step % every_steps == 0)

    # --- evaluation ---

    def evaluate(self, params: Any, step: int) -> dict[str, float]:
        """Held-out metrics of the student; its samples go to WORKDIR/eval."""
        row, samples = self.suite(params, self.fold(step, self.EVALUATION), self.guard.check)
        if jax.process_index() == 0:
            records.write_samples(self.workdir, step, samples)
        return row

    # --- checkpoints and faults ---

    def save(self, step: int, state, cursor: dict, row: dict | None, metric: float | None) -> None:
        """Starts a checkpoint of `state` after `step` updates.

        Args:
          cursor: of the prompt stream, before the next batch is drawn.
          row: metrics of that update that are not yet written, or None.
          metric: what the best checkpoints are chosen by; None = not evaluated here.
        """
        if step in self.checkpoints.steps():
            return  # the same bits: training is exact
        cursor = dict(prompts=cursor, row=row)
        self.checkpoints.save(step, state, cursor=cursor, config=self.config, metric=metric)

    def check_skipped(self, step: int, row: dict, taken: Step | None, state: Any) -> None:
        """Keeps the batch of an update that was not finite; stops a run that meets too many.

        Args:
          step: updates before this one.
          row: its metrics.
          taken, state: the step, and the state that it left as it was.
        """
        if not row["update/skipped"]:
            self.skipped_in_a_row = 0
            return
        faults.dump(self.workdir, step + 1, taken, state, self.config)
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.max_skipped:
            self.checkpoints.wait()
            good = self.checkpoints.steps()
            raise FloatingPointError(
                f"{self.skipped_in_a_row} updates in a row were not finite, more than "
                f"config.optim.max_skipped={self.max_skipped}; the parameters are those of the "
                f"last finite one. Last checkpoint: {good[-1] if good else 'none'} under "
                f"{self.workdir}/checkpoints; the batches are under {self.workdir}/faults. "
                "Try a lower --config.optim.learning_rate or --config.model.compute_dtype=float32."
            )

    # --- the end ---

    def finish(self, state: TrainState) -> None:
        """Exports the student, evaluates the teacher, and says what came out."""
        self.checkpoints.wait()
        teacher = {}
        if self.teacher_suite is not None:
            key = self.fold(self.num_steps, self.EVALUATION)
            teacher, _ = self.teacher_suite(self.stages.frozen.teacher, key, self.guard.check)
        output, source = self.workdir / "student", self.student.directory
        hf.save(self.student.config, state.params, output, source=source)
        if jax.process_index() == 0:
            found = summary.of_run(records.read_metrics(self.workdir), teacher)
            records.write_json(self.workdir, "done.json", found | {"step": self.num_steps})
            self.recorder.say(summary.table(found, self.workdir))
