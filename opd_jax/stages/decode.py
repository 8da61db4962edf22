# SPDX-License-Identifier: Apache-2.0
"""Decoding on the device: slots, prefill into them, and the compiled loop of single-token steps.

`rollout.py` decides which row sits in which slot; here is what runs once it has. Dims: S slots over
all hosts, R prompts of a refill, J steps of a chunk, C columns of the cache, K candidates.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding

from opd_jax import parallel
from opd_jax.model import qwen3
from opd_jax.stages import sampling


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything fixed when the functions below are compiled. Hashable: their static argument."""

    config: qwen3.Qwen3Config
    knobs: sampling.Knobs
    vocab_size: int  # real tokens; further rows of the head are padding and never drawn
    num_candidates: int
    eos_ids: tuple[int, ...]
    chunk: int  # J
    mesh: Mesh
    backend: qwen3.Backend
    head_dtype: Any

    @property
    def head_is_dv(self) -> bool:
        """The head is stored transposed: only the CPU's bf16 matmul is slow otherwise."""
        return parallel.platform(self.mesh) == "cpu" and self.head_dtype == jnp.bfloat16


@struct.dataclass
class Weights:
    """The student as decoding wants it."""

    params: Any  # compute dtype, decode sharding, of `qwen3.unstack_layers`
    head: jax.Array  # head dtype, [V, D], or [D, V] where `Spec.head_is_dv`


@struct.dataclass
class Slots:
    """S rows being decoded. Free slots still run every step; their output is ignored."""

    cache: qwen3.Cache  # columns before position_s are written
    token_s: jax.Array  # int32[S], fed next: the last of the prompt, then the last drawn
    position_s: jax.Array  # int32[S], its column
    t_s: jax.Array  # int32[S], response token that is drawn next
    limit_s: jax.Array  # int32[S], response tokens at most
    active_s: jax.Array  # bool[S], True = decoding, False = free
    key_s: jax.Array  # key[S], of the row: token t is drawn with fold_in(key, t)


@struct.dataclass
class Arrivals:
    """R rows that are to be prefilled. Rows that are no prompt are never moved into a slot."""

    tokens_rp: Any  # int32[R, P], the prompt from column 0 on
    length_r: Any  # int32[R], tokens of the prompt
    row_r: Any  # int32[R], index in the global batch: names the sampling key
    limit_r: Any  # int32[R], response tokens at most


@struct.dataclass
class Drawn:
    """What one chunk of J decode steps drew. A row's tokens come first, then unused columns."""

    emitted_sj: jax.Array  # bool[S, J], True = a token of the row
    token_sj: jax.Array  # int32[S, J]
    logp_sj: jax.Array  # float32[S, J]
    candidates_sjk: jax.Array  # int32[S, J, K]
    candidate_logp_sjk: jax.Array  # float32[S, J, K]
    entropy_sj: jax.Array  # float32[S, J]
    nonfinite_s: jax.Array  # bool[S], True = the row ended because its logits were not finite


@struct.dataclass
class Control:
    """What every host must know to take the same decisions. Replicated."""

    active_s: jax.Array  # bool[S], after the chunk
    num_steps: jax.Array  # int32[], decode steps of the chunk
    num_busy: jax.Array  # int32[], slot-steps that worked on a row


@functools.partial(jax.jit, static_argnums=0)
def prepare(spec: Spec, params: Any) -> Weights:
    config, mesh = spec.config, spec.mesh
    decode = functools.partial(parallel.shardings, mesh=mesh, rules=parallel.DECODE_RULES)
    head = qwen3.head_vd(config, params).astype(spec.head_dtype)
    axes = ("vocab", "embed")
    if spec.head_is_dv:
        head, axes = head.T, axes[::-1]
    params = jax.tree.map(lambda x: x.astype(spec.backend.compute_dtype), params)
    weights = Weights(qwen3.unstack_layers(config, params, spec.backend), head)
    if mesh.size > 1:
        unstacked = qwen3.unrolls(config, spec.backend)
        places = Weights(decode(qwen3.param_axes(config, unstacked=unstacked)), decode(axes))
        weights = jax.lax.with_sharding_constraint(weights, places)
    return weights


def _pinned(spec: Spec, slots: Slots) -> Slots:
    """Rows divided over the batch axes, whatever made them: one sharding, one compilation."""
    if spec.mesh.size == 1:
        return slots
    rows = parallel.batch_sharding(spec.mesh)
    cache = NamedSharding(
        spec.mesh, parallel.spec(qwen3.CACHE_AXES, spec.mesh, parallel.ACTIVATION_RULES)
    )
    shardings: dict[str, Any] = {field.name: rows for field in dataclasses.fields(Slots)}
    shardings["cache"] = cache
    return jax.lax.with_sharding_constraint(slots, Slots(**shardings))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def init(spec: Spec, num_slots: int, columns: int) -> Slots:
    S = num_slots
    cache = qwen3.init_cache(spec.config, S, columns, spec.backend)
    zero_s, free_s = jnp.zeros(S, jnp.int32), jnp.zeros(S, bool)
    keys = jax.random.wrap_key_data(jnp.zeros((S, 2), jnp.uint32))
    return _pinned(spec, Slots(cache, zero_s, zero_s, zero_s, zero_s, free_s, keys))


@functools.partial(jax.jit, static_argnums=(0, 2))
def grow(spec: Spec, slots: Slots, columns: int) -> Slots:
    more = ((0, 0), (0, 0), (0, 0), (0, columns - slots.cache.num_columns), (0, 0))
    cache = jax.tree.map(lambda x: jnp.pad(x, more), slots.cache)
    return _pinned(spec, dataclasses.replace(slots, cache=cache))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def insert(
    spec: Spec,
    weights: Weights,
    slots: Slots,
    key_data: jax.Array,
    rows: Arrivals,
    source_s: jax.Array,
) -> Slots:
    """Prefills R prompts and moves them into slots.

    source_s: int32[S], which of its shard's arrivals moves into the slot; -1 = none.

    The cache gets all tokens of a prompt; the first decode step groups the last one again, so that
    every response token is drawn in one place.
    """
    tokens_rp, length_r = rows.tokens_rp, rows.length_r
    R, P = tokens_rp.shape
    shards = parallel.num_batch_shards(spec.mesh)
    fresh = qwen3.init_cache(spec.config, R, P, spec.backend)
    start_r = jnp.zeros_like(length_r)
    _, fresh = qwen3.extend(spec.config, weights.params, tokens_rp, start_r, fresh, spec.backend)

    def moved(new, old, axis=0):
        """Rows of `new` picked by source_s, within each shard; other slots keep `old`."""
        split = (*new.shape[:axis], shards, R // shards, *new.shape[axis + 1 :])
        picked = jax.vmap(lambda x, i: jnp.take(x, i, axis=axis), in_axes=(axis, 0), out_axes=axis)(
            new.reshape(split), jnp.maximum(source_s, 0).reshape(shards, -1)
        ).reshape(old.shape)
        keep = (1,) * axis + (-1,) + (1,) * (old.ndim - axis - 1)
        return jnp.where((source_s >= 0).reshape(keep), picked, old)

    def cached(new, old):
        return old.at[:, :, :, :P].set(moved(new, old[:, :, :, :P], axis=1))

    def without(slots):
        """The slots but for their cache, whose rows are its second axis."""
        return dataclasses.replace(slots, cache=None)

    last_r = jnp.maximum(length_r - 1, 0)
    token_r = jnp.take_along_axis(tokens_rp, last_r[:, None], axis=1)[:, 0]
    key = jax.random.wrap_key_data(key_data)
    key_r = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows.row_r)
    # A prompt without tokens has nothing to condition on: its response is empty.
    new = Slots(
        cache=slots.cache,
        token_s=token_r,
        position_s=last_r,
        t_s=start_r,
        limit_s=rows.limit_r,
        active_s=(rows.limit_r > 0) & (length_r > 0),
        key_s=key_r,
    )
    cache = jax.tree.map(cached, fresh, slots.cache)
    rest = jax.tree.map(moved, without(new), without(slots))
    return _pinned(spec, dataclasses.replace(rest, cache=cache))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(spec, weights, slots, stop) -> tuple[Slots, Drawn, Control]:
    """Steps until the chunk is full, no slot is active, or `stop` more slots are free."""
    S, J, K = slots.token_s.shape[0], spec.chunk, spec.num_candidates
    number_sj, id_sj = jnp.zeros((S, J), jnp.float32), jnp.zeros((S, J), jnp.int32)
    drawn = Drawn(
        emitted_sj=jnp.zeros((S, J), bool),
        token_sj=id_sj,
        logp_sj=number_sj,
        candidates_sjk=jnp.zeros((S, J, K), jnp.int32),
        candidate_logp_sjk=jnp.zeros((S, J, K), jnp.float32),
        entropy_sj=number_sj,
        nonfinite_s=jnp.zeros(S, bool),
    )
    before_s = slots.active_s

    def more(carry):
        j, _, slots, _ = carry
        freed = jnp.sum(before_s & ~slots.active_s)
        return (j < J) & jnp.any(slots.active_s) & (freed < stop)

    def step(carry):
        j, busy, slots, drawn = carry
        busy += jnp.sum(slots.active_s, dtype=jnp.int32)
        slots, drawn = _step(spec, weights, slots, drawn, j)
        return j + 1, busy, slots, drawn

    zero = jnp.int32(0)
    num_steps, num_busy, slots, drawn = jax.lax.while_loop(more, step, (zero, zero, slots, drawn))
    slots = _pinned(spec, slots)
    control = Control(slots.active_s, num_steps, num_busy)
    if spec.mesh.size > 1:
        everywhere = parallel.replicated(spec.mesh)
        control = jax.lax.with_sharding_constraint(control, everywhere)
        drawn = jax.lax.with_sharding_constraint(drawn, parallel.batch_sharding(spec.mesh))
    return slots, drawn, control


def _step(spec, weights, slots, drawn, j) -> tuple[Slots, Drawn]:
    """Feeds one token per slot, draws the next and files it in column j."""
    hidden_sld, cache = qwen3.extend(
        spec.config,
        weights.params,
        slots.token_s[:, None],
        slots.position_s,
        slots.cache,
        spec.backend,
    )
    logits_sv = logits(spec, weights.head, hidden_sld[:, 0])
    bits_s2 = jax.vmap(
        lambda key, t: jax.random.bits(jax.random.fold_in(key, t), (2,), jnp.uint32)
    )(slots.key_s, slots.t_s)
    out = sampling.sample(
        logits_sv,
        bits_s2,
        spec.knobs,
        num_candidates=spec.num_candidates,
        vocab_size=spec.vocab_size,
    )
    active_s = slots.active_s
    emit_s = active_s & out.finite_b
    eos = jnp.array(spec.eos_ids, jnp.int32)
    ended_s = jnp.any(out.token_b[:, None] == eos[None], axis=1)
    t_s = slots.t_s + emit_s
    slots = dataclasses.replace(
        slots,
        cache=cache,
        token_s=jnp.where(emit_s, out.token_b, slots.token_s),
        position_s=slots.position_s + emit_s,
        t_s=t_s,
        active_s=emit_s & ~ended_s & (t_s < slots.limit_s),
    )

    def file(column, x):
        return jax.lax.dynamic_update_index_in_dim(column, x, j, axis=1)

    drawn = Drawn(
        emitted_sj=file(drawn.emitted_sj, emit_s),
        token_sj=file(drawn.token_sj, out.token_b),
        logp_sj=file(drawn.logp_sj, out.logp_b),
        candidates_sjk=file(drawn.candidates_sjk, out.candidates_bk),
        candidate_logp_sjk=file(drawn.candidate_logp_sjk, out.candidate_logp_bk),
        entropy_sj=file(drawn.entropy_sj, out.entropy_b),
        nonfinite_s=drawn.nonfinite_s | (active_s & ~out.finite_b),
    )
    return slots, drawn


def logits(spec, head, hidden_sd) -> jax.Array:
    """float32[S, V]. Whole rows: the sums of `sampling` would cross shards at every step."""
    hidden_sd = hidden_sd.astype(head.dtype)
    dims = "sd,dv->sv" if spec.head_is_dv else "sd,vd->sv"
    logits_sv = jnp.einsum(dims, hidden_sd, head, preferred_element_type=jnp.float32)
    # In two steps: in one, XLA would gather the head at every token in place of the logits.
    logits_sv = spec.backend.shard(logits_sv, ("batch", "vocab"))
    return spec.backend.shard(logits_sv, ("batch", None))
