# SPDX-License-Identifier: Apache-2.0
"""What TPU programs cost, compiled for chips that are not here (libtpu's compiler runs on CPU)."""

import dataclasses
import os
import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from launch.plan import hlo, hlo_cost
from opd_jax import parallel
from opd_jax.model import qwen3
from opd_jax.model.qwen3 import Backend, Qwen3Config

pytestmark = pytest.mark.slow
B, L = 16, 512
CONFIG = Qwen3Config(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    num_experts=32,
    num_experts_per_token=8,
    moe_intermediate_size=256,
    norm_topk_prob=True,
)


@pytest.fixture(scope="module")
def chips():
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # the compiler holds no chip
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices


def compile_for(chips, config, backward, rows=(B, L), attention="splash", **sizes):
    """Trunk (or its gradient) in bf16 over a mesh of the given axis sizes."""
    sizes = dict(fsdp=1, expert=1, tensor=1, data=1) | sizes
    count = sizes["fsdp"] * sizes["expert"] * sizes["tensor"] * sizes["data"]
    mesh = parallel.build_mesh(sizes.items(), devices=list(chips[:count]))
    backend = Backend(
        attention=attention,
        remat="layer",
        compute_dtype=jnp.bfloat16,
        shard=parallel.shard_activations(mesh),
    )
    shardings = parallel.shardings(qwen3.param_axes(config), mesh)
    parallel.check_coverage(qwen3.param_shapes(config), shardings, mesh)
    params = jax.tree.map(
        lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h),
        qwen3.param_shapes(config),
        shardings,
    )
    place = NamedSharding(mesh, parallel.spec(("batch",), mesh, parallel.ACTIVATION_RULES))
    ids = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=place)

    def trunk(*args):
        return qwen3.trunk(config, *args, backend)

    if backward:
        function = jax.grad(lambda *args: trunk(*args).astype(jnp.float32).sum())
    else:
        function = trunk
    return jax.jit(function).lower(params, ids, ids, ids).compile()


def fair_flops(config, backward, rows=(B, L)) -> float:
    """Of all devices together: two per active weight and token, and plain attention."""
    tokens = rows[0] * rows[1]
    head = (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size
    weights = 2.0 * (qwen3.num_active_params(config) - head) * tokens
    width = config.num_heads * config.head_dim
    scores = 4.0 * config.num_layers * width * tokens * rows[1]
    # Backward: rematerialised forward, and two products for each.
    return (weights + scores) * (4 if backward else 1)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shards", [1, 4, 8])
def test_mixture_costs_its_active_parameters(chips, shards, backward):
    """Under plain jit, XLA would gather the experts and each device do all the work."""
    compiled = compile_for(chips, CONFIG, backward, attention="xla", expert=shards)
    costs = hlo_cost.count(hlo.parse(compiled.as_text()))
    fair = fair_flops(CONFIG, backward) / shards
    assert 0.7 < (costs.matmul_flops + costs.kernel_flops) / fair < 1.25
    if not backward:  # what is gathered is tokens and shared weights, less than the experts alone
        experts = 3 * CONFIG.num_layers * 32 * 256 * 256 * 2
        assert costs.collective_bytes["all-gather"] < experts


def test_splash_compiles_with_heads_divided(chips):
    """The kernel inside shard_map: rows over data, heads over tensor; no scores in memory."""
    config = dataclasses.replace(CONFIG, num_experts=0)
    rows = (4, 4096)
    compiled = compile_for(chips, config, True, rows, data=2, tensor=4)
    assert "splash" in compiled.as_text()
    scores = 2 * 2 * 4096 * 4096 * 4  # float32 of one device's rows and heads
    assert compiled.memory_analysis().temp_size_in_bytes < scores


def test_compile_time_does_not_grow_with_depth(chips):
    """Layers are scanned: the program is the same, only its trip counts differ."""
    jax.jit(jnp.sin).lower(1.0).compile()  # the compiler itself warms up
    seconds, sizes = {}, {}
    for depth in (4, 36):
        config = dataclasses.replace(CONFIG, num_experts=0, num_layers=depth)
        start = time.perf_counter()
        compiled = compile_for(chips, config, True)
        seconds[depth] = time.perf_counter() - start
        sizes[depth] = len(compiled.as_text())
    print(f"compile seconds by depth: {seconds}, characters of the program: {sizes}")
    assert sizes[36] < 1.3 * sizes[4]  # what a busy machine cannot blur
    assert seconds[36] < 1.3 * seconds[4] + 2.0
