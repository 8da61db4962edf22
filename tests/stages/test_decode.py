# SPDX-License-Identifier: Apache-2.0
"""The head's product, and what only the fully optimised program shows; the rest of `decode` is
tested through `rollout`."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from opd_jax import parallel
from opd_jax.model import qwen3
from opd_jax.stages import decode, rollout
from opd_jax.structs import Vocabulary


@pytest.mark.parametrize("unroll", [0, 8])
def test_the_cache_is_updated_in_place(one_device_mesh, unroll):
    config = qwen3.Qwen3Config(
        vocab_size=150,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
    )
    params = qwen3.init_params(config, jax.random.key(0))
    sampler = rollout.build(
        config,
        rollout.Settings(response_len=8),
        Vocabulary(150, eos_ids=(1,), pad_id=0),
        mesh=one_device_mesh,
        backend=qwen3.Backend(unroll=unroll),
    )
    weights = decode.prepare(sampler.spec, params)
    slots = decode.init(sampler.spec, 4, 4096)
    compiled = decode.decode.lower(sampler.spec, weights, slots, jnp.int32(9)).compile()
    memory = compiled.memory_analysis()
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(slots.cache))
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes  # one layer's columns, but no second cache


@pytest.mark.usefixtures("quick_compile")
def test_no_token_waits_for_the_whole_head():
    """With tensor=4 each device multiplies by its rows of the head; then logits are gathered."""
    mesh = parallel.build_mesh((("fsdp", 2), ("tensor", 4)))
    V, D = 1024, 32
    config = qwen3.Qwen3Config(V, D, 48, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8)
    shardings = parallel.shardings(qwen3.param_axes(config), mesh)
    params = jax.device_put(qwen3.init_params(config, jax.random.key(0)), shardings)
    backend = qwen3.Backend(shard=parallel.shard_activations(mesh))
    settings, vocabulary = rollout.Settings(response_len=8), Vocabulary(V, (1,), pad_id=0)
    spec = rollout.build(config, settings, vocabulary, mesh=mesh, backend=backend).spec
    weights = decode.prepare(spec, params)
    slots = decode.init(spec, 8, 16)
    text = decode.decode.lower(spec, weights, slots, jnp.int32(9)).compile().as_text()
    gathered = [
        math.prod(int(n) for n in shape.split(","))
        for shape in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)
    ]
    assert max(gathered) == 8 // 2 * V  # logits of a device's slots
