# SPDX-License-Identifier: Apache-2.0
"""A few processes that each run one function, beside a parent that holds an accelerator.

They are fresh interpreters that import the function's module and nothing else: forking a process
that runs JAX deadlocks sooner or later, and multiprocessing's spawn imports the parent's main
module again, JAX with it. A worker leaves when its stdin closes, so none outlives its parent.

Messages are JSON in which bytes and arrays are marked: data alone, which runs nothing when it is
read. Tuples arrive as lists.
"""

import base64
import concurrent.futures
import contextlib
import importlib
import json
import os
import pathlib
import queue
import select
import struct
import subprocess
import sys
import time
from typing import Any

START_SECONDS = 120.0  # imports take seconds on a busy machine
_SIZE = struct.Struct("<Q")


class Pool:
    """Calls `function(argument, **common)` in `num_workers` processes.

    Attributes:
      num_died: workers that died, or passed the time limit, with work in hand; each was replaced.
    """

    def __init__(
        self,
        function: str,
        num_workers: int,
        *,
        seconds: float = 0.0,
        memory_mib: int = 0,
        at_once: bool = True,
        **common: Any,
    ):
        """`function`: "module:name". `common` goes to every worker once and stays there.

        Arguments and results: what JSON holds, bytes, and arrays of numbers, nested at will.
        `seconds`: wall time for one argument, the worker's imports not counted; 0 = no limit.
        `memory_mib`: address space of a worker; 0 = no limit. `at_once`: False starts a worker with
        its first argument.
        """
        if num_workers < 1:
            raise ValueError(f"a pool of {num_workers} workers does nothing; use at least 1")
        self.num_died = 0
        self._seconds = seconds
        self._threads = concurrent.futures.ThreadPoolExecutor(num_workers, "opd_jax_worker")
        self._idle: queue.Queue[_Worker] = queue.Queue()
        hello = encode([function, memory_mib, common])
        for _ in range(num_workers):
            worker = _Worker(hello, quiet=memory_mib > 0)
            if at_once:
                worker.start()
            self._idle.put(worker)

    def submit(self, argument: Any) -> concurrent.futures.Future:
        """The result to come.

        Its `result()` raises TimeoutError past the time limit, EOFError if the worker died with
        this argument twice, and RuntimeError with the worker's traceback if the function raised.
        """
        return self._threads.submit(self._call, argument)

    def close(self) -> None:
        """Waits for work in hand and ends the workers."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().stop()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _call(self, argument):
        worker = self._idle.get()
        try:
            try:
                ok, value = self._ask(worker, argument)
            except EOFError:  # died, perhaps not of this
                ok, value = self._ask(worker, argument)
        finally:
            self._idle.put(worker)
        if not ok:
            raise RuntimeError(f"a worker's function raised:\n{value}")
        return value

    def _ask(self, worker, argument):
        """The worker's reply. One that dies or is late is stopped: the next call starts another."""
        try:
            return worker.ask(argument, self._seconds)
        except (OSError, EOFError) as error:
            self.num_died += 1
            worker.kill()
            worker.stop()
            raise error if isinstance(error, TimeoutError) else EOFError from error


class _Worker:
    """One process, started again after it was stopped."""

    def __init__(self, hello: bytes, quiet: bool):
        self._hello = hello
        self._quiet = quiet  # what libraries say of hostile input helps nobody
        self._process: subprocess.Popen | None = None
        self._ready = False

    @property
    def pid(self) -> int | None:
        """None = not started."""
        return self._process and self._process.pid

    def start(self) -> None:
        """Returns at once; the process is ready when it has imported its function."""
        root = str(pathlib.Path(__file__).resolve().parents[1])
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        self._ready = False
        self._process = process = subprocess.Popen(
            [sys.executable, "-c", "from opd_jax import workers; workers.serve()"],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if self._quiet else None,
            process_group=0,  # Ctrl-C is for the run, which needs its workers to end in order
            env=os.environ | {"PYTHONPATH": path},
        )
        with contextlib.suppress(OSError):  # dead already: the first call finds out
            _write(process.stdin, self._hello)

    def ask(self, argument: Any, seconds: float) -> Any:
        """The reply; TimeoutError past the limit, OSError or EOFError when the process is gone."""
        if self._process is None:
            self.start()
        assert self._process is not None  # `start` makes one
        if not self._ready:
            self._receive(START_SECONDS)
            self._ready = True
        _write(self._process.stdin, encode(argument))
        return self._receive(seconds)

    def _receive(self, seconds: float) -> Any:
        assert self._process is not None and self._process.stdout is not None  # asked once started
        until = time.monotonic() + seconds if seconds else None
        return decode(_read(_Timed(self._process.stdout.fileno(), until)))

    def kill(self) -> None:
        """Ends the process in mid-work."""
        if self._process:
            self._process.kill()

    def stop(self) -> None:
        """Ends the process when its work is done."""
        if self._process is None:
            return
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # its end of the pipe is gone
                if pipe is not None:
                    pipe.close()
        self._process.wait()
        self._process = None


class _Timed:
    """A pipe to read from until a moment of the monotonic clock; None = without end."""

    def __init__(self, pipe: int, until: float | None):
        self._pipe, self._until = pipe, until

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer where the pipe ends; TimeoutError when the moment has come."""
        parts, left = [], size
        while left:
            wait = None if self._until is None else max(self._until - time.monotonic(), 0)
            if not select.select([self._pipe], [], [], wait)[0]:
                raise TimeoutError
            parts.append(os.read(self._pipe, min(left, 2**20)))
            if not parts[-1]:
                break
            left -= len(parts[-1])
        return b"".join(parts)


def serve() -> None:
    """A worker's life: "ready", then one reply per argument until stdin ends."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be taken for a reply
    function, memory_mib, common = decode(_read(sys.stdin.buffer))
    if memory_mib:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_mib * 2**20, memory_mib * 2**20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module, name = function.split(":")
    function = getattr(importlib.import_module(module), name)
    _write(replies, encode("ready"))
    while True:
        try:
            argument = decode(_read(sys.stdin.buffer))
        except EOFError:
            return
        _write(replies, _reply(function, argument, common))


def encode(value: Any) -> bytes:
    """A message; TypeError for what it cannot hold."""
    return json.dumps(value, default=_mark).encode()


def decode(message: bytes) -> Any:
    """What `encode` was given, with lists for tuples. Arrays are read-only."""
    return json.loads(message, object_hook=_unmark)


def _mark(value):
    """json's way to ask for what it does not know."""
    if isinstance(value, bytes):
        return {"$bytes": value.decode("latin-1")}
    numpy = sys.modules.get("numpy")  # who holds an array has imported it
    if numpy and isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf":
        data = base64.b64encode(value.tobytes()).decode()
        return {"$array": data, "dtype": value.dtype.str, "shape": value.shape}
    raise TypeError(
        f"a worker's message cannot hold a {type(value).__name__}: it takes what JSON holds, bytes "
        "and arrays of numbers"
    )


def _unmark(found: dict):
    if "$bytes" in found:
        return found["$bytes"].encode("latin-1")
    if "$array" in found:
        import numpy

        data = base64.b64decode(found["$array"])
        return numpy.frombuffer(data, found["dtype"]).reshape(found["shape"])
    return found


def _reply(function, argument, common):
    """[True, value] or [False, traceback]: a worker survives what its function raises."""
    try:
        return encode([True, function(argument, **common)])
    except Exception:  # raised again in the parent, with this text
        import traceback

        return encode([False, traceback.format_exc()])


def _write(stream, data: bytes) -> None:
    left = memoryview(_SIZE.pack(len(data)) + data)
    while left:  # a pipe without a buffer takes what it has room for
        left = left[stream.write(left) :]
    stream.flush()


def _read(stream) -> bytes:
    """One message; EOFError where the stream ends."""
    size = stream.read(_SIZE.size)
    if len(size) < _SIZE.size:
        raise EOFError
    data = stream.read(_SIZE.unpack(size)[0])
    if len(data) < _SIZE.unpack(size)[0]:
        raise EOFError
    return data
