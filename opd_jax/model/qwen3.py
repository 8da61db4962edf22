# SPDX-License-Identifier: Apache-2.0
"""Qwen3, dense and mixture of experts: pure functions of (config, params), Flax NNX modules inside.

params is a nested dict; layers are stacked on axis 0 and scanned, so compile time does not grow
with depth (a model of few layers may have them one after the other, see `Backend.unroll`):

  embed                          [V, D]
  layers/input_norm              [layers, D]
  layers/attention/q_proj        [layers, D, N, H]     k_proj, v_proj [layers, D, G, H]
  layers/attention/q_norm        [layers, H]           k_norm
  layers/attention/o_proj        [layers, N, H, D]
  layers/post_norm               [layers, D]
  layers/mlp/gate_proj           [dense layers, D, F]  up_proj; down_proj [dense layers, F, D]
  layers/moe/router              [sparse layers, D, E]
  layers/moe/gate_proj           [sparse layers, E, D, F]  up_proj; down_proj [.., E, F, D]
  final_norm                     [D]
  head                           [V, D], absent when tied to embed

Dims: B rows, L tokens of a row, V vocabulary, D width, F MLP width, N query heads, G key/value
heads, R = N / G, H head size, C cache columns, E experts, K experts per token. The model knows no
mesh: `Backend.shard` marks activations by logical axis names, and whoever owns the mesh decides
what they mean.

float32 wherever bf16 would change the result, not only round it; each place says why.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct, traverse_util

from opd_jax.model import attention as attn
from opd_jax.model.config import Qwen3Config, YaRN
from opd_jax.model.layers import PLAIN, Axes, Backend, Layer, normal, rms_norm, rope_table

__all__ = ["Backend", "Cache", "Qwen3Config", "YaRN"]

Params = dict[str, Any]


# ---- parameters ----


@functools.lru_cache
def _graph(config: Qwen3Config, sparse: bool) -> nnx.GraphDef:
    """The layer's static half; merged with one layer's slice of params."""
    layer = nnx.eval_shape(lambda: Layer(config, sparse, jnp.float32, rngs=nnx.Rngs(0)))
    return nnx.split(layer)[0]


def _init_layer(config: Qwen3Config, sparse: bool, dtype, key: jax.Array) -> Params:
    return nnx.to_pure_dict(nnx.state(Layer(config, sparse, dtype, rngs=nnx.Rngs(key))))


def init_params(config: Qwen3Config, key: jax.Array, dtype=jnp.float32) -> Params:
    """Random weights: normal(0, 0.02), norms 1. Each layer has its own key, whatever the depth."""
    embed_key, head_key, layer_key = jax.random.split(key, 3)
    shape = (config.vocab_size, config.hidden_size)
    layers: dict[bool, Params] = {}
    for sparse in sorted(set(config.sparse_layers)):
        ids = jnp.array([i for i, s in enumerate(config.sparse_layers) if s == sparse])
        keys = jax.vmap(functools.partial(jax.random.fold_in, layer_key))(ids)
        layers[sparse] = jax.vmap(functools.partial(_init_layer, config, sparse, dtype))(keys)
    params = dict(
        embed=normal(embed_key, shape, dtype),
        layers=_join_kinds(config, layers),
        final_norm=jnp.ones((config.hidden_size,), dtype),
    )
    if not config.tie_embeddings:
        params["head"] = normal(head_key, shape, dtype)
    return params


def _join_kinds(config: Qwen3Config, by_kind: dict[bool, Params]) -> Params:
    """Stacks per kind -> one tree: what both kinds have is stacked over all layers, in order."""
    if len(by_kind) == 1:
        return next(iter(by_kind.values()))
    sparse = jnp.array(config.sparse_layers)
    order = jnp.argsort(sparse, stable=True)  # dense layers first, as the concatenation below
    joined = {}
    for name in by_kind[False].keys() & by_kind[True].keys():
        both = jax.tree.map(
            lambda *a: jnp.concatenate(a), by_kind[False][name], by_kind[True][name]
        )
        joined[name] = jax.tree.map(lambda a: a[jnp.argsort(order)], both)
    return joined | dict(mlp=by_kind[False]["mlp"], moe=by_kind[True]["moe"])


def param_shapes(config: Qwen3Config, dtype=jnp.float32) -> Params:
    """The tree of `init_params` as ShapeDtypeStruct: no memory."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))


def param_axes(config: Qwen3Config, *, unstacked: bool = False) -> Params:
    """The tree of `init_params` with a tuple of axis names per array; None = never divided.

    Args:
      unstacked: True = the tree of `unstack_layers` instead.
    """
    if unstacked:
        layers = [_layer_axes(config, sparse) for sparse in config.sparse_layers]
    else:
        layers = {}
        for sparse in set(config.sparse_layers):
            layers |= jax.tree.map(
                lambda names: ("layers", *names),
                _layer_axes(config, sparse),
                is_leaf=lambda x: isinstance(x, tuple),
            )
    axes = dict(embed=("vocab", "embed"), layers=layers, final_norm=("embed",))
    if not config.tie_embeddings:
        axes["head"] = ("vocab", "embed")
    return axes


def _layer_axes(config: Qwen3Config, sparse: bool) -> Params:
    layer = nnx.eval_shape(lambda: Layer(config, sparse, jnp.float32, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(layer))
    return traverse_util.unflatten_dict({path: p.get_metadata("axes") for path, p in flat})


def num_params(config: Qwen3Config) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(param_shapes(config)))


def num_active_params(config: Qwen3Config) -> int:
    """Parameters that one token uses: all, less the experts it is not sent to."""
    unused = config.num_experts - config.num_experts_per_token
    per_expert = 3 * config.hidden_size * config.moe_intermediate_size
    return num_params(config) - sum(config.sparse_layers) * unused * per_expert


def head_vd(config: Qwen3Config, params: Params) -> jax.Array:
    """[V, D]: logits are hidden @ head.T."""
    return params["embed"] if config.tie_embeddings else params["head"]


# ---- the function ----

UNROLL_ON_CPU = 8  # layers; compile time grows with them


def choose_unroll(asked: int, platform: str) -> int:
    """`Backend.unroll`: what is asked, or, where that is -1, what suits the platform.

    A scan takes every layer's weights, and its part of the cache, out of a stack. A CPU copies them
    for that, at each token: with arrays of their own a token step of four layers takes half as
    long, the head aside. On accelerators that has not been measured, and compile time counts.
    """
    if asked < -1:
        raise ValueError(
            f"unroll={asked} must be a number of layers (0: all are scanned) or -1, chosen by "
            "the platform. Set --config.model.unroll=-1."
        )
    return asked if asked >= 0 else UNROLL_ON_CPU if platform == "cpu" else 0


def unrolls(config: Qwen3Config, backend: Backend) -> bool:
    """True = the layers stand one after the other in the program, False = they are scanned."""
    return config.num_layers <= backend.unroll


def unstack_layers(config: Qwen3Config, params: Params, backend: Backend) -> Params:
    """`params` as inference reads them fastest: an unrolled model's layers, each a tree.

    "layers" is then a list of trees without the layers axis, so that no pass has to take them out
    of the stacks. Another model's params come back as they are, and so do those that went through
    here before.
    """
    if not unrolls(config, backend) or isinstance(params["layers"], list):
        return params
    return params | dict(layers=_split(config, params["layers"]))


@functools.partial(jax.jit, static_argnums=0)  # without it, one dispatch per array
def _split(config: Qwen3Config, layers: Params) -> list[Params]:
    each = [_run_params(config, layers, i, 1) for i in range(config.num_layers)]
    return [jax.tree.map(lambda x: x[0], layer) for layer in each]


def _runs(config: Qwen3Config) -> list[tuple[bool, int, int]]:
    """(sparse, first layer, number of layers) of each run of equal layers: one scan each."""
    runs, start = [], 0
    for sparse, group in itertools.groupby(config.sparse_layers):
        size = len(list(group))
        runs.append((sparse, start, size))
        start += size
    return runs


def _run_params(config: Qwen3Config, layers: Params, start: int, size: int) -> Params:
    """The stacked parameters of layers start .. start + size - 1, all of one kind."""
    if size == config.num_layers:
        return layers
    sparse = config.sparse_layers[start]
    before = sum(s == sparse for s in config.sparse_layers[:start])
    kind, other = ("moe", "mlp") if sparse else ("mlp", "moe")
    return {
        name: jax.tree.map(lambda x, i=before if name == kind else start: x[i : i + size], tree)
        for name, tree in layers.items()
        if name != other
    }


def _remat(config: Qwen3Config, backend: Backend, body):
    if backend.remat == "none":
        return body
    policies = jax.checkpoint_policies
    policy = policies.dots_with_no_batch_dims_saveable if backend.remat == "dots" else None
    # A scan already keeps the forward and the backward pass apart.
    return jax.checkpoint(body, policy=policy, prevent_cse=unrolls(config, backend))


def trunk(
    config: Qwen3Config,
    params: Params,
    tokens_bl: jax.Array,
    positions_bl: jax.Array,
    segment_ids_bl: jax.Array,
    backend: Backend = PLAIN,
) -> jax.Array:
    """Hidden states after the final norm, compute dtype [B, L, D].

    Args:
      params: of `init_params` or of `unstack_layers`.
      tokens_bl: int32[B, L]; any valid id where padded.
      positions_bl: int32[B, L], what rotary embedding sees; restarts with each packed segment.
      segment_ids_bl: int32[B, L]. Token i attends to tokens j <= i of its own segment; 0 = padding.
    """
    rope = rope_table(config, positions_bl)
    attend = attn.build_self_attention(segment_ids_bl, config.head_dim, backend)
    x, layers = _embed(params, tokens_bl, backend), params["layers"]
    for sparse, start, size in _runs(config):
        graph = _graph(config, sparse)

        def body(x, layer_params, graph=graph):
            x, _, _ = nnx.merge(graph, layer_params)(x, rope, attend, backend)
            return x, None

        body = _remat(config, backend, body)
        if isinstance(layers, list):
            for layer in layers[start : start + size]:
                x, _ = body(x, layer)
        else:
            stacked = _run_params(config, layers, start, size)
            x, _ = jax.lax.scan(body, x, stacked, unroll=unrolls(config, backend))
    return rms_norm(x, params["final_norm"], config.rms_norm_eps)


def _embed(params: Params, tokens_bl: jax.Array, backend: Backend) -> jax.Array:
    x_bld = params["embed"][tokens_bl].astype(backend.compute_dtype)
    return backend.shard(x_bld, ("batch", "length", None))


@struct.dataclass
class Cache:
    """Keys and values of every layer. Column c of a row holds the token at absolute position c.

    Parts [layers, B, G, C, H], heads before columns, so that no step transposes it: one part of all
    layers, or, of an unrolled model, one of each layer.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]

    @property
    def num_columns(self) -> int:
        return self.k[0].shape[3]


CACHE_AXES: Axes = ("layers", "batch", "kv_heads", None, "head_dim")


def init_cache(config: Qwen3Config, batch: int, length: int, backend: Backend = PLAIN) -> Cache:
    num_parts = config.num_layers if unrolls(config, backend) else 1
    layers = config.num_layers // num_parts
    shape = (layers, batch, config.num_kv_heads, length, config.head_dim)

    def parts():
        return tuple(jnp.zeros(shape, backend.compute_dtype) for _ in range(num_parts))

    return Cache(k=parts(), v=parts())


def extend(
    config: Qwen3Config,
    params: Params,
    tokens_bl: jax.Array,
    start_b: jax.Array,
    cache: Cache,
    backend: Backend = PLAIN,
) -> tuple[jax.Array, Cache]:
    """Appends L tokens to each row: prefill (start 0), prefill in pieces and one-token decoding.

    Row b's tokens take positions and columns start_b .. start_b + L - 1 and attend to the columns
    before start_b and to each other, causally. Columns from start_b on may hold anything. Writes
    beyond the last column are dropped, and what such a token gives has no meaning. To prefill, use
    a cache of the prompt's length and copy it: all columns are read, whether or not they hold
    something.

    In a loop that carries the cache XLA updates it in place, never copying it per token: see the
    two forms below.

    Args:
      params: of `unstack_layers`, with the backend that the cache was made with.

    Returns:
      hidden_bld: compute dtype, after the final norm.
      cache: with the new columns.
    """
    positions_bl = start_b[:, None] + jnp.arange(tokens_bl.shape[1], dtype=start_b.dtype)[None]
    rope = rope_table(config, positions_bl)
    x = _embed(params, tokens_bl, backend)
    form = _extend_unrolled if unrolls(config, backend) else _extend_scanned
    x, cache = form(config, params["layers"], x, rope, positions_bl, cache, backend)
    return rms_norm(x, params["final_norm"], config.rms_norm_eps), cache


def _write(part: jax.Array, new: jax.Array, start_b: jax.Array, backend: Backend) -> jax.Array:
    write = backend.shard.per_device(
        attn.write_columns, (CACHE_AXES, CACHE_AXES, ("batch",)), CACHE_AXES
    )
    return write(part, new, start_b)


def _extend_unrolled(config, layers, x, rope, positions_bl, cache: Cache, backend: Backend):
    """Each layer writes its part of the cache, then reads it: nothing needs the old one."""
    start_b = positions_bl[:, 0]
    visible_blc = jnp.arange(cache.num_columns)[None, None] <= positions_bl[:, :, None]
    new_k, new_v = [], []
    for sparse, layer, *old in zip(config.sparse_layers, layers, cache.k, cache.v, strict=True):

        def attend(q, k, v, old=old):
            k = _write(old[0], attn.heads_first(k)[None], start_b, backend)
            v = _write(old[1], attn.heads_first(v)[None], start_b, backend)
            new_k.append(k)
            new_v.append(v)
            return attn.cached_attention(q, [(k[0], v[0], visible_blc)])

        x, _, _ = nnx.merge(_graph(config, sparse), layer)(x, rope, attend, backend)
    return x, Cache(tuple(new_k), tuple(new_v))


def _extend_scanned(config, layers, x, rope, positions_bl, cache: Cache, backend: Backend):
    """The cache is only read inside the scan and written once after it."""
    start_b, L = positions_bl[:, 0], positions_bl.shape[1]
    seen_blc, causal_bll = attn.cache_visibility(start_b, L, cache.num_columns)
    new_k, new_v = [], []
    for sparse, start, size in _runs(config):
        graph = _graph(config, sparse)

        def body(x, xs, graph=graph):
            layer_params, k_bgch, v_bgch = xs

            def attend(q, k, v):
                k, v = attn.heads_first(k), attn.heads_first(v)
                return attn.scanned_attention(q, [(k_bgch, v_bgch, seen_blc), (k, v, causal_bll)])

            x, k, v = nnx.merge(graph, layer_params)(x, rope, attend, backend)
            return x, (attn.heads_first(k), attn.heads_first(v))

        stacked = _run_params(config, layers, start, size)
        rows = slice(start, start + size)
        x, (k, v) = jax.lax.scan(body, x, (stacked, cache.k[0][rows], cache.v[0][rows]))
        new_k.append(k)
        new_v.append(v)
    k = _write(cache.k[0], jnp.concatenate(new_k), start_b, backend)
    v = _write(cache.v[0], jnp.concatenate(new_v), start_b, backend)
    return x, Cache((k,), (v,))


def logits(
    config: Qwen3Config, params: Params, tokens_bl: jax.Array, valid_bl: jax.Array | None = None
) -> jax.Array:
    """float32[B, L, V]. For tests and small inputs: [B, L, V] is what every stage avoids.

    Args:
      valid_bl: bool[B, L], True = real token; padding may stand on either side. None: all are real.
    """
    tokens_bl = jnp.asarray(tokens_bl)
    valid_bl = jnp.ones(tokens_bl.shape, bool) if valid_bl is None else jnp.asarray(valid_bl)
    return _logits(config, params, tokens_bl, valid_bl)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: Qwen3Config, params: Params, tokens_bl, valid_bl) -> jax.Array:
    positions_bl = jnp.maximum(jnp.cumsum(valid_bl, axis=1) - 1, 0)
    hidden = trunk(config, params, tokens_bl, positions_bl, valid_bl.astype(jnp.int32))
    # float32: a bf16 logit near 20 has steps of 0.125 nats.
    return jnp.einsum(
        "bld,vd->blv", hidden, head_vd(config, params), preferred_element_type=jnp.float32
    )
