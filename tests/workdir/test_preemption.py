# SPDX-License-Identifier: Apache-2.0
"""One signal asks, a second one ends, in real processes; launch/test_interrupt.py has runs."""

import signal
import subprocess
import sys

import pytest

HEAD = """
import hashlib, sys, threading, time
from opd_jax.workdir import preemption

def say_ready():
    print("ready", flush=True)

def compile():  # stands for one: no handler of Python's runs until it returns, in minutes
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
STOPPABLE = """
with preemption.stoppable("begin anew"):
    {ready}
    {wait}
"""
GUARD = """
guard = preemption.Guard()
guard.install()
{ready}
try:
    for _ in range(600):
        {wait}
        guard.check()
except preemption.Preempted:
    sys.exit(preemption.EXIT_PREEMPTED)
"""
LATER = "threading.Timer(1.0, say_ready).start()"


@pytest.fixture
def start():
    """Starts a program and waits until it says that it is ready."""
    started = []

    def run(source: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HEAD + source],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_guard_gives_one_line_and_the_next_check_stops(start, number):
    process = start(GUARD.format(ready="say_ready()", wait="time.sleep(0.1)"))
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]
    assert said == f"{name}: stopping at the next safe point; once more exits at once\n"
    assert process.returncode == 75


def test_ctrl_c_ends_a_command_with_what_to_do_and_no_traceback(start):
    process = start(STOPPABLE.format(ready="say_ready()", wait="time.sleep(60)"))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert said == "stopped: begin anew\n"
    assert process.returncode == 75


@pytest.mark.parametrize("numbers", [(2, 2), (15, 15), (15, 2)], ids=str)
def test_a_second_signal_ends_a_guarded_run_at_once(start, numbers):
    """Though its main thread runs no Python."""
    process = start(GUARD.format(ready=LATER, wait="compile()"))
    process.send_signal(numbers[0])
    assert "once more exits at once" in process.stderr.readline()
    process.send_signal(numbers[1])
    assert process.wait(30) == 76


def test_a_second_ctrl_c_ends_a_command_at_once(start):
    process = start(STOPPABLE.format(ready=LATER, wait="compile()"))
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "Ctrl-C: stopping; once more exits at once\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 76


def test_a_guard_takes_over_from_stoppable_and_keeps_what_was_computed(start):
    guard = GUARD.format(ready="say_ready()", wait="time.sleep(0.1)").replace("\n", "\n    ")
    process = start(STOPPABLE.format(ready="pass", wait=guard))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert "stopping at the next safe point" in said and "begin anew" not in said
    assert process.returncode == 75


def test_a_command_that_is_done_is_not_interrupted(start):
    process = start("preemption.ignore()\nprint('ready', flush=True)\ntime.sleep(0.5)")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_outside_of_a_command_the_handler_is_as_it_was(start):
    source = "before = signal.getsignal(signal.SIGINT)\n"
    source += "with preemption.stoppable():\n    pass\n"
    source += (
        "assert signal.getsignal(signal.SIGINT) is before and signal.set_wakeup_fd(-1) == -1\n"
    )
    process = start("import signal\n" + source + "print('ready', flush=True)")
    assert process.wait(30) == 0, process.stderr.read()
