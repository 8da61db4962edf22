# SPDX-License-Identifier: Apache-2.0
"""Case host: segmentation and selection of a large batch, and how much of it a step waits for."""

import dataclasses
import json
import subprocess
import sys
import time
from typing import Any

import numpy as np

from launch.bench import measure, sizes
from launch.bench.measure import Report
from opd_jax.algorithm import segments, selectors
from opd_jax.stages import selection

# Prose of mathematics as tokens; about every 18th ends a sentence.
WORDS = "the of we so that x = 2 + n is sum and therefore a let value equals by prime each hence"
ENDS = (b".", b"?", b". Then", b".\n\n")
END_SHARE = 1 / 18
SLOTS = 128  # rows that the predicted step decodes at once: 1,024 do not fit v5e:4x4


def host_case(args) -> Report:
    """Seconds that a step waits for the host: --rows responses of --new_tokens tokens.

    Segmentation runs in worker processes while the device scores. A step waits for sending the
    rows to them, for segmentation that is not done when the teacher is, and for selection.
    """
    token_bytes = [b" " + word.encode() for word in WORDS.split()] + list(ENDS)
    rollout, scores = _responses(args, len(token_bytes))
    num_bytes = sum(len(token_bytes[i]) for i in rollout.tokens_bt.reshape(-1))
    taken = []
    settings = segments.Settings(num_workers=args.workers)
    with selection.build(selectors.build("bic"), token_bytes, segment=settings) as stage:
        for i in range(args.warmup + args.repeats):
            seconds, chosen = _measure(stage, rollout, scores)
            if i >= args.warmup:
                taken.append(seconds)
    wait, segment = np.median(taken, axis=0).tolist()
    plan = _plan(args) if args.topology else {}
    score_seconds = plan["stages"]["score"]["seconds"] if plan else 0.0
    exposed = wait + max(0.0, segment - score_seconds)
    row = dict(
        exposed_seconds=exposed,
        segment_seconds=segment,
        start_and_select_seconds=wait,
        mb_per_second=num_bytes / 1e6 / segment,
        segments=int(chosen.num_segments_b.sum()),
        score_seconds=score_seconds,
        step_seconds=plan.get("step_seconds"),
        share_of_step=exposed / plan["step_seconds"] if plan else None,
    )
    notes = [
        f"{args.rows} responses of {args.new_tokens} tokens ({num_bytes / 1e6:.1f} MB), "
        f"{args.workers} worker processes. score and step: what launch.plan predicts for "
        f"{args.topology or 'no slice, see --topology'}; segmentation that outlasts the teacher "
        "pass is exposed"
    ]
    return Report(dict(case="host", seconds=exposed, topology=args.topology, **row), [row], notes)


def _responses(args, num_ids: int):
    """A rollout of random sentences with a teacher whose margin falls halfway through each row."""
    rng = np.random.default_rng(args.seed)
    rollout = sizes.random_rollout(args.rows, 1, args.new_tokens, num_ids, args.seed, 4)
    num_words = num_ids - len(ENDS)
    shape = rollout.tokens_bt.shape
    ends = rng.integers(num_words, num_ids, shape)
    words = rng.integers(0, num_words, shape)
    tokens = np.where(rng.random(shape) < END_SHARE, ends, words).astype(np.int32)
    scores = sizes.random_scores(rollout, ("teacher_logp_bt", "teacher_logp_btk"), 0, 0, None)
    teacher_btk: Any = scores.teacher_logp_btk
    teacher_btk[..., 0] += np.where(np.arange(shape[1]) < shape[1] // 2, 3.0, 0.3)
    return dataclasses.replace(rollout, tokens_bt=tokens), scores


def _measure(stage, rollout, scores):
    """((seconds of start and finish without waiting, seconds of segmentation), what is chosen)."""
    whole = measure.Clock()
    stage.start(rollout)
    stage.finish(rollout, scores, 0)
    together = whole.seconds()
    clock = measure.Clock()
    stage.start(rollout)
    start = clock.seconds()
    time.sleep(together)  # the teacher pass, long enough to hide all of it
    clock = measure.Clock()
    chosen = stage.finish(rollout, scores, 0)
    wait = start + clock.seconds()
    return (wait, max(together - wait, 1e-9)), chosen


def _plan(args) -> dict:
    """launch.plan's prediction of a step of this size, from a separate process."""
    command = [
        sys.executable,
        "-m",
        "launch.plan",
        "--json",
        f"--config={args.config}",
        f"--topology={args.topology}",
        f"--config.data.batch_size={args.rows}",
        f"--config.rollout.response_len={args.new_tokens}",
        f"--config.rollout.num_slots={SLOTS}",
        f"--response_mean={args.new_tokens}",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"ERROR: {' '.join(command[1:])} failed; without it, set --topology=''.")
    plan = json.loads(done.stdout.splitlines()[-1])
    if plan["step_seconds"] is None:
        sys.exit(
            f"ERROR: {args.config} does not compile for --topology={args.topology}, so there is no "
            f"step to compare with: {' '.join(command[1:])} says what is short. Set a larger "
            "--topology, or --topology='' for the seconds alone."
        )
    return plan
