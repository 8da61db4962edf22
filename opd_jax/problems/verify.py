# SPDX-License-Identifier: Apache-2.0
r"""Is a response's answer right? The last \boxed{} against the reference.

Cheap tests first: the same text, or the same letter for multiple choice. What is left goes to
`math-verify` (1/2 and 0.5 are equal) in worker processes, because sympy can hang, crash or eat the
memory on a hostile expression, and model output is hostile sooner or later. A worker that passes
its time limit is killed; its answer counts as wrong and a new worker takes its place.

Workers are plain subprocesses that speak JSON lines: no fork of a process that runs JAX, no pickle.
"""

import atexit
import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import queue
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterable

MAX_ANSWER = 2000  # characters; no answer is longer, and parsers are worse than linear
START_SECONDS = 120.0  # a worker imports sympy, which takes seconds on a busy machine
MATH_VERIFY_SECONDS = 3  # math-verify's own, softer limit on each of its three stages

_BOX = "\\boxed{"
_BRACES = re.compile(r"\\boxed\{|\\.|[{}]", re.DOTALL)
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_]{2,}(?:[ -][^\W\d_]+)*")  # no digit, sign or lone letter
_CHOICE = re.compile(r"\(?([A-Z])\)?(?:[.:)].*)?", re.DOTALL)  # C, (C), C), C. text


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete \boxed{...}; None when there is none. Linear in the text."""
    best, open_braces = None, []  # starts of contents; -1 where the brace is not a box's
    for match in _BRACES.finditer(text):
        if match[0] == _BOX:
            open_braces.append(match.end())
        elif match[0] == "{":
            open_braces.append(-1)
        elif match[0] == "}" and open_braces:
            start = open_braces.pop()
            if start > (best.start if best else -1):
                best = slice(start, match.start())
    return None if best is None else text[best]


def normalise(answer: str) -> str:
    r"""The answer without what typesetting adds: $, \text{}, a final full stop, double spaces."""
    answer = _WRAPPED.sub(r"\1", answer.strip().strip("$"))
    return " ".join(answer.split()).removesuffix(".").strip()


def compare_text(given: str, answer: str) -> bool | None:
    """True or False where text decides; None where only mathematics can."""
    given, answer = normalise(given), normalise(answer)
    if given == answer:
        return bool(answer)
    if not given or not answer or max(len(given), len(answer)) > MAX_ANSWER:
        return False
    if re.fullmatch(r"[A-J]", answer):
        choice = _CHOICE.fullmatch(given)
        return bool(choice) and choice[1] == answer
    if _WORDS.fullmatch(given) and _WORDS.fullmatch(answer):
        return given.casefold() == answer.casefold()
    return None


class Verifier:
    """Decides whether answers are right, in worker processes with hard limits.

    Attributes:
      num_killed: workers that passed a limit or died; each counts as one wrong answer.
    """

    def __init__(self, num_workers: int = 1, seconds: float = 10.0, memory_mib: int = 2048):
        """`seconds`: wall time for one answer. `memory_mib`: address space of a worker."""
        if num_workers < 1 or seconds <= 0 or memory_mib < 512:
            raise ValueError(
                f"Verifier(num_workers={num_workers}, seconds={seconds}, memory_mib={memory_mib}): "
                "needs a worker, time and at least 512 MiB for sympy; try (1, 10.0, 2048)"
            )
        self.num_killed = 0
        self._seconds = seconds
        self._workers: queue.Queue[_Worker] = queue.Queue()
        for _ in range(num_workers):
            self._workers.put(_Worker(memory_mib))
        self._num_workers = num_workers

    def is_correct(self, response: str, answer: str) -> bool:
        r"""True = the last \boxed{} of the response equals the answer."""
        given = last_boxed(response)
        if given is None:
            return False
        same = compare_text(given, answer)
        return self._ask(given, answer) if same is None else same

    def are_correct(self, pairs: Iterable[tuple[str, str]]) -> list[bool]:
        """`is_correct` of many (response, answer) pairs, all workers at once."""
        with concurrent.futures.ThreadPoolExecutor(self._num_workers) as pool:
            return list(pool.map(lambda pair: self.is_correct(*pair), pairs))

    def _ask(self, given: str, answer: str) -> bool:
        worker = self._workers.get()
        try:
            return worker.ask(normalise(given), normalise(answer), self._seconds)
        except (TimeoutError, OSError):  # hung, or died under us
            self.num_killed += 1
            worker.stop()
            return False
        finally:
            self._workers.put(worker)

    def close(self) -> None:
        """Stops the workers; the next answer that needs one starts it again."""
        for _ in range(self._num_workers):
            worker = self._workers.get()
            worker.stop()
            self._workers.put(worker)

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _Worker:
    """One subprocess; started by the first question."""

    def __init__(self, memory_mib: int):
        self._memory_mib = memory_mib
        self._process: subprocess.Popen | None = None
        self._rest = b""

    def ask(self, given: str, answer: str, seconds: float) -> bool:
        """Raises TimeoutError past the limit, OSError when the process is gone."""
        if self._process is None:
            self._start()
        question = json.dumps({"given": given, "answer": answer}).encode() + b"\n"
        self._process.stdin.write(question)
        self._process.stdin.flush()
        return json.loads(self._read_line(seconds))

    def _start(self) -> None:
        root = str(pathlib.Path(__file__).resolve().parents[2])
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        self._rest = b""
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from opd_jax.problems import verify; verify.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for the run, which needs its workers to end in order
            env=os.environ | {"PYTHONPATH": path, "OPD_JAX_VERIFY_MIB": str(self._memory_mib)},
        )
        self._read_line(START_SECONDS)  # "ready": its imports do not count as an answer's time

    def _read_line(self, seconds: float) -> bytes:
        deadline, out = time.monotonic() + seconds, self._process.stdout.fileno()
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([out], [], [], left)[0]:
                raise TimeoutError
            chunk = os.read(out, 4096)
            if not chunk:
                raise BrokenPipeError
            self._rest += chunk
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        with contextlib.suppress(OSError):  # a broken pipe on closing says nothing new
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._process = None


def serve() -> None:
    """A worker's life: a JSON object per line in, true or false per line out, until stdin ends."""
    import resource

    limit = int(os.environ["OPD_JAX_VERIFY_MIB"]) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    import math_verify  # noqa: F401  (seconds; before "ready")

    print('"ready"', file=out, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(_equal(question["given"], question["answer"])), file=out, flush=True)


def _equal(given: str, answer: str) -> bool:
    import math_verify

    def parse(text):
        return math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=MATH_VERIFY_SECONDS)

    try:
        return bool(
            math_verify.verify(parse(answer), parse(given), timeout_seconds=MATH_VERIFY_SECONDS)
        )
    except (MemoryError, RecursionError, math_verify.errors.TimeoutException):
        return False  # what cannot be compared is not right


@functools.cache
def default_verifier() -> Verifier:
    """The verifier of this process, one worker, stopped at exit."""
    verifier = Verifier()
    atexit.register(verifier.close)
    return verifier


def is_correct(response: str, answer: str) -> bool:
    r"""True = the last \boxed{} of the response equals the answer."""
    return default_verifier().is_correct(response, answer)
