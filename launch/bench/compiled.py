# SPDX-License-Identifier: Apache-2.0
"""Cases loss_memory (what the TPU compiler reserves) and compile (how long compiling takes)."""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from launch.bench import measure
from launch.bench.measure import Report
from launch.plan.chips import GIB
from opd_jax.algorithm.head import head_loss_and_grads
from opd_jax.algorithm.objective import Objective, Targets

FULL_VOCABULARY = ("reverse_kl", "forward_kl", "jsd")


def loss_memory_case(args) -> Report:
    """Temporary memory of loss and gradient over the full vocabulary, --rows x --new_tokens tokens.

    Nothing runs: the program is compiled for one chip of --topology.
    """
    from launch.plan import chips

    device = chips.describe(args.topology).devices[0]
    rows = [dict(objective=kind, **_loss_memory(args, kind, device)) for kind in FULL_VOCABULARY]
    tokens = args.batch * args.new_tokens
    result = dict(
        case="loss_memory",
        tokens=tokens,
        temp_bytes=max(row["temp_bytes"] for row in rows),
        topology=args.topology,
        rows=rows,
    )
    student, teacher = args.student["hidden"], args.teacher["hidden"]
    notes = [
        f"{tokens} tokens, widths {student} and {teacher}, V={args.vocab}, {args.dtype}; arguments "
        "and results (hidden states, heads, gradients) are not temporary"
    ]
    return Report(result, rows, notes)


def _loss_memory(args, kind: str, device) -> dict:
    objective = Objective(kind)
    M, N, V = args.batch, args.new_tokens, args.vocab

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    targets = Targets(
        token=array((M, N), jnp.int32),
        weight=array((M, N), jnp.float32),
        sampler_logp=array((M, N), jnp.float32),
        teacher_hidden_d=array((M, N, args.teacher["hidden"]), args.dtype),
    )

    def loss(hidden, head, targets, count, teacher_head):
        return head_loss_and_grads(
            objective, hidden, head, targets, count, teacher_head, chunk=args.head_chunk
        )

    clock = measure.Clock()
    compiled = (
        jax.jit(loss)
        .lower(
            array((M, N, args.student["hidden"]), args.dtype),
            array((V, args.student["hidden"]), args.dtype),
            targets,
            array((M,), jnp.int32),
            array((V, args.teacher["hidden"]), args.dtype),
        )
        .compile()
    )
    stats: Any = compiled.memory_analysis()  # a backend without it has no such case
    temp = stats.temp_size_in_bytes
    return dict(temp_bytes=temp, temp_gib=temp / GIB, compile_seconds=clock.seconds())


def compile_case(args) -> Report:
    """The first step of --config in a new process, then in another with the cache of the first."""
    with tempfile.TemporaryDirectory() as cache:
        rows = [dict(process=name, **_first_steps(args, cache)) for name in ("cold", "cached")]
    result = dict(case="compile", seconds=rows[0]["compile_seconds"], config=args.config, rows=rows)
    notes = ["compile_seconds: trace + lower + XLA; later_compilations: in steps 2 and 3, want 0"]
    return Report(result, rows, notes)


def _first_steps(args, cache: str) -> dict:
    command = [sys.executable, "-m", "launch.bench.first_steps", args.config]
    settings = dict(JAX_COMPILATION_CACHE_DIR=cache, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    done = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"ERROR: {' '.join(command[1:])} failed; its own message is above.")
    return json.loads(done.stdout.splitlines()[-1])
