# SPDX-License-Identifier: Apache-2.0
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_jax.algorithm.objective import Objective
from opd_jax.algorithm.weights import loss_weights


def random_masks(seed, soft=0.0):
    rng = np.random.default_rng(seed)
    valid = np.arange(9) < rng.integers(0, 10, 4)[:, None]
    supervised = valid & (np.arange(9) < rng.integers(0, 10, 4)[:, None])
    weight = np.where(supervised, 1.0, soft) * valid
    return valid, supervised, weight, rng.normal(size=(4, 9))


@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([0.0, 0.5]))
def test_the_default_loss_equals_the_loops(seed, rescale, soft):
    valid, supervised, weight, loss = random_masks(seed, soft)
    objective = Objective(rescale="sequence" if rescale else "none")
    final, denominator, _ = loss_weights(supervised, weight, valid, objective)
    taught = supervised.any(axis=1)
    assert denominator == taught.sum()
    if not taught.any():
        assert not final.any()
        return
    q = [
        list(row) if is_taught else [0.0] * 9 for row, is_taught in zip(weight, taught, strict=True)
    ]
    wanted = oracle.batch_loss(loss.tolist(), valid.tolist(), q, rescale)
    assert np.sum(final * loss) / denominator == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@given(st.integers(0, 10**6))
def test_the_default_is_the_mean_of_row_means_over_supervised_tokens(seed):
    valid, supervised, weight, loss = random_masks(seed)
    final, denominator, _ = loss_weights(supervised, weight, valid)
    rows = [loss[b][supervised[b]].mean() for b in range(4) if supervised[b].any()]
    if rows:
        assert np.sum(final * loss) / denominator == pytest.approx(
            np.mean(rows), rel=1e-5, abs=1e-6
        )


def test_aggregates_and_rescaling_by_hand():
    valid = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
    supervised = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)

    def run(**knobs):
        return loss_weights(supervised, supervised * 1.0, valid, Objective(**knobs))

    for knobs, first, second, denominator, factors in (
        (dict(), 1, 1 / 2, 2, [4, 1, 1]),
        (dict(rescale="none"), 1 / 4, 1 / 2, 2, [1, 1, 1]),
        # 6 valid tokens, 3 supervised.
        (dict(rescale="batch"), 1 / 4 * 2, 1 / 2 * 2, 2, [2, 2, 1]),
        (dict(max_rescale=2.0), 1 / 4 * 2, 1 / 2, 2, [2, 1, 1]),
        (dict(aggregate="token_mean"), 4, 1, 6, [4, 1, 1]),
        # The mean of supervised tokens.
        (dict(aggregate="token_mean", rescale="batch"), 2, 2, 6, [2, 2, 1]),
        (dict(aggregate="token_mean", rescale="none"), 1, 1, 6, [1, 1, 1]),
    ):
        weight, total, factor = run(**knobs)
        np.testing.assert_allclose(factor, factors)
        np.testing.assert_allclose(weight[0, 0], first)
        np.testing.assert_allclose(weight[1, 0], second)
        assert total == denominator and not weight[2].any() and not weight[0, 1:].any()


def test_batch_rescaling_counts_the_rows_of_all_hosts():
    valid, supervised, weight, _ = random_masks(11)
    batch, handed = Objective(rescale="batch"), []
    whole = loss_weights(supervised, weight, valid, batch)[0]
    loss_weights(supervised, weight, valid, batch, lambda x: handed.append(x) or x)
    half = loss_weights(supervised[:2], weight[:2], valid[:2], batch, gather=lambda x: handed[0])[0]
    np.testing.assert_array_equal(half, whole[:2])


def test_position_weights_leave_the_rescaling_alone():
    valid = supervised = np.ones((1, 4), bool)
    weight, denominator, factor = loss_weights(supervised, np.full((1, 4), 1.5), valid)
    np.testing.assert_allclose(weight, 1.5 / 4)
    assert denominator == factor == 1
