# SPDX-License-Identifier: Apache-2.0
"""Which mesh and micro-batch are fastest among those that fit."""

import itertools
from collections.abc import Callable, Iterator

import ml_collections as mlc

from launch import columns, config_flags
from launch.plan import text
from launch.plan.chips import GIB
from launch.plan.text import Plan

_TENSOR, _EXPERT = (1, 2, 4, 8), (1, 4, 16)
_ROWS = (2, 4)  # packed rows per batch shard, besides those of the config

Element = dict[str, object]  # dotted key -> value


def search(
    config: mlc.ConfigDict,
    plan: Callable[[mlc.ConfigDict], Plan],
    num_devices: int,
    num_experts: int,
    report: Callable[[str], None],
) -> list[tuple[Element, Plan]]:
    """Plans of everything that was tried, those that fit first, fastest first.

    First every mesh with the config's micro-batch, then larger micro-batches on the best mesh: a
    grid of both would compile for an hour. What is found is reported at once, so that a search
    that is stopped has not been for nothing.

    Args:
      plan: config -> its plan; ValueError = this mesh cannot hold the model.
      num_experts: of the models; 0 = none has experts, and none of the meshes divides any.
      report: told of what is tried and found.
    """
    found = []
    tries = list(meshes(num_devices, num_experts))
    numbers = itertools.count(1)

    def attempt(element: Element) -> None:
        flags = config_flags.as_line(element)
        report(f"candidate {next(numbers)} of {len(tries) + len(_ROWS)}: {flags}")
        try:
            found.append((element, plan(config_flags.apply_overrides(config, element))))
            report("  " + ", ".join(f"{k} {v}" for k, v in _figures(found[-1][1]).items()))
        except ValueError as error:
            report(f"  not possible: {str(error).split(':')[0]}")

    for mesh in tries:
        attempt({"mesh": mesh})
    if not found:
        raise ValueError(
            f"no mesh of {num_devices} devices divides model and batch. Set another --topology."
        )
    found.sort(key=_rank)
    best, first = found[0]
    shards = num_devices // first.mesh_shape["tensor"]
    for rows in _ROWS:
        attempt(best | {"pack.micro_batch_rows": rows * shards})
    return sorted(found, key=_rank)


def meshes(num_devices: int, num_experts: int) -> Iterator[tuple]:
    """config.mesh of each shape to try."""
    for tensor in _TENSOR:
        for expert in _EXPERT if num_experts else (1,):
            if num_devices % (tensor * expert) == 0:
                yield (("data", 1), ("fsdp", -1), ("tensor", tensor), ("expert", expert))


def _rank(candidate: tuple[Element, Plan]) -> tuple:
    plan = candidate[1]
    return not plan.fits, plan.step_seconds or float("inf")


def as_table(found: list[tuple[Element, Plan]]) -> str:
    rows = [["flags", *_figures(found[0][1])]]
    rows += [[config_flags.as_line(element), *_figures(plan).values()] for element, plan in found]
    return "\n".join(
        [columns.align(rows), "", "predicted; the first line is the fastest that fits"]
    )


def _figures(plan: Plan) -> dict[str, str]:
    """Column -> cell of what is said of one plan."""
    largest = max(stage.hbm_bytes for stage in plan.stages.values())
    return {
        "fits": "yes" if plan.fits else "no",
        "largest GiB": f"{largest / GIB:.2f}",
        "of GiB": f"{plan.chips.hbm_bytes / GIB:.2f}",
        "s per step": "-" if plan.step_seconds is None else f"{plan.step_seconds:.4g}",
    }


def as_json(found: list[tuple[Element, Plan]]) -> list[dict]:
    return [{"flags": config_flags.as_flags(e), **text.as_json(plan)} for e, plan in found]
