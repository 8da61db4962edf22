# SPDX-License-Identifier: Apache-2.0
"""No row of a batch sees another, at the sizes we run.

XLA's CPU backend of jaxlib 0.10.2 computes d + sum(x * d, -1) wrongly from about 10**5 numbers on,
where x lacks d's leading axis: every slice gets the sum of the first (docs/log.md). Nothing here
multiplies so, and these tests say it of the programs as a run compiles them: the tiny shapes and
the `quick_compile` of other tests would not meet it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import parallel
from opd_jax.algorithm.objective import Objective, Targets
from opd_jax.model import hf, qwen3
from opd_jax.stages import packing, update

L, N = 256, 128  # tokens of a row and, of these, targets
OBJECTIVES = {
    "sampled_pg": Objective("sampled_pg"),
    "reverse_kl": Objective("reverse_kl"),
    "jsd": Objective("jsd"),
}


@functools.cache
def student() -> tuple[qwen3.Qwen3Config, qwen3.Params]:
    return hf.load(hf.resolve("embedded:student"), jnp.float32)


@functools.cache
def rows(num: int) -> tuple[np.ndarray, Targets]:
    """Tokens [num, L] and targets; row i is the same for every `num`."""
    config, _ = student()
    rng = [np.random.default_rng(i) for i in range(num)]
    tokens = np.stack([r.integers(0, config.vocab_size, L) for r in rng]).astype(np.int32)
    states = np.stack([r.normal(size=(N, config.hidden_size)) for r in rng]).astype(np.float32)
    targets = Targets(
        token=tokens[:, L - N :],
        weight=np.ones((num, N), np.float32),
        teacher_logp=np.full((num, N), -1.0, np.float32),
        teacher_hidden_d=states,
    )
    return tokens, targets


@functools.cache
def stage(objective: str, num: int, unroll: int) -> update.Update:
    import optax

    mesh = parallel.build_mesh([("data", 1), ("fsdp", 1)], devices=jax.devices()[:1])
    return update.build(
        student()[0],
        OBJECTIVES[objective],
        optax.sgd(1.0),
        packing.MicroBatch(num, L, chunk=512),
        backend=qwen3.Backend(unroll=unroll, shard=parallel.shard_activations(mesh)),
        mesh=mesh,
    )


def gradients(objective: str, num: int, weight_m: np.ndarray, unroll: int, first: int = 0):
    """Of a micro-batch of rows first .. first + num - 1, whose tokens weigh weight_m."""
    config, params = student()
    built = stage(objective, num, unroll)
    tokens, targets = jax.tree.map(lambda x: x[first : first + num], rows(first + num))
    targets = targets.replace(weight=targets.weight * weight_m[:, None].astype(np.float32))
    batch = dict(
        tokens_ml=tokens,
        positions_ml=np.broadcast_to(np.arange(L, dtype=np.int32), (num, L)),
        segment_ids_ml=np.ones((num, L), np.int32),
        index_mn=np.broadcast_to(np.arange(L - N - 1, L - 1, dtype=np.int32), (num, N)),
        count_m=np.full(num, N, np.int32),
        targets=targets,
    )
    head = qwen3.head_vd(config, params)
    grads, _ = built.accumulate(params, built.zeros(), batch, head)
    return jax.tree.map(np.asarray, grads)


@pytest.mark.parametrize(
    ("objective", "num", "unroll"),
    [
        pytest.param("reverse_kl", 8, 8, id="reverse_kl-8-unrolled"),
        pytest.param("sampled_pg", 6, 0, id="sampled_pg-6-scanned", marks=pytest.mark.slow),
        pytest.param("sampled_pg", 8, 8, id="sampled_pg-8-unrolled", marks=pytest.mark.slow),
        pytest.param("jsd", 6, 8, id="jsd-6-unrolled", marks=pytest.mark.slow),
    ],
)
def test_tokens_of_weight_zero_have_gradient_zero(objective, num, unroll):
    """Exactly, of every parameter; and the other rows' gradient is what it is without them."""
    for path, grad in jax.tree_util.tree_leaves_with_path(
        gradients(objective, num, np.zeros(num), unroll)
    ):
        np.testing.assert_array_equal(grad, 0.0, err_msg=jax.tree_util.keystr(path))
    last = np.eye(num)[num - 1]
    found = gradients(objective, num, last, unroll)
    expected = gradients(objective, 1, np.ones(1), unroll, first=num - 1)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(
            a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize("unroll", [0, 8], ids=["scanned", "unrolled"])
def test_a_row_is_sampled_and_scored_as_it_would_be_alone(unroll):
    """Whole rows, prefill and one more token, 24 rows at once, against one row at a time."""
    num, (config, params) = 24, student()
    backend = qwen3.Backend(unroll=unroll)
    tokens_bl, _ = rows(num)

    @jax.jit
    def whole(tokens_bl):
        positions_bl = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), tokens_bl.shape)
        segments_bl = jnp.ones_like(tokens_bl)
        return qwen3.trunk(config, params, tokens_bl, positions_bl, segments_bl, backend)

    @jax.jit
    def in_two_steps(tokens_bl):
        own = qwen3.unstack_layers(config, params, backend)
        start_b = jnp.zeros(len(tokens_bl), jnp.int32)
        cache = qwen3.init_cache(config, len(tokens_bl), L, backend)
        first, cache = qwen3.extend(config, own, tokens_bl[:, :-1], start_b, cache, backend)
        last, _ = qwen3.extend(config, own, tokens_bl[:, -1:], start_b + L - 1, cache, backend)
        return jnp.concatenate([first, last], axis=1)

    together = whole(tokens_bl)
    np.testing.assert_allclose(in_two_steps(tokens_bl), together, atol=1e-3)
    for i in (0, 1, num - 1):
        np.testing.assert_allclose(whole(tokens_bl[i : i + 1])[0], together[i], atol=1e-3)
    assert float(jnp.abs(together[0] - together[1]).max()) > 1.0  # or any row would do
