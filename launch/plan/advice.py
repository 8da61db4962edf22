# SPDX-License-Identifier: Apache-2.0
"""What to change when a plan does not fit."""

import ml_collections as mlc

from launch.plan.chips import GIB
from launch.plan.predict import Stage
from launch.plan.text import Plan


def advise(plan: Plan, config: mlc.ConfigDict) -> list[str]:
    """One line per stage that is short of memory: by how much, and flags that make it smaller."""
    largest = [max(s.memory, key=lambda kind, s=s: s.memory[kind]) for s in plan.short]
    return [
        f"{stage.name} is short of {(stage.hbm_bytes - plan.chips.hbm_bytes) / GIB:.2f} GiB per "
        f"device; its largest share is {kind}. Set "
        f"{' or '.join(_flags(stage, plan, config))}."
        for stage, kind in zip(plan.short, largest, strict=True)
    ]


def _flags(stage: Stage, plan: Plan, config: mlc.ConfigDict) -> list[str]:
    shards = plan.chips.num_chips * plan.chips.devices_per_chip // plan.mesh_shape["tensor"]
    flags = []
    if stage.name in ("prefill", "decode"):
        slots = config.rollout.num_slots or config.data.batch_size
        room = plan.chips.hbm_bytes - stage.memory.get("resident", 0.0)
        share = room / max(stage.hbm_bytes - stage.memory.get("resident", 0.0), 1.0)
        fewer = int(slots * share) // shards * shards
        if 0 < fewer < slots:
            flags.append(f"--config.rollout.num_slots={fewer}")
    if stage.name in ("score", "update") and set(stage.memory) - {"resident", "arguments"}:
        rows = config.pack.micro_batch_rows
        if rows > shards:
            flags.append(f"--config.pack.micro_batch_rows={max(shards, rows // 2)}")
        if stage.name == "update" and config.model.remat != "layer":
            flags.append("--config.model.remat=layer")
        if config.pack.head_chunk > 256:
            flags.append(f"--config.pack.head_chunk={config.pack.head_chunk // 2}")
    if stage.name == "score" and config.teacher.param_dtype == "float32":
        flags.append("--config.teacher.param_dtype=bfloat16")
    tensor = 2 * plan.mesh_shape["tensor"]
    mesh = f"(('data',1),('fsdp',-1),('tensor',{tensor}),('expert',{plan.mesh_shape['expert']}))"
    flags.append(f'--config.mesh="{mesh}"')
    return [*flags, f"--topology={_larger(plan)}"]


def _larger(plan: Plan) -> str:
    """The slice with its smallest dimension doubled."""
    kind, _, _ = plan.chips.name.partition(":")
    shape = list(plan.chips.shape)
    shape[shape.index(min(shape))] *= 2
    return f"{kind}:{'x'.join(map(str, sorted(shape)))}"
