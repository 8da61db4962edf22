# SPDX-License-Identifier: Apache-2.0
"""The command itself, where a run cannot begin."""

import os
import pathlib
import subprocess
import sys

import pytest

# Runs the command on a disk that takes no byte more.
FULL = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
runpy.run_module("launch", run_name="__main__", alter_sys=True)
"""


def launch(*start: str, workdir: pathlib.Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *start, "--config=configs/quickstart.py", f"--workdir={workdir}"],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"},
        timeout=300,
    )


@pytest.mark.parametrize("case", ["cannot be made", "disk full"])
def test_a_workdir_that_cannot_be_written_is_one_message_and_status_1(case, tmp_path):
    """A file in the place of its parent stands for a read-only one: root may write in those."""
    if case == "disk full":
        start, workdir = ("-c", FULL), tmp_path
        says = "File too large. Put that right (free space, make it writable), or set --workdir to"
    else:
        (tmp_path / "file").write_text("")
        start, workdir = ("-m", "launch"), tmp_path / "file" / "run"
        says = f"ERROR: --workdir={workdir} must be a directory that can be written"
    ended = launch(*start, workdir=workdir)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
    assert says in ended.stderr.splitlines()[-1]
