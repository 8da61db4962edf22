# SPDX-License-Identifier: Apache-2.0
"""One function, however it is cut: in pieces, packed, padded, rematerialised, scanned."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.model import layers, qwen3
from opd_jax.model.qwen3 import Backend, Qwen3Config

V = 64
DENSE = Qwen3Config(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
SPARSE = dataclasses.replace(
    DENSE,
    num_layers=3,
    num_experts=4,
    num_experts_per_token=2,
    moe_intermediate_size=24,
    norm_topk_prob=True,
    mlp_only_layers=(1,),
    tie_embeddings=True,
)
TOKENS = np.random.default_rng(0).integers(0, V, (2, 12)).astype(np.int32)


def sharp_params(config, seed=0):
    """Weights large enough that attention and routing are far from uniform."""
    params = jax.jit(qwen3.init_params, static_argnums=0)(config, jax.random.key(seed))
    return jax.tree.map(lambda x: np.asarray(x) * (12 if x.ndim > 2 else 1), params)


def trunk(config, params, tokens, positions, segments, backend):
    return jax.jit(qwen3.trunk, static_argnums=(0, 5))(
        config, params, tokens, positions, segments, backend
    )


extend = jax.jit(qwen3.extend, static_argnums=(0, 5))
UNROLLED = Backend(unroll=8)
FORMS = pytest.mark.parametrize("backend", [Backend(), UNROLLED], ids=["scanned", "unrolled"])


@functools.partial(jax.jit, static_argnums=0)
def log_probs(config, params, hidden):
    return jax.nn.log_softmax(hidden @ qwen3.head_vd(config, params).T)


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
@FORMS
def test_prefill_in_pieces_and_token_by_token_equal_the_full_pass(config, backend):
    params = sharp_params(config)
    full = jax.nn.log_softmax(qwen3.logits(config, params, TOKENS))
    own = qwen3.unstack_layers(config, params, backend)
    B, L = TOKENS.shape
    for sizes in ([L], [5, 4, 3], [4] + [1] * (L - 4)):
        # Garbage where nothing was written yet: columns from start_b on must not be read.
        cache = qwen3.init_cache(config, B, 16, backend)
        cache = jax.tree.map(lambda x: x + 1e3, cache)
        parts, first = [], 0
        for size in sizes:
            tokens = TOKENS[:, first : first + size]
            start_b = jnp.full(B, first, jnp.int32)
            hidden, cache = extend(config, own, tokens, start_b, cache, backend)
            parts.append(log_probs(config, params, hidden))
            first += size
        np.testing.assert_allclose(jnp.concatenate(parts, 1), full, atol=1e-5)


@FORMS
def test_rows_of_different_length_decode_together(backend):
    """Row 0 is four tokens ahead of row 1, as in a batch of prompts of different length."""
    params = sharp_params(DENSE)
    own = qwen3.unstack_layers(DENSE, params, backend)
    full = jax.nn.log_softmax(qwen3.logits(DENSE, params, TOKENS))
    prompt = np.where(np.arange(8)[None] < np.array([[8], [4]]), TOKENS[:, :8], 0)
    cache = qwen3.init_cache(DENSE, 2, 12, backend)
    _, cache = extend(DENSE, own, prompt, jnp.zeros(2, jnp.int32), cache, backend)
    for start in ([8, 4], [9, 5]):
        tokens = TOKENS[[0, 1], start][:, None]
        hidden, cache = extend(DENSE, own, tokens, jnp.array(start, jnp.int32), cache, backend)
        ours = log_probs(DENSE, params, hidden)[:, 0]
        np.testing.assert_allclose(ours, full[jnp.arange(2), jnp.array(start)], atol=1e-5)


@FORMS
def test_bf16_decoding_stays_close_and_keeps_its_dtype(backend):
    """Prefill, then one token: on a CPU XLA has no batched products of bf16."""
    backend = dataclasses.replace(backend, compute_dtype=jnp.bfloat16)
    params = sharp_params(DENSE)
    full = qwen3.logits(DENSE, params, TOKENS)
    own = qwen3.unstack_layers(DENSE, jax.tree.map(jnp.bfloat16, params), backend)
    cache = qwen3.init_cache(DENSE, 2, 48, backend)
    parts = []
    for tokens, start in ((TOKENS[:, :11], 0), (TOKENS[:, 11:], 11)):
        start_b = jnp.full(2, start, jnp.int32)
        hidden, cache = extend(DENSE, own, tokens, start_b, cache, backend)
        assert hidden.dtype == cache.k[0].dtype == jnp.bfloat16
        parts.append(log_probs(DENSE, own, hidden))
    error = np.abs(np.concatenate(parts, 1) - jax.nn.log_softmax(full))
    assert error.mean() < 0.1, error.mean()


@FORMS
def test_writes_beyond_the_cache_are_dropped(backend):
    """A finished row may keep stepping: it must not overwrite its neighbours' columns."""
    params = sharp_params(DENSE)
    cache = qwen3.init_cache(DENSE, 2, 4, backend)
    own = qwen3.unstack_layers(DENSE, params, backend)
    _, after = extend(DENSE, own, TOKENS[:, :1], jnp.array([4, 1], jnp.int32), cache, backend)
    for k in after.k:
        assert not np.any(k[:, 0]) and np.any(k[:, 1, :, 1])


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_packed_rows_equal_separate_rows(config):
    params = sharp_params(config)
    separate = [
        qwen3.logits(config, params, row[None, :size])
        for row, size in zip(TOKENS, (7, 5), strict=True)
    ]
    packed = np.concatenate([TOKENS[0, :7], TOKENS[1, :5], [0, 0]])[None]
    positions = np.array([[*range(7), *range(5), 0, 1]], np.int32)
    segments = np.array([[1] * 7 + [2] * 5 + [0] * 2], np.int32)
    hidden = trunk(config, params, packed, positions, segments, Backend())
    ours = log_probs(config, params, hidden)[0, :12]
    theirs = jax.nn.log_softmax(jnp.concatenate([x[0] for x in separate]))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_no_trace(side):
    params = sharp_params(DENSE)
    alone = qwen3.logits(DENSE, params, TOKENS[:, :6])
    valid = np.zeros((2, 12), bool)
    where = slice(6, None) if side == "left" else slice(None, 6)
    valid[:, where] = True
    for padding in (0, 13):
        tokens = np.full((2, 12), padding, np.int32)
        tokens[:, where] = TOKENS[:, :6]
        padded = qwen3.logits(DENSE, params, tokens, valid)
        np.testing.assert_allclose(padded[:, where], alone, atol=1e-5)
        assert np.isfinite(padded).all()


def test_no_token_sees_a_later_one_or_another_segment():
    """By derivative: exact zeros, not small numbers."""
    params = sharp_params(DENSE)
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3], np.int32)
    positions = np.array([[*range(5), *range(4), *range(3)]], np.int32)
    tokens = np.arange(12, dtype=np.int32)[None]  # distinct, so that each has its own embedding

    def at(embed, query):
        hidden = qwen3.trunk(DENSE, params | dict(embed=embed), tokens, positions, segments)
        return jnp.sum(hidden[0, query] * jnp.arange(1.0, 33.0))

    grad = jax.jit(jax.grad(at))
    for query in range(9):
        seen = np.any(np.asarray(grad(params["embed"], query))[:12] != 0, axis=-1)
        same = segments[0] == segments[0, query]
        np.testing.assert_array_equal(seen, same & (np.arange(12) <= query))


@pytest.mark.parametrize(
    "changes",
    [dict(remat="layer"), dict(remat="dots"), dict(unroll=3), dict(unroll=3, remat="layer")],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_rematerialisation_and_unrolling_change_no_gradient(changes):
    params = sharp_params(SPARSE)
    positions = np.tile(np.arange(12, dtype=np.int32), (2, 1))

    def loss(params, backend):
        hidden = qwen3.trunk(SPARSE, params, TOKENS, positions, np.ones_like(TOKENS), backend)
        return jnp.sum(jnp.sin(hidden))

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    plain, again = grad(params, Backend()), grad(params, Backend(**changes))

    def close(a, b):
        # Those of the embeddings reach 680, where float32's own steps are 6e-5.
        np.testing.assert_allclose(a, b, atol=max(1e-4, 1e-6 * np.abs(a).max()))

    jax.tree.map(close, plain, again)


def test_bf16_compute_stays_close_and_keeps_its_dtype():
    params = sharp_params(DENSE)
    positions = np.tile(np.arange(12, dtype=np.int32), (2, 1))
    args = (DENSE, params, TOKENS, positions, np.ones_like(TOKENS))
    half = trunk(*args, Backend(compute_dtype=jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    error = np.abs(np.asarray(half, np.float32) - trunk(*args, Backend()))
    assert error.mean() < 0.03, error.mean()


def test_far_positions_are_not_rounded():
    """bf16 angles would merge position 257 with 256."""
    cos = layers.rope_table(DENSE, jnp.array([[256, 257, 262143]]))[0][..., :8]
    exact = np.cos(np.float64([256, 257, 262143])[:, None] * 1e6 ** (-np.arange(8) / 8))
    np.testing.assert_allclose(cos[0], exact, atol=0.02)  # float32 holds 262143 rad to 0.016
    np.testing.assert_allclose(cos[0, :2], exact[:2], atol=3e-5)


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_program_does_not_grow_with_depth(config):
    """Forward and backward: the lowered program of 36 layers is that of 4."""

    def size(depth):
        deep = dataclasses.replace(config, num_layers=depth, mlp_only_layers=())
        params = qwen3.param_shapes(deep)
        rows = jax.ShapeDtypeStruct((2, 12), jnp.int32)
        grad = jax.grad(lambda p, *x: qwen3.trunk(deep, p, *x, Backend(remat="layer")).sum())
        return jax.jit(grad).lower(params, rows, rows, rows).as_text().count("\n")

    assert size(36) == size(4)


@pytest.mark.parametrize("backend", [Backend(), Backend(unroll=16)], ids=["scanned", "unrolled"])
def test_decoding_never_copies_the_cache(backend):
    """In a loop that carries it, temporaries stay below one copy of the cache."""
    config = dataclasses.replace(DENSE, num_layers=16)
    shapes = qwen3.param_shapes(config)
    shapes = jax.eval_shape(lambda params: qwen3.unstack_layers(config, params, backend), shapes)
    cache = jax.eval_shape(lambda: qwen3.init_cache(config, 8, 256, backend))

    def decode(params, token_b, cache):
        def step(i, state):
            token_b, cache = state
            start_b = jnp.full(8, i, jnp.int32)
            hidden, cache = qwen3.extend(config, params, token_b[:, None], start_b, cache, backend)
            return log_probs(config, params, hidden[:, 0]).argmax(-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, 200, step, (token_b, cache))

    token_b = jax.ShapeDtypeStruct((8,), jnp.int32)
    compiled = jax.jit(decode, donate_argnums=2).lower(shapes, token_b, cache).compile()
    memory = compiled.memory_analysis()
    cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 8, memory


def test_unstacked_layers_compute_what_their_stacks_do():
    params = sharp_params(SPARSE)
    own = qwen3.unstack_layers(SPARSE, params, UNROLLED)
    assert len(own["layers"]) == SPARSE.num_layers
    positions = np.tile(np.arange(12, dtype=np.int32), (2, 1))
    args = TOKENS, positions, np.ones_like(TOKENS), UNROLLED
    stacked = trunk(SPARSE, params, *args)
    np.testing.assert_allclose(trunk(SPARSE, own, *args), stacked, atol=1e-5)


def test_only_stacks_are_copied_when_layers_are_split():
    """A large teacher is loaded where there is no room for it twice."""
    params = sharp_params(DENSE)
    assert qwen3.unstack_layers(DENSE, params, Backend()) is params
    own = qwen3.unstack_layers(DENSE, params, UNROLLED)
    assert own["embed"] is params["embed"]
    assert qwen3.unstack_layers(DENSE, own, UNROLLED) is own


@pytest.mark.parametrize("unstacked", [False, True])
def test_axes_match_shapes(unstacked):
    for config in (DENSE, SPARSE):
        shapes = qwen3.param_shapes(config)
        axes = qwen3.param_axes(config, unstacked=unstacked)
        if unstacked:
            split = functools.partial(qwen3.unstack_layers, config, backend=UNROLLED)
            shapes = jax.eval_shape(split, shapes)
        flat = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
        named = {jax.tree_util.keystr(path): names for path, names in flat}
        sized = {
            jax.tree_util.keystr(path): x.shape
            for path, x in jax.tree_util.tree_leaves_with_path(shapes)
        }
        assert named.keys() == sized.keys()
        assert all(len(named[key]) == len(sized[key]) for key in sized)


def test_init_does_not_depend_on_depth():
    """A deeper model starts as the shallower one plus layers: what makes depth studies
    comparable."""
    short = qwen3.init_params(DENSE, jax.random.key(0))
    long = qwen3.init_params(dataclasses.replace(DENSE, num_layers=5), jax.random.key(0))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b[:2]), short["layers"], long["layers"]
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_heads=5), "num_attention_heads=5 does not divide by num_key_value_heads=2"),
        (dict(head_dim=15), "head_dim=15 must be even"),
        (dict(num_experts=4, num_experts_per_token=5), "num_experts_per_tok=5 must lie in 1..num"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DENSE, **change)


@pytest.mark.parametrize("field", ["attention", "remat"])
def test_unknown_backend_lists_the_known_ones(field):
    with pytest.raises(ValueError, match=rf"{field}='flash' is unknown: choose one of \('"):
        Backend(**{field: "flash"})
