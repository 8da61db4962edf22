# SPDX-License-Identifier: Apache-2.0
"""Loss and gradient through the vocabulary head, in chunks of tokens.

No array of tokens x V is ever larger than one chunk. The functions take hidden states [M, N, D] of
M packed rows with N target positions, used ones first, and loop over chunks of all M rows times a
few positions: M may be sharded over batch axes, V or D over tensor axes, and the number of
iterations follows the fullest row, so that positions which no row uses are not paid for. The
gradient of the head is a sum over M: on a mesh, call them under shard_map over the batch axes, or
every chunk sums it over devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.algorithm.objective import Objective, Targets, check_targets, token_loss

CACHED_LOGITS = 2**18  # float32 logits that a CPU core's own cache holds beside the teacher's
Sums = dict[str, jax.Array]  # name -> float32[]
MASKED = -1e30  # logit of a padded vocabulary row: no probability, and no NaN as -inf would give


def head_loss_and_grads(
    objective: Objective,
    hidden_mnd: jax.Array,
    head_vd: jax.Array,
    targets_mn: Targets,
    count_m: jax.Array,
    teacher_head_vd: jax.Array | None = None,
    *,
    chunk: int = 64,
    vocab_size: int | None = None,
) -> tuple[Sums, jax.Array, jax.Array]:
    """Weighted loss sum of a micro-batch and its gradients, in one pass over the head.

    Args:
      objective: what to minimise.
      hidden_mnd: compute dtype [M, N, D], student states; position n predicts the targets' token n.
      head_vd: [V', D], the student's head. Products take operands in hidden's dtype and sum in
        float32.
      targets_mn: `Targets` with leading dims [M, N]. A position of weight 0 or n >= count_m
        contributes exactly nothing, whatever it holds.
      count_m: int32[M], used positions of each row; they come first.
      teacher_head_vd: [V', D'], beside the targets' teacher_hidden_d: full-vocabulary divergences.
      chunk: tokens (M times positions) per pass over the head. Temporary memory grows with it, and
        so does speed, as every pass reads both heads and adds to d_head.
      vocab_size: true vocabulary size where the heads have more rows. None = all rows are real.

    Returns:
      sums: dict of float32[]. "loss" is weighted and not yet divided. Unweighted, over used tokens:
        "tokens" (their number), "token_loss", the aux values of `token_loss`, "abs_advantage",
        "abs_sampler_gap". "nonfinite": tokens left out because a value or loss was not finite.
      d_hidden_mnd: hidden's dtype, gradient of sums["loss"].
      d_head_vd: float32[V', D], likewise.
    """
    M, N, _ = hidden_mnd.shape
    width = max(1, min(N, chunk // M))
    dtype = hidden_mnd.dtype
    head_vd = head_vd.astype(dtype)
    if objective.is_divergence and objective.support == "full":
        check_targets(objective, targets_mn, targets_mn.teacher_hidden_d)
        teacher_head_vd = teacher_head_vd.astype(targets_mn.teacher_hidden_d.dtype)
    else:
        targets_mn = targets_mn.replace(teacher_hidden_d=None)

    def step(i, d_hidden_mnd, d_head_vd):
        # The last chunk may overlap the one before: `use_ms` takes each target position once.
        start = jnp.minimum(i * width, N - width)
        position_s = start + jnp.arange(width)
        use_ms = (position_s >= i * width)[None] & (position_s[None] < count_m[:, None])
        inputs_ms = _slice((hidden_mnd, targets_mn), start, width)
        hidden_msd, targets_ms, use_ms, sums = _clean(*inputs_ms, use_ms)
        logits_msv = _logits(hidden_msd, head_vd, vocab_size)
        teacher_msv = None
        if targets_ms.teacher_hidden_d is not None:
            teacher_msv = _logits(targets_ms.teacher_hidden_d, teacher_head_vd, vocab_size)
        d_logits_msv = _loss_and_d_logits(
            objective, logits_msv, targets_ms, teacher_msv, use_ms, sums
        ).astype(dtype)
        f32 = dict(preferred_element_type=jnp.float32)
        d_head_vd += jnp.einsum("msv,msd->vd", d_logits_msv, hidden_msd, **f32)
        d_hidden_msd = jnp.einsum("msv,vd->msd", d_logits_msv, head_vd, **f32).astype(dtype)
        d_hidden_msd += jax.lax.dynamic_slice_in_dim(d_hidden_mnd, start, width, axis=1)
        d_hidden_mnd = _update(d_hidden_mnd, d_hidden_msd, start)
        return sums, d_hidden_mnd, d_head_vd

    def body(i, carry):
        sums, *gradients = step(i, *carry[1:])
        return merge_sums(carry[0], sums), *gradients

    d_hidden_mnd = jnp.zeros_like(hidden_mnd)
    d_head_vd = jnp.zeros(head_vd.shape, jnp.float32)
    shapes, *_ = jax.eval_shape(step, 0, d_hidden_mnd, d_head_vd)
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(0, _num_chunks(count_m, width), body, (sums, d_hidden_mnd, d_head_vd))


def merge_sums(a: Sums, b: Sums) -> Sums:
    """The sums of two parts of a batch -> those of both; "max_..." are maxima."""
    return {k: jnp.maximum(a[k], b[k]) if k.startswith("max_") else a[k] + b[k] for k in a}


def logprobs(
    hidden_mnd: jax.Array,
    head_vd: jax.Array,
    token_mn: jax.Array,
    candidates_mnk: jax.Array | None = None,
    count_m: jax.Array | None = None,
    *,
    num_top: int = 0,
    entropy: bool = True,
    chunk: int = 64,
    vocab_size: int | None = None,
) -> dict[str, jax.Array]:
    """What a model says of given tokens at temperature 1: the teacher's side of every objective.

    Args:
      hidden_mnd: compute dtype [M, N, D]; position n predicts token n.
      head_vd: [V', D].
      token_mn: int32[M, N], the sampled tokens.
      candidates_mnk: int32[M, N, K] or None, the student's top-K ids.
      count_m: int32[M], used positions of each row, first; None = all.
      num_top: also return the model's own top ids, for supports teacher_k and union.
      entropy: also return the entropy.
      chunk, vocab_size: see `head_loss_and_grads`.

    Returns:
      dict of float32 arrays, nats, 0 in unused positions: "logp" [M, N]; if asked for
      "candidate_logp" [M, N, K], "entropy" [M, N], and of num_top = J "top_logp" [M, N, J] with
      "top_ids" int32[M, N, J], best first. A hidden state that is not finite makes its own position
      NaN.
    """
    M, N, _ = hidden_mnd.shape
    width = max(1, min(N, chunk // M))
    count_m = jnp.full((M,), N) if count_m is None else count_m
    inputs_mn = (hidden_mnd, token_mn[..., None], candidates_mnk)

    def of_tokens(logits_nv, token_n1, candidates_nk):
        logp_nv = jax.nn.log_softmax(logits_nv, axis=-1)
        out = {"logp": jnp.take_along_axis(logp_nv, token_n1, axis=-1)[..., 0]}
        if candidates_nk is not None:
            out["candidate_logp"] = jnp.take_along_axis(logp_nv, candidates_nk, axis=-1)
        if entropy:
            out["entropy"] = -jnp.sum(jnp.exp(logp_nv) * logp_nv, axis=-1)
        if num_top:
            out["top_logp"], out["top_ids"] = jax.lax.top_k(logp_nv, num_top)
        return out

    def step(i):
        start = jnp.minimum(i * width, N - width)
        hidden_msd, token_ms1, candidates_msk = _slice(inputs_mn, start, width)
        logits_msv = _logits(hidden_msd, head_vd.astype(hidden_mnd.dtype), vocab_size)
        out = _map_tokens(of_tokens, logits_msv, token_ms1, candidates_msk)
        use_ms = (start + jnp.arange(width))[None] < count_m[:, None]
        return start, jax.tree.map(lambda x: jnp.where(_lift(use_ms, x), x, 0), out)

    def body(i, out_mn):
        start, out_ms = step(i)
        return jax.tree.map(lambda old, new: _update(old, new, start), out_mn, out_ms)

    _, shapes = jax.eval_shape(step, 0)
    out_mn = jax.tree.map(lambda x: jnp.zeros((M, N, *x.shape[2:]), x.dtype), shapes)
    return jax.lax.fori_loop(0, _num_chunks(count_m, width), body, out_mn)


def _num_chunks(count_m: jax.Array, width: int) -> jax.Array:
    return (jnp.max(count_m) + width - 1) // width


def _slice(tree: Any, start: jax.Array | int, width: int) -> Any:
    """Positions start .. start + width - 1 of every array [M, N, ...]."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, width, axis=1), tree)


def _update(old: jax.Array, new: jax.Array, start: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)


def _lift(mask_ms: jax.Array, x: jax.Array) -> jax.Array:
    """mask_ms with as many trailing dims as x has more."""
    return mask_ms.reshape(mask_ms.shape + (1,) * (x.ndim - mask_ms.ndim))


def _logits(hidden_msd: jax.Array, head_vd: jax.Array, vocab_size: int | None) -> jax.Array:
    """float32[M, s, V'] with padded vocabulary rows at `MASKED`."""
    logits_msv = jnp.einsum("msd,vd->msv", hidden_msd, head_vd, preferred_element_type=jnp.float32)
    if vocab_size is None or vocab_size == head_vd.shape[0]:
        return logits_msv
    return jnp.where(jnp.arange(head_vd.shape[0]) < vocab_size, logits_msv, MASKED)


def _clean(
    hidden_msd: jax.Array, targets_ms: Targets, use_ms: jax.Array
) -> tuple[jax.Array, Targets, jax.Array, Sums]:
    """Zeros in every position that is not used or not finite, so that 0 * NaN cannot reach a sum.

    Returns hidden, targets, use (bool[M, s]) and the sums so far: {"nonfinite": float32[]}.
    """
    use_ms = use_ms & (targets_ms.weight != 0)
    finite_ms = jnp.ones_like(use_ms)
    for x in jax.tree.leaves((hidden_msd, targets_ms)):
        if jnp.issubdtype(x.dtype, jnp.floating):
            finite_ms &= jnp.all(jnp.isfinite(x), axis=tuple(range(2, x.ndim)))
    bad = jnp.sum(use_ms & ~finite_ms, dtype=jnp.float32)
    use_ms &= finite_ms
    hidden_msd, targets_ms = jax.tree.map(
        lambda x: jnp.where(_lift(use_ms, x), x, 0), (hidden_msd, targets_ms)
    )
    return hidden_msd, targets_ms, use_ms, {"nonfinite": bad}


def _loss_and_d_logits(
    objective: Objective,
    logits_msv: jax.Array,
    targets_ms: Targets,
    teacher_msv: jax.Array | None,
    use_ms: jax.Array,
    sums: Sums,
) -> jax.Array:
    """Gradient of the chunk's weighted loss in its logits, float32[M, s, V']; fills `sums`."""

    def of_tokens(logits_nv, targets_n, teacher_nv, use_n):
        loss_n, pull_back, aux = jax.vjp(
            lambda x: token_loss(objective, x, targets_n, teacher_nv), logits_nv, has_aux=True
        )
        use_n &= jnp.isfinite(loss_n)
        (d_logits_nv,) = pull_back(jnp.where(use_n, targets_n.weight, 0.0).astype(jnp.float32))
        return jnp.where(use_n[:, None], d_logits_nv, 0.0), use_n, aux | {"token_loss": loss_n}

    asked_ms = use_ms
    d_logits_msv, use_ms, aux = _map_tokens(
        of_tokens, logits_msv, targets_ms, teacher_msv, asked_ms
    )
    sums["nonfinite"] += jnp.sum(asked_ms & ~use_ms, dtype=jnp.float32)
    for name in ("advantage", "sampler_gap"):
        if name in aux:
            aux["abs_" + name] = jnp.abs(aux[name])
            sums["max_abs_" + name] = jnp.max(jnp.where(use_ms, aux["abs_" + name], 0.0))
    sums["loss"] = jnp.sum(jnp.where(use_ms, targets_ms.weight * aux["token_loss"], 0.0))
    sums["tokens"] = jnp.sum(use_ms, dtype=jnp.float32)
    for name, value_ms in aux.items():
        sums[name] = jnp.sum(jnp.where(use_ms, value_ms, 0.0))
    return d_logits_msv


def _map_tokens(function: Callable, logits_msv: jax.Array, *inputs_ms: Any) -> Any:
    """`function` of arrays [n, ...], the first of them logits, over all tokens of [M, s, ...].

    On a CPU a few tokens at a time, whose logits stay in its cache from the normaliser to the
    gradient: both heads' reverse KL takes 0.7 of the time with V = 151,936. Rows that are sharded
    over several CPU devices, as in tests, are gathered for it.
    """
    M, s, V = logits_msv.shape
    most = max(1, CACHED_LOGITS // V)
    size = next(n for n in range(min(most, M * s), 0, -1) if M * s % n == 0)

    def in_cache(*inputs_ms):
        blocks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[2:]), inputs_ms)
        out = jax.lax.map(lambda xs: function(*xs), blocks)
        return jax.tree.map(lambda x: x.reshape(M, s, *x.shape[2:]), out)

    inputs_ms = (logits_msv, *inputs_ms)
    if size == M * s:
        return jax.vmap(function)(*inputs_ms)
    return jax.lax.platform_dependent(*inputs_ms, cpu=in_cache, default=jax.vmap(function))
