# SPDX-License-Identifier: Apache-2.0
"""Runs a config once per element of a sweep, and ends with one table.

  python -m launch.sweep --config=configs/study.py --workdir=runs/study --jobs=2
  python -m launch.sweep --config=configs/quickstart.py --workdir=runs/mine \
      --sweep='config.seed=0,1,2' --sweep='config.selector.kind=bic,full'

Elements are what sweep() of the config file yields, or the product of the --sweep flags (--zip
pairs them). Each is one `python -m launch` in WORKDIR/<its keys>, its output in log.txt there. Run
the same command again to continue: finished runs are skipped, interrupted ones resumed. The table
and WORKDIR/sweep.csv hold eval/accuracy: the last and the best value of each run, and for each arm
(runs that differ in the seed alone) mean, standard deviation and best of the last values.

--list shows the state of each element, --print_commands one command per element to start by hand
(as on a pod, where a run takes every host).

Exit codes: 0 all runs finished, 1 some failed, 75 stopped by SIGTERM or Ctrl-C: run it again.
"""

import concurrent.futures
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections as mlc
from absl import flags
from etils import epath

from configs import base
from launch import columns, config_flags, launcher
from opd_jax.workdir import owner, preemption, records

METRIC = "eval/accuracy"


def define_flags() -> None:
    config_flags.define()
    launcher.define()  # handed to the runs
    flags.DEFINE_string("workdir", None, "holds one directory per run", required=True)
    flags.DEFINE_multi_string(
        "sweep", [], "config.KEY=VALUE,VALUE,... (again for more keys); none: the config's sweep()"
    )
    flags.DEFINE_bool("zip", False, "pair the values of the --sweep flags, no product")
    flags.DEFINE_integer("jobs", 1, "runs at once", 1)
    flags.DEFINE_bool("list", False, "show the state of each element, run nothing")
    flags.DEFINE_bool("print_commands", False, "print one command per run, run nothing")


@dataclasses.dataclass(frozen=True)
class Run:
    """One element of the sweep."""

    overrides: Mapping[str, str]  # dotted key -> what its flag takes
    workdir: str
    config: Mapping  # resolved, as the run writes it to config.json

    @property
    def name(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.overrides.items())


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The state of a run."""

    status: str  # finished, "step n of N" or "not started"
    last: float | None  # METRIC of the last row that has it
    best: float | None  # over the rows


# --- what to run ---


def parse_sweep_flag(text: str) -> tuple[str, list[str]]:
    """ "config.KEY=A,B" -> ("KEY", ["A", "B"]); a comma in brackets or quotes separates nothing."""
    key, equals, values = text.partition("=")
    key = key.removeprefix("--").removeprefix("config.")
    parts = _split(values)
    if not equals or not key or "" in parts:
        raise config_flags.ConfigError(
            f"--sweep={text} must be config.KEY=VALUE,VALUE,... as --sweep='config.seed=0,1,2'"
        )
    return key, parts


def _split(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        depth += (char in "([{") - (char in ")]}") if not quote else 0
        if char == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def elements(texts: Sequence[str], zipped: bool) -> list[dict[str, str]]:
    """The elements that the --sweep flags name."""
    keys, values = zip(*map(parse_sweep_flag, texts), strict=True)
    if repeated := {key for key in keys if keys.count(key) > 1}:
        raise config_flags.ConfigError(
            f"--sweep names {sorted(repeated)[0]} twice; give all its values in one flag"
        )
    lengths = {key: len(options) for key, options in zip(keys, values, strict=True)}
    if zipped and len(set(lengths.values())) > 1:
        raise config_flags.ConfigError(
            f"--zip pairs values, so every --sweep needs as many; given are {lengths}. Add values, "
            "or leave --zip out for the product"
        )
    combine = zip if zipped else itertools.product
    return [dict(zip(keys, element, strict=True)) for element in combine(*values)]


def plan(config: mlc.ConfigDict, found: Iterable[Mapping], workdir: str) -> list[Run]:
    """The runs of a sweep, all checked: keys, values, duplicates, and what the workdirs hold."""
    if (epath.Path(workdir) / "metrics.jsonl").exists():
        raise config_flags.ConfigError(
            f"--workdir={workdir} is a run, not a sweep; use a directory of its own"
        )
    runs = []
    for element in found:
        resolved = config_flags.apply_overrides(config, element)
        resolved = json.loads(json.dumps(resolved.to_dict()))
        texts = {key: config_flags.as_text(value) for key, value in element.items()}
        runs.append(Run(texts, str(epath.Path(workdir) / directory_name(texts)), resolved))
    if not runs:
        raise config_flags.ConfigError(
            "there is nothing to sweep: the config has no sweep() and no --sweep is given; add "
            "--sweep='config.seed=0,1,2'"
        )
    for a, b in itertools.combinations(runs, 2):
        if a.config == b.config:
            raise config_flags.ConfigError(
                f"two elements of the sweep are the same run: {a.name!r} and {b.name!r}; leave one "
                "out"
            )
    defaults = base.get_config().to_dict()
    for run in runs:
        owner.check_same_run(run.config, epath.Path(run.workdir), defaults)
    return runs


def directory_name(overrides: Mapping[str, str]) -> str:
    """A directory name for an element; it does not depend on the other elements."""
    full = ",".join(f"{key}={value}" for key, value in overrides.items()) or "default"
    name = re.sub(r"[^\w.=,+-]+", "_", full)
    if name == full and len(name) <= 120:
        return name
    return f"{name[:100]}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"


def command(run: Run, config_path: str, overrides: Mapping, extra: Sequence[str]) -> list[str]:
    """The command line of one run; its element wins over `overrides`, which all runs share."""
    keys = {**overrides, **run.overrides}
    flags_of_run = config_flags.as_flags(keys)
    return [
        *("python", "-m", "launch", f"--config={config_path}"),
        *(*flags_of_run, f"--workdir={run.workdir}", *extra),
    ]


# --- running ---


def outcome(run: Run) -> Outcome:
    """The state of a run, from its workdir."""
    rows = records.read_metrics(run.workdir)
    values = [row[METRIC] for row in rows if row.get(METRIC) is not None]
    last, best = (values[-1], max(values)) if values else (None, None)
    if not rows:
        return Outcome("not started", last, best)
    step, num_steps = rows[-1]["step"], run.config["num_steps"]
    if step == num_steps and (epath.Path(run.workdir) / "done.json").exists():
        return Outcome("finished", last, best)
    return Outcome(f"step {step} of {num_steps}", last, best)


class Runner:
    """Runs commands as subprocesses, several at once; hands signals on and then starts no more."""

    def __init__(self, num_jobs: int):
        self._num_jobs = num_jobs
        self._num_signals = 0

    @property
    def stopping(self) -> bool:
        return self._num_signals > 0

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        self._num_signals += 1  # the thread of each run hands it on

    def __call__(self, jobs: Sequence[tuple[Run, list[str]]]) -> Iterator[tuple[Run, int]]:
        """Yields (run, exit status) as runs end; those not started because of a signal are left."""
        with concurrent.futures.ThreadPoolExecutor(self._num_jobs) as pool:
            futures = {pool.submit(self._run, run, line): run for run, line in jobs}
            for future in concurrent.futures.as_completed(futures):
                if (status := future.result()) is not None:
                    yield futures[future], status

    def _run(self, run: Run, line: list[str]) -> int | None:
        if self.stopping:
            return None
        log = log_path(run)
        log.parent.mkdir(parents=True, exist_ok=True)
        # One write: other runs' threads print beside this one.
        print(f"start   {run.name}  {log}\n", end="", flush=True)
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, *line[1:]],
                stdin=subprocess.PIPE,  # held open: its end tells the run that we are gone
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches it through us, once
                env=os.environ | launcher.end_with_parent_environment(),
            )
        num_sent = 0
        while process.poll() is None:
            if num_sent < self._num_signals:
                process.terminate()
                num_sent += 1
            time.sleep(0.1)
        ended = f"exit {process.returncode}" if process.returncode else "end"
        # Here, not where the caller learns of it: by then the next run has started.
        print(f"{ended:7} {run.name}  {outcome(run).status}\n", end="", flush=True)
        return process.returncode


def log_path(run: Run) -> pathlib.Path:
    """Where a run's output goes: beside its metrics, or here where those are in a bucket."""
    if "://" in run.workdir:
        return pathlib.Path("sweep_logs") / run.workdir.rpartition("/")[2] / "log.txt"
    return pathlib.Path(run.workdir) / "log.txt"


# --- the table ---


def arms(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in the seed alone, by the keys they share."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        keys = [f"{key}={value}" for key, value in run.overrides.items() if key != "seed"]
        groups.setdefault(", ".join(keys) or "all", []).append(run)
    return groups


def table(runs: Sequence[Run]) -> str:
    """One row per arm: mean, standard deviation and best of METRIC over its finished runs."""
    rows = [("arm", "finished", "mean", "spread", "best")]
    for name, group in arms(runs).items():
        outcomes = [outcome(run) for run in group]
        last = [o.last for o in outcomes if o.status == "finished" and o.last is not None]
        rows.append(
            (
                name,
                f"{sum(o.status == 'finished' for o in outcomes)}/{len(group)}",
                f"{statistics.mean(last):.4f}" if last else "-",
                f"{statistics.stdev(last):.4f}" if len(last) > 1 else "-",
                f"{max(last):.4f}" if last else "-",
            )
        )
    return f"{METRIC} after the last update\n{columns.align(rows)}"


def write_csv(runs: Sequence[Run], path: epath.Path) -> None:
    """One row per run: its keys, workdir, state, last and best METRIC."""
    keys = list(dict.fromkeys(key for run in runs for key in run.overrides))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*keys, "workdir", "status", f"{METRIC} last", f"{METRIC} best"])
    for run in runs:
        found = outcome(run)
        values = [run.overrides.get(key, "") for key in keys]
        writer.writerow([*values, run.workdir, found.status, found.last, found.best])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.getvalue())


def main(_) -> None:
    values = flags.FLAGS
    flag: Any = values["config"]  # ml_collections' own, which knows its file
    path, shared = flag.config_filename, flag.override_values
    try:
        found = (
            elements(values.sweep, values.zip) if values.sweep else config_flags.load_sweep(path)
        )
        runs = plan(values.config, found, values.workdir)
    except (ValueError, ImportError) as error:  # ImportError: gs:// without its client
        sys.exit(f"ERROR: {error}")
    jobs = [(run, command(run, path, shared, _launcher_flags())) for run in runs]
    if values.list:
        print(columns.align([("run", "state"), *((run.name, outcome(run).status) for run in runs)]))
    elif values.print_commands or _on_several_hosts(os.environ):
        print("\n".join(shlex.join(line) for _, line in jobs))
    else:
        sys.exit(run_all(jobs, values.jobs, values.workdir))


def _launcher_flags() -> list[str]:
    """Flags of the launcher that were given: they belong to the runs."""
    given = [name for name in launcher.FLAGS if flags.FLAGS[name].present]
    return [f"--{name}={flags.FLAGS[name].value}" for name in given]


def _on_several_hosts(environment: Mapping[str, str]) -> bool:
    """True where a run takes several hosts, which a subprocess of one of them cannot start."""
    workers = environment.get("TPU_WORKER_HOSTNAMES", "").count(",") + 1
    return workers > 1 or int(environment.get("SLURM_NTASKS", 1)) > 1


def run_all(jobs: Sequence[tuple[Run, list[str]]], num_jobs: int, workdir: str) -> int:
    """Runs what is not finished, prints the table and writes the CSV. Returns the exit status."""
    runner, failed = Runner(num_jobs), []
    runner.install()
    todo = [(run, line) for run, line in jobs if outcome(run).status != "finished"]
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} finished before")
    for run, status in runner(todo):
        if status not in (0, preemption.EXIT_PREEMPTED) and not runner.stopping:
            failed.append(run)
    runs = [run for run, _ in jobs]
    write_csv(runs, epath.Path(workdir) / "sweep.csv")
    print(f"\n{table(runs)}\n\n{epath.Path(workdir) / 'sweep.csv'}")
    for run in failed:
        print(f"ERROR: {run.name} failed:\n{_tail(log_path(run))}", file=sys.stderr)
    if runner.stopping:
        print("stopped: the same command goes on with the runs left", file=sys.stderr)
        return preemption.EXIT_PREEMPTED
    return int(any(outcome(run).status != "finished" for run in runs))


def _tail(log: pathlib.Path, num_lines: int = 5) -> str:
    lines = log.read_text(errors="replace").splitlines()[-num_lines:]
    return "\n".join([*(f"  {line}" for line in lines), f"  ({log})"])


if __name__ == "__main__":
    define_flags()
    config_flags.run(main)
