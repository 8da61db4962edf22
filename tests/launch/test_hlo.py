# SPDX-License-Identifier: Apache-2.0
"""Counts of compiled modules against arithmetic, on CPU modules and on TPU modules."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from launch.plan import hlo, hlo_cost

F32, BF16, I32 = jnp.float32, jnp.bfloat16, jnp.int32


def _cpu_mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))


@pytest.fixture(scope="module")
def tpu_mesh():
    """Four v5e chips that exist on paper."""
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    return Mesh(np.array(devices).reshape(2, 2), ("x", "y"))


def _struct(shape, dtype=F32, mesh=None, spec=None):
    spec = P() if spec is None else spec
    return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh and NamedSharding(mesh, spec))


def _count(function, *arguments, **options):
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return hlo_cost.count(hlo.parse(text), **options)


def _layers(weights, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
    return jnp.sum(x.astype(F32) ** 2)


def test_a_scanned_forward_and_backward_counts_every_layer():
    layers, rows, width = 7, 32, 64
    weights, x = _struct((layers, width, width)), _struct((rows, width))
    forward = _count(_layers, weights, x)
    both = _count(jax.value_and_grad(_layers, argnums=(0, 1)), weights, x)
    once = 2 * layers * rows * width * width
    assert forward.matmul_flops == once
    assert both.matmul_flops == 3 * once  # the gradients of x and of w
    assert 0 < forward.vector_flops < 0.1 * once
    assert not both.dynamic_loops


def test_nested_loops_multiply():
    def outer(x):
        inner = lambda x: jax.lax.fori_loop(2, 7, lambda i, x: x @ x, x)  # noqa: E731
        return jax.lax.scan(lambda x, _: (inner(x), None), x, None, length=3)[0]

    assert _count(outer, _struct((16, 16))).matmul_flops == 3 * 5 * 2 * 16**3


def test_a_loop_whose_length_is_data_is_named_and_takes_the_assumed_trips():
    def loop(n, x):
        return jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)

    arguments = _struct((), I32), _struct((16, 16))
    assert _count(loop, *arguments).matmul_flops == 2 * 16**3
    costs = _count(loop, *arguments, dynamic_trips=lambda name: 9 if "while" in name else 0)
    assert costs.matmul_flops == 9 * 2 * 16**3
    assert len(costs.dynamic_loops) == 1


def test_an_early_exit_counts_as_if_it_never_came():
    def loop(x):
        def going(carry):
            return (carry[0] < 12) & ~jnp.all(carry[1] > 5)

        return jax.lax.while_loop(going, lambda c: (c[0] + 1, c[1] @ c[1]), (0, x))

    costs = _count(loop, _struct((16, 16)))
    assert costs.matmul_flops == 12 * 2 * 16**3
    assert not costs.dynamic_loops


def test_the_dearest_branch_counts():
    def branch(which, x):
        return jax.lax.switch(which, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

    costs = _count(branch, _struct((), I32), _struct((16, 16)))
    assert costs.matmul_flops == 2 * 2 * 16**3


def test_stacked_weights_are_read_once_each_and_a_cache_is_written_one_column_at_a_time():
    layers, width, columns = 16, 128, 4096

    def decode(weights, cache, x):
        def layer(carry, inputs):
            x, cache = carry
            weight, i = inputs
            x = x @ weight
            return (x, jax.lax.dynamic_update_index_in_dim(cache, x[0], i, 0)), None

        return jax.lax.scan(layer, (x, cache), (weights, jnp.arange(layers)))[0]

    text = (
        jax.jit(decode, donate_argnums=1)
        .lower(_struct((layers, width, width)), _struct((columns, width)), _struct((4, width)))
        .compile()
        .as_text()
    )
    costs = hlo_cost.count(hlo.parse(text))
    weights = layers * width * width * 4
    assert weights <= costs.hbm_bytes < 3.5 * weights  # copies of a slice; never 16 x the stack


RETILED = """\
HloModule m, is_scheduled=true

%retile (p: f32[28,64]) -> f32[28,64] {
  %p = f32[28,64]{1,0:T(16,128)} parameter(0)
  ROOT %copy = f32[28,64]{1,0:T(8,128)} copy(%p)
}

%layer (stack: f32[28,64], i: s32[]) -> f32[1,64] {
  %stack = f32[28,64]{1,0:T(16,128)} parameter(0)
  %view = f32[28,64]{1,0:T(8,128)} fusion(%stack), kind=kLoop, ALIAS calls=%retile
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,64]{1,0:T(8,128)} dynamic-slice(%view, %i, %zero), dynamic_slice_sizes={1,64}
}

ENTRY %main (stack: f32[28,64], i: s32[]) -> f32[1,64] {
  %stack = f32[28,64]{1,0:T(16,128)} parameter(0)
  %i = s32[] parameter(1)
  ROOT %out = f32[1,64]{1,0:T(8,128)} fusion(%stack, %i), kind=kLoop, calls=%layer
}
"""


def test_a_slice_of_a_view_in_another_tiling_reads_the_slice():
    """As tpu7x decodes: the whole cache would be counted once per layer."""
    view = RETILED.replace("ALIAS", "output_to_operand_aliasing={{}: (0, {})},")
    copied, computed = RETILED.replace("ALIAS", ""), view.replace("copy(", "negate(")
    read = [hlo_cost.count(hlo.parse(text)).hbm_bytes for text in (view, copied, computed)]
    layer, whole = 4 * (64 + 64 + 1), 4 * (28 * 64 + 64 + 1)  # with the result and the index
    assert read == [layer, whole, whole]


HEAD = """\
HloModule m, is_scheduled=true

%bits (p: bf16[4096,64]) -> bf16[4096,64] {
  %p = bf16[4096,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %bitcast = bf16[4096,64]{1,0:T(8,128)(2,1)} bitcast(%p)
}

%logits (head: bf16[4096,64], hidden: bf16[4,64]) -> f32[4,4096] {
  %head = bf16[4096,64]{1,0:T(8,128)(2,1)} parameter(0)
  %same = bf16[4096,64]{1,0:T(8,128)(2,1)} fusion(%head), kind=kLoop, calls=%bits
  %hidden = bf16[4,64]{1,0:T(4,128)(2,1)} parameter(1)
  ROOT %product = f32[4,4096]{1,0:T(4,128)S(1)} convolution(%hidden, %same), dim_labels=bf_oi->bf
}

ENTRY %main (head: bf16[4096,64], hidden: bf16[4,64]) -> f32[4,4096] {
  %head = bf16[4096,64]{1,0:T(8,128)(2,1)} parameter(0)
  %hidden = bf16[4,64]{1,0:T(4,128)(2,1)} parameter(1)
  ROOT %out = f32[4,4096]{1,0:T(4,128)S(1)} fusion(%head, %hidden), kind=kOutput, calls=%logits
}
"""


def test_a_head_behind_a_fusion_of_bitcasts_is_read():
    """As TPUs decode: the vocabulary head is read once a token step; it was counted as nothing."""
    assert hlo_cost.count(hlo.parse(HEAD)).hbm_bytes == 2 * (4096 * 64 + 4 * 64)


OVERLAPPED = """\
HloModule m, is_scheduled=true, num_partitions=4

%start (shard: f32[16,64]) -> (f32[16,64], f32[64,64], u32[]) {
  %shard = f32[16,64]{1,0} parameter(0)
  %gather = f32[64,64]{1,0} all-gather(%shard), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %begun = (f32[16,64]{1,0}, f32[64,64]{1,0}, u32[]{:S(2)}) custom-call(%gather), custom_call_target="AsyncCollectiveStart"
}

%beside (x: f32[8,8], shard: f32[16,64], whole: f32[64,64]) -> (f32[8,8], f32[16,64], f32[64,64]) {
  %x = f32[8,8]{1,0} parameter(0)
  %y = f32[8,8]{1,0} negate(%x)
  %shard = f32[16,64]{1,0} parameter(1)
  %whole = f32[64,64]{1,0} parameter(2)
  %gather = f32[64,64]{1,0} all-gather(%shard), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %out = (f32[8,8]{1,0}, f32[16,64]{1,0}, f32[64,64]{1,0}) tuple(%y, %shard, %gather)
}

%finish (shard: f32[16,64], whole: f32[64,64]) -> f32[64,64] {
  %shard = f32[16,64]{1,0} parameter(0)
  %whole = f32[64,64]{1,0} parameter(1)
  %gather = f32[64,64]{1,0} all-gather(%shard), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %done = f32[64,64]{1,0} custom-call(%shard, %whole, %gather), custom_call_target="AsyncCollectiveDone"
}

%layer (carry: (f32[8,8], f32[16,64], f32[64,64])) -> (f32[8,8], f32[16,64], f32[64,64]) {
  %carry = (f32[8,8]{1,0}, f32[16,64]{1,0}, f32[64,64]{1,0}) parameter(0)
  %x = f32[8,8]{1,0} get-tuple-element(%carry), index=0
  %shard = f32[16,64]{1,0} get-tuple-element(%carry), index=1
  %whole = f32[64,64]{1,0} get-tuple-element(%carry), index=2
  ROOT %both = (f32[8,8]{1,0}, f32[16,64]{1,0}, f32[64,64]{1,0}) fusion(%x, %shard, %whole), kind=kLoop, calls=%beside
}

%more (carry: (f32[8,8], f32[16,64], f32[64,64])) -> pred[] {
  %carry = (f32[8,8]{1,0}, f32[16,64]{1,0}, f32[64,64]{1,0}) parameter(0)
  ROOT %yes = pred[]{:S(2)} constant(true)
}

ENTRY %main (x: f32[8,8], shard: f32[16,64]) -> f32[64,64] {
  %x = f32[8,8]{1,0} parameter(0)
  %shard = f32[16,64]{1,0} parameter(1)
  %begun = (f32[16,64]{1,0}, f32[64,64]{1,0}, u32[]{:S(2)}) fusion(%shard), kind=kCustom, calls=%start
  %whole = f32[64,64]{1,0} get-tuple-element(%begun), index=1
  %carry = (f32[8,8]{1,0}, f32[16,64]{1,0}, f32[64,64]{1,0}) tuple(%x, %shard, %whole)
  %layers = (f32[8,8]{1,0}, f32[16,64]{1,0}, f32[64,64]{1,0}) while(%carry), condition=%more, body=%layer, backend_config={"known_trip_count":{"n":"28"}}
  %last = f32[64,64]{1,0} get-tuple-element(%layers), index=2
  ROOT %gathered = f32[64,64]{1,0} fusion(%shard, %last), kind=kCustom, calls=%finish
}
"""  # noqa: E501


def test_a_gather_that_runs_beside_the_layers_counts_once():
    """As v5e decodes with tensor=4: start, a part in every layer, and end, of one transfer."""
    costs = hlo_cost.count(hlo.parse(OVERLAPPED))
    shard, whole, layer = 4 * 16 * 64, 4 * 64 * 64, 4 * 8 * 8
    assert costs.collectives == {("all-gather", (0, 1, 2, 3)): 3 * shard}
    assert costs.hbm_bytes == shard + whole + 28 * 2 * layer


@pytest.mark.parametrize("replicated", [False, True])
def test_a_device_counts_its_share_or_all_of_what_is_replicated(replicated):
    mesh = _cpu_mesh()
    rows = P() if replicated else P(("x", "y"))
    costs = _count(
        lambda x, w: x @ w, _struct((256, 64), F32, mesh, rows), _struct((64, 32), F32, mesh)
    )
    assert costs.matmul_flops == 2 * 256 * 64 * 32 / (1 if replicated else 8)


def test_collectives_by_kind_and_group():
    mesh = _cpu_mesh()  # devices 0 and 1 differ in y
    x, w = _struct((64, 32), F32, mesh, P("x", "y")), _struct((32, 48), F32, mesh, P("y", None))
    reduced = jax.jit(jnp.matmul, out_shardings=NamedSharding(mesh, P("x", None)))
    text = reduced.lower(x, w).compile().as_text()
    costs = hlo_cost.count(hlo.parse(text))
    # Each device holds a partial [16, 48]; half of it goes out to reduce and half to gather.
    assert costs.collectives == {("all-reduce", (0, 1)): 2 * 16 * 48 * 4 / 2}

    gathered = jax.jit(jnp.cos, out_shardings=NamedSharding(mesh, P(None, "y")))
    costs = hlo_cost.count(hlo.parse(gathered.lower(x).compile().as_text()))
    assert costs.collectives == {("all-gather", (0, 2, 4, 6)): 3 * 16 * 16 * 4}


@pytest.mark.parametrize(
    "text, group",
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("{}", tuple(range(8))),
        ("[4,2]<=[8]", (0, 1)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        ("mesh['a'=4,'b'=2] {'b'}", (0, 1)),
        ("mesh['a'=4,'b'=2] {'a':(1)2,'b'}", (0, 1, 4, 5)),
        ("mesh['a'=4,'b'=2] {'a':(2)2}", (0, 2)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
        ("mesh['a'=4,'b'=2], device_ids=([8]) {'a'}", (0, 2, 4, 6)),
        ("mesh['a'=4,'b'=2], device_ids=(7,6,5,4,3,2,1,0) {'a':(1)2}", (7, 3)),
    ],
)
def test_replica_groups_in_every_spelling(text, group):
    op = hlo.Op("o", "all-gather", (), (), "", f"channel_id=1, replica_groups={text}, x=1", True)
    assert hlo_cost.device_group(op, 8) == group


# TPU modules: dots become convolutions, loops lose their trip count, collectives hide in fusions.


def test_tpu_scan_counts_layers_gathers_and_reductions(tpu_mesh):
    layers, rows, width = 6, 1024, 512
    weights = _struct((layers, width, width), BF16, tpu_mesh, P(None, ("x", "y"), None))
    costs = _count(
        jax.grad(_layers), weights, _struct((rows, width), BF16, tpu_mesh, P(("x", "y")))
    )
    assert costs.matmul_flops == 3 * 2 * layers * rows * width * width / 4
    weight_bytes = layers * width * width * 2
    # Forward and backward each gather the weights; each (n-1)/n of them arrives from others.
    assert costs.collective_bytes["all-gather"] == 2 * weight_bytes * 3 / 4
    reduced = costs.collective_bytes["all-reduce"] / 2 + costs.collective_bytes["reduce-scatter"]
    assert reduced == weight_bytes * 3 / 4
    assert not costs.dynamic_loops


def test_tpu_attention_of_many_heads_counts_batch_as_batch(tpu_mesh):
    B, N, L, H = 4, 8, 256, 128

    def scores(q, k):
        return jnp.einsum("bnlh,bnmh->bnlm", q, k)

    shape = _struct((B, N, L, H), BF16, tpu_mesh, P(("x", "y")))
    assert _count(scores, shape, shape).matmul_flops == 2 * B * N * L * L * H / 4


def test_tpu_experts_count_each_token_once_forward_and_backward(tpu_mesh):
    tokens, width, hidden, experts = 2048, 512, 256, 8

    def moe(x, w, sizes):
        return jnp.sum(jax.lax.ragged_dot(x, w, sizes).astype(F32))

    arguments = (
        _struct((tokens, width), BF16, tpu_mesh),
        _struct((experts, width, hidden), BF16, tpu_mesh),
        _struct((experts,), I32, tpu_mesh),
    )
    once = 2 * tokens * width * hidden
    forward = _count(moe, *arguments)
    assert forward.matmul_flops + forward.kernel_flops == once
    both = _count(jax.value_and_grad(moe, argnums=(0, 1)), *arguments)
    assert both.matmul_flops + both.kernel_flops == 3 * once
    assert not both.unknown_kernels


def test_tpu_splash_attention_counts_the_blocks_under_the_diagonal(tpu_mesh):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, N, L, H, block = 4, 2, 2048, 128, 512
    sizes = {
        f"block_{name}": block
        for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")
    }
    splash = kernel.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((L, L))] * N),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernel.BlockSizes(**sizes, use_fused_bwd_kernel=True),
    )
    spec = P(("x", "y"))
    attend = jax.shard_map(
        jax.vmap(splash), mesh=tpu_mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )

    def loss(q, k, v):
        return jnp.sum(attend(q, k, v).astype(F32) ** 2)

    shape = _struct((B, N, L, H), BF16, tpu_mesh, spec)
    whole = 2 * L * L * H * N * B / 4  # one matmul of L x L x H for each of this device's heads
    live = sum(range(1, L // block + 1)) / (L // block) ** 2
    assert _count(loss, shape, shape, shape).kernel_flops == 2 * whole * live
    both = _count(jax.grad(loss, argnums=(0, 1, 2)), shape, shape, shape)
    assert both.kernel_flops == (2 + 5) * whole * live
    assert not both.unknown_kernels


def test_tpu_splash_attention_of_one_row_and_one_key_head(tpu_mesh):
    """With tensor=4 a device may hold one head of keys, which then has two dimensions."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    N, L, H, block = 2, 1024, 128, 512
    sizes = kernel.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block)
    mask = masks.MultiHeadMask([masks.CausalMask((L, L))] * N)
    splash = kernel.make_splash_mqa_single_device(mask, block_sizes=sizes)
    attend = jax.shard_map(splash, mesh=tpu_mesh, in_specs=P(), out_specs=P(), check_vma=False)
    keys = _struct((L, H), BF16, tpu_mesh)
    costs = _count(attend, _struct((N, L, H), BF16, tpu_mesh), keys, keys)
    assert costs.kernel_flops == 2 * 2 * N * H * 3 * block * block  # three of the four blocks
