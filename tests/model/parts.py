# SPDX-License-Identifier: Apache-2.0
"""Our sub-modules on the inputs that transformers' sub-modules saw."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opd_jax.model import attention, layers, qwen3


def check(config, params, seen: dict[str, np.ndarray], atol: float) -> None:
    """Compares norms, rotary table, attention and MLP (or mixture) of the last layer."""
    last = config.num_layers - 1
    stacked = qwen3._run_params(config, params["layers"], last, 1)
    stacked = jax.tree.map(lambda x: x[-1], stacked)
    layer = nnx.merge(qwen3._graph(config, config.sparse_layers[last]), stacked)
    backend = qwen3.Backend()

    cos, sin = seen["cos"], seen["sin"]  # [1 or B, L, H]: both halves hold the same angles
    length = cos.shape[1]
    rope = layers.rope_table(config, jnp.arange(length, dtype=jnp.int32)[None])
    sign_h = np.repeat([-1.0, 1.0], config.head_dim // 2)  # ours has the sign of the other half
    for name, ours, theirs in (("cos", rope[0], cos), ("sin", rope[1], sin * sign_h)):
        np.testing.assert_allclose(ours[0], theirs[0], atol=atol, err_msg=name)

    def attend(x_bld):
        rows = x_bld.shape[:2]
        table = jax.tree.map(lambda t: jnp.broadcast_to(t, (*rows, t.shape[-1])), rope)
        see = attention.build_self_attention(jnp.ones(rows, jnp.int32), config.head_dim, backend)
        return layer.attention(x_bld, table, see, backend)[0]

    mlp = layer.moe if config.sparse_layers[last] else layer.mlp
    ours = {
        "input_layernorm": lambda x: layers.rms_norm(x, layer.input_norm[...], config.rms_norm_eps),
        "self_attn": attend,
        "post_attention_layernorm": lambda x: layers.rms_norm(
            x, layer.post_norm[...], config.rms_norm_eps
        ),
        "mlp": lambda x: mlp(x, backend),
    }
    for name, function in ours.items():
        out = function(jnp.asarray(seen[f"{name}.in"]))
        np.testing.assert_allclose(out, seen[f"{name}.out"], atol=atol, rtol=1e-5, err_msg=name)
