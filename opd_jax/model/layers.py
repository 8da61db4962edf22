# SPDX-License-Identifier: Apache-2.0
"""One Qwen3 layer as Flax NNX modules, and how it is to be computed. Dims as in qwen3.py."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from opd_jax.model import attention as attn
from opd_jax.model import moe
from opd_jax.model.config import Qwen3Config

Axes = tuple[str | None, ...]
Rope = tuple[jax.Array, jax.Array]  # cos and signed sin of `rope_table`
REMAT = ("none", "layer", "dots")


class NoSharding:
    """The default `Backend.shard`, and what another one must offer: here one device holds all."""

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Marks an activation's logical axes, so that XLA divides it as the mesh's owner says."""
        return x

    def per_device(self, function: Callable, in_axes: tuple[Axes, ...], out_axes: Axes) -> Callable:
        """`function` as each device runs it on its parts of the arrays (shard_map): for kernels and
        experts, which XLA cannot divide."""
        return function

    def mesh_axes(self, name: str) -> tuple[str, ...]:
        """Mesh axes that divide a logical axis: what `function` above reduces over."""
        return ()


@dataclass(frozen=True)
class Backend:
    """How the same function is computed. Hashable: a static argument."""

    attention: str = "xla"  # "splash": Pallas on TPU, "cudnn": GPU; decoding is always plain
    remat: str = "none"  # "layer": keep layer inputs only; "dots": also keep matmul outputs
    compute_dtype: Any = jnp.float32
    unroll: int = 0  # models of at most so many layers are not scanned, see `qwen3.choose_unroll`
    shard: Any = NoSharding()  # `parallel.shard_activations(mesh)` where there is a mesh
    interpret: bool = False  # True: the attention kernel's semantics without its hardware, slowly

    def __post_init__(self):
        for name, value, known in (
            ("attention", self.attention, attn.KERNELS),
            ("remat", self.remat, REMAT),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown: choose one of {known}.")


PLAIN = Backend()  # float32, one device


def normal(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, dtype)  # Qwen3's initializer_range


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in x's dtype.

    The mean square is float32: a bf16 sum over thousands of squares keeps two digits, and every
    layer starts here.
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    weight = jnp.expand_dims(weight.astype(x.dtype), range(x.ndim - 1))
    return (x32 * scale).astype(x.dtype) * weight


def rope_table(config: Qwen3Config, positions_bl: jax.Array) -> Rope:
    """cos and signed sin of every head component, float32[B, L, H]: what `rotate` multiplies with.

    Angles are float32: bf16 rounds position 257 to 256, and a wrong position is a wrong model.
    """
    angle_blh = positions_bl.astype(jnp.float32)[..., None] * rope_frequencies(config)[None, None]
    scale = config.rope_scaling.scale if config.rope_scaling else 1.0
    cos, sin = jnp.cos(angle_blh) * scale, jnp.sin(angle_blh) * scale
    table = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    # Made once: a CPU would compute the cosines again inside each rotation of each layer.
    return jax.lax.optimization_barrier(table)


def rope_frequencies(config: Qwen3Config) -> jax.Array:
    """Radians per position, float32[H / 2]; YaRN stretches the slow ones by its factor."""
    half = config.head_dim // 2
    base = config.rope_theta
    frequency = base ** -(jnp.arange(half, dtype=jnp.float32) / half)
    yarn = config.rope_scaling
    if yarn is None:
        return frequency

    def dimension(rotations: float) -> float:  # that makes so many turns over the original context
        return (
            half
            * math.log(yarn.original_max_positions / (rotations * 2 * math.pi))
            / math.log(base)
        )

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    ramp = (jnp.arange(half, dtype=jnp.float32) - low) / (high - low or 0.001)
    stretched = jnp.clip(ramp, 0.0, 1.0)
    return frequency * (1.0 - stretched) + frequency / yarn.factor * stretched


def rotate(x_blnh: jax.Array, cos_blh: jax.Array, sin_blh: jax.Array) -> jax.Array:
    """Turns pairs (i, i + H / 2) of each head; float32 inside, x's dtype outside."""
    x32 = x_blnh.astype(jnp.float32)
    other = jnp.roll(x32, x32.shape[-1] // 2, axis=-1)
    return (x32 * cos_blh[:, :, None] + other * sin_blh[:, :, None]).astype(x_blnh.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with RMS norm on each query and key head, before rotation."""

    def __init__(self, config: Qwen3Config, dtype, *, rngs: nnx.Rngs):
        D, N, G, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.eps = config.rms_norm_eps

        def weight(shape, axes):
            return nnx.Param(normal(rngs.params(), shape, dtype), axes=axes)

        self.q_proj = weight((D, N, H), ("embed", "heads", "head_dim"))
        self.k_proj = weight((D, G, H), ("embed", "kv_heads", "head_dim"))
        self.v_proj = weight((D, G, H), ("embed", "kv_heads", "head_dim"))
        self.o_proj = weight((N, H, D), ("heads", "head_dim", "embed"))
        self.q_norm = nnx.Param(jnp.ones((H,), dtype), axes=("head_dim",))
        self.k_norm = nnx.Param(jnp.ones((H,), dtype), axes=("head_dim",))

    def __call__(
        self, x_bld: jax.Array, rope: Rope, attend: attn.Attend, backend: Backend
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """-> (out_bld, k_blgh, v_blgh); `attend` of attention.py decides which token sees which."""
        dtype, shard = backend.compute_dtype, backend.shard
        heads = ("batch", "length", "heads", "head_dim")
        kv_heads = ("batch", "length", "kv_heads", "head_dim")

        def project(weight, axes):
            return shard(jnp.einsum("bld,dnh->blnh", x_bld, weight[...].astype(dtype)), axes)

        q = rotate(rms_norm(project(self.q_proj, heads), self.q_norm[...], self.eps), *rope)
        k = rotate(rms_norm(project(self.k_proj, kv_heads), self.k_norm[...], self.eps), *rope)
        v = project(self.v_proj, kv_heads)
        out = shard(attend(q, k, v), heads)
        out = jnp.einsum("blnh,nhd->bld", out, self.o_proj[...].astype(dtype))
        return shard(out, ("batch", "length", None)), k, v


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen3Config, dtype, *, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size

        def weight(shape, axes):
            return nnx.Param(normal(rngs.params(), shape, dtype), axes=axes)

        self.gate_proj = weight((D, F), ("embed", "mlp"))
        self.up_proj = weight((D, F), ("embed", "mlp"))
        self.down_proj = weight((F, D), ("mlp", "embed"))

    def __call__(self, x_bld: jax.Array, backend: Backend) -> jax.Array:
        dtype, shard = backend.compute_dtype, backend.shard
        gate = jnp.einsum("bld,df->blf", x_bld, self.gate_proj[...].astype(dtype))
        up = jnp.einsum("bld,df->blf", x_bld, self.up_proj[...].astype(dtype))
        hidden = shard(jax.nn.silu(gate) * up, ("batch", "length", "mlp"))
        out = jnp.einsum("blf,fd->bld", hidden, self.down_proj[...].astype(dtype))
        return shard(out, ("batch", "length", None))


class MoE(nnx.Module):
    """A router and E small MLPs, of which each token uses K."""

    def __init__(self, config: Qwen3Config, dtype, *, rngs: nnx.Rngs):
        D, F, E = config.hidden_size, config.moe_intermediate_size, config.num_experts
        self.num_chosen = config.num_experts_per_token
        self.normalise = config.norm_topk_prob

        def weight(shape, axes):
            return nnx.Param(normal(rngs.params(), shape, dtype), axes=axes)

        # Every device routes its tokens over all experts: this second axis is never divided.
        self.router = weight((D, E), ("embed", None))
        self.gate_proj = weight((E, D, F), ("experts", "embed", "mlp"))
        self.up_proj = weight((E, D, F), ("experts", "embed", "mlp"))
        self.down_proj = weight((E, F, D), ("experts", "mlp", "embed"))

    def __call__(self, x_bld: jax.Array, backend: Backend) -> jax.Array:
        weight, chosen = moe.route(x_bld, self.router[...], self.num_chosen, self.normalise)
        gate, up, down = (
            matrix[...].astype(backend.compute_dtype)
            for matrix in (self.gate_proj, self.up_proj, self.down_proj)
        )
        out = moe.mixture(x_bld, weight, chosen, gate, up, down, backend.shard)
        return backend.shard(out, ("batch", "length", None))


class Layer(nnx.Module):
    """Pre-norm attention and MLP (or mixture of experts), both residual."""

    def __init__(self, config: Qwen3Config, sparse: bool, dtype, *, rngs: nnx.Rngs):
        self.eps = config.rms_norm_eps
        self.input_norm = nnx.Param(jnp.ones((config.hidden_size,), dtype), axes=("embed",))
        self.post_norm = nnx.Param(jnp.ones((config.hidden_size,), dtype), axes=("embed",))
        self.attention = Attention(config, dtype, rngs=rngs)
        # Two names, so that a model with both kinds of layers has one tree for each.
        if sparse:
            self.moe = MoE(config, dtype, rngs=rngs)
        else:
            self.mlp = MLP(config, dtype, rngs=rngs)

    def __call__(
        self, x_bld: jax.Array, rope: Rope, attend: attn.Attend, backend: Backend
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """-> (x_bld, k_blgh, v_blgh): the layer's keys and values, for a cache."""
        out, k, v = self.attention(
            rms_norm(x_bld, self.input_norm[...], self.eps), rope, attend, backend
        )
        x_bld = x_bld + out
        mlp = self.moe if hasattr(self, "moe") else self.mlp
        return x_bld + mlp(rms_norm(x_bld, self.post_norm[...], self.eps), backend), k, v
