# SPDX-License-Identifier: Apache-2.0
"""The compiled pieces of one step, as arguments without data: what to lower, and how often it runs.

The functions are the run's own (`decode`, `score`, `update`), lowered for `ShapeDtypeStruct`s whose
shardings name the devices of a slice. Nothing is allocated.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from opd_jax import parallel, structs
from opd_jax.config import Settings
from opd_jax.model import qwen3
from opd_jax.stages import decode, packing, score, update
from opd_jax.step import Stages


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What decides the work of a step and is not in the config."""

    prompt_mean: float  # tokens
    response_mean: float  # tokens
    decode_steps: int  # of a step; 0 = as many as the longest row or the slots need
    supervised: float  # share of the response tokens that the update sees
    packing: float  # share of a micro-batch's tokens that are real


@dataclasses.dataclass(frozen=True)
class Piece:
    """One compiled function."""

    stage: str
    runs: float  # per step
    lower: Callable[[], jax.stages.Lowered]
    resident: float  # bytes per device that stay in HBM beside what it is given
    head_iterations: float = 1.0  # of the loop over chunks of the vocabulary head

    def iterations(self, op_name: str) -> float:
        """Assumed iterations of a loop whose length depends on data.

        That is the loop over the head's chunks or, inside a layer, the loop over the pieces of a
        mixture's assignments: one piece where experts are evenly loaded.
        """
        in_layer = "while/body" in op_name or "closed_call" in op_name  # scanned, or unrolled
        return 1.0 if in_layer else self.head_iterations


class Pieces:
    """Everything a step compiles.

    Args:
      device: the run's stages (`build.stages`).
      given: the config.
      student, teacher, reference: parameters as ShapeDtypeStructs with their shardings; there may
        be no reference (None).
    """

    def __init__(
        self,
        device: Stages,
        given: Settings,
        assume: Assumptions,
        *,
        student,
        teacher,
        reference=None,
    ):
        self.device, self.assume = device, assume
        self.batch_size, self.prompt_len = given.data.batch_size, given.data.prompt_len
        self.head_chunk = given.pack.head_chunk
        self.teacher, self.reference = teacher, reference
        self.mesh = device.mesh
        state = jax.eval_shape(device.update.init, student)
        self.state = with_shardings(state, device.update.shardings)
        self.frozen = device_bytes((teacher, reference))  # models that are never updated
        self.packed_rows = device.update.packed_rows * parallel.host_group(self.mesh).count

    def __iter__(self) -> Iterator[Piece]:
        yield from self._rollout()
        yield self._score()
        yield self._accumulate()
        yield self._apply()

    def least(self) -> dict[str, dict[str, float]]:
        """Stage -> kind -> bytes that a device holds in it, whatever the compiler makes of it.

        By arithmetic alone: parameters, optimizer state, gradients and cache, without temporaries.
        """
        sampler, params = self.device.sampler, self.state.params
        config, backend = sampler.spec.config, sampler.spec.backend
        shapes = qwen3.param_shapes(config, backend.compute_dtype)
        weights = with_shardings(
            shapes, parallel.shardings(qwen3.param_axes(config), self.mesh, parallel.DECODE_RULES)
        )
        size = (sampler.num_slots or self.batch_size, sampler.cache_sizes(self.prompt_len)[-1])
        cache = jax.eval_shape(lambda: qwen3.init_cache(config, *size, backend))
        spec = parallel.spec(qwen3.CACHE_AXES, self.mesh, parallel.ACTIVATION_RULES)
        cache = with_shardings(cache, jax.tree.map(lambda _: NamedSharding(self.mesh, spec), cache))
        state, reference = device_bytes(self.state), device_bytes(self.reference)
        optimizer = device_bytes(self.state.opt_state)
        given = {
            "decode": (self.frozen + state, device_bytes((weights, cache))),
            "score": (state + reference, device_bytes(self.teacher)),
            "update": (self.frozen + optimizer, device_bytes((params, self._grads()))),
        }
        return {name: dict(resident=a, arguments=b) for name, (a, b) in given.items()}

    # --- rollout ---

    def _rollout(self) -> Iterator[Piece]:
        sampler, params = self.device.sampler, self.state.params
        spec = sampler.spec
        rest = self.frozen + device_bytes(self.state.opt_state)
        yield Piece("gather", 1, lambda: decode.prepare.lower(spec, params), rest)

        weights = self._weights()
        num_slots = sampler.num_slots or self.batch_size
        sizes = sampler.cache_sizes(self.prompt_len)
        resident = self.frozen + device_bytes(self.state)
        shardings = decode.init.lower(spec, num_slots, 128).compile().output_shardings
        slots = {
            size: with_shardings(decode.init.lower(spec, num_slots, size).out_info, shardings)
            for size in sizes
        }
        refill = num_slots if num_slots >= self.batch_size else max(1, num_slots // 4)
        yield Piece(
            "prefill",
            self.batch_size / refill,
            lambda: self._lower_insert(weights, slots[sizes[0]], refill),
            resident,
        )
        for size, steps in self._decode_steps(sizes, num_slots):
            stop = jax.ShapeDtypeStruct((), jnp.int32, sharding=parallel.replicated(self.mesh))
            yield Piece(
                "decode",
                steps / spec.chunk,
                functools.partial(decode.decode.lower, spec, weights, slots[size], stop),
                resident,
            )

    def _weights(self) -> decode.Weights:
        """Decode weights, with the shardings that `decode.prepare` gives them.

        They come from compiling a model of one layer, because the full model may not fit and then
        does not compile. (An unrolled model has other arrays, and few layers.)
        """
        spec, params = self.device.sampler.spec, self.state.params
        config, backend = spec.config, spec.backend
        if not qwen3.unrolls(config, backend):
            config = dataclasses.replace(config, num_layers=1)
            backend = dataclasses.replace(backend, unroll=0)
        shardings = jax.tree.map(lambda p: p.sharding, params)
        dtype = jax.tree.leaves(params)[0].dtype
        small = with_shardings(qwen3.param_shapes(config, dtype), shardings)
        small_spec = dataclasses.replace(spec, config=config, backend=backend)
        sharded = decode.prepare.lower(small_spec, small).compile().output_shardings
        return with_shardings(decode.prepare.lower(spec, params).out_info, sharded)

    def _lower_insert(self, weights, slots, refill: int):
        rows, replicated = parallel.batch_sharding(self.mesh), parallel.replicated(self.mesh)
        tokens = jax.ShapeDtypeStruct((refill, self.prompt_len), jnp.int32, sharding=rows)
        row = jax.ShapeDtypeStruct((refill,), jnp.int32, sharding=rows)
        source = jax.ShapeDtypeStruct(slots.token_s.shape, jnp.int32, sharding=rows)
        key = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=replicated)
        rows = decode.Arrivals(tokens, row, row, row)
        spec = self.device.sampler.spec
        return decode.insert.lower(spec, weights, slots, key, rows, source)

    def _decode_steps(self, sizes: list[int], num_slots: int) -> Iterator[tuple[int, float]]:
        """(cache columns, decode steps with a cache of that size)."""
        response_len = self.device.sampler.response_len
        total = self.assume.decode_steps or max(
            response_len, math.ceil(self.batch_size / num_slots) * self.assume.response_mean
        )
        done = 0.0
        for size in sizes:
            last = size == sizes[-1]
            upto = total if last else min(total, size - self.prompt_len)
            if upto > done or last:
                yield size, max(upto - done, 1.0)
            done = max(done, upto)

    # --- teacher and update ---

    def _runs(self, tokens: float) -> int:
        u = self.device.update
        capacity = self.packed_rows * u.tokens * self.assume.packing
        return max(1, math.ceil(tokens / capacity))

    def _head_iterations(self, response_share: float) -> float:
        """Chunks of the head in a full micro-batch, of which this share are response tokens."""
        u = self.device.update
        rows = self.packed_rows // parallel.num_batch_shards(self.mesh)
        width = max(1, min(u.tokens, self.head_chunk // rows))
        return math.ceil(u.tokens * response_share / width)

    def _micro_batch(self, tree: Any) -> Any:
        """Host rows [1, 2, ...] of a tiny batch -> global ShapeDtypeStructs [M, L, ...]."""
        u, sharding = self.device.update, parallel.batch_sharding(self.mesh)

        def grown(x):
            shape = (self.packed_rows, *(u.tokens,) * (x.ndim > 1), *x.shape[2:])
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

        return jax.tree.map(grown, tree)

    def _score(self) -> Piece:
        assume, scorer = self.assume, self.device.score
        packed, rollout, _ = tiny_batch(self.device)
        batch = self._micro_batch(score.make_batch(packed, rollout))
        tokens = assume.prompt_mean + assume.response_mean
        return Piece(
            "score",
            self._runs(self.batch_size * tokens),
            lambda: scorer.teacher.lower(self.teacher, batch),  # stacked, as scanned models are
            device_bytes(self.state) + device_bytes(self.reference),
            self._head_iterations(assume.response_mean / tokens),
        )

    def _accumulate(self) -> Piece:
        assume, u = self.assume, self.device.update
        batch = self._update_batch()
        supervised = assume.supervised * assume.response_mean
        tokens = assume.prompt_mean + supervised
        return Piece(
            "update",
            self._runs(self.batch_size * tokens),
            lambda: u.accumulate.lower(self.state.params, self._grads(), batch, None),
            self.frozen + device_bytes(self.state.opt_state),
            self._head_iterations(supervised / tokens),
        )

    def _update_batch(self):
        packed, rollout, scores = tiny_batch(self.device)
        weight_bt = np.ones(rollout.tokens_bt.shape, np.float32)
        objective = self.device.update.objective
        return self._micro_batch(update.make_batch(objective, packed, rollout, scores, weight_bt))

    def _grads(self):
        return jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding),
            self.state.params,
        )

    def _apply(self) -> Piece:
        u, grads = self.device.update, self._grads()
        scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=parallel.replicated(self.mesh))
        sums = jax.eval_shape(u.accumulate, self.state.params, grads, self._update_batch(), None)[1]
        sums = jax.tree.map(lambda _: scalar, sums)
        return Piece(
            "optimizer", 1, lambda: u.apply.lower(self.state, grads, sums, scalar), self.frozen
        )


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Tree of ShapeDtypeStruct -> the same with shardings."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def device_bytes(tree: Any) -> float:
    """Bytes of one device's share."""
    return float(
        sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )
    )


def tiny_batch(device) -> tuple[packing.Batch, structs.Rollout, structs.Scores]:
    """One packed row of one token, with every field that the stages ask for."""
    spec, needs = device.sampler.spec, device.score.needs
    one, flags, zero = (
        np.zeros((1, 1), np.int32),
        np.ones((1, 1), bool),
        np.zeros((1, 1), np.float32),
    )
    candidates = np.zeros((1, 1, spec.num_candidates), np.float32)
    rollout = structs.Rollout(
        prompt_bp=one,
        prompt_valid_bp=flags,
        tokens_bt=one,
        valid_bt=flags,
        sampler_logp_bt=zero,
        candidates_btk=candidates.astype(np.int32),
        candidate_logp_btk=candidates,
        entropy_bt=zero,
        finished_b=flags[0],
    )
    scores = structs.Scores(**{name: candidates if name.endswith("k") else zero for name in needs})
    plan = packing.plan(
        prompt_bp=one,
        prompt_valid_bp=flags,
        tokens_bt=one,
        needed_bt=flags,
        micro_batch_rows=1,
        micro_batch_tokens=2,
    )
    return plan.batch(0), rollout, scores
