# SPDX-License-Identifier: Apache-2.0
"""Verification: what counts as the answer, what equals it, and what hostile answers cannot."""

import os
import signal
import time

import pytest

from opd_jax.problems import verify


@pytest.fixture(scope="module")
def verifier():
    with verify.Verifier(seconds=60.0) as v:
        yield v


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The answer is \\boxed{green}.", "green"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{7} and then \\boxed{cut", "7"),  # an answer cut off by the length limit is none
        ("\\boxed{a \\boxed{b}}", "b"),
        ("\\boxed{}", ""),
        ("no box", None),
        ("\\boxed{never closed", None),
        ("", None),
    ],
)
def test_last_boxed(text, expected):
    assert verify.last_boxed(text) == expected


def test_an_enormous_response_is_read_quickly():
    began = time.monotonic()
    assert verify.last_boxed("\\boxed{" * 20_000) is None
    assert verify.last_boxed("\\boxed{" + "{" * 1_000_000) is None
    assert verify.last_boxed("x" * 5_000_000 + "\\boxed{3}") == "3"
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "given, answer, expected",
    [
        ("green", "green", True),
        (" Green ", "green", True),
        ("\\text{green}.", "green", True),
        ("blue", "green", False),
        ("greenish", "green", False),
        ("$42$", "42", True),
        ("", "", False),
        ("", "3", False),
        ("9" * 3000, "3", False),
        ("C", "C", True),
        ("(C)", "C", True),
        ("C) the mitochondrion", "C", True),
        ("\\text{C}", "C", True),
        ("D", "C", False),
        ("CD", "C", False),
        ("C and D", "C", False),
        ("c", "C", False),
        ("1/2", "0.5", None),  # only mathematics decides
        ("x", "y", None),
    ],
)
def test_compare_text(given, answer, expected):
    assert verify.compare_text(given, answer) is expected


@pytest.mark.parametrize(
    "given, answer, expected",
    [
        ("\\frac{1}{2}", "0.5", True),
        ("1/3", "0.5", False),
        ("x+1", "1+x", True),
        ("(1,2)", "(1, 2)", True),
        ("(2,1)", "(1,2)", False),
        ("\\{2,1\\}", "\\{1,2\\}", True),
        ("10\\%", "10", True),
        ("1{,}000", "1000", True),
        ("2\\sqrt{2}", "\\sqrt{8}", True),
        ("3", "4", False),
    ],
)
def test_mathematics(verifier, given, answer, expected):
    assert verifier.is_correct(f"so \\boxed{{{given}}}", answer) is expected


def test_plain_answers_start_no_process():
    with verify.Verifier() as v:
        assert v.is_correct("\\boxed{green}", "green")
        assert not v.is_correct("\\boxed{blue}", "green")
        assert v._workers.queue[0]._process is None


HOSTILE = [
    "9**9**9**9",
    "10^{10^{10^{10}}}",
    "1000000000!",
    "\\binom{10^{9}}{5\\cdot 10^8}",
    "\\int_0^1 x^{x^{x^{x}}} dx",
    "\\sqrt{" * 200 + "2" + "}" * 200,
    "(" * 900,
    "{" * 900 + "}" * 900,
    '__import__("os").system("touch pwned")',
    "\x00",
    "\ud800",
    "\\input{/etc/passwd}",
]


@pytest.mark.slow
def test_hostile_answers_are_wrong_and_the_next_answer_is_still_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with verify.Verifier(num_workers=2, seconds=3.0) as v:
        pairs = [(f"\\boxed{{{h}}}", "7") for h in HOSTILE]
        assert v.are_correct(pairs) == [False] * len(HOSTILE)
        v._seconds = 60.0
        assert v.are_correct([("\\boxed{1/2}", "0.5")] * 4) == [True] * 4
    assert os.listdir(tmp_path) == []


def test_a_worker_that_hangs_or_dies_is_counted_and_replaced(verifier, monkeypatch):
    """A real hang: the process is stopped by a signal, as a loop in C code would stop it."""
    half = ("so \\boxed{1/2}", "0.5")
    assert verifier.is_correct(*half)
    with monkeypatch.context() as patch:
        patch.setattr(verifier, "_seconds", 0.5)
        hung = verifier._workers.queue[0]._process
        os.kill(hung.pid, signal.SIGSTOP)
        assert not verifier.is_correct(*half)
    assert verifier.num_killed == 1 and hung.poll() is not None
    assert verifier.is_correct(*half)
    dead = verifier._workers.queue[0]._process
    dead.kill()
    dead.wait()
    assert not verifier.is_correct(*half)
    assert verifier.num_killed == 2
    verifier.close()
    assert all(worker._process is None for worker in verifier._workers.queue)


def test_wrong_limits_are_refused():
    with pytest.raises(ValueError, match="try \\(1, 10.0, 2048\\)"):
        verify.Verifier(num_workers=0)
