# SPDX-License-Identifier: Apache-2.0
"""Reads run directories and groups their runs into arms; models are not loaded.

A run is a directory with metrics.jsonl. Runs whose configs differ in the seed alone are one arm.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from etils import epath

from configs import base
from opd_jax.problems import intervals
from opd_jax.settings import flatten
from opd_jax.workdir import records

SEED_KEY = "seed"
MAX_DEPTH = 3  # how deep runs are looked for below a given directory
NOTHING = (
    "no run at or below {}: a run is a directory with metrics.jsonl, which `python -m launch "
    "--workdir=DIR` writes. Set --workdir to one or to their folder"
)


def always(step: int, last: int) -> bool:
    return True


def early(step: int, last: int) -> bool:
    return step <= max(1, round(0.1 * last))


def late(step: int, last: int) -> bool:
    return step > 0.8 * last


@dataclass(frozen=True)
class Run:
    name: str
    path: epath.Path
    config: dict  # flat: "selector.kind" -> value
    info: dict  # run.json
    rows: list[dict]  # metrics.jsonl by step
    signals: list[records.Signals] = field(default_factory=list)

    @property
    def seed(self) -> int:
        return int(self.config.get(SEED_KEY, 0))

    @property
    def commit(self) -> str:
        return str(self.info.get("commit") or "unknown")

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and finite values of one metric."""
        pairs = [(r["step"], r[name]) for r in self.rows if is_finite(r.get(name))]
        return np.array([s for s, _ in pairs], float), np.array([v for _, v in pairs], float)


@dataclass(frozen=True)
class Arm:
    """Runs that differ in the seed alone."""

    label: str
    runs: list[Run]

    def curve(self, name: str, x: str = "step") -> tuple[np.ndarray, list[intervals.Interval]]:
        """One metric against `x` (a metric that grows along the run, or "step").

        At each step that all runs have: mean x, and the mean with Student's interval over seeds.
        One run: the interval written beside the metric (`name`_low, `name`_high), if there is one.
        """
        tables = [
            {int(r["step"]): r for r in run.rows if is_finite(r.get(name))} for run in self.runs
        ]
        tables = [t for t in tables if t]
        steps = sorted(set.intersection(*(set(t) for t in tables))) if tables else []
        xs, out = [], []
        for step in steps:
            rows = [t[step] for t in tables]
            if not all(is_finite(r.get(x)) for r in rows):
                continue
            xs.append(float(np.mean([r[x] for r in rows])))
            interval = intervals.over_seeds(np.array([r[name] for r in rows]))
            if len(rows) == 1:
                low, high = (rows[0].get(f"{name}_{end}") for end in ("low", "high"))
                if low is not None and high is not None and is_finite(low) and is_finite(high):
                    interval = intervals.Interval(interval.mean, low, high)
            out.append(interval)
        return np.array(xs), out

    def pooled(
        self, axis: str, steps: Callable[[int, int], bool] = always
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Signals summed over runs and steps: name -> (sums, counts).

        `axis`: by_position or by_sentence.
        """
        out: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for run in self.runs:
            last = max((s.step for s in run.signals), default=0)
            for signals in run.signals:
                if not steps(signals.step, last):
                    continue
                for name, pair in getattr(signals, axis).items():
                    before = out.get(name, (0.0, 0.0))
                    out[name] = _add(before[0], pair[0]), _add(before[1], pair[1])
        return out

    def per_rollout(self, name: str, steps: Callable[[int, int], bool] = always) -> np.ndarray:
        """One per-rollout quantity (records.signals_arrays), all runs and chosen steps in a row."""
        parts = []
        for run in self.runs:
            last = max((s.step for s in run.signals), default=0)
            parts += [s.rows[name] for s in run.signals if name in s.rows and steps(s.step, last)]
        return np.concatenate(parts).astype(float) if parts else np.zeros(0)


def _add(a, b):
    """Sum of vectors whose lengths may differ (runs see different numbers of sentences)."""
    a, b = np.atleast_1d(np.asarray(a, float)), np.atleast_1d(np.asarray(b, float))
    short, long = sorted((a, b), key=len)
    return long + np.pad(short, (0, len(long) - len(short)))


def is_finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ---------------------------------------------------------------- reading


def find_runs(workdirs: Iterable[str], with_signals: bool = True) -> list[Run]:
    """Every run with at least one row at or below the given directories, in order of paths.

    Raises:
      ValueError: a directory does not exist.
    """
    runs: dict[str, Run] = {}
    for root, path in _found(workdirs, "metrics.jsonl"):
        name = str(path.relative_to(root)) if path != root else path.name
        runs[str(path)] = read_run(path, name, with_signals)
    return [run for run in runs.values() if run.rows]


def find_diagnoses(workdirs: Iterable[str]) -> dict[str, dict]:
    """What `launch.diagnose` wrote at or below the directories, by the directory's name."""
    found = _found(workdirs, "diagnosis.json")
    return {path.name: records.read_json(path, "diagnosis.json") for _, path in found}


def _found(workdirs: Iterable[str], name: str) -> Iterable[tuple[epath.Path, epath.Path]]:
    """(given directory, directory at or below it that holds a file `name`)."""
    for workdir in workdirs:
        root = epath.Path(workdir)
        if not root.exists():
            raise ValueError(NOTHING.format(workdir))
        yield from ((root, path) for path in _below(root, name, MAX_DEPTH))


def _below(path: epath.Path, name: str, depth: int) -> Iterable[epath.Path]:
    if (path / name).exists():
        yield path
    elif depth:
        for child in sorted(path.iterdir()):
            if child.is_dir():
                yield from _below(child, name, depth - 1)


def read_run(path, name: str, with_signals: bool = True) -> Run:
    """A run; a key that is newer than its config.json has its default, which the run followed."""
    path = epath.Path(path)
    stored = flatten(records.read_json(path, "config.json"))
    defaults = json.loads(json.dumps(base.get_config().to_dict())) if stored else {}
    return Run(
        name=name,
        path=path,
        config=flatten(defaults) | stored,
        info=records.read_json(path, "run.json"),
        rows=with_totals(records.read_metrics(path)),
        signals=list(records.read_signals(path)) if with_signals else [],
    )


def with_totals(rows: Sequence[dict]) -> list[dict]:
    """Adds what a run has spent up to each row: `total/seconds` and `total/supervised_tokens`.

    Seconds are those of the training stages, without evaluation. An update that took more than
    three medians was compiling (the first, and the first after a restart) and counts as a median.
    """
    times = [row["time/step"] for row in rows if is_finite(row.get("time/step"))]
    median = float(np.median(times)) if times else 0.0
    seconds, tokens, out = 0.0, 0.0, []
    for row in rows:
        taken = row.get("time/step")
        if taken is not None and is_finite(taken):
            seconds += taken if taken <= 3 * median else median
        tokens += row.get("tokens/supervised") or 0.0
        out.append({**row, "total/seconds": seconds, "total/supervised_tokens": tokens})
    return out


# ---------------------------------------------------------------- arms


def arms(
    runs: Sequence[Run], label: Callable[[dict], str | None] = lambda config: None
) -> list[Arm]:
    """Groups runs by config without the seed, in order of first appearance. Every run is in one.

    An arm is called by `label` where that gives a name and gives it to no other arm. Any other arm
    is called by its values of the keys in which it differs from the first arm, and the first arm
    by all keys in which the arms differ.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = repr(sorted((k, repr(v)) for k, v in run.config.items() if k != SEED_KEY))
        groups.setdefault(key, []).append(run)
    firsts = [group[0] for group in groups.values()]
    labels = [label(run.config) for run in firsts]
    names = [
        name if name and labels.count(name) == 1 else _by_keys(run, firsts)
        for name, run in zip(labels, firsts, strict=True)
    ]
    return [
        Arm(name, sorted(group, key=lambda run: run.seed))
        for name, group in zip(names, groups.values(), strict=True)
    ]


def _by_keys(run: Run, firsts: Sequence[Run]) -> str:
    """An arm's name from its config: no two arms (each given by its first run) get the same."""
    others = firsts if run is firsts[0] else firsts[:1]
    missing = object()
    parts = []
    for key, value in sorted(run.config.items()):
        same = all(repr(other.config.get(key, missing)) == repr(value) for other in others)
        if key != SEED_KEY and not same:
            parts.append(f"{key.removeprefix('selector.').removeprefix('objective.')}={value}")
    return ", ".join(parts) or run.name


def trajectories(runs: Sequence[Run], limit: int, max_tokens: int) -> tuple[list[dict], int]:
    """Stored trajectories to show, spread over runs and steps, and how many were left out.

    At most `limit` of them and `max_tokens` response tokens in all, so that the page stays light.
    """
    stored = [t | {"run": run.name} for run in runs for t in records.read_rollouts(run.path)]
    chosen, tokens = [], 0
    # Every n-th first, then those between: an even spread whatever the limit cuts.
    stride = max(1, math.ceil(len(stored) / max(limit, 1)))
    for i in (i for first in range(stride) for i in range(first, len(stored), stride)):
        size = len(stored[i]["ids"])
        if len(chosen) < limit and tokens + size <= max_tokens:
            chosen.append(i)
            tokens += size
    return [stored[i] for i in sorted(chosen)], len(stored) - len(chosen)
