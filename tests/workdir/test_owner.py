# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a workdir, and no trace of one that was killed."""

import os
import re
import subprocess
import sys

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


def test_a_second_run_is_refused_before_it_starts_and_a_killed_one_is_not_in_the_way(
    tmp_path, monkeypatch, no_wait
):
    workdir = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(workdir)]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        child = int(holder.stdout.readline())
        try:
            monkeypatch.setattr(build, "build", lambda *_: pytest.fail("the second run began"))
            with pytest.raises(ValueError) as refused:
                train.run(None, str(workdir))
            holder.kill()
            holder.wait()
            with owner.hold(str(workdir)):  # though the child of the killed run lives on
                pass
        finally:
            os.kill(child, 9)
    message = str(refused.value)
    assert (
        f"--workdir={workdir} is in use: process {holder.pid} on {os.uname().nodename}" in message
    )
    assert re.search(r"since 20\d\d-\d\d-\d\dT.*set --workdir to another directory", message)


def test_a_run_that_ended_leaves_the_workdir_free(tmp_path, no_wait):
    with pytest.raises(KeyError):
        with owner.hold(str(tmp_path)):
            raise KeyError
    with owner.hold(str(tmp_path)):
        with pytest.raises(ValueError, match="is in use"), owner.hold(str(tmp_path)):
            pass


def test_a_new_run_waits_for_a_killed_one_to_be_gone(tmp_path, monkeypatch):
    first = owner.hold(str(tmp_path))
    first.__enter__()
    monkeypatch.setattr(owner.time, "sleep", lambda _: first.__exit__(None, None, None))
    with owner.hold(str(tmp_path)):
        pass


def test_process_0_alone_locks_and_a_bucket_is_not_locked(tmp_path, monkeypatch, no_wait):
    with owner.hold("gs://bucket/run"), owner.hold("gs://bucket/run"):
        pass
    assert not os.path.exists("gs:")
    with owner.hold(str(tmp_path)):
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        with owner.hold(str(tmp_path)):
            pass


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(owner.errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(owner.fcntl, "flock", flock)
    with owner.hold(str(tmp_path)), owner.hold(str(tmp_path)):
        assert "is not locked: its file system has no locks" in caplog.text


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    """A parent that is a file stands for a read-only one, which root may write."""
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"--workdir=.*file/run must be a directory that can be wr"
    ):
        with owner.hold(str(tmp_path / "file" / "run")):
            pass
