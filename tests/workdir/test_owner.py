# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a workdir, and no trace of one that was killed."""

import fcntl
import os
import re
import subprocess
import sys
import threading

import jax
import pytest

from opd_jax import build, train
from opd_jax.workdir import owner

# Holds the workdir, starts a process that outlives it, and waits to be killed.
HOLDER = """
import subprocess, sys, time
from opd_jax.workdir import owner
with owner.hold(sys.argv[1]):
    child = subprocess.Popen(["sleep", "60"])
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def no_wait(monkeypatch):
    monkeypatch.setattr(owner, "LOCK_SECONDS", 0.0)


@pytest.fixture
def holder():
    """Starts a process that holds a workdir; gives it and its child's id."""
    started = []

    def start(workdir):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(workdir)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
        )
        started.append((process, int(process.stdout.readline())))
        return started[-1]

    yield start
    for process, child in started:
        process.kill()
        process.wait()
        process.stdout.close()
        os.kill(child, 9)


def test_a_second_run_is_refused_before_it_starts_and_a_killed_one_is_not_in_the_way(
    tmp_path, monkeypatch, no_wait, holder
):
    workdir = tmp_path / "run"
    process, _ = holder(workdir)
    monkeypatch.setattr(build, "build", lambda *_: pytest.fail("the second run began"))
    with pytest.raises(ValueError) as refused:
        train.run(None, str(workdir))
    process.kill()
    process.wait()
    with owner.hold(str(workdir)):  # though the child of the killed run lives on
        pass
    message = str(refused.value)
    assert (
        f"--workdir={workdir} is in use: process {process.pid} on {os.uname().nodename}" in message
    )
    assert re.search(r"since 20\d\d-\d\d-\d\dT.*set --workdir to another directory", message)


def test_who_is_there_is_the_run_that_is_there_now(tmp_path, no_wait, holder):
    """Not the one before it, nor the end of a file that was being written."""
    (tmp_path / owner.HOLDER).write_text('{"pid": 1')
    process, _ = holder(tmp_path)
    with pytest.raises(ValueError, match=f"is in use: process {process.pid} "):
        with owner.hold(str(tmp_path)):
            pass
    (tmp_path / owner.HOLDER).write_text('{"pid": 1')
    with pytest.raises(ValueError, match="is in use: another run has just begun there"):
        with owner.hold(str(tmp_path)):
            pass


def test_a_run_that_ended_leaves_the_workdir_free(tmp_path, no_wait):
    with pytest.raises(KeyError):
        with owner.hold(str(tmp_path)):
            raise KeyError
    with owner.hold(str(tmp_path)):
        with pytest.raises(ValueError, match="is in use"), owner.hold(str(tmp_path)):
            pass


def test_a_new_run_waits_for_a_killed_one_to_be_gone(tmp_path, holder):
    process, _ = holder(tmp_path)
    timer = threading.Timer(0.3, process.kill)
    timer.start()
    with owner.hold(str(tmp_path)):
        assert process.wait() == -9
    timer.join()


def test_process_0_alone_locks_and_a_bucket_is_not_locked(tmp_path, monkeypatch, no_wait):
    with owner.hold("gs://bucket/run"), owner.hold("gs://bucket/run"):
        pass
    assert not os.path.exists("gs:")
    with owner.hold(str(tmp_path)):
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        with owner.hold(str(tmp_path)):
            pass


@pytest.mark.parametrize("error", owner.NO_LOCKS)
def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog, error):
    """The system call is the only part that cannot run here: it refuses as such a mount does."""

    def flock(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    with owner.hold(str(tmp_path)), owner.hold(str(tmp_path)):
        assert "is not locked: its file system has no lock support" in caplog.text


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    """A parent that is a file stands for a read-only one, which root may write."""
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"--workdir=.*file/run must be a directory that can be wr"
    ):
        with owner.hold(str(tmp_path / "file" / "run")):
            pass


OLD = {"seed": 0, "selector": {"kind": "bic"}}
DEFAULTS = {"selector": {"share": 0.8, "sides": (1, 3)}}


@pytest.mark.parametrize("defaults", [DEFAULTS, {"selector.share": 0.8, "selector.sides": (1, 3)}])
def test_a_run_that_is_older_than_a_key_goes_on_with_its_default(defaults):
    now = {"seed": 0, "selector": {"kind": "bic", "share": 0.8, "sides": [1, 3]}}
    owner.compare(now, OLD, "runs/a", defaults)


@pytest.mark.parametrize(
    ("now", "says"),
    [
        ({"share": 0.5}, "selector.share: 0.8 there, 0.5 now. Set"),
        ({"sides": [3, 3]}, "selector.sides: [1, 3] there, [3, 3] now. Set"),
        ({"new": 1}, "selector.new: no such key there, 1 now. Set"),  # without a default
        ({"kind": "full"}, "selector.kind: 'bic' there, 'full' now. Set"),
    ],
)
def test_another_value_of_a_newer_key_is_another_run(now, says):
    config = {"seed": 0, "selector": OLD["selector"] | now}
    with pytest.raises(ValueError, match=re.escape(f"Different are {says}")):
        owner.compare(config, OLD, "runs/a", DEFAULTS)


def test_a_key_that_is_gone_is_named():
    with pytest.raises(ValueError, match=re.escape("seed: 0 there, no such key now. Set")):
        owner.compare({"selector": {"kind": "bic"}}, OLD, "runs/a", DEFAULTS)
