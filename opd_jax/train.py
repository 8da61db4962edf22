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

Stages 2 to 6 are step.py's; the order is a contract. Evaluation and checkpoint follow the update
they belong to, so row n of metrics.jsonl and checkpoint n both speak of the student after n updates
(row 0: before the first). The row is on disk before its checkpoint, and a checkpoint holds the data
cursor before the next prompts are drawn: whatever moment a run is killed at, the same command ends
with the same bits. Nothing random is stored: keys and generators follow from the seed and the step.

Left out on purpose: replay, asynchronous rollouts, rewards, several epochs per batch.
"""

import ml_collections as mlc

from opd_jax import build
from opd_jax.run import Run
from opd_jax.stages.update import TrainState
from opd_jax.step import Clock
from opd_jax.workdir import owner, preemption


def run(config: mlc.ConfigDict, workdir: str) -> None:
    """Trains, or goes on with the run that `workdir` holds; the end of it is in its done.json.

    Raises:
      ValueError: something in the config cannot work, or another run is in the workdir; says which
        flag to set to what.
      preemption.Preempted: asked to stop by SIGTERM; checkpointed, the same call goes on.
      FloatingPointError: too many updates in a row were not finite; names the last checkpoint.
      OSError: a checkpoint could not be written; names those that are whole.
    """
    with owner.hold(workdir), build.build(config, workdir) as built:
        built.finish(_loop(built))


def _loop(run: Run) -> TrainState:
    """Steps until the last; returns the trained state."""
    state, step, row = run.start.state, run.start.step, run.start.row
    while True:
        cursor = run.prompts.state()
        try:
            if row is not None:  # of update `step`, not yet written
                if run.due(step, run.evaluate_every_steps):
                    clock = Clock()
                    with clock("evaluate"):
                        row = row | run.evaluate(state.params, step)
                    row = row | {f"time/{k}": v for k, v in clock.seconds.items()}
                run.recorder.write(step, row)
                accuracy, row = row.get("eval/accuracy"), None
                if step and run.due(step, run.checkpoint_every_steps):
                    run.save(step, state, cursor, row, metric=accuracy)
            if step == run.num_steps:
                return state
            state, row = _step(run, state, step)
            step += 1
        except preemption.Preempted:
            run.save(step, state, cursor, row, metric=None)
            raise


def _step(run: Run, state: TrainState, step: int) -> tuple[TrainState, dict]:
    """Stages 1 to 6, and the row of metrics; until the update the run is as it was."""
    prompts = next(run.prompts)
    key = run.fold(step, run.ROLLOUT)
    state, taken = run.stages(state, prompts, key, step, run.guard.check)
    row = run.recorder.row(step, taken)
    run.check_skipped(step, row, taken, state)
    return state, row
