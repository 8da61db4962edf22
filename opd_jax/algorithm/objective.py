# SPDX-License-Identifier: Apache-2.0
"""The loss of one supervised token, its settings and what it reads. Eq. (4)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from opd_jax.algorithm import divergences
from opd_jax.settings import Section, choice, number

KINDS = ("sampled_pg", *divergences.KINDS, "cross_entropy")
SUPPORTS = ("full", "student_k", "teacher_k", "union")
TAILS = ("bin", "renormalise", "truncate")
AGGREGATES = ("row_mean", "token_mean")
RESCALES = ("sequence", "batch", "none")


@dataclasses.dataclass(frozen=True)
class Objective(Section):
    """What is minimised: the loss of a token, eq. (4), and how tokens are weighed, eq. (5).

    Hashable: a static argument of compiled functions.
    """

    section = "objective"

    kind: str = choice("sampled_pg", KINDS)
    support: str = choice("full", SUPPORTS)  # of divergences: all of V, or a top K, or their union
    tail: str = choice("bin", TAILS)  # of the supports other than full: divergences.py
    # Size of the teacher's support; the student's is config.rollout.num_candidates.
    top_k: int = number(16, least=2, why="a support of one token says nothing")
    beta: float = number(0.5, least=0, most=1, why="it mixes two distributions")  # of "jsd"
    stop_gradient: bool = False  # of "reverse_kl" on a support: fixed per-outcome advantages
    extrapolation: float = number(1.0)  # lambda of ExOPD; other than 1 needs a reference model
    advantage_clip: float = number(0.0, least=0)  # |A| is cut to this, nats; 0 = off (the paper)
    advantage_floor: float = number(0.0, most=0)  # A is raised to this, nats; 0 = off (the paper)
    is_threshold: float = number(0.0, least=0)  # cap of the ratio trainer / sampler; 0 = off
    # Of eq. (5), see weights.py. "row_mean" = mean over rows of row means; "token_mean" = over
    # tokens. The factor is per "sequence" (the paper), one for the "batch", or "none".
    aggregate: str = choice("row_mean", AGGREGATES)
    rescale: str = choice("sequence", RESCALES)
    max_rescale: float = number(0.0, least=0)  # upper limit of the factor; 0 = none (the paper)

    def __post_init__(self) -> None:
        super().__post_init__()
        sampled, partial = self.kind == "sampled_pg", self.support != "full"
        advantage = "kind sampled_pg, which has an advantage,"
        read_by = {
            "support": (self.is_divergence, f"a divergence ({', '.join(divergences.KINDS)})"),
            "tail": (partial, "a divergence on a support other than full"),
            "top_k": (self.support in ("teacher_k", "union"), "support teacher_k or union"),
            "beta": (self.kind == "jsd", "kind jsd"),
            "stop_gradient": (self.kind == "reverse_kl" and partial, "reverse_kl on a support"),
            "extrapolation": (sampled, advantage),
            "advantage_clip": (sampled, advantage),
            "advantage_floor": (sampled, advantage),
            "is_threshold": (sampled, advantage),
        }
        default = {field.name: field.default for field in dataclasses.fields(self)}
        for name, (is_read, reader) in read_by.items():
            given = f"kind={self.kind} and support={self.support}"
            must = f"{default[name]!r} with {given}: only {reader} reads it"
            ok = is_read or getattr(self, name) == default[name]
            self.require(ok, name, must, default[name])
        must = "0 (no limit) or at least 1: rescaling only ever raises a weight"
        self.require(self.max_rescale == 0 or self.max_rescale >= 1, "max_rescale", must, 0.0)

    @property
    def is_divergence(self) -> bool:
        """True = it compares distributions, not only what both say of the sampled token."""
        return self.kind in divergences.KINDS

    @property
    def needs(self) -> frozenset[str]:
        """The fields of structs.Scores that the objective reads."""
        if self.kind == "sampled_pg":
            reference = {"reference_logp_bt"} if self.extrapolation != 1.0 else set()
            return frozenset({"teacher_logp_bt"} | reference)
        if not self.is_divergence:
            return frozenset()
        return {
            "full": frozenset({"teacher_hidden_btd"}),
            "student_k": frozenset({"teacher_logp_btk"}),
            "teacher_k": frozenset({"teacher_ids_btk", "teacher_ids_logp_btk"}),
            "union": frozenset({"teacher_logp_btk", "teacher_ids_btk", "teacher_ids_logp_btk"}),
        }[self.support]


@struct.dataclass
class Targets:
    """What the loss of each token needs beside the student's logits. Unused fields are None.

    Leading dims are [..., N]. All are constants: no gradient reaches them. The score stage delivers
    teacher_ids_k as structs.Scores.teacher_ids_btk (`head.logprobs` with num_top).
    """

    token: Any  # int32[..., N], the sampled token
    weight: Any = None  # float32[..., N], final; 0 = nothing of this slot counts, whatever it holds
    teacher_logp: Any = None  # float32[..., N], nats, of the sampled token
    sampler_logp: Any = None  # float32[..., N], nats, of the distribution actually sampled
    reference_logp: Any = None  # float32[..., N], nats, of the sampled token, reference model
    candidates_k: Any = None  # int32[..., N, K], the student's top-K ids
    teacher_logp_k: Any = None  # float32[..., N, K], nats, the teacher's at candidates_k
    teacher_ids_k: Any = None  # int32[..., N, J], the teacher's own top-J ids
    teacher_ids_logp_k: Any = None  # float32[..., N, J], nats, the teacher's at teacher_ids_k
    teacher_hidden_d: Any = None  # compute dtype [..., N, D], teacher state that predicts the token


def check_models(objective: Objective, sampled_by: str, has_reference: bool) -> None:
    """Raises ValueError unless the loss is of samples of `sampled_by` ("student" or "teacher").

    And unless a reference model is there where the loss reads one.
    """
    meant = "teacher" if objective.kind == "cross_entropy" else "student"
    if sampled_by != meant:
        raise ValueError(
            f"config.rollout.by={sampled_by!r}, but objective {objective.kind!r} is of the "
            f"{meant}'s samples. Set --config.rollout.by={meant}, or another "
            "--config.objective.kind"
        )
    if "reference_logp_bt" in objective.needs and not has_reference:
        raise ValueError(
            f"config.objective.extrapolation={objective.extrapolation:g} measures from a reference "
            "model, and config.reference.path is empty. Set --config.reference.path to a model "
            "directory (as --config.reference.path=embedded:student), or "
            "--config.objective.extrapolation=1.0"
        )


def check_sizes(objective: Objective, num_candidates: int, vocab_size: int) -> None:
    """Raises ValueError unless the supports fit the vocabulary; call it before tracing."""
    if not 2 <= num_candidates <= vocab_size:
        raise ValueError(
            f"num_candidates K={num_candidates} must be from 2 to the vocabulary size "
            f"{vocab_size}: a margin needs two candidates. "
            f"Set --config.rollout.num_candidates={min(4, vocab_size)}"
        )
    if objective.support in ("teacher_k", "union"):
        must = f"at most the vocabulary size {vocab_size}"
        fits = objective.top_k <= vocab_size
        objective.require(fits, "top_k", must, min(16, vocab_size))


def token_loss(
    objective: Objective,
    student_logits_nv: jax.Array,
    targets_n: Targets,
    teacher_logits_nv: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    r"""Loss of each token, not yet weighted; differentiable in the student's logits alone.

    "sampled_pg", the paper's eq. (4), with A_t held constant:

    .. math::
      L_t = -A_t \log p_S(y_t), \quad A_t = \log p_T(y_t) - \log p_S(y_t)

    Its value is no divergence; its gradient is an unbiased estimate of reverse KL's. `_advantage`
    has the knobs of A_t.
    "cross_entropy": :math:`-\log p_S(y_t)`, supervised training on whatever was sampled.
    The others: `divergences.full_divergence` and `divergences.support_divergence`.

    Args:
      student_logits_nv: float32[n, V], temperature 1, padded columns at -1e30.
      targets_n: `Targets` with leading dims [n]; the weight is not applied.
      teacher_logits_nv: float32[n, V], for a divergence on support "full".

    Returns:
      loss_n: float32[n].
      aux: dict of float32[n] without gradient: "logp" (trainer log-prob of the sampled token) and,
        where the targets allow, "advantage" (log p_T - log p_S, before any knob), "sampler_gap"
        (log p_S - the sampler's), "ratio_cut" (1 = the importance ratio was truncated).

    Raises:
      ValueError: a target that the objective reads is None; on concrete arrays also candidates that
        repeat an id or leave the vocabulary, and targets that are not finite where weight is not 0.
    """
    check_targets(objective, targets_n, teacher_logits_nv)
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(targets_n)):
        check_values(targets_n, student_logits_nv.shape[-1])
    targets_n = jax.lax.stop_gradient(targets_n)
    logp_n = divergences.logp_at(student_logits_nv, targets_n.token[:, None])[:, 0]
    aux = {"logp": jax.lax.stop_gradient(logp_n)}
    if targets_n.teacher_logp is not None:
        aux["advantage"] = targets_n.teacher_logp - aux["logp"]
    if targets_n.sampler_logp is not None:
        aux["sampler_gap"] = aux["logp"] - targets_n.sampler_logp
    if objective.kind == "sampled_pg":
        advantage_n = _advantage(objective, targets_n, aux)
        return -advantage_n * logp_n, aux
    if not objective.is_divergence:
        return -logp_n, aux
    if objective.support == "full":
        teacher_nv = jax.lax.stop_gradient(teacher_logits_nv)
        loss_n = divergences.full_divergence(
            objective.kind, objective.beta, student_logits_nv, teacher_nv
        )
        return loss_n, aux
    ids_nk, teacher_logp_nk, present_nk = _support(objective, targets_n)
    if objective.tail == "bin":
        logp_nk, tail_n = divergences.logp_and_tail(student_logits_nv, ids_nk)
    else:
        logp_nk, tail_n = divergences.logp_at(student_logits_nv, ids_nk), None
    loss_n = divergences.support_divergence(
        objective.kind,
        objective.beta,
        objective.tail,
        logp_nk,
        teacher_logp_nk,
        present_nk,
        tail_n,
        objective.stop_gradient,
    )
    return loss_n, aux


def _advantage(objective: Objective, targets_n: Targets, aux: dict[str, jax.Array]) -> jax.Array:
    """A_t of the sampled tokens, float32[n], constant; not yet rescaled (eq. 5).

    With `extrapolation` lambda (ExOPD, arXiv 2602.12125)
    A_t = -[(log p_S - log p_ref) - lambda (log p_T - log p_ref)]. For lambda other than 1 a teacher
    equal to the student leaves (lambda - 1)(log p_S - log p_ref): to go beyond the teacher is its
    purpose. A_t is raised to the floor, then clipped, then multiplied by the truncated importance
    ratio min(p_S / p_sampler, is_threshold) if that is on.
    """
    advantage_n = objective.extrapolation * targets_n.teacher_logp - aux["logp"]
    if objective.extrapolation != 1.0:
        advantage_n -= (objective.extrapolation - 1.0) * targets_n.reference_logp
    if objective.advantage_floor:
        advantage_n = jnp.maximum(advantage_n, objective.advantage_floor)
    if objective.advantage_clip:
        clip = objective.advantage_clip
        advantage_n = jnp.clip(advantage_n, -clip, clip)
    if objective.is_threshold:
        log_limit = np.log(objective.is_threshold)
        aux["ratio_cut"] = (aux["sampler_gap"] > log_limit).astype(jnp.float32)
        advantage_n *= jnp.exp(jnp.minimum(aux["sampler_gap"], log_limit))
    return advantage_n


def _support(objective: Objective, targets_n: Targets) -> tuple[jax.Array, jax.Array, jax.Array]:
    """ids, teacher log-probs and present, each [n, K']: every id of the support counts once."""
    if objective.support == "student_k":
        ids_nk, logp_nk = targets_n.candidates_k, targets_n.teacher_logp_k
        return ids_nk, logp_nk, jnp.ones_like(ids_nk, dtype=bool)
    own_nj, own_logp_nj = targets_n.teacher_ids_k, targets_n.teacher_ids_logp_k
    if objective.support == "teacher_k":
        return own_nj, own_logp_nj, jnp.ones_like(own_nj, dtype=bool)
    ids_nk, logp_nk = targets_n.candidates_k, targets_n.teacher_logp_k
    new_nj = ~jnp.any(own_nj[:, :, None] == ids_nk[:, None, :], axis=-1)
    return (
        jnp.concatenate([ids_nk, own_nj], axis=-1),
        jnp.concatenate([logp_nk, own_logp_nj], axis=-1),
        jnp.concatenate([jnp.ones_like(ids_nk, dtype=bool), new_nj], axis=-1),
    )


_FIELD_OF_SCORE = {  # name in Objective.needs -> name in Targets
    "teacher_logp_bt": "teacher_logp",
    "teacher_logp_btk": "teacher_logp_k",
    "teacher_ids_btk": "teacher_ids_k",
    "teacher_ids_logp_btk": "teacher_ids_logp_k",
    "reference_logp_bt": "reference_logp",
}


def check_targets(
    objective: Objective, targets: Targets, teacher_logits: jax.Array | None = None
) -> None:
    """Raises ValueError naming the first target that the objective reads and that is None."""
    names = [_FIELD_OF_SCORE[need] for need in sorted(objective.needs) if need in _FIELD_OF_SCORE]
    names += ["candidates_k"] if "teacher_logp_k" in names else []
    names += ["sampler_logp"] if objective.is_threshold else []
    for name in names:
        if getattr(targets, name) is None:
            raise ValueError(
                f"objective {objective.kind!r} on support {objective.support!r} reads "
                f"Targets.{name}, which is None; have the score stage deliver "
                f"{', '.join(sorted(objective.needs))}"
            )
    if "teacher_hidden_btd" in objective.needs and teacher_logits is None:
        raise ValueError(
            f"objective {objective.kind!r} on support 'full' reads the teacher's logits, which are "
            "None; pass them (teacher hidden states and head in head_loss_and_grads), or set "
            "--config.objective.support=student_k"
        )


def check_values(targets: Targets, vocab_size: int) -> None:
    """Raises ValueError for targets that no loss can be taken of. Concrete arrays only.

    Inside a compiled step the same trouble is masked and counted (head.head_loss_and_grads).
    """
    used = np.array(True) if targets.weight is None else np.asarray(targets.weight) != 0
    for name in ("teacher_logp", "teacher_logp_k", "teacher_ids_logp_k", "reference_logp"):
        value = getattr(targets, name)
        if value is not None:
            finite = np.isfinite(np.asarray(value, np.float32))
            finite = finite.all(axis=-1) if name.endswith("_k") else finite
            if not np.all(finite | ~used):
                raise ValueError(
                    f"Targets.{name} holds values that are not finite on tokens that count; set "
                    "their weight to 0, as the selection stage does"
                )
    for ids_nk in (targets.candidates_k, targets.teacher_ids_k):
        if ids_nk is not None:
            check_candidates(ids_nk, vocab_size)


def check_candidates(ids_nk: np.ndarray | jax.Array, vocab_size: int) -> None:
    """Raises ValueError for candidates that repeat an id or leave the vocabulary; not under jit."""
    ids_nk = np.sort(np.asarray(ids_nk), axis=-1)
    if np.any(ids_nk[..., 1:] == ids_nk[..., :-1]):
        raise ValueError(
            "candidates hold the same id twice at one position, whose mass would count twice; they "
            "must be distinct, as top-K ids are. Set --config.objective.support=union to join the "
            "student's and the teacher's sets"
        )
    if ids_nk.size and (ids_nk.min() < 0 or ids_nk.max() >= vocab_size):
        raise ValueError(
            f"candidates run from {ids_nk.min()} to {ids_nk.max()}, outside the vocabulary of "
            f"{vocab_size}: mask padded vocabulary rows before taking the top K"
        )
