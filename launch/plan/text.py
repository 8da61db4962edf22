# SPDX-License-Identifier: Apache-2.0
"""A plan as a table, as one JSON object, and as advice."""

import dataclasses
import math

from launch import columns
from launch.plan.chips import GIB, Slice
from launch.plan.predict import Stage

_KINDS = ("resident", "arguments", "temporaries", "results")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was predicted for one config on one slice."""

    chips: Slice
    mesh_shape: dict[str, int]
    stages: dict[str, Stage]
    response_tokens: float  # of a step
    assumed: str

    @property
    def fits(self) -> bool:
        return not self.short

    @property
    def short(self) -> list[Stage]:
        """Stages that need more memory than there is, worst first."""
        short = [s for s in self.stages.values() if s.hbm_bytes > self.chips.hbm_bytes]
        return sorted(short, key=lambda stage: -stage.hbm_bytes)

    @property
    def step_seconds(self) -> float | None:
        seconds = [s.seconds for s in self.stages.values() if s.seconds is not None]
        return sum(seconds) if len(seconds) == len(self.stages) else None

    @property
    def utilisation(self) -> float | None:
        """Counted FLOPs over what the chips could do in that time."""
        if not self.step_seconds:
            return None
        flops = sum(stage.flops or 0.0 for stage in self.stages.values())
        return flops / self.step_seconds / self.chips.flops

    @property
    def tokens_per_second_per_chip(self) -> float | None:
        if not self.step_seconds:
            return None
        return self.response_tokens / self.step_seconds / self.chips.num_chips

    @property
    def chip_hours(self) -> float | None:
        """Of 100 steps."""
        return self.step_seconds and 100 * self.step_seconds * self.chips.num_chips / 3600


def as_json(plan: Plan) -> dict:
    """Everything that the table says, in bytes, FLOPs and seconds per device and step."""
    limit = plan.chips.hbm_bytes
    stages = {
        stage.name: {
            "hbm_bytes": _finite(stage.hbm_bytes),
            "hbm_limit_bytes": limit,
            "hbm_bytes_by_kind": {k: _finite(v) for k, v in stage.memory.items()},
            "runs_per_step": stage.runs,
            "flops": stage.flops,
            "hbm_traffic_bytes": stage.hbm_traffic_bytes,
            "collective_bytes": stage.collective_bytes,
            "seconds": stage.seconds,
            "bound": stage.bound,
            "notes": sorted(stage.notes),
        }
        for stage in plan.stages.values()
    }
    return {
        "fits": plan.fits,
        "topology": plan.chips.name,
        "num_chips": plan.chips.num_chips,
        "mesh": plan.mesh_shape,
        "assumed": plan.assumed,
        "stages": stages,
        "step_seconds": plan.step_seconds,
        "utilisation": plan.utilisation,
        "tokens_per_second_per_chip": plan.tokens_per_second_per_chip,
        "chip_hours_per_100_steps": plan.chip_hours,
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def as_table(plan: Plan, advice: list[str]) -> str:
    chips = plan.chips
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh_shape.items())
    device = "chip" if chips.devices_per_chip == 1 else f"1/{chips.devices_per_chip} chip"
    head = ["stage", "runs", *(f"{kind} GiB" for kind in _KINDS), "all GiB", "of GiB"]
    head += ["TFLOP", "HBM GB", "ICI GB", "seconds", "waits for", "FLOP/s used"]
    rows = [head] + [_row(stage, chips) for stage in plan.stages.values()]
    lines = [
        f"{chips.name}: {chips.num_chips} chips, mesh {mesh}. Per device ({device}) and step:",
        "",
        columns.align(rows),
        "",
        f"assumed    {plan.assumed}",
        f"predicted  {_summary(plan)}",
        f"fits       {'yes' if plan.fits else 'no'}",
    ]
    notes = {note for stage in plan.stages.values() for note in stage.notes}
    return "\n".join([*lines, *(f"           {line}" for line in [*advice, *sorted(notes)])])


def _row(stage: Stage, chips: Slice) -> list[str]:
    kinds = [_gib(stage.memory.get(kind)) for kind in _KINDS]
    total = [_gib(stage.hbm_bytes), _gib(chips.hbm_bytes)]
    if stage.flops is None or stage.seconds is None:
        return [stage.name, "", *kinds, *total, *["-"] * 6]
    used = stage.flops / stage.seconds / chips.flops
    return [
        stage.name,
        f"{stage.runs:g}",
        *kinds,
        *total,
        f"{stage.flops / 1e12:.4g}",
        f"{stage.hbm_traffic_bytes / 1e9:.4g}",
        f"{sum(stage.collective_bytes.values()) / 1e9:.4g}",
        f"{stage.seconds:.4g}",
        stage.bound,
        f"{used:.0%}",
    ]


def _gib(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / GIB:.2f}"


def _summary(plan: Plan) -> str:
    if plan.step_seconds is None:
        return "nothing: a stage does not fit"
    return (
        f"{plan.step_seconds:.4g} s per step, {plan.utilisation:.0%} of peak FLOP/s, "
        f"{plan.tokens_per_second_per_chip:.4g} response tokens/s/chip, "
        f"{plan.chip_hours:.4g} chip-hours per 100 steps"
    )
