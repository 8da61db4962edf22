# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollouts import (
    assert_close,
    full_length_logits,
    make_rollout,
    mesh_of,
    params_of,
    tiny_config,
)

from opd_jax import parallel
from opd_jax.model import qwen3
from opd_jax.stages import packing, score

pytestmark = pytest.mark.usefixtures("quick_compile")

TEACHER = tiny_config(hidden_size=48, num_layers=1, tie_embeddings=False)
REFERENCE = tiny_config(num_layers=1)
EVERYTHING = {
    "teacher_logp_bt",
    "teacher_logp_btk",
    "teacher_entropy_bt",
    "teacher_ids_btk",
    "teacher_ids_logp_btk",
    "teacher_hidden_btd",
    "reference_logp_bt",
}


def build(needs, mesh=None, rows=2, tokens=20, unroll=0, **knobs):
    mesh = mesh or mesh_of()
    return score.build(
        TEACHER,
        needs,
        packing.MicroBatch(rows, tokens, chunk=6),
        reference=REFERENCE,
        backend=qwen3.Backend(shard=parallel.shard_activations(mesh), unroll=unroll),
        mesh=mesh,
        num_top=4,
        **knobs,
    )


@pytest.fixture(scope="module")
def everything():
    return build(EVERYTHING)


def full_length_scores(rollout, params, config):
    """Log-probs as one writes them first, f32[B, T, V]: one row per line, no chunk."""
    return np.asarray(jax.nn.log_softmax(full_length_logits(config, params, rollout)))


def assert_valid_close(actual, expected, valid_bt):
    assert_close(actual[valid_bt], expected[valid_bt])
    np.testing.assert_array_equal(actual[~valid_bt], 0)


def test_every_score_is_that_of_the_full_length_pass(everything):
    rollout, params, other = make_rollout(), params_of(TEACHER), params_of(REFERENCE, 1)
    scores = everything(params, rollout, other)
    logp_btv = full_length_scores(rollout, params, TEACHER)
    valid_bt = rollout.valid_bt

    def pick(logp_btv, ids_btk):
        return np.take_along_axis(logp_btv, ids_btk, axis=-1)

    token_bt1 = rollout.tokens_bt[..., None]
    assert_valid_close(scores.teacher_logp_bt, pick(logp_btv, token_bt1)[..., 0], valid_bt)
    expected = pick(logp_btv, rollout.candidates_btk)
    assert_valid_close(scores.teacher_logp_btk, expected, valid_bt)
    entropy_bt = -(np.exp(logp_btv) * logp_btv).sum(-1)
    assert_valid_close(scores.teacher_entropy_bt, entropy_bt, valid_bt)
    best_btk = np.argsort(-logp_btv, axis=-1)[..., :4]
    np.testing.assert_array_equal(scores.teacher_ids_btk[valid_bt], best_btk[valid_bt])
    assert_valid_close(scores.teacher_ids_logp_btk, pick(logp_btv, best_btk), valid_bt)
    reference_btv = full_length_scores(rollout, other, REFERENCE)
    expected = pick(reference_btv, token_bt1)[..., 0]
    assert_valid_close(scores.reference_logp_bt, expected, valid_bt)
    # The hidden states give the same log-probs through the head.
    logits_btv = jnp.einsum("btd,vd->btv", scores.teacher_hidden_btd, params["head"])
    again_btv = np.asarray(jax.nn.log_softmax(logits_btv))
    assert_close(again_btv[valid_bt], logp_btv[valid_bt])


def test_only_what_is_asked_for_comes_back():
    scores = build({"teacher_logp_btk", "spans"})(params_of(TEACHER), make_rollout())
    present = {name for name, value in vars(scores).items() if value is not None}
    assert present == {"teacher_logp_btk"}


def test_values_that_are_not_finite_pass_through(everything):
    rollout, other = make_rollout(), params_of(REFERENCE, 1)
    params = jax.tree.map(np.copy, params_of(TEACHER))
    planted = rollout.tokens_bt[0, 3]
    params["embed"][planted] = np.nan  # read by every row that holds this token
    scores = everything(params, rollout, other)
    P = rollout.prompt_bp.shape[1]
    tokens_bl = np.concatenate([rollout.prompt_bp, rollout.tokens_bt], axis=1)
    real_bl = np.concatenate([rollout.prompt_valid_bp, rollout.valid_bt], axis=1)
    after_bl = np.cumsum((tokens_bl == planted) & real_bl, axis=1) > 0
    bad_bt = after_bl[:, P - 1 : -1] & rollout.valid_bt  # the token before t, or any earlier one
    assert bad_bt.any()
    # What shares a line with them may be lost as well (attention weighs it with 0 * NaN).
    nan_bt = np.isnan(scores.teacher_logp_bt)
    assert nan_bt[bad_bt].all() and not nan_bt[rollout.valid_bt].all()
    assert not nan_bt[~rollout.valid_bt].any()
    np.testing.assert_array_equal(np.isnan(scores.teacher_logp_btk).all(-1), nan_bt)


def test_ids_beyond_the_students_vocabulary_get_no_probability():
    rollout = make_rollout()
    stage = build({"teacher_entropy_bt", "teacher_ids_btk"}, vocab_size=40)
    scores = stage(params_of(TEACHER), rollout)
    assert scores.teacher_ids_btk.max() < 40
    logits_btv = full_length_logits(TEACHER, params_of(TEACHER), rollout)[..., :40]
    logp_btv = np.asarray(jax.nn.log_softmax(logits_btv))
    entropy_bt = -(np.exp(logp_btv) * logp_btv).sum(-1)
    assert_valid_close(scores.teacher_entropy_bt, entropy_bt, rollout.valid_bt)


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [0, 8])
@pytest.mark.parametrize("mesh", [dict(fsdp=8), dict(fsdp=2, tensor=2, expert=2), dict(data=4)])
def test_scores_do_not_depend_on_the_mesh(everything, mesh, unroll):
    rollout, params, other = make_rollout(), params_of(TEACHER), params_of(REFERENCE, 1)
    expected = everything(params, rollout, other)
    mesh = mesh_of(**mesh)
    stage = build(EVERYTHING, mesh, rows=8, unroll=unroll)
    frozen = [
        qwen3.unstack_layers(
            config,
            jax.device_put(p, parallel.shardings(qwen3.param_axes(config), mesh)),
            stage.backend,
        )
        for p, config in ((params, TEACHER), (other, REFERENCE))
    ]
    scores = stage(frozen[0], rollout, frozen[1])
    assert_close(vars(scores), vars(expected))
