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
import struct
import subprocess
import sys
from typing import Any

import numpy as np

_SIZE = struct.Struct("<Q")


class Pool:
    """Calls `function(argument, **common)` in `num_workers` processes.

    Attributes:
      num_died: workers that died with work in hand; each was replaced.
    """

    def __init__(self, function: str, num_workers: int, **common: Any):
        """`function`: "module:name". `common` goes to every worker once and stays there.

        Arguments and results: what JSON holds, bytes, and arrays of numbers, nested at will.
        """
        if num_workers < 1:
            raise ValueError(f"a pool of {num_workers} workers does nothing; use at least 1")
        self.num_died = 0
        self._hello = encode([function, common])
        self._threads = concurrent.futures.ThreadPoolExecutor(num_workers, "opd_jax_worker")
        self._idle: queue.Queue[subprocess.Popen] = queue.Queue()
        for _ in range(num_workers):
            self._idle.put(self._start())

    def submit(self, argument: Any) -> concurrent.futures.Future:
        """The result to come.

        Its `result()` raises OSError or EOFError if the worker died with this argument twice, and
        RuntimeError with the worker's traceback if the function raised.
        """
        return self._threads.submit(self._call, argument)

    def close(self) -> None:
        """Waits for work in hand and ends the workers."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            _stop(self._idle.get())

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _call(self, argument):
        worker = self._idle.get()
        try:
            try:
                ok, value = _ask(worker, argument)
            except (OSError, EOFError):
                worker = self._replace(worker)
                ok, value = _ask(worker, argument)
        except (OSError, EOFError):
            worker = self._replace(worker)
            raise
        finally:
            self._idle.put(worker)
        if not ok:
            raise RuntimeError(f"a worker's function raised:\n{value}")
        return value

    def _replace(self, worker):
        self.num_died += 1
        worker.kill()
        _stop(worker)
        return self._start()

    def _start(self):
        root = str(pathlib.Path(__file__).resolve().parents[1])
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        worker = subprocess.Popen(
            [sys.executable, "-c", "from opd_jax import workers; workers.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # Ctrl-C is for the run, which needs its workers to end in order
            env=os.environ | {"PYTHONPATH": path},
        )
        with contextlib.suppress(OSError):  # dead already: the first call finds out
            _write(worker.stdin, self._hello)
        return worker


def serve() -> None:
    """A worker's life: one reply per argument until stdin ends."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be taken for a reply
    function, common = decode(_read(sys.stdin.buffer))
    module, name = function.split(":")
    function = getattr(importlib.import_module(module), name)
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
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
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
        data = base64.b64decode(found["$array"])
        return np.frombuffer(data, found["dtype"]).reshape(found["shape"])
    return found


def _reply(function, argument, common):
    """[True, value] or [False, traceback]: a worker survives what its function raises."""
    try:
        return encode([True, function(argument, **common)])
    except Exception:  # raised again in the parent, with this text
        import traceback

        return encode([False, traceback.format_exc()])


def _ask(worker, argument):
    _write(worker.stdin, encode(argument))
    return decode(_read(worker.stdout))


def _write(stream, data: bytes) -> None:
    stream.write(_SIZE.pack(len(data)))
    stream.write(data)
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


def _stop(worker) -> None:
    with contextlib.suppress(OSError):  # its end of the pipe is gone
        worker.stdin.close()
    worker.stdout.close()
    worker.wait()
