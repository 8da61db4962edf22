# SPDX-License-Identifier: Apache-2.0
"""Compiles the pieces of a step and predicts what the step needs and takes."""

import dataclasses
import re
import time
from collections.abc import Iterable
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from launch.plan import hlo, hlo_cost
from launch.plan.chips import GIB, Slice, roofline
from launch.plan.stages import Piece

# What the compiler says when a program alone is larger than the memory.
_TOO_LARGE = re.compile(
    r"Used ([\d.]+)([KMG]?) of|required for HLO temporaries \(([\d.]+)([KMG]?)\)"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB}


@dataclasses.dataclass
class Stage:
    """A stage's share of one step; per device. Its memory is that of its largest piece."""

    name: str
    runs: float = 0.0
    flops: float | None = 0.0  # None: a piece did not compile
    hbm_traffic_bytes: float = 0.0
    collective_bytes: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float | None = 0.0
    bound: str = ""  # what the largest piece waits for
    memory: dict[str, float] = dataclasses.field(default_factory=dict)  # kind -> bytes
    notes: set[str] = dataclasses.field(default_factory=set)
    compile_seconds: float = 0.0

    @property
    def hbm_bytes(self) -> float:
        return sum(self.memory.values())


def predict(pieces: Iterable[Piece], chips: Slice, devices: list, report=lambda text: None):
    """Compiles every piece; returns the stages by name, in order.

    Args:
      devices: of the mesh, in its order.
      report: told of each compilation.
    """
    stages: dict[str, Stage] = {}
    for piece in pieces:
        stage = stages.setdefault(piece.stage, Stage(piece.stage))
        start = time.perf_counter()
        _add(stage, piece, chips, devices)
        elapsed = time.perf_counter() - start
        stage.compile_seconds += elapsed
        report(f"compiled {piece.stage} in {elapsed:.0f} s")
    return stages


def by_arithmetic(least: dict[str, dict[str, float]], chips: Slice) -> dict[str, Stage]:
    """Stages that need not be compiled to know that one does not fit; {} = all of them may fit.

    Args:
      least: stage -> kind -> bytes that it holds at least (`Pieces.least`).
    """
    if all(sum(kinds.values()) <= chips.hbm_bytes for kinds in least.values()):
        return {}
    note = "nothing was compiled: without temporaries already a stage holds more than there is"
    return {
        name: Stage(name, flops=None, seconds=None, memory=kinds, notes={note})
        for name, kinds in least.items()
    }


def _add(stage: Stage, piece: Piece, chips: Slice, devices: list) -> None:
    try:
        compiled = piece.lower().compile()
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        stage.flops = stage.seconds = None
        _largest(stage, {"resident": piece.resident, "program": _needed(str(error))})
        stage.notes.add(str(error).split("\n")[0])
        return
    _largest(stage, memory(compiled) | {"resident": piece.resident})
    costs = hlo_cost.count(hlo.parse(compiled.as_text() or ""), piece.iterations)
    seconds = roofline(costs, chips, devices)
    stage.runs += piece.runs
    stage.hbm_traffic_bytes += piece.runs * costs.hbm_bytes
    for kind, num_bytes in costs.collective_bytes.items():
        stage.collective_bytes[kind] = (
            stage.collective_bytes.get(kind, 0.0) + piece.runs * num_bytes
        )
    if stage.flops is not None and stage.seconds is not None:
        stage.flops += piece.runs * costs.flops
        stage.seconds += piece.runs * seconds.total
    stage.bound = seconds.bound
    stage.notes |= {f"FLOPs of kernel {name} are not counted" for name in costs.unknown_kernels}


def _largest(stage: Stage, kinds: dict[str, float]) -> None:
    if sum(kinds.values()) > stage.hbm_bytes:
        stage.memory = kinds


def memory(compiled: jax.stages.Compiled) -> dict[str, float]:
    """kind -> bytes of HBM per device while the program runs, by the compiler's account."""
    stats: Any = compiled.memory_analysis()
    return {
        "arguments": float(stats.argument_size_in_bytes),
        "temporaries": float(stats.temp_size_in_bytes),
        # What is not written over an argument.
        "results": float(stats.output_size_in_bytes - stats.alias_size_in_bytes),
        "code": float(stats.generated_code_size_in_bytes),
    }


def _needed(message: str) -> float:
    """Bytes that a program would need, of the compiler's refusal."""
    match = _TOO_LARGE.search(message)
    if match is None:
        return float("inf")
    amount, unit = (match[1], match[2]) if match[1] else (match[3], match[4])
    return float(amount) * _UNITS[unit]
