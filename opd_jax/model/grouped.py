# SPDX-License-Identifier: Apache-2.0
"""Matrix products over rows sorted by group: group e's rows meet matrix e, and no other.

TPU: `jax.lax.ragged_dot` becomes a kernel that walks the groups' tiles. Its weight gradient does
not (XLA multiplies every row by every group), so that one is Pallas' `tgmm`. Elsewhere XLA does the
same to `ragged_dot` itself (128 experts: 128 times the work), so there we loop over blocks of rows
that share a group. Both do the work of the rows that exist: rows beyond the last group cost
nothing.

Dims: M rows, D in, F out, E groups.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

TILE = 128  # rows come in multiples of this


def grouped_dot(rows_md: jax.Array, matrix_edf: jax.Array, sizes_e: jax.Array) -> jax.Array:
    """[M, F], rows' dtype: row i of group e times matrix e; undefined beyond sum(sizes_e) rows."""
    return jax.lax.platform_dependent(
        rows_md, matrix_edf, sizes_e, tpu=_ragged_dot, default=_blocked_dot
    )


def grouped_outer(rows_md: jax.Array, grads_mf: jax.Array, sizes_e: jax.Array) -> jax.Array:
    """float32[E, D, F]: per group, rows.T @ grads; exactly 0 for an empty group."""
    return jax.lax.platform_dependent(rows_md, grads_mf, sizes_e, tpu=_tgmm, default=_blocked_outer)


def _ragged_dot(rows_md: jax.Array, matrix_edf: jax.Array, sizes_e: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(rows_md, matrix_edf, sizes_e).astype(rows_md.dtype)


def _tgmm(rows_md: jax.Array, grads_mf: jax.Array, sizes_e: jax.Array) -> jax.Array:
    tiles = (TILE, _tile(rows_md.shape[1]), _tile(grads_mf.shape[1]))
    out = tgmm(rows_md.T, grads_mf, sizes_e, jnp.float32, tiles)
    # The kernel leaves the matrices of empty groups unwritten.
    return jnp.where((sizes_e > 0)[:, None, None], out, 0.0)


def _tile(size: int) -> int:
    return min(512, -(-size // 128) * 128)


def _blocks(num_rows: int, sizes_e: jax.Array) -> tuple[int, jax.Array, Callable]:
    """Block size, number of blocks that hold rows, and block number -> (group, first row, end)."""
    E = sizes_e.shape[0]
    per_group = max(num_rows // E, 1)
    size = min(TILE, max(8, 1 << (per_group - 1).bit_length()))
    end_e = jnp.cumsum(sizes_e)
    last_e = jnp.cumsum(-(-sizes_e // size))  # blocks up to and including group e

    def locate(block):
        group = jnp.searchsorted(last_e, block, side="right").astype(jnp.int32)
        first_block = last_e[group] - -(-sizes_e[group] // size)
        first = end_e[group] - sizes_e[group] + (block - first_block) * size
        return group, first, end_e[group]

    return size, last_e[-1], locate


def _blocked_dot(rows_md: jax.Array, matrix_edf: jax.Array, sizes_e: jax.Array) -> jax.Array:
    size, num_blocks, locate = _blocks(rows_md.shape[0], sizes_e)
    rows = jnp.pad(rows_md, ((0, size), (0, 0)))  # so that the last block is whole

    def body(block, out):
        group, first, _ = locate(block)
        part = jax.lax.dynamic_slice_in_dim(rows, first, size) @ matrix_edf[group]
        # A block's tail may reach into the next group, whose block comes later and overwrites it.
        return jax.lax.dynamic_update_slice_in_dim(out, part, first, axis=0)

    out = jnp.zeros((rows.shape[0], matrix_edf.shape[2]), rows_md.dtype)
    return jax.lax.fori_loop(0, num_blocks, body, out)[: rows_md.shape[0]]


def _blocked_outer(rows_md: jax.Array, grads_mf: jax.Array, sizes_e: jax.Array) -> jax.Array:
    size, num_blocks, locate = _blocks(rows_md.shape[0], sizes_e)
    rows = jnp.pad(rows_md, ((0, size), (0, 0)))
    grads = jnp.pad(grads_mf, ((0, size), (0, 0)))

    def body(block, out):
        group, first, end = locate(block)
        inside = (first + jnp.arange(size) < end)[:, None]
        x = jnp.where(inside, jax.lax.dynamic_slice_in_dim(rows, first, size), 0)
        g = jnp.where(inside, jax.lax.dynamic_slice_in_dim(grads, first, size), 0)
        part = jnp.einsum("md,mf->df", x, g, preferred_element_type=jnp.float32)
        return out.at[group].add(part)

    shape = (sizes_e.shape[0], rows_md.shape[1], grads_mf.shape[1])
    return jax.lax.fori_loop(0, num_blocks, body, jnp.zeros(shape, jnp.float32))
