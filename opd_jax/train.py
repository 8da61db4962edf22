# SPDX-License-Identifier: Apache-2.0
"""A run: the student learns from the teacher on its own rollouts, up to each release point.

One step, in this order:

  1 prompts     the next batch, this host's rows of it
  2 rollout     the student samples responses; the sampler also keeps its top-K candidates
  3 segment     worker processes cut the responses into sentences, while ...
  4 score       ... the teacher gives log-probs of the sampled tokens and of the candidates
  5 select      margin -> sentence scores -> change point -> which tokens are supervised (host)
  6 update      rows cropped at their last supervised token, packed, gradients summed, one update
  7 evaluate    when due; then one row of metrics for this update is written
  8 checkpoint  when due

The order is a contract. Evaluation and checkpoint follow the update they belong to, so row n of
metrics.jsonl and checkpoint n both speak of the student after n updates (row 0: before the first).
The row is on disk before its checkpoint, and a checkpoint holds the data cursor before the next
prompts are drawn: whatever moment a run is killed at, the same command ends with the same bits.
Nothing random is stored: keys and generators follow from the seed and the step.

Left out on purpose: replay, asynchronous rollouts, rewards, several epochs per batch.
"""

import contextlib
import time

import jax
import ml_collections as mlc

from opd_jax import build
from opd_jax.job import Job
from opd_jax.workdir import faults, owner, preemption


def run(config: mlc.ConfigDict, workdir: str) -> None:
    """Trains, or goes on with the run that `workdir` holds; the end of it is in its done.json.

    Raises:
      ValueError: something in the config cannot work, or another run is in the workdir; says which
        flag to set to what.
      preemption.Preempted: asked to stop by SIGTERM; checkpointed, the same call goes on.
      FloatingPointError: too many updates in a row were not finite; names the last checkpoint.
      OSError: a checkpoint could not be written; names those that are whole.
    """
    with owner.hold(workdir), build.build(config, workdir) as job:
        job.finish(_loop(job))


def _loop(job: Job):
    """Steps until the last; returns the trained state."""
    state, step, row = job.start.state, job.start.step, job.start.row
    while True:
        cursor = job.prompts.state()
        try:
            if row is not None:  # of update `step`, not yet written
                if job.due(step, job.every.evaluate):
                    clock = Clock()
                    with clock("evaluate"):
                        row = row | job.evaluate(state.params, step)
                    row = row | {f"time/{k}": v for k, v in clock.seconds.items()}
                job.write(step, row)
                accuracy, row = row.get("eval/accuracy"), None
                if step and job.due(step, job.every.checkpoint):
                    job.save(step, state, cursor, row, metric=accuracy)
            if step == job.num_steps:
                return state
            state, row = _step(job, state, step)
            step += 1
        except preemption.Preempted:
            job.save(step, state, cursor, row, metric=None)
            raise


def _step(job: Job, state, step: int):
    """Stages 1 to 6; until the update the run is as it was, so a step can be abandoned."""
    clock = Clock()
    prompts = next(job.prompts)
    with clock("rollout"):
        key = job.fold(step, job.ROLLOUT)
        rolled, stats = job.sampler.run(
            job.sampling_params(state), prompts, key, between=job.guard.check
        )
    job.guard.check()
    with clock("score"):
        job.selection.start(rolled)
        scores = job.score(job.teacher_params, rolled, job.reference_params)
    job.guard.check()
    with clock("select"):
        chosen = job.selection.finish(rolled, scores, step)
    job.guard.check()
    with clock("update"):
        batch = rolled, scores, chosen.weight_bt, chosen.denominator
        state, sums = job.update(state, *batch, job.teacher_head_vd)
        sums = jax.device_get(sums)
    row = job.describe(step, prompts, rolled, stats, scores, chosen, sums, clock.seconds)
    if row["update/skipped"]:
        faults.dump(job.workdir, step + 1, *batch, state, job.config)
    job.check_skipped(row)
    return state, row


class Clock:
    """Seconds of each named stage; every stage ends on the host, so wall time is its time."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str):
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
