# SPDX-License-Identifier: Apache-2.0
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from rollouts import (
    assert_close,
    full_length_logits,
    make_rollout,
    mesh_of,
    params_of,
    tiny_config,
)

from opd_jax import parallel, structs
from opd_jax.algorithm.objective import Objective, Targets, token_loss
from opd_jax.model import qwen3
from opd_jax.stages import packing, update

pytestmark = pytest.mark.usefixtures("quick_compile")

SAMPLED = Objective("sampled_pg")
FULL = Objective("reverse_kl", support="full")
ON_CANDIDATES = Objective("forward_kl", support="student_k", tail="bin")
TEACHER_WIDTH = 16
SPARSE = dict(num_experts=4, num_experts_per_token=2, moe_intermediate_size=32)


@functools.lru_cache
def built(objective=SAMPLED, rows=2, tokens=20, mesh=None, optimizer=None, config=None, chunk=8):
    mesh = mesh or mesh_of()
    return update.build(
        config or tiny_config(),
        objective,
        optimizer or optax.trace(decay=0.9),  # whose first state is the gradient
        packing.MicroBatch(rows, tokens, chunk),
        backend=qwen3.Backend(shard=parallel.shard_activations(mesh)),
        mesh=mesh,
    )


@functools.lru_cache
def sgd():
    return optax.sgd(0.1)


@functools.lru_cache
def adam():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def make_scores(rollout, seed=1):
    rng = np.random.default_rng(seed)
    B, T, K = rollout.candidates_btk.shape
    logp = np.log(rng.dirichlet(np.ones(K + 1), (B, T))).astype(np.float32)
    return structs.Scores(
        teacher_logp_bt=np.log(rng.random((B, T))).astype(np.float32),
        teacher_logp_btk=logp[..., 1:],
        teacher_hidden_btd=rng.normal(size=(B, T, TEACHER_WIDTH)).astype(np.float32),
    )


def make_weights(rollout, seed=2):
    """Prefixes of different lengths, one row left out, one with a hole; unequal weights."""
    rng = np.random.default_rng(seed)
    B, T = rollout.tokens_bt.shape
    weight = rng.random((B, T)).astype(np.float32) + 0.5
    keep = np.arange(T) < rng.integers(1, T + 1, B)[:, None]
    keep[1] = False
    keep[0, 2] = False
    return np.where(rollout.valid_bt & keep, weight, 0).astype(np.float32)


def teacher_head():
    rng = np.random.default_rng(3)
    return jnp.asarray(rng.normal(size=(64, TEACHER_WIDTH)), jnp.float32)


def run(stage, rollout, scores, weight_bt, denominator, params=None, config=None):
    params = params_of(config or tiny_config()) if params is None else params
    state = stage.init(jax.device_put(params, stage.shardings.params))
    head = teacher_head() if stage.objective is FULL else None
    state, metrics = stage(state, rollout, scores, weight_bt, denominator, head)
    return state, {k: (float(s), float(n)) for k, (s, n) in jax.device_get(metrics).items()}


def masked_full_length(objective, rollout, scores, weight_bt, denominator, config):
    """(loss, gradients) as one writes them first: every token computed, the loss masked."""
    targets = Targets(
        token=rollout.tokens_bt,
        teacher_logp=scores.teacher_logp_bt,
        sampler_logp=rollout.sampler_logp_bt,
        candidates_k=rollout.candidates_btk,
        teacher_logp_k=scores.teacher_logp_btk,
    )
    teacher_btv = jnp.einsum("btd,vd->btv", scores.teacher_hidden_btd, teacher_head())

    def loss(params):
        logits_btv = full_length_logits(config, params, rollout)
        loss_bt, _ = jax.vmap(lambda *row: token_loss(objective, *row))(
            logits_btv, targets, teacher_btv
        )
        return jnp.sum(jnp.where(weight_bt != 0, weight_bt * loss_bt, 0.0)) / denominator

    return jax.jit(jax.value_and_grad(loss))(params_of(config))


@pytest.mark.parametrize(
    "objective, tie",
    [(SAMPLED, True), (FULL, False), (ON_CANDIDATES, True)],
    ids=["sampled-tied", "full-untied", "candidates-tied"],
)
def test_cropped_and_packed_gradients_equal_masked_full_length_ones(objective, tie):
    config = tiny_config(tie_embeddings=tie)
    rollout = make_rollout()
    scores, weight_bt = make_scores(rollout), make_weights(rollout)
    loss, grads = masked_full_length(objective, rollout, scores, weight_bt, 5.0, config)
    stage = built(objective, config=config)
    state, metrics = run(stage, rollout, scores, weight_bt, 5.0, config=config)
    total, count = metrics["loss"]
    assert count == 5.0
    np.testing.assert_allclose(total / count, loss, rtol=1e-5)
    assert_close(state.opt_state.trace, grads)
    np.testing.assert_allclose(metrics["grad_norm"][0], optax.tree.norm(grads), rtol=1e-5)
    # Fewer tokens than the rollout holds: what stands after the last weight is not computed.
    assert metrics["update/num_supervised"][0] == (weight_bt != 0).sum()
    seen = rollout.prompt_valid_bp.sum() + rollout.valid_bt.sum()
    assert metrics["update/num_tokens"][0] < seen


@pytest.mark.slow
def test_gradients_of_a_sparse_model_are_those_of_the_full_length_pass_too():
    config = tiny_config(**SPARSE)
    rollout = make_rollout()
    scores, weight_bt = make_scores(rollout), make_weights(rollout)
    _, grads = masked_full_length(SAMPLED, rollout, scores, weight_bt, 5.0, config)
    state, _ = run(built(config=config), rollout, scores, weight_bt, 5.0, config=config)
    assert_close(state.opt_state.trace, grads)


def test_the_layout_of_micro_batches_does_not_matter():
    rollout = make_rollout()
    scores, weight_bt = make_scores(rollout), make_weights(rollout)
    state, metrics = run(built(rows=2, tokens=20), rollout, scores, weight_bt, 5.0)
    # One row at a time: six micro-batches where the other layout needs fewer lines.
    other = built(rows=1, tokens=16, chunk=3)
    again, other_metrics = run(other, rollout, scores, weight_bt, 5.0)
    assert other_metrics["update/num_micro_batches"] > metrics["update/num_micro_batches"]
    assert_close(again.opt_state.trace, state.opt_state.trace)
    for name in ("loss", "sampler_gap/max", "update/token_loss", "update/num_supervised"):
        np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-5)


def test_rows_weigh_the_same_in_whichever_step_they_come():
    """Two half batches, each divided by the whole denominator, add up to the whole batch."""
    rollout = make_rollout()
    scores, weight_bt = make_scores(rollout), make_weights(rollout)
    stage = built()
    whole, _ = run(stage, rollout, scores, weight_bt, 5.0)
    first = np.where(np.arange(8)[:, None] < 3, weight_bt, 0)
    halves = [run(stage, rollout, scores, w, 5.0)[0] for w in (first, weight_bt - first)]
    total = jax.tree.map(lambda a, b: a + b, *(half.opt_state.trace for half in halves))
    assert_close(total, whole.opt_state.trace)


def test_metrics_are_means_over_supervised_tokens():
    rollout = make_rollout()
    scores, weight_bt = make_scores(rollout), make_weights(rollout)
    _, metrics = run(built(), rollout, scores, weight_bt, 5.0)
    logits_btv = full_length_logits(tiny_config(), params_of(tiny_config()), rollout)
    logp_btv = jax.nn.log_softmax(logits_btv)
    logp_bt = np.take_along_axis(np.asarray(logp_btv), rollout.tokens_bt[..., None], -1)[..., 0]
    where = weight_bt != 0
    for name, value_bt in {
        "sampler_gap/mean": np.abs(logp_bt - rollout.sampler_logp_bt),
        "update/advantage": scores.teacher_logp_bt - logp_bt,
        "update/logp": logp_bt,
    }.items():
        total, count = metrics[name]
        assert count == where.sum()
        np.testing.assert_allclose(total, value_bt[where].sum(), rtol=1e-5, err_msg=name)
    largest = np.abs(logp_bt - rollout.sampler_logp_bt)[where].max()
    np.testing.assert_allclose(metrics["sampler_gap/max"], (largest, 1), rtol=1e-5)


def test_nothing_supervised_changes_nothing_but_the_step():
    rollout = make_rollout()
    stage = built(optimizer=adam())
    state, metrics = run(stage, rollout, make_scores(rollout), np.zeros((8, 11), np.float32), 0.0)
    assert_unchanged(state)
    assert state.step == 1
    assert metrics["update/empty"] == (1, 1) and metrics["update/skipped"] == (0, 1)
    assert metrics["loss"] == (0, 0)


@pytest.mark.parametrize("where", ["parameter", "infinite loss"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_step_and_says_so(where):
    rollout = make_rollout()
    scores, weight_bt = make_scores(rollout), make_weights(rollout)
    params = jax.tree.map(np.copy, params_of(tiny_config()))
    if where == "parameter":
        params["final_norm"][0] = np.nan
    else:
        weight_bt = np.where(weight_bt != 0, np.float32(3e38), 0)
    state, metrics = run(built(optimizer=adam()), rollout, scores, weight_bt, 5.0, params)
    assert_unchanged(state, params)
    assert state.step == 1
    assert metrics["update/skipped"] == (1, 1) and metrics["update/empty"] == (0, 1)


def test_one_bad_teacher_value_costs_one_token():
    rollout = make_rollout()
    scores, weight_bt = make_scores(rollout), make_weights(rollout)
    scores.teacher_logp_bt[0, 1] = np.nan
    state, metrics = run(built(), rollout, scores, weight_bt, 5.0)
    assert metrics["update/nonfinite_tokens"] == (1, 1) and metrics["update/skipped"] == (0, 1)
    weight_bt[0, 1] = 0
    expected, _ = run(built(), rollout, scores, weight_bt, 5.0)
    assert_close(state.opt_state.trace, expected.opt_state.trace)


def test_adam_takes_the_divided_and_clipped_gradient():
    rollout = make_rollout()
    scores, weight_bt = make_scores(rollout), make_weights(rollout)
    gradient = run(built(), rollout, scores, weight_bt, 5.0)[0].opt_state.trace
    state, _ = run(built(optimizer=adam()), rollout, scores, weight_bt, 5.0)
    params = params_of(tiny_config())
    updates, _ = adam().update(gradient, adam().init(params), params)
    assert_close(state.params, optax.apply_updates(params, updates))


def assert_unchanged(state, params=None):
    params = params_of(tiny_config()) if params is None else params
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    fresh = adam().init(params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, fresh)


def test_moments_lie_where_their_parameters_lie():
    shardings = update.state_shardings(tiny_config(), adam(), mesh_of(fsdp=2, tensor=2))
    moments = shardings.opt_state[1][0].mu
    assert moments == shardings.params
    assert shardings.params["layers"]["mlp"]["gate_proj"].spec == P(None, "fsdp", "tensor")
    assert shardings.opt_state[1][0].count.spec == P()


def test_lines_that_do_not_divide_over_the_mesh_name_the_flag():
    with pytest.raises(ValueError, match="--config.pack.micro_batch_rows=2 or 4"):
        built(rows=3, mesh=mesh_of(fsdp=2))


# ---- the same step on other meshes ----

MESHES = [
    dict(data=8),
    dict(fsdp=8),
    dict(data=2, fsdp=2, tensor=2),
    dict(fsdp=2, tensor=2, expert=2),
]


@functools.lru_cache
def gradient_then_sgd():
    return optax.chain(optax.trace(decay=0.9), optax.scale(-0.1))


@functools.lru_cache
def one_step(mesh, objective=SAMPLED, sparse=False):
    """Loss, gradients and parameters after one step of SGD on this mesh, as whole host arrays."""
    config = tiny_config(**(SPARSE if sparse else {}))
    rollout = make_rollout(B=16)
    scores, weight_bt = make_scores(rollout), make_weights(rollout)
    group = parallel.host_group(mesh)
    num = 16 // group.count
    own = slice(num * group.index, num * (group.index + 1))
    mine = jax.tree.map(lambda x: x[own], (rollout, scores, weight_bt))
    stage = built(objective, rows=8, mesh=mesh, optimizer=gradient_then_sgd(), config=config)
    state = stage.init(jax.device_put(params_of(config), stage.shardings.params))
    head = jax.device_put(teacher_head(), parallel.replicated(mesh))
    head = head if objective is FULL else None
    state, metrics = stage(state, *mine, 5.0 / group.count, head)
    whole = jax.jit(lambda x: x, out_shardings=parallel.replicated(mesh))(state)
    total, count = parallel.to_host(metrics["loss"])
    return total / count, *parallel.to_host((whole.opt_state[0].trace, whole.params))


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_step_does_not_depend_on_the_mesh(mesh, sparse):
    mesh = mesh_of(**mesh)
    assert_close(one_step(mesh, sparse=sparse), one_step(mesh_of(), sparse=sparse))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[-2:], ids=str)
@pytest.mark.parametrize("objective", [FULL, ON_CANDIDATES], ids=lambda o: o.support)
def test_no_objective_depends_on_the_mesh(mesh, objective):
    assert_close(one_step(mesh_of(**mesh), objective), one_step(mesh_of(), objective))


def test_an_update_that_leaves_the_parameters_not_finite_is_skipped():
    """Loss and gradient are finite. The edit it catches: not looking at the new parameters."""
    rolled = make_rollout()
    stage = built(optimizer=optax.scale(-np.inf))
    params = jax.tree.map(jnp.array, params_of(tiny_config()))
    weight = np.where(rolled.valid_bt, 1.0, 0.0).astype(np.float32)
    before = jax.tree.map(np.asarray, params)
    state, sums = stage(stage.init(params), rolled, make_scores(rolled), weight, 8.0)
    assert np.isfinite(sums["loss"][0]) and np.isfinite(sums["grad_norm"][0])
    assert sums["update/skipped"][0] == 1
    jax.tree.map(np.testing.assert_array_equal, state.params, before)


TWO_PROCESSES = """
import sys
sys.path[:0] = sys.argv[3:]
import conftest, jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
import test_update
from opd_jax import parallel
from rollouts import assert_close

one = parallel.build_mesh((), devices=jax.local_devices()[:1])
for sizes, sparse in ((dict(fsdp=8), False), (dict(fsdp=2, tensor=2, expert=2), True)):
    mesh = parallel.build_mesh(sizes.items())
    assert mesh.size == 8 and parallel.host_group(mesh).count == 2
    assert_close(
        test_update.one_step(mesh, sparse=sparse), test_update.one_step(one, sparse=sparse)
    )
print("agreed")
"""


@pytest.mark.slow
def test_a_step_does_not_depend_on_the_number_of_processes(two_processes):
    here = pathlib.Path(__file__).parent
    two_processes(TWO_PROCESSES, str(here), str(here.parent))
