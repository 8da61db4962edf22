# SPDX-License-Identifier: Apache-2.0
import os
import time

import numpy as np
import pytest

from opd_jax import workers


def test_results_come_from_other_processes_in_order():
    with workers.Pool("builtins:sorted", 2, reverse=True) as pool:
        futures = [pool.submit([i, i + 1]) for i in range(5)]
        assert [future.result() for future in futures] == [[i + 1, i] for i in range(5)]
    assert pool.num_died == 0


def test_what_a_function_raises_comes_back_with_its_traceback():
    with workers.Pool("builtins:sorted", 1) as pool:
        with pytest.raises(RuntimeError, match="TypeError"):
            pool.submit(3).result()
        assert pool.submit([2, 1]).result() == [1, 2]  # the worker lives on


def test_a_message_holds_bytes_and_arrays_and_no_other_object():
    sent = {
        "text": "\u2603\x00",
        "bytes": [b"", b"\xff\x00a"],
        "numbers": [1.5, float("inf"), None],
        "rows": [np.arange(6, dtype=np.int32).reshape(2, 3)[:, ::2], np.zeros(0, np.float32)],
    }
    got = workers.decode(workers.encode(sent))
    for ours, theirs in zip(sent.pop("rows"), got.pop("rows"), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert got == sent
    for value in (object(), {1, 2}, np.array([object()])):
        with pytest.raises(TypeError, match="cannot hold a"):
            workers.encode(value)


def test_a_result_that_no_message_holds_comes_back_as_a_traceback():
    with workers.Pool("builtins:set", 1) as pool:
        with pytest.raises(RuntimeError, match="cannot hold a set"):
            pool.submit([1]).result()
        assert pool.num_died == 0


def test_a_killed_worker_is_replaced_and_the_work_done():
    with workers.Pool("builtins:sorted", 1) as pool:
        assert pool.submit([1]).result() == [1]
        next(iter(pool._idle.queue)).kill()
        assert pool.submit([2, 1]).result() == [1, 2]
        assert pool.num_died == 1


def test_work_past_the_time_limit_is_given_up_and_its_worker_replaced():
    """Imports are not counted: the limit is shorter than the start of an interpreter."""
    with workers.Pool("time:sleep", 1, seconds=0.05, at_once=False) as pool:
        assert next(iter(pool._idle.queue)).pid is None
        assert pool.submit(0).result() is None
        with pytest.raises(TimeoutError):
            pool.submit(60).result()
        assert pool.num_died == 1
        assert pool.submit(0).result() is None


def test_memory_past_the_limit_is_an_error_of_the_function():
    with workers.Pool("builtins:bytearray", 1, memory_mib=512) as pool:
        with pytest.raises(RuntimeError, match="MemoryError"):
            pool.submit(2**30).result()


def test_a_message_longer_than_a_pipe_arrives():
    with workers.Pool("builtins:sorted", 1) as pool:
        rows = ["x" * 3_000_000, "a" * 3_000_000]
        assert pool.submit(rows).result() == rows[::-1]


def test_work_that_kills_its_worker_twice_is_reported():
    with workers.Pool("os:_exit", 1) as pool:
        with pytest.raises(EOFError):
            pool.submit(1).result()
        assert pool.num_died == 2


def test_no_worker_outlives_the_pool():
    with workers.Pool("builtins:sorted", 2) as pool:
        pool.submit([1]).result()
        pids = [worker.pid for worker in pool._idle.queue]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            for _ in range(100):
                os.kill(pid, 0)
                time.sleep(0.05)


def test_a_pool_of_nobody_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        workers.Pool("builtins:sorted", 0)
