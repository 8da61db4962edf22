# SPDX-License-Identifier: Apache-2.0
"""Loss and gradient through the head: chunks against the dense form."""

import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from opd_jax.algorithm import head as chunked
from opd_jax.algorithm.head import head_loss_and_grads, logprobs
from opd_jax.algorithm.objective import Objective, Targets, token_loss

M, N, D, E, V, ROWS, K = 3, 7, 8, 5, 29, 32, 4  # V true tokens, ROWS rows of the head
COUNT = np.array([5, 0, 7], np.int32)
CASES = [
    dict(kind="sampled_pg", is_threshold=1.5, extrapolation=1.25, advantage_clip=2.0),
    dict(kind="reverse_kl"),
    dict(kind="jsd", beta=0.3),
    dict(kind="forward_kl", support="union", top_k=3),
    dict(kind="reverse_kl", support="teacher_k", tail="renormalise", stop_gradient=True),
]


def name(knobs):
    return "-".join(str(v) for v in knobs.values())


@functools.cache
def problem(seed=0):
    """hidden, head, teacher head and targets; unused slots hold NaN, padded head rows are large."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    hidden, head = normal(M, N, D), normal(ROWS, D)
    teacher_hidden, teacher_head = normal(M, N, E), normal(ROWS, E)
    head[V:] = teacher_head[V:] = 9.0  # would take most of the mass if it reached a softmax
    logits = hidden @ head[:V].T
    candidates = np.argsort(-logits, axis=-1)[..., :K].astype(np.int32)
    token = rng.integers(0, V, (M, N)).astype(np.int32)
    asked = Targets(token=token, candidates_k=candidates)
    said = logprobs(teacher_hidden, teacher_head, asked, num_top=3, vocab_size=V)
    weight = rng.random((M, N)).astype(np.float32)
    weight[2, 3] = 0.0
    targets = Targets(
        token=token,
        weight=weight,
        teacher_logp=said["logp"],
        sampler_logp=said["logp"] - 0.3,
        reference_logp=said["logp"] + 0.2,
        candidates_k=candidates,
        teacher_logp_k=said["candidate_logp"],
        teacher_ids_k=said["top_ids"],
        teacher_ids_logp_k=said["top_logp"],
        teacher_hidden_d=teacher_hidden,
    )
    return hidden, head, teacher_head, jax.tree.map(np.asarray, targets)


def poisoned(hidden, targets):
    """NaN in everything that must not count: slots behind count, and the slot of weight 0."""
    dead = (np.arange(N) >= COUNT[:, None]) | (targets.weight == 0)

    def poison(x):
        if x.dtype != np.float32:
            return x
        return np.where(dead.reshape(M, N, *[1] * (x.ndim - 2)), np.float32(np.nan), x)

    weight = np.where(targets.weight == 0, 0, poison(targets.weight))
    return poison(hidden), jax.tree.map(poison, targets).replace(weight=weight)


def dense(objective, hidden, head, teacher_head, targets):
    """The weighted sum over used slots as one softmax over everything."""

    def mask(z):
        return jnp.where((jnp.arange(ROWS) < V)[None, None], z, -1e30)

    z = mask(jnp.einsum("mnd,vd->mnv", hidden, head)).reshape(M * N, ROWS)
    tz = mask(jnp.einsum("mnd,vd->mnv", targets.teacher_hidden_d, teacher_head))
    flat = jax.tree.map(lambda x: jnp.asarray(x).reshape(M * N, *x.shape[2:]), targets)
    loss_n, _ = token_loss(objective, z, flat, tz.reshape(M * N, ROWS))
    used = (np.arange(N) < COUNT[:, None]).reshape(-1)
    return jnp.sum(jnp.where(used, flat.weight * loss_n, 0.0))


def assert_close(actual, wanted, tolerance=1e-5):
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("knobs", CASES, ids=name)
def test_chunks_equal_the_dense_form_and_unused_slots_count_for_nothing(knobs):
    objective = Objective(**knobs)
    hidden, head, teacher_head, targets = problem()
    loss, gradients = jax.value_and_grad(
        lambda h, w: dense(objective, h, w, teacher_head, targets), argnums=(0, 1)
    )(jnp.array(hidden), jnp.array(head))
    bad_hidden, bad_targets = poisoned(hidden, targets)
    # Chunks of 3 slots: 7 slots make a last chunk that overlaps the one before.
    run = jax.jit(functools.partial(head_loss_and_grads, objective, chunk=3 * M, vocab_size=V))
    sums, d_hidden, d_head = run(bad_hidden, head, bad_targets, COUNT, teacher_head)
    assert_close(sums["loss"], loss)
    assert_close(d_hidden, gradients[0])
    assert_close(d_head, gradients[1])
    assert sums["tokens"] == 11 and sums["nonfinite"] == 0
    dead = (np.arange(N) >= COUNT[:, None]) | (targets.weight == 0)
    np.testing.assert_array_equal(np.asarray(d_hidden)[dead], 0.0)
    np.testing.assert_array_equal(d_head[V:], 0.0)


@pytest.mark.parametrize("chunk", [1, M, 1000])
def test_the_size_of_chunks_changes_nothing(chunk):
    objective = Objective("sampled_pg")
    hidden, head, _, targets = problem()
    run = functools.partial(head_loss_and_grads, objective, vocab_size=V)
    one = run(hidden, head, targets, COUNT, chunk=2 * M)
    other = run(hidden, head, targets, COUNT, chunk=chunk)
    jax.tree.map(assert_close, other, one)


@pytest.mark.parametrize("kind", ["sampled_pg", "jsd"])
def test_tokens_taken_as_the_cache_holds_them_change_nothing(kind, monkeypatch):
    """What a CPU does with a large vocabulary: 9 tokens of a chunk, 3 at a time."""
    hidden, head, teacher_head, targets = problem()
    loss = functools.partial(head_loss_and_grads, Objective(kind), chunk=3 * M, vocab_size=V)
    said = functools.partial(logprobs, num_top=3, chunk=3 * M, vocab_size=V)

    def both(hidden):
        grads = loss(hidden, head, targets, COUNT, teacher_head)
        return grads, said(hidden, head, targets, COUNT)

    def num_loops():
        fresh = jax.jit(lambda x: both(x))  # or the first program would be counted again
        return fresh.lower(hidden).as_text().count("stablehlo.while")

    whole, before = both(hidden), num_loops()
    monkeypatch.setattr(chunked, "CACHED_LOGITS", 3 * ROWS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), both(hidden), whole)
    assert num_loops() == before + 2  # of the losses, and of the log-probs


def test_no_used_slot_means_no_work_and_zeros():
    hidden, head, _, targets = problem()
    run = functools.partial(head_loss_and_grads, Objective())
    sums, d_hidden, d_head = run(hidden * np.nan, head, targets, np.zeros(M, np.int32), chunk=M)
    assert all(float(value) == 0 for value in sums.values())
    assert not np.any(d_hidden) and not np.any(d_head)


@pytest.mark.parametrize("knobs", [CASES[0], CASES[1]], ids=name)
def test_values_that_are_not_finite_are_left_out_and_counted(knobs):
    objective = Objective(**knobs)
    hidden, head, teacher_head, targets = problem()
    run = jax.jit(functools.partial(head_loss_and_grads, objective, chunk=3 * M, vocab_size=V))
    without = targets.weight.copy()
    without[0, 1] = 0.0
    expected = run(hidden, head, targets.replace(weight=without), COUNT, teacher_head)
    if objective.kind == "sampled_pg":
        bad = targets.teacher_logp.copy()
        bad[0, 1] = -np.inf
        targets = targets.replace(teacher_logp=bad)
    else:
        bad = targets.teacher_hidden_d.copy()
        bad[0, 1, 2] = np.nan
        targets = targets.replace(teacher_hidden_d=bad)
    actual = run(hidden, head, targets, COUNT, teacher_head)
    assert actual[0]["nonfinite"] == 1 and expected[0]["nonfinite"] == 0
    assert actual[0]["tokens"] == expected[0]["tokens"] == 10
    np.testing.assert_array_equal(actual[1], expected[1])
    np.testing.assert_array_equal(actual[2], expected[2])


def biggest(jaxpr) -> int:
    """Elements of the largest array that any equation makes, in any inner jaxpr."""
    sizes = [1]
    for eqn in jaxpr.eqns:
        sizes += [math.prod(v.aval.shape) for v in eqn.outvars]
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            sizes.append(biggest(inner))
    return max(sizes)


@pytest.mark.parametrize("knobs", CASES, ids=name)
def test_no_array_of_tokens_times_vocabulary_beyond_a_chunk(knobs):
    objective = Objective(**knobs)
    rows, slots, width, vocab, chunk = 2, 64, 4, 4096, 8
    f32, i32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32), jnp.int32
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=i32)
    targets = Targets(
        token=ints((rows, slots)),
        weight=f32((rows, slots)),
        teacher_logp=f32((rows, slots)),
        sampler_logp=f32((rows, slots)),
        reference_logp=f32((rows, slots)),
        candidates_k=ints((rows, slots, K)),
        teacher_logp_k=f32((rows, slots, K)),
        teacher_ids_k=ints((rows, slots, 3)),
        teacher_ids_logp_k=f32((rows, slots, 3)),
        teacher_hidden_d=f32((rows, slots, width)),
    )
    run = functools.partial(head_loss_and_grads, objective, chunk=chunk)
    head = f32((vocab, width))
    jaxpr = jax.make_jaxpr(run)(f32((rows, slots, width)), head, targets, ints((rows,)), head)
    assert biggest(jaxpr.jaxpr) == chunk * vocab  # the student's logits of one chunk


def test_bfloat16_operands_are_summed_in_float32():
    # The loss of bf16 states equals that of the same numbers in float64: no bf16 sum anywhere.
    rng = np.random.default_rng(0)
    hidden = jnp.array(rng.normal(size=(1, 64, 32)), jnp.bfloat16)
    head = jnp.array(rng.normal(size=(500, 32)), jnp.bfloat16)
    token = rng.integers(0, 500, (1, 64)).astype(np.int32)
    targets = Targets(
        token=token, weight=np.ones((1, 64), np.float32), teacher_logp=np.zeros((1, 64), np.float32)
    )
    sums, d_hidden, d_head = head_loss_and_grads(
        Objective(), hidden, head, targets, np.array([64]), chunk=16
    )
    logits = np.asarray(hidden[0], np.float64) @ np.asarray(head, np.float64).T
    top = logits.max(-1)
    logp = logits[np.arange(64), token[0]] - top
    logp -= np.log(np.exp(logits - top[:, None]).sum(-1))
    assert sums["logp"] == pytest.approx(logp.sum(), rel=1e-6)
    assert sums["loss"] == pytest.approx((logp**2).sum(), rel=1e-6)
    assert d_hidden.dtype == jnp.bfloat16 and d_head.dtype == jnp.float32


def test_logprobs_equal_the_loops_and_mask_padded_rows():
    hidden, head, _, targets = problem()
    out = logprobs(hidden, head, targets, COUNT, num_top=3, chunk=5, vocab_size=V)
    for m in range(M):
        for n in range(N):
            if n >= COUNT[m]:
                assert not np.any([np.any(value[m, n]) for value in out.values()])
                continue
            logp = oracle.log_softmax([float(x) for x in head[:V] @ hidden[m, n]])
            assert out["logp"][m, n] == pytest.approx(logp[targets.token[m, n]], abs=1e-5)
            wanted = [logp[i] for i in targets.candidates_k[m, n]]
            np.testing.assert_allclose(out["candidate_logp"][m, n], wanted, atol=1e-5)
            entropy = -sum(math.exp(x) * x for x in logp)
            assert out["entropy"][m, n] == pytest.approx(entropy, abs=1e-5)
            best = sorted(range(V), key=lambda v, logp=logp: -logp[v])[:3]
            np.testing.assert_array_equal(out["top_ids"][m, n], best)
            np.testing.assert_allclose(out["top_logp"][m, n], [logp[i] for i in best], atol=1e-5)


def test_logprobs_keep_nan_in_its_slot():
    hidden, head, _, targets = problem()
    bad = hidden.copy()
    bad[0, 1, 3] = np.nan
    run = functools.partial(logprobs, vocab_size=V, chunk=6)
    out = run(bad, head, targets, COUNT)
    clean = run(hidden, head, targets, COUNT)
    assert np.isnan(out["logp"][0, 1])
    touched = np.zeros((M, N), bool)
    touched[0, 1] = True
    for key in clean:
        np.testing.assert_array_equal(
            np.asarray(out[key])[~touched], np.asarray(clean[key])[~touched]
        )


def test_rows_and_vocabulary_may_be_sharded():
    objective = Objective("reverse_kl", support="union", top_k=3)
    hidden, head, teacher_head, targets = problem()

    def double(x):  # 4 rows for 2 devices
        return np.concatenate([x, x[:1]])

    hidden, targets = double(hidden), jax.tree.map(double, targets)
    count = double(COUNT)
    run = jax.jit(functools.partial(head_loss_and_grads, objective, chunk=8, vocab_size=V))
    expected = run(hidden, head, targets, count, teacher_head)
    mesh = jax.make_mesh(
        (2, 2),
        ("rows", "vocab"),
        devices=jax.devices()[:4],
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )

    def put(tree, *spec):
        return jax.device_put(tree, jax.NamedSharding(mesh, jax.P(*spec)))

    actual = run(
        put(hidden, "rows"),
        put(head, "vocab"),
        put(targets, "rows"),
        put(count, "rows"),
        put(teacher_head, "vocab"),
    )
    jax.tree.map(assert_close, actual, expected)


def test_a_missing_teacher_head_is_named():
    hidden, head, _, targets = problem()
    with pytest.raises(ValueError, match="--config.objective.support=student_k"):
        head_loss_and_grads(
            Objective("jsd"), hidden, head, targets.replace(teacher_hidden_d=None), COUNT
        )
