# SPDX-License-Identifier: Apache-2.0
"""Heads of one tokenizer that are padded to different numbers of rows."""

import functools

import jax
import numpy as np
import optax
import pytest
from rollouts import make_rollout, mesh_of, params_of, tiny_config

from opd_jax import parallel, structs
from opd_jax.algorithm.head import head_loss_and_grads
from opd_jax.algorithm.objective import Objective, Targets
from opd_jax.model import qwen3
from opd_jax.stages import packing, update

pytestmark = pytest.mark.usefixtures("quick_compile")

M, N, D, E, V = 2, 5, 8, 6, 53
KINDS = [
    Objective("reverse_kl"),
    Objective("forward_kl"),
    Objective("jsd", beta=0.3),
]


@functools.cache
def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray, Targets]:
    """Hidden states, heads of exactly V rows, and targets."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    targets = Targets(
        token=rng.integers(0, V, (M, N)).astype(np.int32),
        weight=rng.random((M, N)).astype(np.float32) + 0.5,
        teacher_hidden_d=normal(M, N, E),
    )
    return normal(M, N, D), normal(V, D), normal(V, E), targets


def padded(head: np.ndarray, rows: int) -> np.ndarray:
    """Rows that no token has, large: they would take most of the mass if they were read."""
    return np.concatenate([head, np.full((rows - len(head), head.shape[1]), 9.0, np.float32)])


@functools.cache
def loss_and_grads(objective: Objective, student_rows: int, teacher_rows: int):
    hidden, student, teacher, targets = problem()
    student, teacher = padded(student, student_rows), padded(teacher, teacher_rows)
    sums, *gradients = jax.jit(
        lambda *arrays: head_loss_and_grads(objective, *arrays, chunk=4, vocab_size=V)
    )(hidden, student, targets, np.array([N, 3], np.int32), teacher)
    return sums, *gradients


@pytest.mark.parametrize("objective", KINDS, ids=lambda o: o.kind)
@pytest.mark.parametrize("rows", [(V, 64), (64, V), (60, 64), (V + 1, V), (V, V + 1), (64, 64)])
def test_padding_that_differs_gives_what_no_padding_gives(objective, rows):
    student_rows, _ = rows
    sums, d_hidden, d_head = loss_and_grads(objective, *rows)
    expected, d_hidden_exact, d_head_exact = loss_and_grads(objective, V, V)
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(d_hidden, d_hidden_exact, rtol=1e-5, atol=1e-6)
    assert d_head.shape == (student_rows, D)
    np.testing.assert_allclose(d_head[:V], d_head_exact, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(d_head[V:], 0.0)


@pytest.mark.parametrize("rows", [(64, 52), (52, 64)])
def test_a_head_that_lacks_tokens_is_refused(rows):
    hidden, student, teacher, targets = problem()
    student, teacher = (
        padded(head, 64)[:size] for head, size in zip((student, teacher), rows, strict=True)
    )
    with pytest.raises(ValueError, match="of which 53 must stand.*kind=sampled_pg"):
        head_loss_and_grads(
            KINDS[0], hidden, student, targets, np.full(M, N), teacher, vocab_size=V
        )


@pytest.mark.parametrize(
    ("mesh", "rows"),
    [
        pytest.param({}, (64, 72), id="one"),
        pytest.param(dict(fsdp=2, tensor=2), (72, 64), id="2x2", marks=pytest.mark.slow),
    ],
)
def test_an_update_takes_heads_that_are_padded_differently(mesh, rows):
    """Through the whole stage, on a mesh that divides the heads' rows too."""
    rollout, rng = make_rollout(), np.random.default_rng(1)
    hidden = rng.normal(size=(*rollout.tokens_bt.shape, E)).astype(np.float32)
    weight = rollout.valid_bt.astype(np.float32)
    teacher = rng.normal(size=(64, E)).astype(np.float32)

    def gradient(student_rows, teacher_rows):
        config = tiny_config(vocab_size=student_rows, tie_embeddings=False)
        params = params_of(tiny_config(tie_embeddings=False))
        params = params | {name: padded(params[name], student_rows) for name in ("embed", "head")}
        stage = update.build(
            config,
            Objective("reverse_kl"),
            optax.trace(decay=0.9),  # its first state is the gradient
            packing.MicroBatch(rows=2, tokens=20, chunk=8),
            backend=qwen3.Backend(shard=parallel.shard_activations(mesh_of(**mesh))),
            mesh=mesh_of(**mesh),
            vocab_size=64,
        )
        state = stage.init(jax.device_put(params, stage.shardings.params))
        scores = structs.Scores(teacher_hidden_btd=hidden)
        head = jax.device_put(padded(teacher, teacher_rows))
        state, _ = stage(state, rollout, scores, weight, 5.0, head)
        return jax.tree.map(np.asarray, state.opt_state.trace)

    found, expected = gradient(*rows), gradient(64, 64)
    np.testing.assert_array_equal(found["head"][64:], 0.0)
    for name in ("embed", "head"):
        found[name] = found[name][:64]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
    )
