# SPDX-License-Identifier: Apache-2.0
"""Real processes, killed and started again: runs, runs of two processes, and sweeps."""

import os
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import time

import pytest

from launch import config_flags
from tests import fakes, kill

pytestmark = pytest.mark.slow

# Two processes of one device each: the batch and the parameters are split over both.
TWO = ("--launcher=local:2", "--devices_per_process=1")
SPLIT = {"mesh": (("data", 1), ("fsdp", 2), ("tensor", 1), ("expert", 1))}
EVERY_STEP = {"checkpoint.every_steps": 1}


def arguments(pair, **overrides):
    overrides = fakes.small_overrides(pair) | overrides
    return ["--config=configs/quickstart.py", *config_flags.as_flags(overrides)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Holds this module's runs: they share what is compiled."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(root, pair):
    """A run of one process that nobody disturbed: (its workdir, the seconds of a second one)."""
    kill.finish(root / "alone", arguments(pair, **EVERY_STEP))
    return root / "alone", kill.finish(root / "again", arguments(pair, **EVERY_STEP))


def test_the_comparison_is_of_the_run_itself(alone, root, pair):
    """Equal runs compare as equal, and another seed shows everywhere."""
    workdir, _ = alone
    assert kill.differences(workdir, root / "again") == []
    kill.finish(root / "other", arguments(pair, **EVERY_STEP, seed=1))
    found = "; ".join(kill.differences(workdir, root / "other"))
    for part in ("step 4: ", "loss", "training state", "student/model.safetensors", "eval/step_"):
        assert part in found


@pytest.mark.parametrize("number", range(3))
def test_a_killed_run_ends_as_if_nothing_had_happened(alone, root, pair, number):
    """Three of the runs of `python -m tests.kill`, each killed twice in a row."""
    workdir, seconds = alone
    killed = root / f"killed_{number}"
    rng = random.Random(number)
    # The machine may be quicker now than when the run was timed.
    met = kill.disturb(killed, arguments(pair, **EVERY_STEP), 0.6 * seconds, 2, rng)
    assert met != ["over", "over"]
    assert kill.differences(workdir, killed) == []


def test_a_checkpoint_killed_half_way_is_not_used(alone, root, pair):
    workdir, _ = alone
    killed = root / "half_written"
    for _ in range(2):
        process = kill.start(killed, arguments(pair, **EVERY_STEP))
        if (met := kill.kill_after(process, killed, 0, half_written=True)) == "checkpoint":
            break
    assert met == "checkpoint"
    kill.finish(killed, arguments(pair, **EVERY_STEP))
    assert kill.differences(workdir, killed) == []


def test_a_full_disk_ends_a_run_with_one_message_and_the_same_command_goes_on(alone, root, pair):
    """Full from the third checkpoint on: its arrays are longer than what may be written."""
    full = root / "full"
    kill.finish(full, arguments(pair, **EVERY_STEP, num_steps=2))
    code = (
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000));"
        "runpy.run_module('launch', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", code, f"--workdir={full}", *arguments(pair, **EVERY_STEP)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
    message = ended.stderr[ended.stderr.index("ERROR: could not write a checkpoint") :]
    assert "File too large" in message and "goes on from step 2" in message
    kill.finish(full, arguments(pair, **EVERY_STEP))
    assert kill.differences(alone[0], full) == []


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_sigterm_ends_a_run_with_75_and_the_same_command_goes_on(alone, root, pair, share):
    """Loading and compiling, a step, evaluation: wherever the signal lands."""
    workdir, seconds = alone
    stopped = root / f"stopped_{share}"
    process = kill.start(stopped, arguments(pair, **EVERY_STEP))
    wait_for_handler(process, stopped)
    time.sleep(share * seconds / 2)
    process.terminate()
    assert process.wait(120) in (0, 75)  # it may be compiling, with another process beside it
    kill.finish(stopped, arguments(pair, **EVERY_STEP))
    assert kill.differences(workdir, stopped) == []


def test_sigterm_while_the_interpreter_shuts_down_leaves_the_status(alone, pair):
    """Python gives a signal its default back before it clears its modules, which takes a while."""
    code = (
        "import os, runpy, signal, sys\n"
        "class Late:\n"
        "    def __del__(self, call=signal.raise_signal, number=signal.SIGTERM, write=os.write):\n"
        "        call(number)\n"
        "        write(2, b'sent late')\n"
        "sys.late = Late()\n"
        "runpy.run_module('launch', run_name='__main__', alter_sys=True)"
    )
    workdir, _ = alone  # done: there is nothing left to do
    command = [sys.executable, "-c", code, f"--workdir={workdir}", *arguments(pair, **EVERY_STEP)]
    ended = subprocess.run(command, stderr=subprocess.PIPE, timeout=600)
    assert ended.returncode == 0 and ended.stderr.endswith(b"sent late")


def wait_for_handler(process, workdir):
    """Until the run holds its workdir: from then on SIGTERM is its own."""
    while process.poll() is None and not (workdir / "config.json").exists():
        time.sleep(0.05)


@pytest.fixture(scope="module")
def together(root, pair):
    """A run of two processes that nobody disturbed."""
    kill.finish(root / "together", [*arguments(pair, **SPLIT), *TWO])
    return root / "together"


@pytest.mark.parametrize("which", ["last", "first", "all"])
def test_two_processes_are_killed_and_end_as_if_nothing_had_happened(together, root, pair, which):
    killed = root / f"together_{which}"
    process = kill.start(killed, [*arguments(pair, **SPLIT), *TWO])
    while not any(killed.glob("checkpoints/[0-9]")):
        assert process.poll() is None, pathlib.Path(f"{killed}.log").read_text()[-2000:]
        time.sleep(0.05)
    begin = time.monotonic()
    kill.kill(process, which)
    assert time.monotonic() - begin < 60 and process.returncode != 0
    kill.finish(killed, [*arguments(pair, **SPLIT), *TWO])
    assert kill.differences(together, killed) == []
    assert "a process of this run failed, which ends" in pathlib.Path(f"{killed}.log").read_text()


def test_sigterm_to_a_launcher_stops_both_and_the_same_command_goes_on(together, root, pair):
    stopped = root / "together_stopped"
    process = kill.start(stopped, [*arguments(pair, **SPLIT), *TWO])
    while not (stopped / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(120) == 75  # as above, and they are two
    kill.finish(stopped, [*arguments(pair, **SPLIT), *TWO])
    assert kill.differences(together, stopped) == []


def test_two_processes_learn_what_one_does(alone, together):
    """Rollouts are equal token by token, so metrics differ only by the order of sums.

    The number of micro-batches follows the mesh.
    """
    one, two = kill.rows(alone[0]), kill.rows(together)
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for a, b in zip(one, two, strict=True):
        for key in a.keys() - {"update/num_micro_batches"}:
            if a[key] is None:  # 0 / 0
                assert b[key] is None, key
            else:
                assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4), key


def test_a_killed_sweep_goes_on_and_ends_with_the_right_table(root, pair):
    workdir = root / "sweep"
    values = arguments(pair, num_steps=2)
    command = [
        *(sys.executable, "-m", "launch.sweep", *values, f"--workdir={workdir}", "--jobs=2"),
        *("--sweep=config.seed=0,1", "--sweep=config.selector.kind=bic,full"),
    ]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled")}

    def start():
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    process = start()
    while not any(workdir.glob("*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(workdir.glob("*/done.json"))) < 4
    time.sleep(5)  # its runs notice that it is gone

    process = start()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert len(list(workdir.glob("*/done.json"))) == 4
    for kind in ("bic", "full"):
        last = [
            kill.rows(workdir / f"seed={seed},selector.kind={kind}")[-1]["eval/accuracy"]
            for seed in (0, 1)
        ]
        mean, spread, best = statistics.mean(last), statistics.stdev(last), max(last)
        line = rf"selector.kind={kind} +2/2 +{mean:.4f} +{spread:.4f} +{best:.4f}"
        assert re.search(line, output), output

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "4 runs, 4 finished before" in again.stdout
