# SPDX-License-Identifier: Apache-2.0
"""Kills runs at random moments, starts them again until they are done, and compares each with one
that nobody disturbed: every metric, every sample and the last training state, bit by bit.

  python -m tests.kill --workdir=runs/kill
  python -m tests.kill --workdir=runs/kill --runs=5 --launcher=local:2 -- --config.num_steps=6

What follows `--` are flags of `python -m launch`, added to those of the small quickstart below (or
in place of them, with another --config). Each run is killed --kills times in a row, at moments
drawn over the time of an undisturbed run; a third of the kills wait for a half-written checkpoint.
Status 0 if all runs are equal to the undisturbed one.
"""

import collections
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import app, flags

NOT_COMPARED = ("time/", "memory/")  # what a machine's speed decides
SMALL = (
    "--config=configs/quickstart.py",
    "--config.num_steps=6",
    "--config.data.batch_size=8",
    "--config.rollout.response_len=64",
    "--config.evaluate.num_problems=20",
    "--config.evaluate.num_ood_problems=10",
    "--config.evaluate.batch_size=30",
    "--config.evaluate.every_steps=2",
    "--config.checkpoint.every_steps=1",
    "--config.log.rollouts_every_steps=2",
)


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "holds the runs; emptied first", required=True)
    flags.DEFINE_integer("runs", 25, "how many runs are killed", 1)
    flags.DEFINE_integer("kills", 2, "of each run, one after the other", 1)
    flags.DEFINE_string("launcher", "", "local:N: several processes; a kill takes one or all")
    flags.DEFINE_integer("seed", 0, "of the moments")


def start(workdir: pathlib.Path, arguments: Sequence[str]) -> subprocess.Popen:
    """Starts a run in a session of its own; its output is appended to WORKDIR.log."""
    environment = os.environ | {  # restarts then compile nothing
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{workdir}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "launch", f"--workdir={workdir}", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def finish(workdir: pathlib.Path, arguments: Sequence[str], timeout: float = 3600) -> float:
    """Runs to the end; returns the seconds it took."""
    begin = time.monotonic()
    status = start(workdir, arguments).wait(timeout)
    if status:
        tail = pathlib.Path(f"{workdir}.log").read_text(errors="replace").splitlines()[-20:]
        raise RuntimeError(f"{workdir} ended with status {status}:\n" + "\n".join(tail))
    return time.monotonic() - begin


# --- killing ---


def pids(*selection: str) -> list[int]:
    """Live processes that `ps` selects."""
    command = ["ps", "-o", "pid=,stat=", *selection]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return [int(pid) for pid, state in map(str.split, lines) if not state.startswith("Z")]


def kill(process: subprocess.Popen, which: str) -> None:
    """SIGKILL for a run, and then nothing of it may be left.

    Args:
      which: "run" = the process that was started; of a launcher's run, "first", "last" or "all" of
        the processes below it.
    """
    below = sorted(pids("--ppid", str(process.pid)))
    victims = {"run": [process.pid], "first": below[:1], "last": below[-1:], "all": below}[which]
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it ended by itself, just now
    process.wait(60)  # a launcher: until it has ended the others
    deadline = time.monotonic() + 30
    while left := pids("--sid", ",".join(map(str, [process.pid, *below]))):
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {left} outlive their killed run")
        time.sleep(0.1)


def kill_after(
    process: subprocess.Popen,
    workdir: pathlib.Path,
    seconds: float,
    which: str = "run",
    half_written: bool = False,
) -> str:
    """Kills a run `seconds` from now, or at the first half-written checkpoint after that.

    Returns what it met: "start", "step" (or evaluation), "checkpoint", or "over" (it had ended).
    """
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        writing = any(workdir.glob("checkpoints/*tmp*"))
        if time.monotonic() > deadline and (writing or not half_written):
            has_rows = (workdir / "metrics.jsonl").exists()
            kill(process, which)
            return "checkpoint" if writing else "step" if has_rows else "start"
        time.sleep(0.002)
    return "over"


# --- comparing ---


def rows(workdir: pathlib.Path) -> list[dict]:
    """metrics.jsonl without what a machine's speed decides."""
    text = (workdir / "metrics.jsonl").read_text()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(NOT_COMPARED)}
        for line in text.splitlines()
    ]


def digests(workdir: pathlib.Path) -> dict[str, int]:
    """Of every array of the last training state (parameters, optimiser), by path."""
    last = max((workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    return json.loads((last / "meta" / "metadata").read_text())["digests"]


def differences(a: pathlib.Path, b: pathlib.Path) -> list[str]:
    """What differs between two finished runs; [] = equal bit by bit."""
    found = []
    ours, theirs = rows(a), rows(b)
    if [row["step"] for row in ours] != [row["step"] for row in theirs]:
        found.append(f"steps {[row['step'] for row in ours]}, {[row['step'] for row in theirs]}")
    for one, other in zip(ours, theirs, strict=False):
        keys = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
        if keys:
            found.append(f"step {one['step']}: {', '.join(sorted(keys))}")
    if digests(a) != digests(b):
        found.append("the training state")
    for pattern in ("student/*", "eval/*", "rollouts/*"):
        names = {str(path.relative_to(run)) for run in (a, b) for path in run.glob(pattern)}
        found += [name for name in sorted(names) if _bytes(a / name) != _bytes(b / name)]
    return found


def _bytes(path: pathlib.Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


# --- the whole harness ---


def disturb(
    workdir: pathlib.Path,
    arguments: Sequence[str],
    seconds: float,
    num_kills: int,
    rng: random.Random,
) -> list[str]:
    """A run that is killed `num_kills` times and then left alone; what each kill met."""
    several = any(argument.startswith("--launcher=local") for argument in arguments)
    met = []
    for _ in range(num_kills):
        which = rng.choice(("run", "first", "last", "all")) if several else "run"
        moment, half_written = rng.uniform(0, seconds), rng.random() < 1 / 3
        met.append(kill_after(start(workdir, arguments), workdir, moment, which, half_written))
    finish(workdir, arguments)
    return met


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    root, arguments = pathlib.Path(values.workdir), [*SMALL, *argv[1:]]
    if any(argument.startswith("--config=") for argument in argv):
        arguments = argv[1:]
    if values.launcher:
        arguments.append(f"--launcher={values.launcher}")
    shutil.rmtree(root, ignore_errors=True)
    reference = root / "undisturbed"
    finish(reference, arguments)
    seconds = finish(root / "again", arguments)  # with everything compiled, as restarts have it
    print(f"undisturbed: {seconds:.0f} s, {len(rows(reference))} rows", flush=True)
    num_different, counts = bool(differences(reference, root / "again")), collections.Counter()
    rng = random.Random(values.seed)
    for number in range(values.runs):
        workdir = root / f"run_{number}"
        met = disturb(workdir, arguments, seconds, values.kills, rng)
        counts.update(met)
        found = differences(reference, workdir)
        num_different += bool(found)
        print(
            f"run {number}: killed in {', '.join(met)}; {'; '.join(found) or 'equal'}", flush=True
        )
    print(f"{values.runs} runs; kills by what they met: {dict(counts)}; {num_different} differ")
    sys.exit(int(num_different > 0))


if __name__ == "__main__":
    define_flags()
    app.run(main)
