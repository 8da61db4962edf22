# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C at the keyboard, as a terminal sends it: to the command and to all that it has started.

tests/workdir/test_preemption.py has the handlers, test_processes.py the same for SIGTERM.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import tiny_model

from launch import config_flags
from tests import fakes, kill

pytestmark = pytest.mark.slow

# With a worker process, which must outlive the signal.
SMALL = {"segment.num_workers": 1, "checkpoint.every_steps": 1, "num_steps": 200}
TWO = ("--launcher=local:2", "--devices_per_process=1")
SPLIT = {"mesh": (("data", 1), ("fsdp", 2), ("tensor", 1), ("expert", 1))}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("interrupted")


def start(log: pathlib.Path, module: str, *arguments: str) -> subprocess.Popen:
    """A command in a process group of its own, as a shell starts it."""
    with open(log, "wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def interrupt(process: subprocess.Popen, log: pathlib.Path, ready) -> str:
    """Ctrl-C once `ready()`; the output of the command, which must end with 75 and in order."""
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    status, said = process.wait(120), log.read_text()
    assert status == 75 and "Traceback" not in said, said[-3000:]
    return said


def training(pair, workdir, **changes) -> list[str]:
    overrides = fakes.small_overrides(pair) | SMALL | changes
    return [
        "--config=configs/quickstart.py",
        f"--workdir={workdir}",
        *config_flags.as_flags(overrides),
    ]


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_checkpoints_a_run_and_says_how_to_go_on(pair, root, processes):
    workdir, log = root / f"run_{processes}", root / f"run_{processes}.log"
    arguments = training(pair, workdir, **(SPLIT if processes == 2 else {}))
    process = start(log, "launch", *arguments, *(TWO if processes == 2 else ()))
    said = interrupt(process, log, (workdir / "checkpoints" / "1").exists)
    assert f"preempted after a checkpoint under {workdir}; the same command resumes there" in said
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    assert max(steps) >= kill.rows(workdir)[-1]["step"] >= 1


def test_ctrl_c_before_there_is_a_run_is_one_line(pair, root):
    """While models are loaded: nothing is there to save."""
    workdir, log = root / "early", root / "early.log"
    process = start(log, "launch", *training(pair, workdir))
    said = interrupt(process, log, (workdir / "lock.json").exists)
    assert "run the same command again" in said or "preempted after a checkpoint" in said


def test_ctrl_c_stops_a_sweep_and_its_runs_in_order(pair, root):
    workdir, log = root / "sweep", root / "sweep.log"
    sweep = ["--sweep=config.seed=0,1", "--jobs=1"]
    process = start(log, "launch.sweep", *training(pair, workdir), *sweep)
    said = interrupt(process, log, (workdir / "seed=0" / "checkpoints" / "1").exists)
    assert "stopped: the same command goes on with the runs left" in said
    run = (workdir / "seed=0" / "log.txt").read_text()
    assert "preempted after a checkpoint" in run and "Traceback" not in run
    assert not (workdir / "seed=1").exists()


def test_ctrl_c_keeps_an_evaluations_samples_and_the_same_command_goes_on(root):
    model, output, log = tiny_model.save(root), root / "evaluation", root / "evaluation.log"
    arguments = [f"--model={model}", f"--output={output}", "--benchmarks=embedded"]
    arguments += ["--num_problems=100", "--response_len=12", "--batch_size=1"]
    samples = output / "embedded.jsonl"
    said = interrupt(start(log, "launch.evaluate", *arguments), log, samples.exists)
    assert f"stopped: samples are kept under {output}; the same command goes on" in said
    kept = samples.read_text()
    assert 0 < len(kept.splitlines()) < 100
    assert start(log, "launch.evaluate", *arguments).wait(300) == 0, log.read_text()[-3000:]
    assert samples.read_text().startswith(kept)
    results = json.loads((output / "results.json").read_text())
    assert results["results"]["embedded"]["num_problems"] == 100
