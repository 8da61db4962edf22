# SPDX-License-Identifier: Apache-2.0
"""Divergences between student and teacher at one position, on all of V or on a few outcomes.

Conventions, stated once. p = student, q = teacher. "reverse_kl" = KL(p || q), "forward_kl" =
KL(q || p), "jsd" = beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p, GKD's
(arXiv 2306.13649). At beta = 0 and 1 that formula is identically zero; there "jsd" means its limits
after division by beta or 1 - beta: forward KL at 0, reverse KL at 1.

TRL's `generalized_jsd_loss` (1.16) has the same beta, the same ends and natural logs. It differs
where TRL divides: its default reduction is by batch size, ours is `weights.loss_weights`; it also
scales logits by a temperature, ours is 1. TRL's first version (commit 03a860c1) mixed
*log*-probabilities and swapped the two weights: its beta means something else for every beta.

The teacher is a constant everywhere: no gradient reaches it.
"""

import functools

import jax
import jax.numpy as jnp

KINDS = ("reverse_kl", "forward_kl", "jsd")


def normaliser(logits_nv: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest logit and log of the sum of exp(logit - largest), float[n, 1] each.

    Log-probs are taken as (logit - largest) - log sum, in this order: next to a logit of 30,
    logit - logsumexp would be off by 2e-6 in float32, however close to one the probability is.
    """
    top_n1 = jnp.max(logits_nv, axis=-1, keepdims=True)
    return top_n1, jnp.log(jnp.sum(jnp.exp(logits_nv - top_n1), axis=-1, keepdims=True))


@jax.custom_vjp
def logp_at(logits_nv: jax.Array, ids_nk: jax.Array) -> jax.Array:
    """Log-probabilities of a few ids, normalised over all of V.

    The gradient is written by hand: it needs one pass over the logits and no scatter for one id.

    Args:
      logits_nv: float32[n, V]. ids_nk: int32[n, K], each in [0, V).

    Returns:
      float32[n, K], nats.
    """
    return _logp_at_forward(logits_nv, ids_nk)[0]


def _logp_at_forward(logits_nv: jax.Array, ids_nk: jax.Array) -> tuple[jax.Array, tuple]:
    top_n1, log_sum_n1 = normaliser(logits_nv)
    logp_nk = (jnp.take_along_axis(logits_nv, ids_nk, axis=-1) - top_n1) - log_sum_n1
    return logp_nk, (logits_nv, top_n1, log_sum_n1, ids_nk)


def _logp_at_backward(residuals: tuple, g_nk: jax.Array) -> tuple[jax.Array, None]:
    logits_nv, top_n1, log_sum_n1, ids_nk = residuals
    total_n1 = jnp.sum(g_nk, axis=-1, keepdims=True)
    d_nv = -total_n1 * jnp.exp((logits_nv - top_n1) - log_sum_n1)
    if ids_nk.shape[-1] == 1:
        d_nv += jnp.where(jnp.arange(d_nv.shape[-1])[None] == ids_nk, g_nk, 0.0)
    else:
        d_nv = d_nv.at[jnp.arange(d_nv.shape[0])[:, None], ids_nk].add(g_nk)
    return d_nv, None


logp_at.defvjp(_logp_at_forward, _logp_at_backward)


@jax.custom_vjp
def logp_and_tail(logits_nv: jax.Array, ids_nk: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`logp_at`, and the log of the mass of all other tokens, summed over those: no 1 - sum.

    Args:
      logits_nv: float32[n, V]. ids_nk: int32[n, K], each in [0, V); an id may come twice.

    Returns:
      float32[n, K] and float32[n], nats; -inf where the ids are the whole vocabulary.
    """
    return _logp_and_tail_forward(logits_nv, ids_nk)[0]


def _logp_and_tail_forward(
    logits_nv: jax.Array, ids_nk: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    logp_nk, residuals = _logp_at_forward(logits_nv, ids_nk)
    _, top_n1, log_sum_n1, _ = residuals
    others_nv = jnp.where(_held(logits_nv, ids_nk), -jnp.inf, logits_nv - top_n1)
    tail_n = jnp.log(jnp.sum(jnp.exp(others_nv), axis=-1)) - log_sum_n1[:, 0]
    return (logp_nk, tail_n), (*residuals, tail_n)


def _logp_and_tail_backward(
    residuals: tuple, g: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, None]:
    *residuals, tail_n = residuals
    logits_nv, top_n1, log_sum_n1, ids_nk = residuals
    g_nk, g_tail_n1 = g[0], jnp.where(jnp.isfinite(tail_n), g[1], 0.0)[:, None]
    d_nv, _ = _logp_at_backward(residuals, g_nk)
    logp_nv = (logits_nv - top_n1) - log_sum_n1
    own_nv = jnp.where(_held(logits_nv, ids_nk), -jnp.inf, logp_nv - tail_n[:, None])
    return d_nv + g_tail_n1 * (jnp.exp(own_nv) - jnp.exp(logp_nv)), None


def _held(logits_nv: jax.Array, ids_nk: jax.Array) -> jax.Array:
    """bool[n, V], True = one of the ids."""
    rows_n1 = jnp.arange(len(ids_nk))[:, None]
    return jnp.zeros(logits_nv.shape, bool).at[rows_n1, ids_nk].set(True)


logp_and_tail.defvjp(_logp_and_tail_forward, _logp_and_tail_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def full_divergence(
    kind: str, beta: float, student_nv: jax.Array, teacher_nv: jax.Array
) -> jax.Array:
    """Divergence over the whole vocabulary, from logits; the gradient is written by hand.

    Args:
      kind: one of `KINDS`. beta: the JSD's, in [0, 1]; others ignore it.
      student_nv, teacher_nv: float32[n, V], logits; a column of -1e30 (or -inf) in both is no
        token.

    Returns:
      float32[n], nats, >= 0 up to rounding.
    """
    return _full_forward(kind, beta, student_nv, teacher_nv)[0]


def _full_forward(
    kind: str, beta: float, student_nv: jax.Array, teacher_nv: jax.Array
) -> tuple[jax.Array, tuple]:
    norms = (*normaliser(student_nv), *normaliser(teacher_nv))
    terms_nv = _terms(kind, beta, *_log_probs(student_nv, teacher_nv, norms))
    loss_n = jnp.sum(terms_nv, axis=-1)
    return loss_n, (student_nv, teacher_nv, norms, loss_n)


def _full_backward(
    kind: str, beta: float, residuals: tuple, g_n: jax.Array
) -> tuple[jax.Array, None]:
    student_nv, teacher_nv, norms, loss_n = residuals
    kind = limit_kind(kind, beta)
    logp_nv, logq_nv = _log_probs(student_nv, teacher_nv, norms)
    p_nv = jnp.exp(logp_nv)
    if kind == "forward_kl":  # d/dz KL(q || p) = p - q
        d_nv = p_nv - jnp.exp(logq_nv)
    elif kind == "reverse_kl":  # p (log p - log q - KL)
        d_nv = jnp.where(p_nv > 0, p_nv * (logp_nv - logq_nv - loss_n[:, None]), 0.0)
    else:  # (1 - beta) p (log p - log m - KL(p || m))
        log_ratio_nv = jnp.where(p_nv > 0, logp_nv - _log_mix(beta, p_nv, jnp.exp(logq_nv)), 0.0)
        mean_n1 = jnp.sum(p_nv * log_ratio_nv, axis=-1, keepdims=True)
        d_nv = (1.0 - beta) * p_nv * (log_ratio_nv - mean_n1)
    return d_nv * g_n[:, None], None


full_divergence.defvjp(_full_forward, _full_backward)


def _log_probs(
    student_nv: jax.Array, teacher_nv: jax.Array, norms: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    """Log-softmax of both, float[n, V], from their `normaliser`s."""
    top_n1, log_sum_n1, teacher_top_n1, teacher_log_sum_n1 = norms
    logp_nv = (student_nv - top_n1) - log_sum_n1
    return logp_nv, (teacher_nv - teacher_top_n1) - teacher_log_sum_n1


def limit_kind(kind: str, beta: float) -> str:
    """The kind that is computed: JSD at the ends of [0, 1] is a KL."""
    if kind == "jsd" and beta in (0.0, 1.0):
        return "reverse_kl" if beta else "forward_kl"
    return kind


def _log_mix(beta: float, p: jax.Array, q: jax.Array) -> jax.Array:
    """log(beta q + (1 - beta) p); where both underflow, the term it appears in is zero anyway."""
    return jnp.log(jnp.maximum(beta * q + (1.0 - beta) * p, jnp.finfo(p.dtype).tiny))


def _terms(kind: str, beta: float, logp: jax.Array, logq: jax.Array) -> jax.Array:
    """The summands of a divergence, one per outcome; 0 where the leading probability is 0."""
    kind = limit_kind(kind, beta)
    p, q = jnp.exp(logp), jnp.exp(logq)
    if kind == "reverse_kl":
        return jnp.where(p > 0, p * (logp - logq), 0.0)
    if kind == "forward_kl":
        return jnp.where(q > 0, q * (logq - logp), 0.0)
    log_mix = _log_mix(beta, p, q)
    from_teacher = jnp.where(q > 0, q * (logq - log_mix), 0.0)
    return beta * from_teacher + (1.0 - beta) * jnp.where(p > 0, p * (logp - log_mix), 0.0)


def support_divergence(
    kind: str,
    beta: float,
    tail: str,
    student_logp_nk: jax.Array,
    teacher_logp_nk: jax.Array,
    present_nk: jax.Array,
    student_tail_n: jax.Array | None = None,
    stop_gradient: bool = False,
) -> jax.Array:
    """Divergence on a few outcomes, with one of three treatments of all the others.

    "bin": the other tokens are one more outcome, so both sides are distributions: >= 0, and a lower
    bound of the full divergence. "renormalise": both sides are divided by their mass on the
    support. "truncate": the outcomes' summands alone. Neither side then sums to one, the value can
    be negative, and both KLs have a gradient even for two equal models: reverse KL moves mass off
    the support (students elsewhere collapsed with it), forward KL onto it. The JSD has none.

    Args:
      kind, beta: see the module. tail: one of the three.
      student_logp_nk, teacher_logp_nk: float32[n, K], nats, normalised over the whole vocabulary.
      present_nk: bool[n, K], False = the slot repeats another one and does not count.
      student_tail_n: float32[n], nats, of `logp_and_tail`; read by "bin".
      stop_gradient: of "reverse_kl". Every outcome's p (log p - log q) is a constant that
        multiplies the gradient of its log p (arXiv 2604.13016; with "renormalise", p is
        renormalised and the logs are not). Zero for equal models, whatever the tail.

    Returns:
      float32[n], nats. stop_gradient changes the gradient alone, not the value.
    """
    teacher_logp_nk = jax.lax.stop_gradient(teacher_logp_nk)
    raw_nk, raw_teacher_nk = student_logp_nk, teacher_logp_nk
    if tail == "bin":
        tail_n1 = student_tail_n[:, None]
        student_logp_nk = jnp.concatenate([student_logp_nk, tail_n1], axis=-1)
        teacher_tail_n1 = _tail(jnp.where(present_nk, teacher_logp_nk, -jnp.inf))
        teacher_logp_nk = jnp.concatenate([teacher_logp_nk, teacher_tail_n1], axis=-1)
        present_nk = jnp.concatenate([present_nk, jnp.isfinite(tail_n1)], axis=-1)
        raw_nk, raw_teacher_nk = student_logp_nk, teacher_logp_nk
    elif tail == "renormalise":
        student_logp_nk = _renormalise(student_logp_nk, present_nk)
        teacher_logp_nk = _renormalise(teacher_logp_nk, present_nk)
    # An absent slot takes a finite value before the logs meet: a NaN behind jnp.where would still
    # spoil gradients.
    student_logp_nk = jnp.where(present_nk, student_logp_nk, 0.0)
    teacher_logp_nk = jnp.where(present_nk, teacher_logp_nk, 0.0)
    terms_nk = _terms(kind, beta, student_logp_nk, teacher_logp_nk)
    loss_n = jnp.sum(jnp.where(present_nk, terms_nk, 0.0), axis=-1)
    if not stop_gradient:
        return loss_n
    advantage_nk = jnp.exp(student_logp_nk) * (raw_nk - raw_teacher_nk)
    advantage_nk = jax.lax.stop_gradient(jnp.where(present_nk, advantage_nk, 0.0))
    surrogate_n = jnp.sum(advantage_nk * jnp.where(present_nk, raw_nk, 0.0), axis=-1)
    return jax.lax.stop_gradient(loss_n) + surrogate_n - jax.lax.stop_gradient(surrogate_n)


def _tail(masked_nk: jax.Array) -> jax.Array:
    """log(1 - mass) of the teacher, [n, 1], from its log-probs on the support alone.

    As -expm1(log mass), which keeps the digits where one token holds most of the mass. It is no
    smaller than the dtype's rounding: in float32 the tail's log-ratio ends near 16 nats.
    """
    mass_n1 = -jnp.expm1(_log_mass(masked_nk))
    return jnp.log(jnp.maximum(mass_n1, jnp.finfo(masked_nk.dtype).eps))


def _log_mass(masked_nk: jax.Array) -> jax.Array:
    """log sum exp over the last axis, kept; the largest entry enters exactly."""
    top_n1 = jax.lax.stop_gradient(jnp.max(masked_nk, axis=-1, keepdims=True))
    at_top_nk = jnp.arange(masked_nk.shape[-1])[None] == jnp.argmax(masked_nk, -1, keepdims=True)
    rest_n1 = jnp.sum(
        jnp.exp(jnp.where(at_top_nk, -jnp.inf, masked_nk) - top_n1), -1, keepdims=True
    )
    own_n1 = jnp.sum(jnp.where(at_top_nk, masked_nk, 0.0), axis=-1, keepdims=True) - top_n1
    return top_n1 + own_n1 + jnp.log1p(rest_n1 * jnp.exp(-own_n1))


def _renormalise(logp_nk: jax.Array, present_nk: jax.Array) -> jax.Array:
    return logp_nk - _log_mass(jnp.where(present_nk, logp_nk, -jnp.inf))
