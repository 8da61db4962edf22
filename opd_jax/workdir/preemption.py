# SPDX-License-Identifier: Apache-2.0
"""SIGTERM or Ctrl-C asks a run to stop at the next safe point; a second one ends it at once.

Schedulers, spot machines and TPU maintenance all announce themselves by SIGTERM, the person at the
keyboard by Ctrl-C. A run checks between stages (and between chunks of decoding), abandons the step
in hand, checkpoints, and exits with `EXIT_PREEMPTED`; the same command then goes on from there.
Where there is nothing to save, as before the first step, `stoppable` ends the command.
"""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits: run the same command again
EXIT_AT_ONCE = 76  # by the second signal: nothing was saved since the last checkpoint
NAMES = {signal.SIGTERM: b"SIGTERM", signal.SIGINT: b"Ctrl-C"}


class Preempted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop; the training state is that of the last whole update."""


def ignore() -> None:
    """From here on neither signal changes anything: call when all is written.

    The interpreter gives a Python handler's signal its default back long before it is gone; one
    that came then would turn a finished run into a killed one.
    """
    for number in NAMES:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def stoppable(advice: str = "run the same command again") -> Iterator[None]:
    """For a command: Ctrl-C ends it with a line and `EXIT_PREEMPTED`, a second one at once.

    Nothing is saved on the way. What can save something has a `Guard`, whose handler takes over.
    """
    before = signal.signal(signal.SIGINT, _interrupt)
    _Listener.start(b"stopping", patience=1.0)
    try:
        yield
    except (KeyboardInterrupt, Preempted):
        _leave(advice)
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, before)
            _Listener.stop()


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _leave(advice: str) -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_AT_ONCE))
    _Listener.stop()
    print(f"stopped: {advice}", file=sys.stderr, flush=True)
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized():  # it would wait for the others, far as they are
        sys.stdout.flush()
        os._exit(EXIT_PREEMPTED)
    sys.exit(EXIT_PREEMPTED)


class _Listener:
    """Answers signals in a thread: Python's own handlers wait for the main one, which may spend
    minutes in a compilation. The first gets a line (unless the main thread has answered within
    `patience` seconds and stopped us), the second ends the process.
    """

    _wakeup = -1  # the end of the pipe that the interpreter writes each signal's number to

    @classmethod
    def start(cls, doing: bytes, patience: float = 0.0) -> None:
        """`doing` is what the line says; an earlier listener of ours ends."""
        cls.stop()
        reader, cls._wakeup = os.pipe()
        os.set_blocking(cls._wakeup, False)
        signal.set_wakeup_fd(cls._wakeup, warn_on_full_buffer=False)
        threading.Thread(target=cls._listen, args=(reader, doing, patience), daemon=True).start()

    @classmethod
    def stop(cls) -> None:
        if cls._wakeup >= 0:
            signal.set_wakeup_fd(-1)
            os.close(cls._wakeup)
            cls._wakeup = -1

    @staticmethod
    def _listen(reader: int, doing: bytes, patience: float) -> None:
        num_signals = 0
        while byte := os.read(reader, 1):
            if byte[0] not in NAMES:
                continue
            num_signals += 1
            if num_signals > 1:
                os._exit(EXIT_AT_ONCE)
            if not select.select([reader], [], [], patience)[0]:
                os.write(
                    2,
                    NAMES[signal.Signals(byte[0])] + b": " + doing + b"; once more exits at once\n",
                )
        os.close(reader)


class Guard:
    """Holds the signal handler; `check()` raises `Preempted` on every process or on none."""

    def __init__(self):
        self.requested = False

    def install(self) -> None:
        _Listener.start(b"stopping at the next safe point")
        for number in NAMES:
            signal.signal(number, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True

    def check(self) -> None:
        """Call at the same points on every process: several processes must agree to stop."""
        import jax  # here: commands that use no device import this module for its exit codes
        import numpy as np
        from jax.experimental import multihost_utils

        requested = self.requested
        if jax.process_count() > 1:
            requested = bool(np.max(multihost_utils.process_allgather(np.array(requested))))
        if requested:
            raise Preempted
