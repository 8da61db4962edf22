# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_jax.algorithm import margin


def random_logp(shape, K, seed=0, V=9):
    """Log-probs of K of V tokens: they do not sum to one."""
    rng = np.random.default_rng(seed)
    return np.log(rng.dirichlet(np.full(V, 0.5), size=shape)[..., :K] + 1e-9)


ORACLES = {
    "top1_top2": lambda teacher_k, student_k: oracle.margin_top1_top2(teacher_k),
    "top1_mean": lambda teacher_k, student_k: oracle.margin_top1_mean(teacher_k),
    "entropy": lambda teacher_k, student_k: oracle.margin_entropy(teacher_k),
    "advantage_variance": oracle.advantage_variance,
}


@pytest.mark.parametrize("kind", margin.KINDS)
@pytest.mark.parametrize("K", [2, 4])
def test_every_kind_equals_its_loop(kind, K):
    teacher, student = random_logp((5, 7), K), random_logp((5, 7), K, seed=1)
    expected = [
        [ORACLES[kind](list(t), list(s)) for t, s in zip(*rows, strict=True)]
        for rows in zip(teacher, student, strict=True)
    ]
    np.testing.assert_allclose(
        margin.margin(margin.Settings(kind), teacher, student), expected, rtol=1e-9
    )
    device = jax.jit(functools.partial(margin.margin, margin.Settings(kind)))
    actual = device(jnp.array(teacher, jnp.float32), jnp.array(student, jnp.float32))
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_margin_is_best_minus_second_best_in_any_order():
    logp = np.array([[-3.0, -0.5, -2.0, -9.0], [-1.0, -1.0, -5.0, -2.0]])
    np.testing.assert_array_equal(margin.teacher_margin(logp), [1.5, 0.0])
    np.testing.assert_array_equal(margin.teacher_margin(logp[:, ::-1]), [1.5, 0.0])
    excluded = np.array([-0.5, -np.inf, -2.0])
    assert margin.teacher_margin(excluded) == 1.5


@given(st.integers(0, 10**6), st.floats(-50, 50), st.sampled_from(margin.KINDS))
def test_a_constant_on_all_teacher_values_changes_no_margin(seed, constant, kind):
    teacher, student = random_logp((3,), 4, seed), random_logp((3,), 4, seed + 1)
    one = margin.margin(margin.Settings(kind), teacher, student)
    np.testing.assert_allclose(
        margin.margin(margin.Settings(kind), teacher + constant, student), one, atol=1e-9
    )
    assert np.all(one >= 0)


@given(st.integers(0, 10**6), st.permutations(range(4)), st.sampled_from(margin.KINDS))
def test_the_order_of_candidates_changes_nothing(seed, order, kind):
    teacher, student = random_logp((3,), 4, seed), random_logp((3,), 4, seed + 1)
    one = margin.margin(margin.Settings(kind), teacher, student)
    other = margin.margin(margin.Settings(kind), teacher[:, order], student[:, order])
    np.testing.assert_allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("kind", margin.KINDS)
def test_the_sampled_token_joins_once_and_only_if_it_is_no_candidate(kind):
    teacher, student = random_logp((2,), 5), random_logp((2,), 5, seed=1)
    ids = np.array([[7, 3, 1, 0], [7, 3, 1, 0]])
    token = np.array([3, 8])  # row 0 sampled its second candidate, row 1 none of them
    sampled = (
        token,
        np.array([teacher[0, 1], teacher[1, 4]]),
        np.array([student[0, 1], student[1, 4]]),
    )
    t, s, present = margin.with_sampled(teacher[:, :4], student[:, :4], ids, sampled)
    np.testing.assert_array_equal(present[:, 4], [False, True])
    actual = margin.margin(margin.Settings(kind), t, s, present)
    expected = [
        ORACLES[kind](list(teacher[0, :4]), list(student[0, :4])),
        ORACLES[kind](list(teacher[1]), list(student[1])),
    ]
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_temperature_divides_both_models():
    teacher, student = random_logp((4,), 4), random_logp((4,), 4, seed=1)
    for kind in margin.KINDS:
        hot = margin.margin(margin.Settings(kind, temperature=2.0), teacher, student)
        np.testing.assert_allclose(
            hot, margin.margin(margin.Settings(kind), teacher / 2, student / 2), rtol=1e-12
        )


def test_two_equal_models_have_no_advantage_variance():
    logp = random_logp((6,), 4)
    np.testing.assert_allclose(margin.advantage_variance(logp, logp), 0.0, atol=1e-15)
    np.testing.assert_allclose(margin.advantage_variance(logp - 3.0, logp), 0.0, atol=1e-15)
