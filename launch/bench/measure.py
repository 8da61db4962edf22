# SPDX-License-Identifier: Apache-2.0
"""Clocks, rates of this machine, and how measurements are printed."""

import dataclasses
import json
import resource
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from launch import columns
from launch.plan.chips import CHIPS, GIB

# Device kind as JAX names it -> peak FLOP/s in bf16 (dense) and bytes/s of its memory.
# GPUs: NVIDIA's data sheets of the SXM parts; TPUs: launch/plan/chips.py.
PEAKS = {
    "NVIDIA A100-SXM4-80GB": (312e12, 2.039e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA H200": (989e12, 4.8e12),
}
_TPUS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
PEAKS |= {kind: (CHIPS[name].flops, CHIPS[name].hbm_bandwidth) for kind, name in _TPUS.items()}


@dataclasses.dataclass
class Report:
    """Figures of a case: `rows` is the printed table, `result` the JSON object."""

    result: dict
    rows: list[dict]
    notes: list[str] = dataclasses.field(default_factory=list)


class Clock:
    """Seconds since it was made: of wall time, and of this process's CPU time."""

    def __init__(self):
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def cpu_seconds(self) -> float:
        """Shows how fast an idle machine would be when this one is busy."""
        return time.process_time() - self._cpu_start


def seconds_of(function: Callable, *args) -> Callable[[], float]:
    """A measurement for `interleaved`: seconds of a call until its arrays are computed."""

    def measure() -> float:
        clock = Clock()
        jax.block_until_ready(function(*args))
        return clock.seconds()

    return measure


def interleaved(*measurements: Callable[[], float], warmup: int, repeats: int) -> list[list[float]]:
    """What each measurement returns, one list per measurement, from rounds of one of each.

    Whatever slows the machine for a while slows all of them, so their ratios hold.
    """
    rounds = [[measure() for measure in measurements] for _ in range(warmup + repeats)]
    return [list(column) for column in zip(*rounds[warmup:], strict=True)]


def ratio(above: list[float], below: list[float]) -> float:
    """Median over the rounds of `interleaved` of the ratio of two measurements."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def matmul_rate(dtype=jnp.float32, size: int = 3072) -> Callable[[], float]:
    """A measurement for `interleaved`: FLOP/s of a square product.

    Its operand and its result, 36 MiB each in float32, count in a case's `peak_rss_gib`.
    """
    if jax.default_backend() != "cpu":
        size, dtype = 8192, jnp.bfloat16
    x = jnp.ones((size, size), dtype)
    return _rate(2 * size**3, jax.jit(lambda a: a @ a), x)


def read_rate(num_bytes: int = 2**28) -> Callable[[], float]:
    """A measurement for `interleaved`: bytes/s of a sum over an array that no cache holds."""
    return _rate(num_bytes, jax.jit(jnp.sum), jnp.ones(num_bytes // 4, jnp.float32))


def _rate(work: float, function: Callable, x: jax.Array) -> Callable[[], float]:
    seconds = seconds_of(function, x)
    seconds()  # compiles
    return lambda: work / seconds()


def peaks() -> tuple[float, float] | None:
    """(FLOP/s, bytes/s) of the default device, if its peaks are known."""
    return PEAKS.get(jax.devices()[0].device_kind)


def utilisation(flops: float = 0.0, num_bytes: float = 0.0, seconds: float = 1.0) -> dict:
    """Share of the device's peaks that was used; empty where they are not known."""
    known = peaks()
    if known is None:
        return {}
    out = {}
    if flops:
        out["mfu"] = flops / seconds / known[0]
    if num_bytes:
        out["bandwidth_utilisation"] = num_bytes / seconds / known[1]
    return out


def peak_rss_gib() -> float:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def peak_device_gib() -> float | None:
    """Highest memory in use on the default device; None where it does not say."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / GIB if stats else None


def show(report: Report, *, json_only: bool) -> None:
    """The table, the notes, and the JSON object as the last line."""
    if not json_only:
        print(table(report.rows))
        for note in report.notes:
            print(note)
    print(json.dumps({k: _plain(v) for k, v in report.result.items()}))


def table(rows: list[dict]) -> str:
    """Aligned columns; a row may lack some."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return columns.align([names, *([_cell(row.get(name)) for name in names] for row in rows)])


def _cell(value) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value):
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
