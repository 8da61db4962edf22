# SPDX-License-Identifier: Apache-2.0
"""Every objective's value and gradient against the loops of oracle.py."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from opd_jax.algorithm import divergences
from opd_jax.algorithm.objective import TAILS, Objective, Targets, check_sizes, token_loss

V, K = 7, 3
DIVERGENCES = [
    dict(kind=kind, support=support, tail=tail)
    for kind, support, tail in itertools.product(
        ("reverse_kl", "forward_kl", "jsd"),
        ("student_k", "teacher_k", "union"),
        TAILS,
    )
] + [dict(kind=kind) for kind in ("reverse_kl", "forward_kl", "jsd")]
FIXED = [
    dict(kind="reverse_kl", support=support, tail=tail, stop_gradient=True)
    for support, tail in itertools.product(("student_k", "union"), TAILS)
]
SAMPLED = [
    dict(kind="sampled_pg"),
    dict(kind="sampled_pg", extrapolation=1.25),
    dict(kind="sampled_pg", advantage_clip=0.5, advantage_floor=-0.3),
    dict(kind="sampled_pg", is_threshold=1.5),
]


def name(knobs):
    return "-".join(str(v) for v in knobs.values())


def logits(seed=0):
    """Student and teacher logits [n, V]: plain, one-hot student, one-hot teacher, tiny tails."""
    student, teacher = 2 * np.random.default_rng(seed).normal(size=(2, 4, V))
    student[1, 2] += 30.0
    teacher[2, 4] += 12.0
    student[3, :4] -= 25.0
    return student, teacher


def targets_of(student, teacher, dtype, num=K, seed=0):
    """`Targets` that a score stage would deliver, and the ids as lists."""
    rng = np.random.default_rng(seed)
    logp, logq = (
        np.array([oracle.log_softmax(list(row)) for row in x]) for x in (student, teacher)
    )
    ids, own = (np.argsort(-x, axis=-1)[:, :num] for x in (student, teacher))
    token = rng.integers(0, student.shape[1], len(student))
    at = np.arange(len(student))
    made = Targets(
        token=token.astype(np.int32),
        teacher_logp=logq[at, token],
        sampler_logp=logp[at, token] + rng.normal(size=len(at)),
        reference_logp=logq[at, token] + rng.normal(size=len(at)),
        candidates_k=ids.astype(np.int32),
        teacher_logp_k=np.take_along_axis(logq, ids, -1),
        teacher_ids_k=own.astype(np.int32),
        teacher_ids_logp_k=np.take_along_axis(logq, own, -1),
    )
    return jax.tree.map(lambda x: x.astype(dtype) if x.dtype == np.float64 else x, made)


def run(objective, student, teacher, targets, dtype):
    """loss_n and its gradient [n, V] from the code under test."""

    def total(z):
        loss_n, aux = token_loss(objective, z, targets, jnp.array(teacher, dtype))
        return jnp.sum(loss_n), loss_n

    (_, loss_n), d_logits = jax.value_and_grad(total, has_aux=True)(jnp.array(student, dtype))
    assert loss_n.dtype == dtype
    return loss_n, d_logits


def support_ids(objective, targets, n):
    student, teacher = list(targets.candidates_k[n]), list(targets.teacher_ids_k[n])
    return {
        "student_k": student,
        "teacher_k": teacher,
        "union": student + [i for i in teacher if i not in student],
        "full": list(range(V)),
    }[objective.support]


def expected(objective, student, teacher, targets):
    """loss_n and gradient from the loops."""
    losses, gradients = [], []
    for n in range(len(student)):
        z, tz = list(student[n]), list(teacher[n])
        ids = [int(i) for i in support_ids(objective, targets, n)]
        tail = "truncate" if objective.support == "full" else objective.tail

        def loss(z, tz=tz, ids=ids, tail=tail):
            return oracle.support_loss(objective.kind, z, tz, ids, tail, objective.beta)

        losses.append(loss(z))
        if objective.stop_gradient:
            gradients.append(oracle.fixed_advantage_gradient(z, tz, ids, tail))
        else:
            gradients.append(oracle.numerical_gradient(loss, z))
    return np.array(losses), np.array(gradients)


def expected_sampled(o, student, targets):
    losses, gradients = [], []
    for n, token in enumerate(targets.token):
        logp = oracle.log_softmax(list(student[n]))[token]
        advantage = oracle.sampled_advantage(
            logp,
            float(targets.teacher_logp[n]),
            float(targets.reference_logp[n]),
            o.extrapolation,
            o.advantage_floor,
            o.advantage_clip,
        )
        ratio = 1.0
        if o.is_threshold:
            ratio = min(np.exp(logp - float(targets.sampler_logp[n])), o.is_threshold)
        loss, gradient = oracle.sampled_pg(list(student[n]), token, advantage, ratio)
        losses.append(loss)
        gradients.append(gradient)
    return np.array(losses), np.array(gradients)


def assert_close(actual, wanted, tolerance):
    """Within `tolerance` of the wanted array's largest magnitude."""
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("knobs", DIVERGENCES + FIXED, ids=name)
def test_divergences_equal_the_loops(knobs):
    objective = Objective(**knobs)
    student, teacher = logits()
    targets = targets_of(student, teacher, np.float64)
    losses, gradients = expected(objective, student, teacher, targets)
    with jax.enable_x64(True):
        loss_n, d_logits = run(objective, student, teacher, targets, np.float64)
        assert_close(loss_n, losses, 1e-9)
        assert_close(d_logits, gradients, 1e-7)
    targets = targets_of(student, teacher, np.float32)
    loss_n, d_logits = run(objective, student, teacher, targets, np.float32)
    assert_close(loss_n, losses, 1e-5)
    assert_close(d_logits, gradients, 1e-5)


@pytest.mark.parametrize("knobs", SAMPLED, ids=name)
def test_the_sampled_token_objective_equals_the_loops(knobs):
    objective = Objective(**knobs)
    student, teacher = logits()
    targets = targets_of(student, teacher, np.float64)
    losses, gradients = expected_sampled(objective, student, targets)
    with jax.enable_x64(True):
        loss_n, d_logits = run(objective, student, teacher, targets, np.float64)
        assert_close(loss_n, losses, 1e-12)
        assert_close(d_logits, gradients, 1e-12)
    targets = targets_of(student, teacher, np.float32)
    loss_n, d_logits = run(objective, student, teacher, targets, np.float32)
    assert_close(loss_n, losses, 1e-5)
    assert_close(d_logits, gradients, 1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.9, 1.0])
def test_jsd_at_other_betas(beta):
    objective = Objective("jsd", beta=beta)
    student, teacher = logits(1)
    targets = targets_of(student, teacher, np.float64)
    losses, gradients = expected(objective, student, teacher, targets)
    with jax.enable_x64(True):
        loss_n, d_logits = run(objective, student, teacher, targets, np.float64)
        assert_close(loss_n, losses, 1e-9)
        assert_close(d_logits, gradients, 1e-7)


@pytest.mark.parametrize("support", ["student_k", "teacher_k", "union"])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_a_support_of_the_whole_vocabulary_is_the_full_divergence(kind, support):
    student, teacher = logits(2)
    full = Objective(kind)
    with jax.enable_x64(True):
        targets = targets_of(student, teacher, np.float64, num=V)
        wanted = run(full, student, teacher, targets, np.float64)
        for tail in TAILS:
            top_k = {} if support == "student_k" else dict(top_k=V)
            objective = Objective(kind, support=support, tail=tail, **top_k)
            actual = run(objective, student, teacher, targets, np.float64)
            assert_close(actual[0], wanted[0], 1e-9)
            assert_close(actual[1], wanted[1], 1e-9)


@pytest.mark.parametrize("knobs", DIVERGENCES + FIXED + SAMPLED, ids=name)
def test_equal_models_have_zero_loss_and_zero_gradient(knobs):
    objective = Objective(**knobs)
    student, _ = logits(3)
    targets = targets_of(student, student, np.float32)
    loss_n, d_logits = run(objective, student, student, targets, np.float32)
    # The exceptions, whose docstrings say why: ExOPD with lambda other than 1, and both KLs on a
    # truncated support without fixed advantages.
    if objective.extrapolation != 1.0:
        assert np.abs(d_logits).max() > 1e-2
        return
    np.testing.assert_allclose(loss_n, 0.0, atol=1e-5)
    truncated = objective.tail == "truncate" and objective.support != "full"
    if truncated and objective.kind != "jsd" and not objective.stop_gradient:
        assert np.abs(d_logits).max() > 1e-6
    else:
        np.testing.assert_allclose(d_logits, 0.0, atol=1e-6)


@pytest.mark.parametrize(
    "knobs",
    [dict(kind="sampled_pg"), dict(kind="jsd"), dict(kind="reverse_kl", support="union")],
    ids=name,
)
def test_permuting_the_vocabulary_changes_nothing(knobs):
    objective = Objective(**knobs)
    student, teacher = logits(4)
    order = np.random.default_rng(0).permutation(V)  # column v moves from order[v]
    place = np.argsort(order).astype(np.int32)
    targets = targets_of(student, teacher, np.float32)
    moved = targets.replace(
        token=place[targets.token],
        candidates_k=place[targets.candidates_k],
        teacher_ids_k=place[targets.teacher_ids_k],
    )
    one = run(objective, student, teacher, targets, np.float32)
    other = run(objective, student[:, order], teacher[:, order], moved, np.float32)
    np.testing.assert_allclose(other[0], one[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(other[1], one[1][:, order], rtol=1e-5, atol=1e-6)


def test_no_gradient_reaches_the_teacher_or_the_targets():
    student, teacher = logits()
    targets = targets_of(student, teacher, np.float32)
    floats = {
        field.name: getattr(targets, field.name)
        for field in dataclasses.fields(targets)
        if getattr(getattr(targets, field.name), "dtype", None) == np.float32
    }
    for knobs in (dict(kind="sampled_pg", is_threshold=2.0), dict(kind="jsd"), DIVERGENCES[0]):
        objective = Objective(**knobs)

        def total(floats, teacher, objective=objective):
            made = targets.replace(**floats)
            return jnp.sum(token_loss(objective, jnp.array(student), made, teacher)[0])

        gradients = jax.grad(total, argnums=(0, 1))(floats, jnp.array(teacher, jnp.float32))
        assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(gradients))


def test_the_mean_sampled_gradient_is_reverse_kls():
    # E over y ~ p of the policy gradient, summed exactly over the vocabulary.
    student, teacher = logits(5)
    z, tz = student[:1], teacher[:1]
    p, logq = oracle.softmax(list(z[0])), oracle.log_softmax(list(tz[0]))
    mean = np.zeros(V)
    with jax.enable_x64(True):
        for token in range(V):
            targets = Targets(
                token=np.array([token], np.int32), teacher_logp=np.array([logq[token]])
            )
            _, d = run(Objective("sampled_pg"), z, tz, targets, np.float64)
            mean += p[token] * np.asarray(d[0])
    gradient = oracle.numerical_gradient(
        lambda z: oracle.kl(oracle.softmax(z), oracle.softmax(list(tz[0]))), list(z[0])
    )
    assert_close(mean, np.array(gradient), 1e-7)


# Student and teacher logits, and TRL 1.16's generalized_jsd_loss(reduction="none") summed over V.
TRL_STUDENT = [
    [0.002, 0.597, -0.548, -1.781, -0.909, -1.983],
    [0.12, 2.68, -0.984, -1.241, 0.98, 0.714],
    [0.211, -1.861, -0.059, 1.391, -2.688, -0.915],
]
TRL_TEACHER = [
    [-3.802, -2.579, -3.683, -0.47, -2.535, 0.543],
    [0.314, -0.374, -5.034, -1.077, -0.097, 0.227],
    [-3.06, -0.956, -1.957, -1.618, 2.122, -1.615],
]
TRL = {
    0.0: [2.29474875377, 0.786319735675, 3.91052543334],
    0.1: [0.180725299137, 0.0684896588077, 0.249364457921],
    0.5: [0.438379345899, 0.183398829565, 0.539166977507],
    0.9: [0.181814677813, 0.0711143452728, 0.221180090947],
    1.0: [2.31929358502, 0.825603861568, 2.91203852342],
}


@pytest.mark.parametrize("beta", TRL)
def test_jsd_and_both_kls_equal_trls_stored_values(beta):
    student, teacher = jnp.array(TRL_STUDENT), jnp.array(TRL_TEACHER)
    loss_n = divergences.full_divergence("jsd", beta, student, teacher)
    np.testing.assert_allclose(loss_n, TRL[beta], rtol=2e-6)
    if beta in (0.0, 1.0):
        kind = "reverse_kl" if beta else "forward_kl"
        loss_n = divergences.full_divergence(kind, 0.5, student, teacher)
        np.testing.assert_allclose(loss_n, TRL[beta], rtol=2e-6)


@pytest.mark.parity
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_jsd_equals_torch_written_as_trl_does(beta):
    """TRL itself if it is here, else its formula in torch's own kl_div, values and gradients."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    student, teacher = (3 * rng.normal(size=(5, 11)) for _ in range(2))
    z = torch.tensor(student, requires_grad=True)
    logp, logq = torch.log_softmax(z, -1), torch.log_softmax(torch.tensor(teacher), -1)

    def kl(a, b):  # KL(a || b), torch's argument order reversed
        return torch.nn.functional.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    if beta in (0.0, 1.0):
        loss = kl(logp, logq) if beta else kl(logq, logp)
    else:
        logs = torch.stack([logp + np.log1p(-beta), logq + np.log(beta)])
        mixed = torch.logsumexp(logs, 0)
        loss = beta * kl(logq, mixed) + (1 - beta) * kl(logp, mixed)
    loss.sum().backward()
    with jax.enable_x64(True):
        value, pull = jax.vjp(
            lambda z: divergences.full_divergence("jsd", beta, z, jnp.array(teacher)),
            jnp.array(student),
        )
        np.testing.assert_allclose(value, loss.detach().numpy(), rtol=1e-10)
        (d_logits,) = pull(jnp.ones_like(value))
        np.testing.assert_allclose(d_logits, z.grad.numpy(), rtol=1e-8, atol=1e-12)


def test_excluded_tokens_make_no_nan():
    student, teacher = (np.array(x) for x in logits())
    student[:, 5] = teacher[:, 5] = -np.inf
    for kind in divergences.KINDS:
        objective = Objective(kind)
        targets = targets_of(*logits(), np.float32)
        loss_n, d_logits = run(objective, student, teacher, targets, np.float32)
        assert np.all(np.isfinite(loss_n)) and np.all(np.isfinite(d_logits))
        np.testing.assert_array_equal(np.asarray(d_logits)[:, 5], 0.0)


def test_sizes_that_do_not_fit_the_vocabulary():
    with pytest.raises(ValueError, match="--config.objective.top_k=10"):
        objective = Objective("jsd", support="union", top_k=11)
        check_sizes(objective, num_candidates=4, vocab_size=10)


def test_targets_that_no_loss_can_be_taken_of():
    student, teacher = logits()
    targets = targets_of(student, teacher, np.float32)
    union = Objective("jsd", support="union")

    def loss(**changes):
        made = targets.replace(**changes)
        return token_loss(union, jnp.array(student, jnp.float32), made)

    with pytest.raises(ValueError, match="the same id twice.*support=union"):
        loss(candidates_k=np.zeros((4, K), np.int32))
    with pytest.raises(ValueError, match="outside the vocabulary of 7"):
        loss(teacher_ids_k=targets.teacher_ids_k + V)
    with pytest.raises(ValueError, match="teacher_logp_k, which is None"):
        loss(teacher_logp_k=None)
    bad = targets.teacher_logp_k.copy()
    bad[1, 0] = np.nan
    with pytest.raises(ValueError, match="not finite.*weight to 0"):
        loss(teacher_logp_k=bad)
    loss(teacher_logp_k=bad, weight=np.array([1.0, 0.0, 1.0, 1.0]))  # it does not count
    with pytest.raises(ValueError, match="teacher's logits"):
        token_loss(Objective("jsd"), jnp.array(student), targets)
