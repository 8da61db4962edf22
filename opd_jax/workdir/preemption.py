# SPDX-License-Identifier: Apache-2.0
"""SIGTERM asks a run to stop at the next safe point; a second one ends it at once.

Schedulers, spot machines and TPU maintenance all announce themselves by SIGTERM. A run checks
between stages (and between chunks of decoding), abandons the step in hand, checkpoints, and exits
with `EXIT_PREEMPTED`; the same command then goes on from there.
"""

import os
import signal
import sys
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits: run the same command again
EXIT_AT_ONCE = 76  # by the second signal: nothing was saved since the last checkpoint


class Preempted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop; the training state is that of the last whole update."""


def ignore() -> None:
    """From here on SIGTERM changes nothing: call when all is written, so that the exit code stands.

    The interpreter gives a Python handler's signal its default back long before it is gone; one
    that came then would turn a finished run into a killed one.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Guard:
    """Holds the signal handler; `check()` raises `Preempted` on every process or on none."""

    def __init__(self):
        self.requested = False

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(EXIT_AT_ONCE)
        self.requested = True
        # os.write: print is not safe inside a signal handler.
        os.write(
            sys.stderr.fileno(), b"SIGTERM: stopping at the next safe point; once more exits\n"
        )

    def check(self) -> None:
        """Call at the same points on every process: several processes must agree to stop."""
        requested = self.requested
        if jax.process_count() > 1:
            requested = bool(np.max(multihost_utils.process_allgather(np.array(requested))))
        if requested:
            raise Preempted
