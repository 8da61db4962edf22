# SPDX-License-Identifier: Apache-2.0
"""The table that a finished run ends with."""

import math

STAGES = ("rollout", "score", "select", "update", "evaluate")


def of_run(rows: list[dict], teacher: dict) -> dict[str, float | None]:
    """What the run came to, from its metrics rows and the teacher's evaluation."""
    evaluated = [row for row in rows if "eval/accuracy" in row]
    steps = [row for row in rows if "loss" in row]

    def mean(key):
        values = [row[key] for row in steps if row.get(key) is not None]
        return sum(values) / len(values) if values else None

    found = {
        "accuracy_before": evaluated[0]["eval/accuracy"] if evaluated else None,
        "accuracy_after": evaluated[-1]["eval/accuracy"] if evaluated else None,
        "ood_before": evaluated[0].get("eval/ood_accuracy") if evaluated else None,
        "ood_after": evaluated[-1].get("eval/ood_accuracy") if evaluated else None,
        "teacher_accuracy": teacher.get("eval/accuracy"),
        "teacher_ood": teacher.get("eval/ood_accuracy"),
        "release_rate": mean("release/rate"),
        "release_position_median": mean("release/position_median"),
        "supervised_fraction": mean("release/supervised_fraction"),
        "bic_gain_mean": mean("bic/gain_mean"),
        "peak_memory_gib": max((row["memory/peak_gib"] for row in steps), default=None),
    }
    for stage in STAGES:
        values = sorted(r[f"time/{stage}"] for r in rows if r.get(f"time/{stage}") is not None)
        found[f"seconds_{stage}"] = values[len(values) // 2] if values else None
    return found


def table(found: dict, workdir) -> str:
    """Aligned text for a person."""

    def percent(key):
        value = found.get(key)
        return "-" if value is None or not math.isfinite(value) else f"{value:.1%}"

    def number(key, form):
        value = found.get(key)
        return "-" if value is None else format(value, form)

    lines = [
        ("held-out accuracy", "before", "after", "teacher"),
        ("  in-domain", *map(percent, ("accuracy_before", "accuracy_after", "teacher_accuracy"))),
        ("  out-of-domain", *map(percent, ("ood_before", "ood_after", "teacher_ood"))),
        (),
        ("rollouts released", percent("release_rate") + ", mean over steps"),
        ("median release position", percent("release_position_median") + " of the response"),
        ("tokens supervised", percent("supervised_fraction")),
        ("mean BIC gain", number("bic_gain_mean", ".1f") + " nats"),
        (),
        ("seconds, median", *STAGES),
        ("", *(number(f"seconds_{stage}", ".3f") for stage in STAGES)),
        ("peak memory", number("peak_memory_gib", ".2f") + " GiB"),
        (),
        ("metrics", f"{workdir}/metrics.jsonl"),
        ("student", f"{workdir}/student"),
        ("checkpoints", f"{workdir}/checkpoints"),
    ]
    return "\n".join(map(_aligned, lines))


def _aligned(line: tuple[str, ...]) -> str:
    """A label and its cells: several stand in columns, one stands free."""
    label, *cells = line or ("",)
    wide = len(cells) > 1
    return (f"{label:<26}" + "".join(f"{c:>10}" if wide else c for c in cells)).rstrip()
