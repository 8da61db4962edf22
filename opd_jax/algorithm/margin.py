# SPDX-License-Identifier: Apache-2.0
"""How strongly the teacher discriminates between the student's own candidates. Paper, eq. (1).

Sign convention, stated once: every kind of margin is >= 0, and larger means that the teacher's
feedback is more discriminative; a change point *downward* is a loss of teachability for each kind.
Adding a constant to all of a position's teacher values changes none of them: log-probs, logits and
log-probs renormalised over the candidates have the same margin.
Functions take numpy or JAX arrays and keep their dtype, on the host or under jit.
"""

import dataclasses

import jax
import numpy as np

from opd_jax.settings import Section, choice, number

Array = np.ndarray | jax.Array
KINDS = ("top1_top2", "top1_mean", "entropy", "advantage_variance")


@dataclasses.dataclass(frozen=True)
class Settings(Section):
    """config.margin; the defaults are the paper's."""

    section = "margin"

    kind: str = choice("top1_top2", KINDS)  # see `margin`
    include_sampled: bool = False  # True: the sampled token joins the candidates, `with_sampled`
    temperature: float = number(1.0, above=0, why="it divides both models' log-probs")


DEFAULT = Settings()


def teacher_margin(teacher_logp_btk: Array) -> Array:
    """M_t, the paper's margin: the teacher's best candidate minus its second best. Eq. (1).

    Args:
      teacher_logp_btk: float[..., K], nats (or logits: the normaliser cancels), the teacher's
        values of the student's K candidates, in any order. -inf = the teacher excludes that
        candidate.

    Returns:
      float[...], nats, >= 0. NaN where the two best are not finite: mask such tokens, do not
      average them.

    Raises:
      ValueError: K < 2; a margin needs two candidates.
    """
    check_num_candidates(teacher_logp_btk)
    xp = teacher_logp_btk.__array_namespace__()
    sorted_btk = xp.sort(teacher_logp_btk, axis=-1)
    return sorted_btk[..., -1] - sorted_btk[..., -2]


def margin(
    settings: Settings,
    teacher_logp_btk: Array,
    student_logp_btk: Array | None = None,
    present_btk: Array | None = None,
) -> Array:
    """The margin of the kind that the settings name. Paper, eq. (1), and variants.

    "top1_top2": `teacher_margin`, the paper. "top1_mean": the best candidate minus the mean of all.
    "entropy": log K - entropy of the teacher renormalised on the K present candidates, nats below
    the uniform distribution. "advantage_variance": see there; alone in reading student_logp_btk.

    Args:
      settings: kind, and the temperature that divides both models' log-probs before all else.
      teacher_logp_btk: float[..., K], nats.
      student_logp_btk: float[..., K], nats, the student's values of the same candidates.
      present_btk: bool[..., K], True = the slot holds a candidate (`with_sampled`). None = all do.

    Returns:
      float[...], >= 0.

    Raises:
      ValueError: K < 2, or no student_logp_btk where it is read.
    """
    kind, temperature = settings.kind, settings.temperature
    check_num_candidates(teacher_logp_btk)
    xp = teacher_logp_btk.__array_namespace__()
    if present_btk is None:
        present_btk = xp.ones_like(teacher_logp_btk, dtype=bool)
    teacher_btk = xp.where(present_btk, teacher_logp_btk / temperature, -np.inf)
    if kind == "top1_top2":
        return teacher_margin(teacher_btk)
    if kind == "top1_mean":
        total_bt = xp.sum(xp.where(present_btk, teacher_btk, 0.0), axis=-1)
        return xp.max(teacher_btk, axis=-1) - total_bt / xp.sum(present_btk, axis=-1)
    if kind == "entropy":
        logp_btk = xp.where(present_btk, teacher_btk - _logsumexp(teacher_btk), 0.0)
        num_bt = xp.sum(present_btk, axis=-1).astype(teacher_btk.dtype)
        return xp.maximum(xp.log(num_bt) + xp.sum(xp.exp(logp_btk) * logp_btk, axis=-1), 0.0)
    if student_logp_btk is None:
        raise ValueError(
            "margin kind 'advantage_variance' needs student_logp_btk, the student's log-probs of "
            "its candidates; pass them, or set --config.margin.kind=top1_top2"
        )
    return advantage_variance(
        teacher_logp_btk / temperature, student_logp_btk / temperature, present_btk
    )


def advantage_variance(
    teacher_logp_btk: Array, student_logp_btk: Array, present_btk: Array | None = None
) -> Array:
    """Var_{a ~ p_S}(A_t(a)) on the candidates, A_t(a) = log p_T(a) - log p_S(a). Eq. (6).

    The student is renormalised on its candidates. This variance, not the sampled token's advantage,
    bounds the expected local update.

    Args:
      teacher_logp_btk, student_logp_btk: float[..., K], nats.
      present_btk: bool[..., K], True = the slot holds a candidate. None = all do.

    Returns:
      float[...], nats squared, >= 0.
    """
    xp = teacher_logp_btk.__array_namespace__()
    if present_btk is None:
        present_btk = xp.ones_like(teacher_logp_btk, dtype=bool)
    student_btk = xp.where(present_btk, student_logp_btk, -np.inf)
    p_btk = xp.exp(student_btk - _logsumexp(student_btk))
    advantage_btk = xp.where(present_btk, teacher_logp_btk - student_logp_btk, 0.0)
    mean_bt = xp.sum(p_btk * advantage_btk, axis=-1, keepdims=True)
    return xp.sum(p_btk * (advantage_btk - mean_bt) ** 2, axis=-1)


def with_sampled(
    teacher_logp_btk: Array,
    student_logp_btk: Array | None,
    candidates_btk: Array,
    sampled: tuple[Array, Array, Array],
) -> tuple[Array, Array | None, Array]:
    """Adds the sampled token as candidate K + 1 where the student's top K does not hold it.

    Args:
      teacher_logp_btk, student_logp_btk: float[..., K], nats; student_logp_btk may be None.
      candidates_btk: int[..., K], the candidates' token ids.
      sampled: (token_bt int[...], teacher_logp_bt float[...], student_logp_bt float[...]).

    Returns:
      (teacher_logp, student_logp, present), each [..., K + 1]; present is False where the sampled
      token was a candidate already, so that it never counts twice.
    """
    token_bt, teacher_logp_bt, student_logp_bt = sampled
    xp = teacher_logp_btk.__array_namespace__()
    known_btk = candidates_btk == token_bt[..., None]
    present_btk = xp.concatenate(
        [xp.ones_like(known_btk), ~xp.any(known_btk, axis=-1, keepdims=True)], axis=-1
    )
    teacher_btk = xp.concatenate([teacher_logp_btk, teacher_logp_bt[..., None]], axis=-1)
    if student_logp_btk is not None:
        student_logp_btk = xp.concatenate([student_logp_btk, student_logp_bt[..., None]], axis=-1)
    return teacher_btk, student_logp_btk, present_btk


def check_num_candidates(logp_btk: Array) -> None:
    """Raises ValueError unless the last axis holds at least two candidates."""
    num = logp_btk.shape[-1] if logp_btk.ndim else 0
    if num < 2:
        raise ValueError(
            f"a margin over K={num} candidates is undefined: it compares the teacher's best with "
            "its second best, so K must be at least 2. Set --config.rollout.num_candidates=4"
        )


def _logsumexp(x_btk: Array) -> Array:
    """log sum exp over the last axis, kept; safe for -inf entries as long as one is finite."""
    xp = x_btk.__array_namespace__()
    top_bt1 = xp.max(x_btk, axis=-1, keepdims=True)
    return top_bt1 + xp.log(xp.sum(xp.exp(x_btk - top_bt1), axis=-1, keepdims=True))
