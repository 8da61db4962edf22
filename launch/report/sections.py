# SPDX-License-Identifier: Apache-2.0
"""Sections with charts: functions from arms to HTML, "" where there is nothing to show."""

import math
from collections.abc import Sequence

import numpy as np

from launch.report import charts
from launch.study import collect
from opd_jax.algorithm.change_point import STRONG_GAIN

SIGNALS = {  # name (algorithm/profiles.py) -> title, axis
    "margin": ("Teacher margin among the student's candidates", "margin, nats"),
    "advantage_variance": ("Variance of the advantage over the candidates", "variance, nats²"),
    "abs_advantage": ("Size of the sampled token's advantage", "|log p_T − log p_S|, nats"),
    "advantage": ("Advantage of the sampled token", "log p_T − log p_S, nats"),
    "log_ratio_supervised": ("Advantage where supervised", "log p_T − log p_S, nats"),
    "log_ratio_released": ("Advantage where released", "log p_T − log p_S, nats"),
    "student_entropy": ("Student entropy", "entropy, nats"),
    "teacher_entropy": ("Teacher entropy", "entropy, nats"),
    "teacher_mass": ("Teacher probability of the candidates together", "probability"),
}
POSITION = charts.Axis("position in the response", percent=True, span=(0.0, 1.0))


def learning(arms: Sequence[collect.Arm]) -> str:
    out = [
        curves(arms, "eval/accuracy", "Held-out accuracy", percent=True),
        curves(
            arms,
            "eval/accuracy",
            "… against supervised tokens",
            True,
            "total/supervised_tokens",
            "supervised tokens so far",
        ),
        curves(
            arms,
            "eval/accuracy",
            "… against training time",
            True,
            "total/seconds",
            "training time, s (without evaluation)",
        ),
        curves(arms, "eval/ood_accuracy", "Out-of-domain accuracy", percent=True),
    ]
    families = sorted(
        {
            k
            for a in arms
            for r in a.runs
            for row in r.rows
            for k in row
            if k.startswith("eval/") and k.endswith("/accuracy") and k.count("/") == 2
        }
    )
    out += [curves(arms, name, f"Family: {name.split('/')[1]}", percent=True) for name in families]
    out += [
        curves(arms, "loss", "Loss", y_label="loss, nats"),
        curves(arms, "student/entropy", "Student entropy", y_label="nats per token"),
        curves(arms, "grad_norm", "Gradient norm", y_label="norm before clipping"),
        curves(arms, "log_ratio/mean", "Teacher minus student", y_label="log p_T − log p_S, nats"),
        curves(arms, "sampler_gap/mean", "Sampler against trainer", y_label="|Δ log p|, nats"),
    ]
    return grid(out)


def teachability(arms: Sequence[collect.Arm]) -> str:
    if len(arms) == 1:
        pools = {"first tenth": (arms[0], collect.early), "last fifth": (arms[0], collect.late)}
        note = "Signals of the run's first tenth and last fifth of updates."
    else:
        pools = {a.label: (a, collect.always) for a in arms}
        note = "Signals of every stored update."
    released = [release_positions(arm, steps) for arm, steps in pools.values()]
    out = profiles(pools, "by_position", POSITION, "", note, np.concatenate(released))
    sentence = charts.Axis("sentence", whole=True)
    out += profiles(pools, "by_sentence", sentence, " by sentence", note)[:2]
    body = grid(out)
    lead = (
        "<p>The paper's diagnosis: local teachability collapses when the margin and the spread of "
        "the advantage fall along the response while the advantage itself stays large. Grey bars: "
        "where rollouts were released.</p>"
    )
    return lead + body if body else ""


def profiles(pools: dict, by: str, x: charts.Axis, suffix: str, note: str, under=None) -> list[str]:
    """One chart per signal, one line per pool: label -> (arm, which steps)."""
    tables = {label: arm.pooled(by, steps) for label, (arm, steps) in pools.items()}
    names = list(dict.fromkeys(name for pooled in tables.values() for name in pooled))
    names.sort(key=lambda n: list(SIGNALS).index(n) if n in SIGNALS else len(SIGNALS))
    out = []
    for name in names:
        title, y_label = SIGNALS.get(name, (name, name))
        series = []
        for i, (label, pooled) in enumerate(tables.items()):
            if name in pooled:
                sums, counts = pooled[name]
                xs, ys = profile(sums, counts, x.percent)
                series.append(charts.Series(label, xs.tolist(), ys.tolist(), colour=i))
        out.append(charts.line_chart(title + suffix, series, x, charts.Axis(y_label), note, under))
    return out


def release_positions(arm: collect.Arm, steps=collect.always) -> np.ndarray:
    """Release points of released rollouts, as shares of the response."""
    length, release = arm.per_rollout("length", steps), arm.per_rollout("release", steps)
    released = release < length
    return release[released] / np.maximum(length[released], 1)


def profile(sums: np.ndarray, counts: np.ndarray, relative: bool) -> tuple[np.ndarray, np.ndarray]:
    """x and means by bin, nan where a bin holds too little; x is relative, or 1, 2, 3, ..."""
    few = counts < max(1.0, 0.002 * counts.max(initial=0.0))
    mean = np.where(few, np.nan, sums / np.maximum(counts, 1.0))
    n = len(sums)
    return ((np.arange(n) + 0.5) / n if relative else np.arange(1, n + 1)), mean


def releases(arms: Sequence[collect.Arm]) -> str:
    position, gain, factor = {}, {}, {}
    for arm in arms:
        length, release = arm.per_rollout("length"), arm.per_rollout("release")
        released = release < length
        position[arm.label] = release_positions(arm)
        gain[arm.label] = arm.per_rollout("gain")
        factor[arm.label] = arm.per_rollout("rescale")[released]
    position, gain, factor = (
        {k: v for k, v in d.items() if np.isfinite(v).any()} for d in (position, gain, factor)
    )
    out = [
        curves(arms, "release/rate", "Rollouts that are released", percent=True),
        curves(arms, "release/supervised_fraction", "Tokens that are supervised", percent=True),
        curves(arms, "bic/gain_above_6", "Rollouts with BIC gain above 6", percent=True),
        charts.histogram(
            "Where supervision ends",
            position,
            np.linspace(0, 1, 21),
            POSITION,
            "Released rollouts of every stored step. The paper's median: 13 %.",
            mark=(0.13, "paper"),
        ),
        charts.histogram(
            "BIC gain of the best drop",
            gain,
            np.linspace(-10, 70, 41),
            charts.Axis("BIC gain"),
            "Beyond the ends: counted in the outer bins. The paper calls more than 6 significant.",
            mark=(STRONG_GAIN, f"{STRONG_GAIN:g}"),
        ),
        charts.histogram(
            "Rescaling of released rollouts",
            factor,
            np.geomspace(1, 128, 22),
            charts.Axis("weight of a supervised token, ×", log=True),
            "Log axis.",
        ),
    ]
    return grid(out)


def responses(arms: Sequence[collect.Arm]) -> str:
    stages = {arm.label: stage_seconds(arm) for arm in arms}
    out = [
        curves(arms, "response/length_mean", "Response length", y_label="tokens"),
        curves(arms, "response/truncation_rate", "Responses cut by the limit", percent=True),
        curves(arms, "response/repetition_rate", "Repeated 4-grams", percent=True),
        charts.stacked_bars(
            "Time per update, by stage", stages, charts.Axis("s"), "Median over updates."
        ),
        curves(arms, "time/step", "Time per update", y_label="s"),
        curves(arms, "memory/peak_gib", "Peak memory", y_label="GiB"),
    ]
    return grid(out)


def stage_seconds(arm: collect.Arm) -> dict[str, float]:
    """Median seconds of an update by stage: the median, because the first update compiles."""
    names = {k for r in arm.runs for row in r.rows for k in row if k.startswith("time/")}
    skipped = ("time/step", "time/evaluate", "time/checkpoint")
    out = {}
    for name in sorted(n for n in names if n not in skipped and not n.endswith("_per_second")):
        values = np.concatenate([r.column(name)[1] for r in arm.runs])
        if values.size:
            out[name.removeprefix("time/")] = float(np.median(values))
    return out


def curves(arms, name, title, percent=False, x="step", x_label="updates", y_label="") -> str:
    series = []
    for i, arm in enumerate(arms):
        xs, values = arm.curve(name, x)
        if not values:
            continue
        low, high = ([getattr(v, end) for v in values] for end in ("low", "high"))
        band = any(math.isfinite(v) for v in low)
        series.append(
            charts.Series(
                arm.label,
                xs,
                [v.mean for v in values],
                low if band else None,
                high if band else None,
                colour=i,
            )
        )
    y = charts.Axis(y_label or "share", percent=percent)
    if name.endswith("accuracy"):
        y = charts.Axis("accuracy", percent=True)
    return charts.line_chart(title, series, charts.Axis(x_label, whole=x == "step"), y)


def grid(figures: Sequence[str]) -> str:
    figures = [f for f in figures if f]
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""
