# SPDX-License-Identifier: Apache-2.0
"""Each attention kernel against the plain form, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.model import attention
from opd_jax.model.qwen3 import Backend

B, L, N, G, H = 2, 384, 4, 2, 128  # three tiles of 128 along the row: one is above the diagonal


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    q = jax.random.normal(keys[0], (B, L, N, H))
    k, v = (jax.random.normal(key, (B, L, G, H)) for key in keys[1:3])
    segments = np.ones((B, L), np.int32)
    segments[0, 100:], segments[0, 300:] = 2, 0  # packed, then padding
    segments[1, :40] = 0  # left padding
    return (q, k, v), segments, jax.random.normal(keys[3], (B, L, N, H))


def run(backend, args, segments):
    return attention.build_self_attention(jnp.asarray(segments), H, backend)(*args)


def by_hand(args, segments):
    """The definition, head by head, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in args)
    out = np.zeros_like(q)
    for b in range(B):
        see = (segments[b][:, None] == segments[b][None]) & np.tri(L, dtype=bool)
        for n in range(N):
            score = q[b, :, n] @ k[b, :, n // (N // G)].T / np.sqrt(H)
            weight = np.where(see, np.exp(score - score.max(-1, keepdims=True)), 0)
            out[b, :, n] = weight / weight.sum(-1, keepdims=True) @ v[b, :, n // (N // G)]
    return out


def test_plain_form_is_the_definition():
    args, segments, _ = inputs()
    np.testing.assert_allclose(run(Backend(), args, segments), by_hand(args, segments), atol=1e-5)


def test_blocks_of_queries_change_nothing(monkeypatch):
    """384 queries in blocks of 100: the last one is padded. Values and derivatives."""
    args, segments, cotangent = inputs()

    def both():
        out, vjp = jax.vjp(lambda *x: run(Backend(), x, segments), *args)
        return out, vjp(cotangent)

    whole = both()
    monkeypatch.setattr(attention, "QUERY_BLOCK", 100)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), both(), whole)


def test_one_query_by_sums_of_products_is_the_plain_form():
    """What a CPU decodes with where the layers are scanned. Row 0 sees nothing of the cache."""
    (q, k, v), _, _ = inputs()
    k, v = attention.heads_first(k), attention.heads_first(v)
    old, new = attention.cache_visibility(jnp.array([0, 17]), 1, L - 1)
    pieces = [(k[:, :, 1:], v[:, :, 1:], old), (k[:, :, :1], v[:, :, :1], new)]
    plain = attention.plain_attention(q[:, :1], pieces)
    np.testing.assert_allclose(attention._attend_one(q[:, :1], pieces), plain, atol=1e-6)


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_kernel_equals_the_plain_form(kernel):
    args, segments, _ = inputs()
    ours = run(Backend(attention=kernel, interpret=True), args, segments)
    np.testing.assert_allclose(ours, run(Backend(), args, segments), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_kernel_derivatives_equal_the_plain_form(kernel):
    args, segments, cotangent = inputs()
    _, ours = jax.vjp(lambda *x: run(Backend(attention=kernel, interpret=True), x, segments), *args)
    _, plain = jax.vjp(lambda *x: run(Backend(), x, segments), *args)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours(cotangent), plain(cotangent)
    )


def test_splash_refuses_rows_that_do_not_tile():
    with pytest.raises(ValueError, match="rows of 200 tokens .* Round the row length up to 256"):
        attention.check_kernel(Backend(attention="splash"), 200, 128)


def test_cudnn_refuses_float32():
    with pytest.raises(ValueError, match="takes bfloat16 or float16"):
        attention.check_kernel(Backend(attention="cudnn"), 256, 128)


@pytest.mark.parametrize("length", [1, 3])
def test_the_tpus_way_to_write_columns_writes_the_same(length):
    """Rows that start inside, end across and start beyond the last of eight columns."""
    cache = jax.random.normal(jax.random.key(0), (2, 5, 3, 8, 4))
    new = jax.random.normal(jax.random.key(1), (2, 5, 3, length, 4))
    start = jnp.array([0, 3, 6, 7, 9], jnp.int32)
    np.testing.assert_array_equal(
        attention.write_by_row(cache, new, start), attention.write_by_scatter(cache, new, start)
    )
