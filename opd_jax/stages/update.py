# SPDX-License-Identifier: Apache-2.0
"""One optimiser step that pays for supervised tokens only.

  1 pack        rows are cropped at their last token with weight and packed (host)
  2 accumulate  per micro-batch: trunk forward, head forward and backward in one pass over chunks
                of tokens, trunk backward; float32 sums
  3 apply       gradients divided once by the denominator of all hosts, clipped and applied by optax

One compiled shape for 2 and one for 3, whatever the number of supervised tokens. A step whose loss,
gradient or new parameters are not finite changes nothing but the step counter and is reported; so
is a step in which no token has weight.

Left out: activation offloading, several epochs over a batch, loss scaling (bf16 does not need it).
"""

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from opd_jax import parallel, structs
from opd_jax.algorithm.head import head_loss_and_grads, merge_sums
from opd_jax.algorithm.objective import Objective, Targets
from opd_jax.model import qwen3
from opd_jax.stages import packing

IN_FLIGHT = 2  # micro-batches handed to the device before the host waits for an earlier one


@struct.dataclass
class TrainState:
    """What a step changes."""

    params: Any
    opt_state: Any  # with the optimiser's own count: updates applied
    step: jax.Array  # int32[], updates tried: skipped and empty ones count


@dataclasses.dataclass(frozen=True)
class Update:
    """A compiled update; made by `build`. Call `init` once, then the object once per step."""

    objective: Objective
    mesh: Mesh
    packed_rows: int  # of a micro-batch on this host
    tokens: int  # of a packed row
    shardings: TrainState  # of NamedSharding
    init: Callable[[Any], TrainState]  # params (donated) -> state
    zeros: Callable[[], Any]  # -> float32 gradients
    accumulate: Callable  # (params, gradients (donated), batch, teacher_head_vd) -> gradients, sums
    apply: Callable  # (state (donated), gradients, sums, denominator) -> state, metrics

    def __call__(
        self,
        state: TrainState,
        rollout: structs.Rollout,
        scores: structs.Scores,
        weight_bt: np.ndarray,
        denominator: float,
        teacher_head_vd: jax.Array | None = None,
    ) -> tuple[TrainState, dict[str, tuple]]:
        """One step on this host's rows. Every host calls it.

        Args:
          state: donated.
          weight_bt: float32[B, T], weight of each token's loss; 0 = not supervised.
          denominator: this host's share; loss = sum(weight * token_loss) / sum(denominator).
          teacher_head_vd: [V, D], for objectives that read the teacher's hidden states.

        Returns:
          state, and metrics name -> (sum, count) over all hosts; device scalars where the device
          makes them, so that fetching them can wait.
        """
        plan = packing.plan(
            prompt_bp=rollout.prompt_bp,
            prompt_valid_bp=rollout.prompt_valid_bp,
            tokens_bt=rollout.tokens_bt,
            needed_bt=weight_bt != 0,
            micro_batch_rows=self.packed_rows,
            micro_batch_tokens=self.tokens,
        )
        own = np.array([len(plan), denominator, plan.num_tokens, plan.num_targets], np.float64)
        hosts = parallel.allgather(own)
        num_batches = max(1, int(hosts[:, 0].max()))  # nothing supervised: one empty micro-batch
        group = parallel.host_group(self.mesh)
        _, denominator, num_tokens, num_targets = hosts[list(group.leaders)].sum(axis=0)
        grads, sums, running = self.zeros(), None, deque()
        for u in range(num_batches):
            batch = make_batch(self.objective, plan.batch(u), rollout, scores, weight_bt)
            batch = parallel.to_global(self.mesh, batch)
            grads, new = self.accumulate(state.params, grads, batch, teacher_head_vd)
            sums = new if sums is None else _merge(sums, new)
            running.append(new)
            if len(running) > IN_FLIGHT:  # the host does not fill the device with inputs
                jax.block_until_ready(running.popleft())
        scale = parallel.replicate(self.mesh, np.float32(denominator))
        state, metrics = self.apply(state, grads, sums, scale)
        capacity = num_batches * self.packed_rows * self.tokens * group.count
        metrics["update/num_micro_batches"] = (num_batches, 1)
        metrics["update/num_tokens"] = (num_tokens, 1)  # prompts included
        metrics["update/fill"] = (num_tokens, capacity)
        metrics["update/num_supervised"] = (num_targets, 1)
        return state, metrics


def build(
    config: qwen3.Qwen3Config,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    shape: packing.MicroBatch,
    *,
    backend: qwen3.Backend,
    mesh: Mesh,
    vocab_size: int | None = None,
    param_dtype: Any = jnp.float32,
) -> Update:
    """The update stage.

    Args:
      config: the student's.
      optimizer: clipping and schedules included (optax.chain); called with float32 gradients.
      backend: its `shard` should be `parallel.shard_activations(mesh)`.
      vocab_size: real tokens; further rows of the heads get no probability. None = all are real.
      param_dtype: dtype of the trained parameters.
    """
    parallel.check_rows(shape.rows, "pack.micro_batch_rows", mesh)
    parallel.check_model(config, mesh, "student")
    shapes = qwen3.param_shapes(config, param_dtype)
    shardings = state_shardings(config, optimizer, mesh)
    parallel.check_coverage(shapes, shardings.params, mesh)
    whole = parallel.replicated(mesh)
    head = _build_head(objective, mesh, shape.chunk, vocab_size or config.vocab_size)
    accumulate = _build_accumulate(config, head, backend)

    def init(params):
        # Moments are float32, whatever the parameters are.
        wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        return TrainState(params, optimizer.init(wide), jnp.zeros((), jnp.int32))

    def zeros():
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)

    return Update(
        objective=objective,
        mesh=mesh,
        packed_rows=shape.rows // parallel.host_group(mesh).count,
        tokens=shape.tokens,
        shardings=shardings,
        init=jax.jit(init, out_shardings=shardings, donate_argnums=0),
        zeros=jax.jit(zeros, out_shardings=shardings.params),
        accumulate=jax.jit(accumulate, donate_argnums=1, out_shardings=(shardings.params, whole)),
        apply=jax.jit(_build_apply(optimizer), donate_argnums=0, out_shardings=(shardings, whole)),
    )


def state_shardings(
    config: qwen3.Qwen3Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """TrainState of NamedSharding: optimiser moments lie where their parameters lie."""
    params = parallel.shardings(qwen3.param_axes(config), mesh)
    whole = parallel.replicated(mesh)
    opt_state = jax.eval_shape(optimizer.init, qwen3.param_shapes(config))
    opt_state = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        opt_state,
        params,
        transform_non_params=lambda _: whole,
    )
    step: Any = whole
    return TrainState(params, opt_state, step)


# --- accumulate ---


def make_batch(
    objective: Objective,
    packed: packing.Batch,
    rollout: structs.Rollout,
    scores: structs.Scores,
    weight_bt: np.ndarray,
) -> dict:
    """What the device needs of one micro-batch; host rows [M, ...]."""
    needs = objective.needs

    def gather(values_bt, needed=True):
        return packed.gather(values_bt) if needed and values_bt is not None else None

    candidates = "teacher_logp_btk" in needs
    targets = Targets(
        token=gather(rollout.tokens_bt),
        weight=gather(weight_bt),
        teacher_logp=gather(scores.teacher_logp_bt),
        sampler_logp=gather(rollout.sampler_logp_bt, objective.kind != "cross_entropy"),
        reference_logp=gather(scores.reference_logp_bt, "reference_logp_bt" in needs),
        candidates_k=gather(rollout.candidates_btk, candidates),
        teacher_logp_k=gather(scores.teacher_logp_btk, candidates),
        teacher_ids_k=gather(scores.teacher_ids_btk, "teacher_ids_btk" in needs),
        teacher_ids_logp_k=gather(scores.teacher_ids_logp_btk, "teacher_ids_logp_btk" in needs),
        teacher_hidden_d=gather(scores.teacher_hidden_btd, "teacher_hidden_btd" in needs),
    )
    return dict(
        tokens_ml=packed.tokens_ml,
        positions_ml=packed.positions_ml,
        segment_ids_ml=packed.segment_ids_ml,
        index_mn=packed.index_mn,
        count_m=packed.count_m,
        targets=targets,
    )


def _build_head(objective, mesh, chunk, vocab_size):
    """Loss sums and gradients of hidden states and head, rows divided over the batch axes."""
    rows, whole = PartitionSpec(parallel.BATCH_AXES), PartitionSpec()

    def head(hidden_mld, head_vd, teacher_head_vd, index_mn, count_m, targets):
        """Sums and gradients of one shard's rows, then summed over the shards."""
        hidden_mnd, pull = jax.vjp(
            lambda h: jnp.take_along_axis(h, index_mn[..., None], axis=1), hidden_mld
        )
        sums, d_hidden_mnd, d_head_vd = head_loss_and_grads(
            objective,
            hidden_mnd,
            head_vd,
            targets,
            count_m,
            teacher_head_vd,
            chunk=chunk,
            vocab_size=vocab_size,
        )
        (d_hidden_mld,) = pull(d_hidden_mnd)
        axes = parallel.BATCH_AXES
        sums = {
            name: jax.lax.pmax(x, axes) if name.startswith("max_") else jax.lax.psum(x, axes)
            for name, x in sums.items()
        }
        return sums, d_hidden_mld, jax.lax.psum(d_head_vd, axes)

    # By hand over the batch axes: left to the partitioner, every chunk would sum d_head over all
    # devices; here they sum once. The vocabulary stays with the partitioner (tensor axis).
    return jax.shard_map(
        head,
        mesh=mesh,
        in_specs=(rows, whole, whole, rows, rows, rows),
        out_specs=(whole, rows, whole),
        axis_names=set(parallel.BATCH_AXES),
        check_vma=False,
    )


def _build_accumulate(config, head, backend):
    def accumulate(params, grads, batch, teacher_head_vd=None):
        def forward(params):
            hidden_mld = qwen3.trunk(
                config,
                params,
                batch["tokens_ml"],
                batch["positions_ml"],
                batch["segment_ids_ml"],
                backend,
            )
            return hidden_mld, qwen3.head_vd(config, params)

        (hidden_mld, head_vd), pull = jax.vjp(forward, params)
        gathered_vd = backend.shard(head_vd, ("vocab", None))  # once, not once per chunk
        if teacher_head_vd is not None:
            teacher_head_vd = backend.shard(teacher_head_vd, ("vocab", None))
        # All shards run the same number of iterations, so that their collectives match.
        count_m = jnp.broadcast_to(jnp.max(batch["count_m"]), batch["count_m"].shape)
        sums, d_hidden_mld, d_head_vd = head(
            hidden_mld, gathered_vd, teacher_head_vd, batch["index_mn"], count_m, batch["targets"]
        )
        (new,) = pull((d_hidden_mld, d_head_vd.astype(head_vd.dtype)))
        return jax.tree.map(lambda g, d: g + d.astype(jnp.float32), grads, new), sums

    return accumulate


_merge = jax.jit(merge_sums)


# --- apply ---


def _build_apply(optimizer):
    def apply(state: TrainState, grads: Any, sums: dict, denominator: jax.Array):
        # Nothing supervised anywhere: gradients are zeros, and 0 / 1 is as good as any.
        count = jnp.where(denominator > 0, denominator, 1.0)
        grads = jax.tree.map(lambda g: g / count, grads)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(grad_norm)
        finite &= _all_finite(_applied(optimizer, grads, state)[0])
        # Made again behind a barrier: the parameters that were looked at would be kept beside the
        # old ones until the last of them was seen.
        params, opt_state = _applied(optimizer, jax.lax.optimization_barrier(grads), state)
        active = finite & (sums["tokens"] > 0)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(active, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        state = TrainState(params, opt_state, state.step + 1)
        return state, _metrics(sums, denominator, grad_norm, finite)

    return apply


def _applied(
    optimizer: optax.GradientTransformation, grads: Any, state: TrainState
) -> tuple[Any, Any]:
    """New parameters and optimiser state."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state


def _all_finite(tree: Any) -> jax.Array:
    """bool[], looked at after the update: finite gradients can still carry parameters over."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def _metrics(sums: dict, denominator, grad_norm, finite) -> dict[str, tuple]:
    """name -> (sum, count). Sums other than the loss are over supervised tokens, unweighted."""
    one = jnp.float32(1)
    empty = (sums["tokens"] == 0) & (sums["nonfinite"] == 0)
    skipped = ~finite | ((sums["tokens"] == 0) & ~empty)
    metrics = {
        "loss": (sums["loss"], denominator),
        "grad_norm": (grad_norm, one),
        "update/skipped": (skipped.astype(jnp.float32), one),
        "update/empty": (empty.astype(jnp.float32), one),
        "update/nonfinite_tokens": (sums["nonfinite"], one),
    }
    names = {"abs_sampler_gap": "sampler_gap/mean", "max_abs_sampler_gap": "sampler_gap/max"}
    for name, total in sums.items():
        if name not in ("loss", "tokens", "nonfinite"):
            count = one if name.startswith("max_") else sums["tokens"]
            metrics[names.get(name, f"update/{name}")] = (total, count)
    return metrics
