# SPDX-License-Identifier: Apache-2.0
"""The head's product, and what only the fully optimised program shows; the rest of `decode` is
tested through `rollout`."""

import jax
import jax.numpy as jnp
import pytest

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
