# SPDX-License-Identifier: Apache-2.0
"""Who attends to whom, and by which kernel.

Dims as in qwen3.py: B rows, L queries, C columns (keys), N query heads, G key/value heads, H head
size; R = N / G query heads share a key/value head.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# (q_blnh, k_blgh, v_blgh) -> out_blnh
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# k_bgch, v_bgch, visible_blc
Piece = tuple[jax.Array, jax.Array, jax.Array]

KERNELS = ("xla", "splash", "cudnn")
QUERY_BLOCK = 1024  # queries whose float32 scores exist at once in the plain form


# ---- the plain form ----


def plain_attention(q_blnh: jax.Array, pieces: Sequence[Piece]) -> jax.Array:
    """Softmax attention over the union of pieces: the form all others are tested against.

    Long rows go block by block of queries, so that no [L, C] scores exist at once. Keys and values
    are never repeated per query head: the grouped einsum reads each once.
    """
    B, L, N, H = q_blnh.shape
    if L <= QUERY_BLOCK:
        return _attend_block(q_blnh, pieces)
    num_blocks = -(-L // QUERY_BLOCK)
    short = num_blocks * QUERY_BLOCK - L  # queries of padding see nothing and are cut off below

    def blocks(x):
        x = jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, num_blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    @jax.checkpoint  # or the backward pass would hold every block's scores
    def one(xs):
        q, visible = xs
        return _attend_block(
            q, [(k, v, see) for (k, v, _), see in zip(pieces, visible, strict=True)]
        )

    out = jax.lax.map(one, (blocks(q_blnh), [blocks(visible) for _, _, visible in pieces]))
    return jnp.moveaxis(out, 0, 1).reshape(B, -1, N, H)[:, :L]


def _attend_block(q_blnh: jax.Array, pieces: Sequence[Piece]) -> jax.Array:
    """Scores and softmax are float32: bf16 weights of a long row do not sum to 1.

    The R heads that share a key stand under each other, rows Q = R * L of one matrix product per
    key head: written with five axes, the products are transposed and copied on a CPU.
    """
    B, L, N, H = q_blnh.shape
    G = pieces[0][0].shape[1]
    R, dtype = N // G, q_blnh.dtype
    q_bgqh = q_blnh.reshape(B, L, G, R, H).transpose(0, 2, 3, 1, 4).reshape(B, G, R * L, H)
    scores = []
    for k, _, visible in pieces:
        score = jnp.einsum(
            "bgqh,bgch->bgqc", q_bgqh, k.astype(dtype), preferred_element_type=jnp.float32
        ).reshape(B, G, R, L, -1)
        # Finite, so that a row that sees nothing in one piece makes no NaN; exp of it is exactly 0.
        scores.append(jnp.where(visible[:, None, None], score * H**-0.5, -1e30))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(dtype)
    weights_bgqc = weights.reshape(B, G, R * L, -1)
    out_bgqh = jnp.zeros((B, G, R * L, H), jnp.float32)
    first = 0
    for k, v, _ in pieces:
        part = weights_bgqc[..., first : first + k.shape[2]]
        out_bgqh += jnp.einsum(
            "bgqc,bgch->bgqh", part, v.astype(dtype), preferred_element_type=jnp.float32
        )
        first += k.shape[2]
    out_blgrh = out_bgqh.reshape(B, G, R, L, H).transpose(0, 3, 1, 2, 4)
    return out_blgrh.reshape(B, L, N, H).astype(dtype)


def heads_first(x_blgh: jax.Array) -> jax.Array:
    """[B, L, G, H] -> [B, G, L, H]."""
    return x_blgh.transpose(0, 2, 1, 3)


# ---- whole rows: training and scoring ----


def build_self_attention(segment_ids_bl: jax.Array, head_dim: int, backend) -> Attend:
    """Causal attention within segments, by the backend's kernel on each device of a mesh."""
    if backend.attention == "xla":
        visible = _visible(segment_ids_bl)
        return lambda q, k, v: plain_attention(q, [(heads_first(k), heads_first(v), visible)])
    kernel = {"splash": _splash, "cudnn": _cudnn}[backend.attention]
    check_kernel(backend, segment_ids_bl.shape[1], head_dim)
    attend = functools.partial(kernel, interpret=backend.interpret)
    heads, kv_heads = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
    inputs = (heads, kv_heads, kv_heads, ("batch", None))
    attend = backend.shard.per_device(attend, inputs, heads)
    return lambda q, k, v: attend(q, k, v, segment_ids_bl)


def check_kernel(backend, length: int, head_dim: int) -> None:
    """Raises unless the kernel takes rows of this length and heads of this size."""
    if backend.attention == "splash" and (length % 128 or head_dim % 128):
        raise ValueError(
            f"attention='splash' was given rows of {length} tokens and heads of {head_dim}: its "
            "tiles are 128 wide, so both must be multiples of 128. Round the row length up to "
            f"{-(-length // 128) * 128}, or use attention='xla'."
        )
    if backend.attention == "cudnn" and not backend.interpret:
        if jnp.dtype(backend.compute_dtype).itemsize != 2:
            raise ValueError(
                f"attention='cudnn' was given compute_dtype={jnp.dtype(backend.compute_dtype)}: "
                "cuDNN takes bfloat16 or float16. Use one of them, or attention='xla'."
            )


def _visible(segment_ids_bl: jax.Array) -> jax.Array:
    """bool[B, L, L], True = the query (axis 1) sees the key (axis 2).

    Padding (segment 0) sees padding: no row is empty, and no real token sees it.
    """
    L = segment_ids_bl.shape[1]
    same = segment_ids_bl[:, :, None] == segment_ids_bl[:, None, :]
    return same & jnp.tril(jnp.ones((L, L), bool))[None]


def _splash(q_blnh, k_blgh, v_blgh, segment_ids_bl, interpret: bool) -> jax.Array:
    """Pallas' flash attention for TPU: no scores in memory, no work above the diagonal's blocks."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    B, L, N, H = q_blnh.shape
    G = k_blgh.shape[2]
    kernel = _splash_kernel(L, N // G, interpret)
    q_bgrlh = q_blnh.reshape(B, L, G, N // G, H).transpose(0, 2, 3, 1, 4)
    # The kernel does not scale. In float32, then rounded once.
    q_bgrlh = (q_bgrlh.astype(jnp.float32) * H**-0.5).astype(q_blnh.dtype)

    def row(q_grlh, k_glh, v_glh, segment_ids_l) -> Any:
        ids = splash.SegmentIds(segment_ids_l, segment_ids_l)
        return jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=ids))(q_grlh, k_glh, v_glh)

    out = jax.vmap(row)(q_bgrlh, heads_first(k_blgh), heads_first(v_blgh), segment_ids_bl)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, L, N, H).astype(q_blnh.dtype)


@functools.lru_cache
def _splash_kernel(length: int, heads_per_kv: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(size for size in (512, 256, 128) if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": block for name in names}
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads_per_kv)
    with jax.ensure_compile_time_eval():  # the mask's tables are constants, not tracers to cache
        return splash.make_splash_mqa_single_device(
            mask,
            block_sizes=splash.BlockSizes(**sizes),
            interpret=interpret,
        )


def _cudnn(q_blnh, k_blgh, v_blgh, segment_ids_bl, interpret: bool) -> jax.Array:
    return jax.nn.dot_product_attention(
        q_blnh,
        k_blgh,
        v_blgh,
        mask=_visible(segment_ids_bl)[:, None],
        implementation="xla" if interpret else "cudnn",
    )


# ---- rows that grow: sampling ----


def cache_visibility(start_b: jax.Array, length: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """Which columns new tokens see: of the cache (before start_b) and of each other (causal).

    Returns bool[B, L, C] and bool[B, L, L].
    """
    B = start_b.shape[0]
    old = jnp.arange(columns)[None, None] < start_b[:, None, None]
    new = jnp.tril(jnp.ones((length, length), bool))
    return jnp.broadcast_to(old, (B, length, columns)), jnp.broadcast_to(new, (B, length, length))


def cached_attention(q_blnh: jax.Array, pieces: Sequence[Piece]) -> jax.Array:
    """`plain_attention`; on a CPU in float32, because XLA has no such products of bf16 there."""
    if q_blnh.dtype == jnp.float32:
        return plain_attention(q_blnh, pieces)

    def wide(q, pieces):
        return plain_attention(q.astype(jnp.float32), pieces).astype(q.dtype)

    return jax.lax.platform_dependent(q_blnh, pieces, cpu=wide, default=plain_attention)


def scanned_attention(q_blnh: jax.Array, pieces: Sequence[Piece]) -> jax.Array:
    """`cached_attention` where the cache comes out of a scan's stack."""
    if q_blnh.shape[1] > 1:
        return cached_attention(q_blnh, pieces)
    return jax.lax.platform_dependent(q_blnh, pieces, cpu=_attend_one, default=plain_attention)


def _attend_one(q_b1nh: jax.Array, pieces: Sequence[Piece]) -> jax.Array:
    """`plain_attention` of one query per row by sums of products, in float32.

    On a CPU a scanned layer's part of the cache is copied out of its stack; for matmuls XLA copies
    and transposes it, and the scores, once more: 0.66 to 0.87 of the time of a token step.
    """
    B, _, N, H = q_b1nh.shape
    G = pieces[0][0].shape[1]
    q_bgr1h = q_b1nh.astype(jnp.float32).reshape(B, G, N // G, 1, H) * H**-0.5
    scores = [
        jnp.where(visible[:, None, None, 0], jnp.sum(q_bgr1h * k[:, :, None], axis=-1), -1e30)
        for k, _, visible in pieces
    ]
    top = functools.reduce(jnp.maximum, [jnp.max(x, axis=-1, keepdims=True) for x in scores])
    weights = [jnp.exp(x - top) for x in scores]
    total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
    parts = [
        jnp.sum((w / total)[..., None] * v[:, :, None], axis=-2)
        for w, (_, v, _) in zip(weights, pieces, strict=True)
    ]
    out: jax.Array = functools.reduce(jnp.add, parts)
    return out.reshape(B, 1, N, H).astype(q_b1nh.dtype)


def write_columns(cache: jax.Array, new: jax.Array, start_b: jax.Array) -> jax.Array:
    """cache[:, b, :, start_b[b] + l] = new[:, b, :, l]; columns beyond the last are dropped.

    cache is [layers, B, G, C, H], new is [layers, B, G, L, H]. For one device's rows: on a TPU they
    are written one by one, which XLA could not divide.
    """
    return jax.lax.platform_dependent(
        cache, new.astype(cache.dtype), start_b, tpu=write_by_row, default=write_by_scatter
    )


def write_by_scatter(cache: jax.Array, new: jax.Array, start_b: jax.Array) -> jax.Array:
    dims = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(0, 2, 4),
        inserted_window_dims=(3,),
        scatter_dims_to_operand_dims=(3,),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    columns_bl = start_b[:, None] + jnp.arange(new.shape[3], dtype=start_b.dtype)[None]
    return jax.lax.scatter(
        cache,
        columns_bl[..., None],
        new,
        dims,
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )


def write_by_row(cache: jax.Array, new: jax.Array, start_b: jax.Array) -> jax.Array:
    """`write_by_scatter`, row by row, for TPUs.

    For a scatter XLA lays the cache out with columns before heads there, so that it copies the
    whole cache around every decode chunk and each layer's part at every step (3 x the traffic).
    """
    layers, B, G, C, H = cache.shape
    L = new.shape[3]

    def row(b, cache):
        at = jnp.clip(start_b[b], 0, C - L)
        corner = (0, b, 0, at, 0)
        shift = start_b[b] - at  # positive where the last columns fall off the end
        written = jnp.roll(jax.lax.dynamic_slice_in_dim(new, b, 1, axis=1), shift, axis=3)
        old = jax.lax.dynamic_slice(cache, corner, (layers, 1, G, L, H))
        keeps = (jnp.arange(L) >= shift)[None, None, None, :, None]
        return jax.lax.dynamic_update_slice(cache, jnp.where(keeps, written, old), corner)

    return jax.lax.fori_loop(0, B, row, cache)
