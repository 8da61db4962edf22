# SPDX-License-Identifier: Apache-2.0
"""A study's tables: arms against a baseline, seed by seed, at equal updates, tokens and seconds.

Works on plain results (`results`). Those behind docs/evidence.md are stored in configs/results, so
that a test can make its tables again. At equal tokens or seconds, the two runs of a pair are read
at the smaller of their two totals, between evaluations by straight lines.
"""

import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np

from launch.study import collect
from opd_jax.problems import intervals
from opd_jax.workdir import records

START = "no training"
AXES = {"step": "updates", "tokens": "supervised tokens", "seconds": "seconds"}
BASELINE, RULE = "full OPD", "release rule"  # arms of configs/study.py
PREFIX = "first "  # arms with a fixed prefix


def results(runs: Sequence[collect.Run], arm_of: Callable[[dict], str | None]) -> dict:
    """Everything the tables need of the finished runs, of every arm.

    `arm_of`: flat config -> name of a known arm, or None; other arms are named by their keys
    (collect.arms). `unfinished`: names of the runs that the tables leave out.
    """
    out, unfinished = [], []
    for arm in collect.arms(runs, arm_of):
        for run in arm.runs:
            curve = [point(row) for row in run.rows if collect.is_finite(row.get("eval/accuracy"))]
            if not curve or curve[-1]["step"] != run.config.get("num_steps"):
                unfinished.append(run.name)
                continue
            known = dict(arm=arm.label, seed=run.seed, commit=run.commit)
            out.append(known | {"first_rollouts": first_rollouts(run), "curve": curve})
    return {"runs": out, "unfinished": unfinished}


def point(row: dict) -> dict:
    """One evaluation of a run; accuracies from 0 to 1."""
    families = {
        name.split("/")[1]: round(value, 5)
        for name, value in row.items()
        if name.startswith("eval/") and name.endswith("/accuracy") and name.count("/") == 2
    }
    return {
        "step": row["step"],
        "tokens": row["total/supervised_tokens"],
        "seconds": round(row["total/seconds"], 2),
        "accuracy": round(row["eval/accuracy"], 5),
        "ood": None if row.get("eval/ood_accuracy") is None else round(row["eval/ood_accuracy"], 5),
        "families": families,
    }


def first_rollouts(run: collect.Run) -> str | None:
    """Digest of the trajectories stored at update 1: equal starts give equal digests.

    "" = nothing is stored; None = not the student's, so not to be compared.
    """
    if run.config.get("rollout.by") == "teacher":
        return None
    path = records.step_path(run.path, "rollouts", 1, ".jsonl")
    if not path.exists():
        return ""
    seen = [(t["prompt"], t["ids"]) for t in records.read_jsonl(path)]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:12]


# ---------------------------------------------------------------- comparisons


class Study:
    """Results by arm and seed."""

    def __init__(self, stored: dict, order: Sequence[str] = ()):
        self.runs: dict[str, dict[int, list[dict]]] = {}
        for run in stored["runs"]:
            seeds = self.runs.setdefault(run["arm"], {})
            if run["seed"] in seeds:
                raise ValueError(
                    f"two runs are of the arm {run['arm']!r} and seed {run['seed']}: these are two "
                    "studies, or one and something else. Set --workdir to the folder of one"
                )
            seeds[run["seed"]] = run["curve"]
        known = [arm for arm in order if arm in self.runs]
        self.runs = {a: self.runs[a] for a in [*known, *(x for x in self.runs if x not in known)]}
        self.commits = sorted({run["commit"] for run in stored["runs"]})
        self.unfinished = stored.get("unfinished", [])
        self.starts = {}
        for run in stored["runs"]:
            if run["first_rollouts"] is not None:
                self.starts.setdefault(run["seed"], set()).add(run["first_rollouts"])

    @property
    def arms(self) -> list[str]:
        return list(self.runs)

    @property
    def equal_starts(self) -> bool:
        """True = per seed, all arms had the same rollouts at update 1."""
        return all(len(digests) == 1 and "" not in digests for digests in self.starts.values())

    def final(self, arm: str, metric: str = "accuracy") -> intervals.Interval:
        values = (read(curve[-1], metric) for curve in self.runs[arm].values())
        return intervals.over_seeds(np.array([v for v in values if v is not None]))

    def start(self, metric: str = "accuracy") -> intervals.Interval:
        """Before the first update: one value per seed, whatever the arm."""
        curves = {seed: curve for arm in self.runs.values() for seed, curve in arm.items()}
        values = (read(curve[0], metric) for curve in curves.values())
        return intervals.over_seeds(np.array([v for v in values if v is not None]))

    def difference(
        self, arm: str, base: str, axis: str = "step", metric: str = "accuracy"
    ) -> intervals.Interval:
        """Paired by seed, each pair at the smaller of its two totals of `axis`."""
        value, baseline = {}, {}
        for seed in set(self.runs[arm]) & set(self.runs[base]):
            a, b = self.runs[arm][seed], self.runs[base][seed]
            budget = min(a[-1][axis], b[-1][axis])
            value[seed], baseline[seed] = (at(c, axis, budget, metric) for c in (a, b))
        return intervals.paired_over_seeds(value, baseline)[0]

    def best_prefix(self) -> str | None:
        """The fixed prefix with the best mean in-domain accuracy at the end.

        Chosen on the figures it is then compared on: that favours the prefix.
        """
        prefixes = [arm for arm in self.arms if arm.startswith(PREFIX)]
        return max(prefixes, key=lambda arm: self.final(arm).mean, default=None)

    def baselines(self) -> list[str]:
        return [b for b in (BASELINE, self.best_prefix()) if b in self.runs]


def read(at_point: dict, metric: str) -> float | None:
    return at_point["families"].get(metric) if metric not in at_point else at_point[metric]


def at(curve: Sequence[dict], axis: str, budget: float, metric: str) -> float:
    """A metric where `axis` reaches `budget`, between evaluations by straight lines; nan = none."""
    known = [(p[axis], read(p, metric)) for p in curve if read(p, metric) is not None]
    if not known:
        return float("nan")
    x, y = zip(*known, strict=True)
    return float(np.interp(budget, x, y))


# ---------------------------------------------------------------- tables


def tables(study: Study) -> list[tuple[str, list[str], list[list[str]]]]:
    """(caption, head, rows) of each table; percent and percentage points."""
    return [
        t for t in (accuracy_table(study), difference_table(study), family_table(study)) if t[2]
    ]


def accuracy_table(study: Study):
    bases = study.baselines()
    head = ["arm", "seeds", "in-domain, %", "out-of-domain, %"]
    head += [f"{metric} − {base}" for base in bases for metric in ("in-domain", "out-of-domain")]
    head += ["supervised tokens", "seconds"]
    rows = [
        [
            START,
            "",
            percent(study.start()),
            percent(study.start("ood")),
            *[""] * (2 * len(bases) + 2),
        ]
    ]
    for arm in study.arms:
        differences = [
            points(study.difference(arm, base, metric=metric)) if arm != base else ""
            for base in bases
            for metric in ("accuracy", "ood")
        ]
        spent = [
            np.mean([c[-1][axis] for c in study.runs[arm].values()])
            for axis in ("tokens", "seconds")
        ]
        rows.append(
            [
                arm,
                str(len(study.runs[arm])),
                percent(study.final(arm)),
                percent(study.final(arm, "ood")),
                *differences,
                f"{spent[0] / 1000:.0f}k",
                f"{spent[1]:.0f}",
            ]
        )
    return "Accuracy after the last update, and paired differences", head, rows


def difference_table(study: Study):
    bases = study.baselines()
    caption = "In-domain difference at equal updates, supervised tokens and seconds"
    head = ["arm", *(f"− {base}, equal {name}" for base in bases for name in AXES.values())]
    rows = [
        [
            arm,
            *(
                points(study.difference(arm, base, axis)) if arm != base else ""
                for base in bases
                for axis in AXES
            ),
        ]
        for arm in study.arms
    ]
    return caption, head, rows if bases else []


def family_table(study: Study):
    curves = [curve for arm in study.runs.values() for curve in arm.values()]
    families = sorted({name for curve in curves for name in curve[-1]["families"]})
    rows = [[START, *(percent(study.start(f)) for f in families)]]
    rows += [[arm, *(percent(study.final(arm, f)) for f in families)] for arm in study.arms]
    return (
        "Accuracy by family after the last update, %",
        ["arm", *families],
        rows if families else [],
    )


def percent(interval: intervals.Interval) -> str:
    """58.1 [55.2, 61.0]"""
    if np.isnan(interval.mean):
        return "–"
    bounds = (
        "" if np.isnan(interval.low) else f" [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    )
    return f"{100 * interval.mean:.1f}{bounds}"


def points(interval: intervals.Interval) -> str:
    """+1.2 [−0.4, +2.8], in percentage points."""
    if np.isnan(interval.mean):
        return "–"
    low, high = f"{100 * interval.low:+.1f}", f"{100 * interval.high:+.1f}"
    bounds = "" if np.isnan(interval.low) else f" [{low}, {high}]"
    return f"{100 * interval.mean:+.1f}{bounds}".replace("-", "−")


def says(study: Study) -> str:
    """The notes below the tables."""
    seeds = sorted({seed for arm in study.runs.values() for seed in arm})
    starts = "the same" if study.equal_starts else "NOT the same"
    unfinished = ", ".join(study.unfinished)
    left_out = f" Left out, because not finished: {unfinished}." if unfinished else ""
    return (
        f"Seeds {', '.join(map(str, seeds))}; commit {', '.join(study.commits)}. Per seed, the "
        f"rollouts at update 1 were {starts} in all arms. Brackets: 95 % t interval over seeds, "
        "not corrected for the number of comparisons; differences are paired by seed, in "
        "percentage points. The best fixed prefix is chosen by the figures it is compared on, "
        f"which favours it. Seconds: training without evaluation and compilation.{left_out}"
    )


def markdown(study: Study) -> str:
    parts = [markdown_table(*each) for each in tables(study)]
    return "\n".join([*parts, says(study)]) + "\n"


def markdown_table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return f"**{caption}**\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
