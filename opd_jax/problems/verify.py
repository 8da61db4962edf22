# SPDX-License-Identifier: Apache-2.0
r"""Is a response's answer right? The last \boxed{} against the reference.

What text decides is decided here (`answers`). What is left is algebra and goes to worker processes
(`symbolic`), because sympy can hang, crash or eat the memory on a hostile expression, and model
output is hostile sooner or later. A worker that passes its time limit is killed; its answer counts
as wrong and a new worker takes its place.
"""

import atexit
import concurrent.futures
import functools
import re
import time
from collections.abc import Iterable

from opd_jax import workers
from opd_jax.problems import answers
from opd_jax.problems.answers import normalise as normalise

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete \boxed{...}; None when there is none. Linear in the text."""
    best, open_braces = None, []  # starts of contents; -1 where the brace is not a box's
    for match in _BRACES.finditer(text):
        if match[0].startswith("\\boxed"):
            open_braces.append(match.end())
        elif match[0] == "{":
            open_braces.append(-1)
        elif match[0] == "}" and open_braces:
            start = open_braces.pop()
            if start > (best.start if best else -1):
                best = slice(start, match.start())
    return None if best is None else text[best]


class Verifier:
    """Decides whether answers are right, in worker processes with hard limits."""

    def __init__(self, num_workers: int = 1, seconds: float = 10.0, memory_mib: int = 2048):
        """`seconds`: wall time for one answer. `memory_mib`: address space of a worker."""
        if num_workers < 1 or seconds <= 0 or memory_mib < 512:
            raise ValueError(
                f"Verifier(num_workers={num_workers}, seconds={seconds}, memory_mib={memory_mib}): "
                "needs a worker, time and at least 512 MiB for sympy; try (1, 10.0, 2048)"
            )
        self._num_workers, self._seconds = num_workers, seconds
        self._pool = workers.Pool(
            "opd_jax.problems.symbolic:equal",
            num_workers,
            seconds=seconds,
            memory_mib=memory_mib,
            at_once=False,
        )

    @property
    def num_killed(self) -> int:
        """Workers that passed a limit or died; an answer that did it to them is wrong."""
        return self._pool.num_died

    def is_correct(self, response: str, answer: str) -> bool:
        r"""True = the last \boxed{} of the response equals the answer."""
        given = last_boxed(response)
        if given is None:
            return False
        until = time.monotonic() + self._seconds
        return answers.equal(given, answer, lambda *sides: self._ask(sides, until))

    def are_correct(self, pairs: Iterable[tuple[str, str]]) -> list[bool]:
        """`is_correct` of many (response, answer) pairs, all workers at once."""
        with concurrent.futures.ThreadPoolExecutor(self._num_workers) as pool:
            return list(pool.map(lambda pair: self.is_correct(*pair), pairs))

    def _ask(self, sides: tuple[str, str], until: float) -> bool:
        """False also past the answer's time: one of many parts may ask for each."""
        if time.monotonic() > until:
            return False
        try:
            return self._pool.submit(sides).result()
        except (TimeoutError, EOFError):
            return False

    def close(self) -> None:
        """Ends the workers."""
        self._pool.close()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_) -> None:
        self.close()


@functools.cache
def default_verifier() -> Verifier:
    """The verifier of this process, one worker, stopped at exit."""
    verifier = Verifier()
    atexit.register(verifier.close)
    return verifier


def is_correct(response: str, answer: str) -> bool:
    r"""True = the last \boxed{} of the response equals the answer."""
    return default_verifier().is_correct(response, answer)
