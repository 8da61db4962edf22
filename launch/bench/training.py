# SPDX-License-Identifier: Apache-2.0
"""Cases update, crop, score and step: the stages of a step, at the sizes of the flags."""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from launch.bench import generate, measure, sizes
from launch.bench.measure import Report
from opd_jax import parallel, structs
from opd_jax.algorithm import selectors
from opd_jax.algorithm.objective import Objective
from opd_jax.model import qwen3
from opd_jax.stages import packing, rollout, score, selection, update

FRACTIONS = (1.0, 0.5, 0.25, 0.13)  # supervised shares of a response, case crop
UNRELEASED, MEDIAN_RELEASE = 0.21, 0.13  # the paper's mix of release points
NUM_CANDIDATES = 4
STAGES = ("rollout", "score", "select", "update", "step")


@dataclasses.dataclass
class Stages:
    """Everything a step needs, at the sizes of the flags."""

    args: Any
    student: qwen3.Qwen3Config
    teacher: qwen3.Qwen3Config
    objective: Objective
    sampler: rollout.Sampler
    score: score.Score
    select: selection.Stage
    update: update.Update

    @property
    def needs(self) -> frozenset[str]:
        return self.objective.needs | self.select.needs


def build(args) -> Stages:
    """The stages, full supervision, through the same calls as a run."""
    mesh = sizes.build_mesh(args)
    student = sizes.model_config(args.student, args.vocab)
    teacher = sizes.model_config(args.teacher, args.vocab)
    backend = sizes.backend(args, mesh)
    objective = Objective("sampled_pg" if args.objective == "paper" else args.objective)
    select = selection.build(selectors.build("full"), [b"x"] * args.vocab)
    lines, tokens = packing.default_shape(
        prompt_len=args.prompt_len,
        response_len=args.new_tokens,
        batch_size=args.batch,
        num_shards=parallel.num_batch_shards(mesh),
    )
    shape = dict(
        micro_batch_rows=args.micro_batch_rows or lines,
        micro_batch_tokens=args.micro_batch_tokens or tokens,
        chunk=args.head_chunk,
        backend=backend,
        mesh=mesh,
    )
    return Stages(
        args=args,
        student=student,
        teacher=teacher,
        objective=objective,
        sampler=generate.build_sampler(args, student, args.dtype, backend=backend, mesh=mesh),
        score=score.build(model_config=teacher, needs=objective.needs | select.needs, **shape),
        select=select,
        update=update.build(
            model_config=student,
            objective=objective,
            optimizer=optax.adamw(1e-5, weight_decay=0.0),
            param_dtype=args.dtype,
            **shape,
        ),
    )


def update_flops(stages: Stages, tokens_b) -> float:
    """Forward and backward of prompt + `tokens_b` response tokens, heads on the latter."""
    args = stages.args
    total = 0.0
    for n in np.asarray(tokens_b):
        total += 3 * sizes.forward_flops(stages.student, 1, 0, args.prompt_len + int(n), int(n))
        if "teacher_hidden_btd" in stages.objective.needs:  # its head's logits are made here
            total += 2 * stages.teacher.hidden_size * args.vocab * int(n)
    return total


def _teacher_params(stages: Stages) -> dict:
    """As a run keeps them."""
    args = stages.args
    params = sizes.random_params(stages.teacher, args.seed + 1, args.dtype)
    return qwen3.unstack_layers(stages.teacher, params, stages.score.backend)


def _beside_the_floor(args, lap: Callable[[], float], flops: float) -> tuple[dict, float]:
    """Figures of a stage whose `lap` returns seconds, and the FLOP/s of a product in between."""
    seconds, rates = measure.in_turns(
        lap, measure.matmul_rate(args.dtype), warmup=args.warmup, repeats=args.repeats
    )
    floors = [flops / rate for rate in rates]
    median = statistics.median(seconds)
    row = dict(
        seconds=median,
        tokens_per_second=args.batch * (args.prompt_len + args.new_tokens) / median,
        floor_seconds=statistics.median(floors),
        ratio_to_floor=measure.ratio(seconds, floors),
        **measure.utilisation(flops=flops, seconds=median),
    )
    return row, statistics.median(rates)


# --- update and crop ---


class _Updates:
    """Updates on one random rollout, with any number of supervised tokens per row."""

    def __init__(self, args):
        self.args, self.stages = args, Objective(args)
        self.rollout = sizes.random_rollout(
            args.batch, args.prompt_len, args.new_tokens, args.vocab, args.seed, NUM_CANDIDATES
        )
        width = self.stages.teacher.hidden_size
        self.scores = sizes.random_scores(
            self.rollout, self.stages.objective.needs, width, args.seed, args.dtype
        )
        self.teacher_head = None
        if "teacher_hidden_btd" in self.stages.objective.needs:
            teacher = sizes.random_params(self.stages.teacher, args.seed + 1, args.dtype)
            self.teacher_head = qwen3.head_vd(self.stages.teacher, teacher)
        params = sizes.random_params(self.stages.student, args.seed, args.dtype)
        self.state = self.stages.update.init(params)

    def seconds(self, release_b) -> float:
        """Of one update that supervises the first release_b tokens of each row."""
        supervised = np.arange(self.args.new_tokens)[None] < np.asarray(release_b)[:, None]
        length = supervised.sum(axis=1, keepdims=True)
        weight = np.where(supervised, 1 / np.maximum(length, 1), 0.0).astype(np.float32)
        clock = measure.Clock()
        self.state, metrics = self.stages.update(
            self.state, self.rollout, self.scores, weight, self.args.batch, self.teacher_head
        )
        jax.block_until_ready((self.state, metrics["loss"]))
        return clock.seconds()


def update_case(args) -> Report:
    """The update with everything supervised."""
    updates = _Updates(args)
    release = np.full(args.batch, args.new_tokens)
    row, rate = _beside_the_floor(
        args, lambda: updates.seconds(release), update_flops(updates.stages, release)
    )
    row = dict(
        objective=args.objective,
        **row,
        peak_rss_gib=measure.peak_rss_gib(),
        peak_device_gib=measure.peak_device_gib(),
    )
    return Report(dict(case="update", matmul_gflops=rate / 1e9, **row), [row])


def crop_case(args) -> Report:
    """The update at several supervised fractions, and at the paper's mix of release points."""
    updates = _Updates(args)
    rng = np.random.default_rng(args.seed)
    releases = {f"{f:g}": np.full(args.batch, round(f * args.new_tokens)) for f in FRACTIONS}
    share = np.clip(rng.lognormal(np.log(MEDIAN_RELEASE), 0.8, args.batch), 0.0, 1.0)
    share[: round(UNRELEASED * args.batch)] = 1.0
    releases["paper's mix"] = np.ceil(share * args.new_tokens).astype(int)
    laps = [functools.partial(updates.seconds, release_b) for release_b in releases.values()]
    taken = measure.in_turns(*laps, warmup=args.warmup, repeats=args.repeats)
    rows = []
    for (name, release), seconds in zip(releases.items(), taken, strict=True):
        rows.append(
            dict(
                released_at=name,
                supervised_fraction=float(release.sum() / (args.batch * args.new_tokens)),
                seconds=statistics.median(seconds),
                time_ratio=measure.ratio(seconds, taken[0]),
                floor_ratio=update_flops(updates.stages, release)
                / update_flops(updates.stages, releases["1"]),
            )
        )
    result = dict(case="crop", seconds=rows[0]["seconds"], objective=args.objective, rows=rows[:-1])
    notes = [
        "time_ratio: against everything supervised, median over updates in turns; floor_ratio: "
        "the same of counted FLOPs"
    ]
    return Report(result | dict(paper_mix=rows[-1]), rows, notes)


# --- score ---


def score_case(args) -> Report:
    """The teacher pass over prompts and whole responses."""
    stages = Objective(args)
    params = _teacher_params(stages)
    sampled = sizes.random_rollout(
        args.batch, args.prompt_len, args.new_tokens, args.vocab, args.seed, NUM_CANDIDATES
    )
    lap = measure.seconds_of(lambda: dataclasses.astuple(stages.score(params, sampled)))
    row, rate = _beside_the_floor(args, lap, score_flops(stages))
    row = dict(needs=",".join(sorted(stages.needs)), **row, peak_rss_gib=measure.peak_rss_gib())
    return Report(dict(case="score", matmul_gflops=rate / 1e9, **row), [row])


def score_flops(stages: Stages) -> float:
    """The head only where log-probabilities are asked for; hidden states need none."""
    args = stages.args
    asked = stages.needs - {"teacher_hidden_btd", "spans"}
    length = args.prompt_len + args.new_tokens
    head = args.new_tokens if asked else 0
    return sizes.forward_flops(stages.teacher, args.batch, 0, length, head)


# --- step ---


def step_case(args) -> Report:
    """A whole step, everything supervised: seconds of every stage, floor, peak memory."""
    stages = Objective(args)
    teacher = _teacher_params(stages)
    params = sizes.random_params(stages.student, args.seed, args.dtype)
    state = stages.update.init(params)
    del params
    clocks, matmul = [], measure.matmul_rate(args.dtype)
    for step in range(args.warmup + args.repeats):
        prompts = sizes.random_prompts(args.batch, args.prompt_len, args.vocab, args.seed + step)
        seconds: dict[str, float] = {}
        state = _step(stages, state, teacher, prompts, step, seconds)
        if step >= args.warmup:
            clocks.append(seconds | dict(matmul=matmul()))
    median = {name: statistics.median(c[name] for c in clocks) for name in clocks[0]}
    rate = median["matmul"]
    flops = _step_flops(stages)

    def to_floor(stage: str) -> float | None:
        floors = [flops[stage] / c["matmul"] for c in clocks]
        return measure.ratio([c[stage] for c in clocks], floors) if flops[stage] else None

    rows = [
        dict(
            stage=name,
            seconds=median[name],
            cpu_seconds=median[f"{name} cpu"],
            floor_seconds=flops[name] / rate,
        )
        for name in STAGES
    ]
    for row in rows:
        row["ratio_to_floor"] = to_floor(row["stage"])
        row |= measure.utilisation(flops=flops[row["stage"]], seconds=row["seconds"])
    result = dict(
        case="step",
        seconds=median["step"],
        cpu_seconds=median["step cpu"],
        stages={name: median[name] for name in STAGES[:-1]},
        floor_seconds=flops["step"] / rate,
        ratio_to_floor=to_floor("step"),
        floor_gflop=flops["step"] / 1e9,
        matmul_gflops=rate / 1e9,
        peak_rss_gib=measure.peak_rss_gib(),
        peak_device_gib=measure.peak_device_gib(),
        tokens_per_second=args.batch * args.new_tokens / median["step"],
    )
    notes = [
        f"floor: {flops['step'] / 1e9:.1f} GFLOP at {rate / 1e9:.1f} GFLOP/s; highest resident "
        f"memory {result['peak_rss_gib']:.2f} GiB; {result['tokens_per_second']:.1f} response "
        "tokens/s"
    ]
    return Report(result, rows, notes)


def _step(stages: Stages, state, teacher, prompts: structs.Prompts, step: int, seconds: dict):
    """One step as `opd_jax.train` does it."""
    head = None
    if "teacher_hidden_btd" in stages.objective.needs:
        head = qwen3.head_vd(stages.teacher, teacher)
    whole = measure.Clock()

    def lap(name, clock):
        seconds[name], seconds[f"{name} cpu"] = clock.seconds(), clock.cpu_seconds()
        return measure.Clock()

    clock = measure.Clock()
    sampled = stages.sampler(state.params, prompts, jax.random.key(step))
    clock = lap("rollout", clock)
    stages.select.start(sampled)
    scores = stages.score(teacher, sampled)
    clock = lap("score", clock)
    chosen = stages.select.finish(sampled, scores, step)
    clock = lap("select", clock)
    state, metrics = stages.update(
        state, sampled, scores, chosen.weight_bt, chosen.denominator, head
    )
    jax.block_until_ready((state, metrics["loss"]))
    lap("update", clock)
    lap("step", whole)
    return state


def _step_flops(stages: Stages) -> dict[str, float]:
    args = stages.args
    flops = dict(
        rollout=sizes.generate_flops(stages.student, args.batch, args.prompt_len, args.new_tokens),
        score=score_flops(stages),
        select=0.0,
        update=update_flops(stages, np.full(args.batch, args.new_tokens)),
    )
    return flops | dict(step=sum(flops.values()))
