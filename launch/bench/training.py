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
from opd_jax import parallel, step
from opd_jax.algorithm import selectors
from opd_jax.algorithm.objective import Objective
from opd_jax.model import qwen3
from opd_jax.stages import packing, score, selection, update

FRACTIONS = (1.0, 0.5, 0.25, 0.13)  # supervised shares of a response, case crop
UNRELEASED, MEDIAN_RELEASE = 0.21, 0.13  # the paper's mix of release points
NUM_CANDIDATES = 4
STAGES = ("rollout", "score", "select", "update", "step")


@dataclasses.dataclass
class Case:
    """A step's stages at the sizes of the flags."""

    args: Any
    student: qwen3.Qwen3Config
    teacher: qwen3.Qwen3Config
    stages: step.Stages

    @property
    def objective(self) -> Objective:
        return self.stages.update.objective

    @property
    def needs(self) -> frozenset[str]:
        return self.stages.score.needs

    def load_teacher(self) -> None:
        """Random parameters, as a run keeps them."""
        params = sizes.random_params(self.teacher, self.args.seed + 1, self.args.dtype)
        params = qwen3.unstack_layers(self.teacher, params, self.stages.score.backend)
        head_vd = None
        if "teacher_hidden_btd" in self.objective.needs:
            head_vd = qwen3.head_vd(self.teacher, params)
        self.stages.frozen = step.Frozen(params, head_vd)


def build(args) -> Case:
    """The stages, full supervision, through the same calls as a run."""
    mesh = sizes.build_mesh(args)
    student = sizes.model_config(args.student, args.vocab)
    teacher = sizes.model_config(args.teacher, args.vocab)
    shared: dict[str, Any] = dict(backend=sizes.backend(args, mesh), mesh=mesh)
    objective = Objective("sampled_pg" if args.objective == "paper" else args.objective)
    select = selection.build(selectors.build("full"), [b"x"] * args.vocab)
    pack = packing.Settings(args.micro_batch_rows, args.micro_batch_tokens, args.head_chunk)
    shards = parallel.num_batch_shards(mesh)
    shape = pack.micro_batch(args.prompt_len, args.new_tokens, args.batch, shards)
    optimizer = optax.adamw(1e-5, weight_decay=0.0)
    stages = step.Stages(
        mesh=mesh,
        sampler=generate.build_sampler(args, student, args.dtype),
        sampled_by="student",
        score=score.build(teacher, objective.needs | select.needs, shape, **shared),
        update=update.build(student, objective, optimizer, shape, param_dtype=args.dtype, **shared),
        select=select,
    )
    return Case(args, student, teacher, stages)


def update_flops(case: Case, tokens_b) -> float:
    """Forward and backward of prompt + `tokens_b` response tokens, heads on the latter."""
    args = case.args
    total = 0.0
    for n in np.asarray(tokens_b):
        total += 3 * sizes.forward_flops(case.student, 1, 0, args.prompt_len + int(n), int(n))
        if "teacher_hidden_btd" in case.objective.needs:  # its head's logits are made here
            total += 2 * case.teacher.hidden_size * args.vocab * int(n)
    return total


def _with_floor(args, stage: Callable[[], float], flops: float) -> tuple[dict, float]:
    """Figures of a stage whose calls return seconds, and the FLOP/s of the interleaved matmul."""
    seconds, rates = measure.interleaved(
        stage, measure.matmul_rate(args.dtype), warmup=args.warmup, repeats=args.repeats
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
        self.args, self.case = args, build(args)
        self.rollout = sizes.random_rollout(
            args.batch, args.prompt_len, args.new_tokens, args.vocab, args.seed, NUM_CANDIDATES
        )
        width = self.case.teacher.hidden_size
        self.scores = sizes.random_scores(
            self.rollout, self.case.objective.needs, width, args.seed, args.dtype
        )
        self.case.load_teacher()
        params = sizes.random_params(self.case.student, args.seed, args.dtype)
        self.state = self.case.stages.update.init(params)

    def seconds(self, release_b) -> float:
        """Of one update that supervises the first release_b tokens of each row."""
        supervised = np.arange(self.args.new_tokens)[None] < np.asarray(release_b)[:, None]
        length = supervised.sum(axis=1, keepdims=True)
        weight = np.where(supervised, 1 / np.maximum(length, 1), 0.0).astype(np.float32)
        clock = measure.Clock()
        update, head_vd = self.case.stages.update, self.case.stages.frozen.teacher_head_vd
        self.state, metrics = update(
            self.state, self.rollout, self.scores, weight, self.args.batch, head_vd
        )
        jax.block_until_ready((self.state, metrics["loss"]))
        return clock.seconds()


def update_case(args) -> Report:
    """The update with everything supervised."""
    updates = _Updates(args)
    release = np.full(args.batch, args.new_tokens)
    row, rate = _with_floor(
        args, lambda: updates.seconds(release), update_flops(updates.case, release)
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
    calls = [functools.partial(updates.seconds, release_b) for release_b in releases.values()]
    taken = measure.interleaved(*calls, warmup=args.warmup, repeats=args.repeats)
    rows = []
    for (name, release), seconds in zip(releases.items(), taken, strict=True):
        rows.append(
            dict(
                released_at=name,
                supervised_fraction=float(release.sum() / (args.batch * args.new_tokens)),
                seconds=statistics.median(seconds),
                time_ratio=measure.ratio(seconds, taken[0]),
                floor_ratio=update_flops(updates.case, release)
                / update_flops(updates.case, releases["1"]),
            )
        )
    result = dict(case="crop", seconds=rows[0]["seconds"], objective=args.objective, rows=rows[:-1])
    notes = [
        "time_ratio: against everything supervised, median over interleaved updates; floor_ratio: "
        "the same of counted FLOPs"
    ]
    return Report(result | dict(paper_mix=rows[-1]), rows, notes)


# --- score ---


def score_case(args) -> Report:
    """The teacher pass over prompts and whole responses."""
    case = build(args)
    case.load_teacher()
    sampled = sizes.random_rollout(
        args.batch, args.prompt_len, args.new_tokens, args.vocab, args.seed, NUM_CANDIDATES
    )
    teacher = case.stages.frozen.teacher
    seconds = measure.seconds_of(lambda: dataclasses.astuple(case.stages.score(teacher, sampled)))
    row, rate = _with_floor(args, seconds, score_flops(case))
    row = dict(needs=",".join(sorted(case.needs)), **row, peak_rss_gib=measure.peak_rss_gib())
    return Report(dict(case="score", matmul_gflops=rate / 1e9, **row), [row])


def score_flops(case: Case) -> float:
    """The head only where log-probabilities are asked for; hidden states need none."""
    args = case.args
    asked = case.needs - {"teacher_hidden_btd", "spans"}
    length = args.prompt_len + args.new_tokens
    head = args.new_tokens if asked else 0
    return sizes.forward_flops(case.teacher, args.batch, 0, length, head)


# --- step ---


def step_case(args) -> Report:
    """A whole step, everything supervised: seconds of every stage, floor, peak memory."""
    case = build(args)
    case.load_teacher()
    params = sizes.random_params(case.student, args.seed, args.dtype)
    state = case.stages.update.init(params)
    del params
    clocks, matmul = [], measure.matmul_rate(args.dtype)
    for i in range(args.warmup + args.repeats):
        prompts = sizes.random_prompts(args.batch, args.prompt_len, args.vocab, args.seed + i)
        clock = measure.Clock()
        state, taken = case.stages(state, prompts, jax.random.key(i), i)
        jax.block_until_ready(state)
        seconds = taken.seconds | dict(step=clock.seconds(), cpu=clock.cpu_seconds())
        if i >= args.warmup:
            clocks.append(seconds | dict(matmul=matmul()))
    median = {name: statistics.median(c[name] for c in clocks) for name in clocks[0]}
    rate = median["matmul"]
    flops = _step_flops(case)

    def to_floor(stage: str) -> float | None:
        floors = [flops[stage] / c["matmul"] for c in clocks]
        return measure.ratio([c[stage] for c in clocks], floors) if flops[stage] else None

    rows = [
        dict(
            stage=name,
            seconds=median[name],
            floor_seconds=flops[name] / rate,
            ratio_to_floor=to_floor(name),
            **measure.utilisation(flops=flops[name], seconds=median[name]),
        )
        for name in STAGES
    ]
    result = dict(
        case="step",
        seconds=median["step"],
        cpu_seconds=median["cpu"],
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


def _step_flops(case: Case) -> dict[str, float]:
    args = case.args
    flops = dict(
        rollout=sizes.generate_flops(case.student, args.batch, args.prompt_len, args.new_tokens),
        score=score_flops(case),
        select=0.0,
        update=update_flops(case, np.full(args.batch, args.new_tokens)),
    )
    return flops | dict(step=sum(flops.values()))
