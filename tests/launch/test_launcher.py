# SPDX-License-Identifier: Apache-2.0
"""Processes find each other or say what is missing; when one ends, none is left hanging."""

import os
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from launch import launcher
from tests import advice

SLURM = dict(
    SLURM_JOB_ID="7",
    SLURM_NTASKS="4",
    SLURM_JOB_NUM_NODES="2",
    SLURM_STEP_NODELIST="node[1-2]",
    SLURM_PROCID="3",
    SLURM_LOCALID="1",
)

# A run that gathers a number 40 times; process 1 does something else in the middle.
PROGRAM = """
import os, sys, time
from absl import app, flags
import jax, numpy as np
from jax.experimental import multihost_utils
from launch import launcher

launcher.define()
MIDDLE = flags.DEFINE_string("middle", "", "")
WORKDIR = flags.DEFINE_string("workdir", "", "")

def main(_):
    launcher.initialize(WORKDIR.value)
    print("devices", jax.local_device_count(), jax.device_count(), flush=True)
    for step in range(40):
        total = multihost_utils.process_allgather(np.array(step + jax.process_index())).sum()
        if step == 5:
            with open(f"{WORKDIR.value}/pid{jax.process_index()}", "w") as file:
                file.write(str(os.getpid()))
            if jax.process_index() == 1:
                exec(MIDDLE.value)
        time.sleep(0.01 if MIDDLE.value != "pass" else 0)
    print("total", total, flush=True)

app.run(main)
"""


def test_a_process_alone_needs_nothing():
    assert launcher.place("", 0, -1, {}) is None
    assert launcher.place("", 1, -1, SLURM) is None  # asked to be alone
    assert launcher.place("", 0, -1, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}) is None


def test_the_place_of_a_process_by_flags_and_by_slurm():
    place = launcher.place("10.0.0.2:8476", 4, 3, {})
    assert place == dict(
        coordinator_address="10.0.0.2:8476",
        num_processes=4,
        process_id=3,
        cluster_detection_method="deactivate",
    )
    assert launcher.place("127.0.0.1:1", 2, 0, {})["coordinator_bind_address"] == "127.0.0.1:1"
    assert launcher.place("", 0, -1, SLURM) == dict(cluster_detection_method="slurm")


def without(name):
    return {key: value for key, value in SLURM.items() if key != name}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (("h:1", 0, -1, {}), "--num_processes=2 and --process_id=0 (1, ... on the others) missing"),
        (("", 2, 0, {}), "not described in full: --coordinator=HOST:PORT missing"),
        (
            ("h:1", 2, -1, {}),
            "not described in full: --process_id=0 (1, ... on the others) missing",
        ),
        (("host", 2, 0, {}), "must be HOST:PORT of process 0, as --coordinator=host:8476"),
        (("h:1", 2, 2, {}), "the last process is --process_id=1"),
        (
            ("", 0, -1, without("SLURM_PROCID")),
            "but not SLURM_PROCID: start the run inside the job",
        ),
        (
            ("", 0, -1, without("SLURM_NTASKS")),
            "but not SLURM_NTASKS: start the run inside the job",
        ),
    ],
)
def test_an_incomplete_description_of_a_process_names_what_is_missing(place, message):
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        launcher.place(*place)
    advice.check(error.value)


def test_a_tpu_host_joins_by_itself_and_refuses_a_missing_worker_id(monkeypatch):
    class TpuConfig:
        jax_platforms = "tpu,cpu"

    monkeypatch.setattr(jax, "config", TpuConfig)
    assert launcher.place("", 0, -1, {}) == {}
    assert launcher.place("", 0, -1, {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}) == {}
    with pytest.raises(SystemExit, match="names 2 workers but TPU_WORKER_ID is not set"):
        launcher.place("", 0, -1, {"TPU_WORKER_HOSTNAMES": "a,b"})


@pytest.mark.parametrize("text", ["local", "local:0", "local:x", "pod:2", "2"])
def test_an_unknown_launcher_names_one_that_works(text):
    with pytest.raises(SystemExit, match=re.escape("must be local:N, as --launcher=local:2")):
        launcher._num_local(text)


def test_a_process_that_hangs_without_its_partner_is_killed(monkeypatch, capsys):
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.2)
    codes = ["import time; time.sleep(1000)", "import sys; sys.exit(3)", "pass"]
    processes = [subprocess.Popen([sys.executable, "-c", code]) for code in codes]
    assert launcher._wait(processes, [None, "logs/process_1.log", "logs/process_2.log"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "ERROR: a process of this run failed, which ends the others:",
        "  process 0: signal SIGKILL, above",
        "  process 1: status 3, logs/process_1.log",
        "  process 2: status 0, logs/process_2.log",
        "The same command continues the run from its last checkpoint.",
    ]


def test_a_run_that_stopped_as_asked_is_no_error(monkeypatch, capsys):
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.0)  # must not apply: one may still be saving
    codes = ["import sys; sys.exit(75)", "import sys, time; time.sleep(0.5); sys.exit(75)"]
    processes = [subprocess.Popen([sys.executable, "-c", code]) for code in codes]
    assert launcher._wait(processes, [None, None]) == 75
    assert [process.returncode for process in processes] == [75, 75]
    assert capsys.readouterr().err == ""


def start(tmp_path, middle):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    flags = ["--launcher=local:2", "--devices_per_process=2", f"--workdir={tmp_path}"]
    return subprocess.Popen(
        [sys.executable, str(program), *flags, f"--middle={middle}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )


def wait_for_pids(tmp_path):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        texts = [(tmp_path / f"pid{i}") for i in range(2)]
        if all(path.exists() and path.read_text() for path in texts):
            return [int(path.read_text()) for path in texts]
        time.sleep(0.05)
    raise AssertionError("the processes did not start within 60 s")


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_two_processes_work_as_one_run(tmp_path):
    process = start(tmp_path, "pass")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "devices 2 4" in output and output.count("total 79") == 1  # 39 + 40, by process 0 only
    assert "total 79" in (tmp_path / "logs" / "process_1.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("middle", "end"),
    [
        ("os.kill(os.getpid(), 9)", "signal SIGKILL"),
        ("raise ValueError('planted')", "status 1"),
        ("launcher.fail('planted')", "status 1"),
        ("os._exit(3)", "status 3"),
    ],
)
def test_one_dead_process_ends_the_other_within_a_minute(tmp_path, middle, end):
    process = start(tmp_path, middle)
    wait_for_pids(tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    log = tmp_path / "logs" / "process_1.log"
    assert f"  process 1: {end}, {log}" in output and "The same command continues" in output
    assert "planted" not in middle or "planted" in log.read_text()


@pytest.mark.slow
def test_sigterm_reaches_every_process(tmp_path):
    process = start(tmp_path, "time.sleep(1000)")
    pids = wait_for_pids(tmp_path)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert output.count(": signal SIGTERM, ") == 2
    assert not any(map(is_running, pids))


@pytest.mark.slow
def test_processes_end_when_their_launcher_is_killed(tmp_path):
    process = start(tmp_path, "time.sleep(1000)")
    pids = wait_for_pids(tmp_path)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, pids))
