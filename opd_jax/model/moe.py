# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: each token goes through K of E small MLPs. No token is ever dropped.

With experts divided over devices, everything below `mixture` runs per device: it gathers the tokens
of its expert group, takes the assignments that its own experts got, and works through them in
pieces of about its fair share: one piece when experts are evenly loaded, more when they are not. So
the buffers and the work follow the active parameters, and the result stays exact. (Left to XLA,
every device gathers all experts and does all the work.)

Dims: T tokens, K experts per token, E experts, C rows of a piece, D width, F expert width.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from opd_jax.model.grouped import TILE, grouped_dot, grouped_outer

# Rows of a piece over an even share of the assignments: slack for a little imbalance, since a
# second piece reads its experts' weights again.
_SLACK = 1.125


def route(
    x_bld: jax.Array, router_de: jax.Array, num_chosen: int, normalise: bool
) -> tuple[jax.Array, jax.Array]:
    """Experts' weights float32[B, L, K] and ids int32[B, L, K], best first.

    float32 throughout, at full precision: a bf16 logit flips the choice between two close experts,
    and another expert is another function, not a rounding error.
    """
    logits = jnp.einsum(
        "bld,de->ble",
        x_bld.astype(jnp.float32),
        router_de.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    weight, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), num_chosen)
    if normalise:
        weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    return weight, chosen.astype(jnp.int32)


def mixture(
    x_bld: jax.Array,
    weight_blk: jax.Array,
    chosen_blk: jax.Array,
    gate_edf: jax.Array,
    up_edf: jax.Array,
    down_efd: jax.Array,
    shard: Any,
) -> jax.Array:
    """[B, L, D], x's dtype: the weighted sum of the chosen experts' outputs. `shard`: Backend's."""
    expert_axes, width_axes = shard.mesh_axes("experts"), shard.mesh_axes("mlp")

    def per_device(x, weight, chosen, gate, up, down):
        shape = x.shape
        x, weight, chosen = (a.reshape(-1, a.shape[-1]) for a in (x, weight, chosen))
        first, shards = 0, 1
        if expert_axes:
            shards = jax.lax.axis_size(expert_axes)
            first = jax.lax.axis_index(expert_axes) * gate.shape[0]
            x, weight, chosen = (
                jax.lax.all_gather(a, expert_axes, tiled=True) for a in (x, weight, chosen)
            )
        piece = -(-math.ceil(chosen.size / shards * (_SLACK if shards > 1 else 1)) // TILE) * TILE
        out: Any = _experts(x, weight, chosen - first, gate, up, down, piece)
        if width_axes:
            out = jax.lax.psum(out, width_axes)
        if expert_axes:
            out = jax.lax.psum_scatter(out, expert_axes, tiled=True)
        return out.reshape(shape).astype(x.dtype)

    rows = ("batch", None, None)
    wide, narrow = ("experts", None, "mlp"), ("experts", "mlp", None)
    function = shard.per_device(per_device, (rows, rows, rows, wide, wide, narrow), rows)
    return function(x_bld, weight_blk, chosen_blk, gate_edf, up_edf, down_efd)


class _Plan(NamedTuple):
    """Assignments sorted by expert; those of other devices' experts come last."""

    order_n: jax.Array  # int32[T * K]: sorted position -> assignment (token * K + choice)
    position_tk: jax.Array  # int32[T, K]: its inverse
    start_e: jax.Array  # int32[E]: first sorted position of each expert
    end_e: jax.Array


def _plan(expert_tk: jax.Array, num_experts: int) -> _Plan:
    flat = expert_tk.reshape(-1)
    key = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    order = jnp.argsort(key, stable=True).astype(jnp.int32)
    position = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
    bounds = jnp.searchsorted(key[order], jnp.arange(num_experts + 1)).astype(jnp.int32)
    return _Plan(order, position.reshape(expert_tk.shape), bounds[:-1], bounds[1:])


def _piece(plan: _Plan, i, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Piece i of the sorted assignments: their ids, whether each is real, and rows per expert."""
    position_c = i * size + jnp.arange(size, dtype=jnp.int32)
    assignment_c = plan.order_n[jnp.minimum(position_c, plan.order_n.size - 1)]
    start_e, end_e = (jnp.clip(x - i * size, 0, size) for x in (plan.start_e, plan.end_e))
    return assignment_c, position_c < plan.end_e[-1], end_e - start_e


def _per_piece(plan: _Plan, size: int, body: Callable, carry: Any) -> Any:
    """carry = body(i, carry) over the pieces that hold assignments of this device's experts."""
    if plan.order_n.size <= size:
        return body(0, carry)
    return jax.lax.fori_loop(0, -(-plan.end_e[-1] // size), body, carry)


def _to_tokens(rows_cd: jax.Array, factor_tk: jax.Array, plan: _Plan, i, size: int) -> jax.Array:
    """float32[T, D]: each token's rows of this piece, weighted and summed in a fixed order."""
    total = jnp.zeros((), jnp.float32)
    for k in range(plan.position_tk.shape[1]):
        position_t = plan.position_tk[:, k] - i * size
        here_t = (position_t >= 0) & (position_t < size) & (plan.position_tk[:, k] < plan.end_e[-1])
        row_td = rows_cd[jnp.clip(position_t, 0, size - 1)].astype(jnp.float32)
        total = total + jnp.where(here_t[:, None], row_td * factor_tk[:, k, None], 0.0)
    return total


def _hidden(x_td, gate, up, assignment_c, sizes_e, num_chosen: int):
    rows_cd = x_td[assignment_c // num_chosen]
    return rows_cd, grouped_dot(rows_cd, gate, sizes_e), grouped_dot(rows_cd, up, sizes_e)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _experts(x_td, weight_tk, expert_tk, gate_edf, up_edf, down_efd, size: int) -> jax.Array:
    """float32[T, D]: the part of the mixture that the experts 0 .. E - 1 given here contribute.

    expert_tk may name experts outside that range: they are other devices'. The derivative is
    written out, because a loop whose length depends on the routing has none of its own; it computes
    the hidden layer again, as rematerialisation would, so that no buffer grows with imbalance.
    """
    return _experts_forward(x_td, weight_tk, expert_tk, gate_edf, up_edf, down_efd, size)[0]


def _experts_forward(x_td, weight_tk, expert_tk, gate_edf, up_edf, down_efd, size: int):
    plan = _plan(expert_tk, gate_edf.shape[0])

    def body(i, out_td):
        assignment_c, _, sizes_e = _piece(plan, i, size)
        _, gate, up = _hidden(x_td, gate_edf, up_edf, assignment_c, sizes_e, weight_tk.shape[1])
        rows_cd = grouped_dot(jax.nn.silu(gate) * up, down_efd, sizes_e)
        return out_td + _to_tokens(rows_cd, weight_tk, plan, i, size)

    out_td = _per_piece(plan, size, body, jnp.zeros(x_td.shape, jnp.float32))
    return out_td, (x_td, weight_tk, expert_tk, gate_edf, up_edf, down_efd)


def _experts_backward(size: int, saved, d_out_td):
    x_td, weight_tk, expert_tk, gate_edf, up_edf, down_efd = saved
    plan = _plan(expert_tk, gate_edf.shape[0])
    dtype, K = x_td.dtype, weight_tk.shape[1]
    ones_tk = jnp.ones_like(weight_tk)

    def body(i, sums):
        assignment_c, real_c, sizes_e = _piece(plan, i, size)
        rows_cd, gate, up = _hidden(x_td, gate_edf, up_edf, assignment_c, sizes_e, K)
        silu, d_silu = jax.vjp(jax.nn.silu, gate)
        d_rows_cd = d_out_td[assignment_c // K].astype(dtype)
        weight_c1 = weight_tk.reshape(-1)[assignment_c].astype(dtype)[:, None]
        d_hidden = grouped_dot(d_rows_cd, down_efd.swapaxes(1, 2), sizes_e)  # not yet weighted
        d_weight_c = jnp.sum((silu * up * d_hidden).astype(jnp.float32), axis=-1)
        d_hidden *= weight_c1
        (d_gate,) = d_silu(d_hidden * up)
        d_up = d_hidden * silu
        d_x_cd = grouped_dot(d_gate, gate_edf.swapaxes(1, 2), sizes_e)
        d_x_cd += grouped_dot(d_up, up_edf.swapaxes(1, 2), sizes_e)
        return (
            sums[0] + _to_tokens(d_x_cd, ones_tk, plan, i, size),
            # An assignment sits in one piece; its weight's derivative is one number.
            sums[1].at[assignment_c].add(jnp.where(real_c, d_weight_c, 0.0)),
            sums[2] + grouped_outer(rows_cd, d_gate, sizes_e),
            sums[3] + grouped_outer(rows_cd, d_up, sizes_e),
            sums[4] + grouped_outer(silu * up, d_rows_cd * weight_c1, sizes_e),
        )

    zeros = [jnp.zeros(a.shape, jnp.float32) for a in (x_td, gate_edf, up_edf, down_efd)]
    sums = (zeros[0], jnp.zeros(weight_tk.size, jnp.float32), *zeros[1:])
    d_x, d_weight, d_gate, d_up, d_down = _per_piece(plan, size, body, sums)
    return (
        d_x.astype(dtype),
        d_weight.reshape(weight_tk.shape).astype(weight_tk.dtype),
        None,
        d_gate.astype(gate_edf.dtype),
        d_up.astype(up_edf.dtype),
        d_down.astype(down_efd.dtype),
    )


_experts.defvjp(_experts_forward, _experts_backward)
