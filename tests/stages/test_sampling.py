# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.stages import sampling
from opd_jax.stages.sampling import Knobs

PLAIN = Knobs()
# Above BLOCK, not a multiple of it, and with its last block nearly empty.
V = 3 * sampling.BLOCK + 5


@functools.partial(jax.jit, static_argnames=("knobs", "num_candidates", "vocab_size"))
def draw(logits_bv, bits_b2, knobs=PLAIN, num_candidates=4, vocab_size=None):
    return sampling.sample(
        logits_bv, bits_b2, knobs, num_candidates=num_candidates, vocab_size=vocab_size
    )


def peaky_logits(seed, rows=1, size=V, spread=3.0):
    return np.random.default_rng(seed).normal(size=(rows, size), scale=spread).astype(np.float32)


def uniform_bits(seed, rows):
    return np.random.default_rng(seed).integers(0, 2**32, (rows, 2), dtype=np.uint32)


def probabilities(logits_v, temperature=1.0):
    scaled = logits_v.astype(np.float64) / temperature
    weight = np.exp(scaled - scaled.max())
    return weight / weight.sum()


def many(logits_v, num_draws, seed=0, **kwargs):
    rows = 2048
    out = []
    for i in range(-(-num_draws // rows)):
        logits = jnp.broadcast_to(jnp.asarray(logits_v), (rows, len(logits_v)))
        out.append(np.asarray(draw(logits, uniform_bits(seed + i, rows), **kwargs).token_b))
    return np.concatenate(out)


def chi_square_per_degree(counts_v, p_v):
    """About 1 for draws from p; cells that expect fewer than 5 are merged into one."""
    expected = p_v * counts_v.sum()
    small = expected < 5
    observed = np.append(counts_v[~small], counts_v[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    keep = expected > 0
    return np.sum((observed - expected)[keep] ** 2 / expected[keep]) / (keep.sum() - 1)


# -- the draw ----------------------------------------------------------------------------------


def test_draw_index_gives_every_weight_its_exact_share_of_the_uniforms():
    weight = np.array([0.0, 3.0, 1e-3, 0.0, 5.0, 2.0, 0.0], np.float32)
    bits = (np.arange(2**16, dtype=np.uint64) << 16).astype(np.uint32)  # a grid over all uniforms
    index = sampling.draw_index(jnp.broadcast_to(weight, (2**16, 7)), jnp.asarray(bits))
    counts = np.bincount(index, minlength=7)
    np.testing.assert_allclose(counts, weight / weight.sum() * 2**16, atol=1.5)
    assert (counts[weight == 0] == 0).all()
    assert (np.diff(index) >= 0).all()  # an inverse of the cumulative distribution is monotone


@pytest.mark.parametrize("word", [0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
def test_extreme_uniforms_never_draw_a_token_of_probability_zero(word):
    logits = peaky_logits(0)
    logits[0, :3] = logits[0, -9:] = logits[0, sampling.BLOCK - 2 : sampling.BLOCK + 2] = -np.inf
    bits = np.full((1, 2), word, np.uint32)
    token = int(draw(logits, bits).token_b[0])
    assert np.isfinite(logits[0, token])
    only_one = np.full((1, V), -np.inf, np.float32)
    only_one[0, 200] = 3.0
    assert int(draw(only_one, bits).token_b[0]) == 200


def test_high_word_of_the_product_is_exact():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**32, (2, 10_000), dtype=np.uint64)
    a[:3], b[:3] = (2**32 - 1, 2**32 - 1, 0xFFFF), (2**32 - 1, 1, 0x10001)
    got = sampling._multiply_high(jnp.asarray(a, jnp.uint32), jnp.asarray(b, jnp.uint32))
    np.testing.assert_array_equal(np.asarray(got, np.uint64), a * b >> np.uint64(32))


def test_draw_inverts_the_float64_cumulative_distribution():
    rows, size = 512, 8192
    logits = peaky_logits(1, rows, size)
    bits = uniform_bits(2, rows)
    got = np.asarray(draw(logits, bits).token_b)
    differ = 0
    for b in range(rows):
        p_nm = probabilities(logits[b]).reshape(-1, sampling.BLOCK)
        u_block, u_token = bits[b] / 2.0**32
        block = np.searchsorted(np.cumsum(p_nm.sum(1)), u_block, side="right")
        inside = np.cumsum(p_nm[block]) / p_nm[block].sum()
        token = block * sampling.BLOCK + np.searchsorted(inside, u_token, side="right")
        differ += token != got[b]
    assert differ == 0  # a border within 1e-6 of a uniform would be bad luck; these seeds have none


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_softmax(temperature):
    logits = peaky_logits(3, spread=1.5)[0]
    knobs = Knobs(temperature=temperature)
    counts = np.bincount(many(logits, 100_000, knobs=knobs), minlength=V)
    # 250 degrees of freedom and more: 1.35 is beyond four standard deviations
    assert chi_square_per_degree(counts, probabilities(logits, temperature)) < 1.35


def test_a_tail_below_float32_resolution_of_the_sum_is_still_drawn():
    """One weight holds 0.99; 0.01 is spread over 2^18 weights of 4e-8, less than half a float32
    step below 1, so that a float32 running sum would stand still after the first."""
    size = 2**18
    weight = np.full(size + 1, 0.01 / size, np.float32)
    weight[0] = 0.99
    uniform = np.linspace(0.9901, 0.9999, 8)
    bits = jnp.asarray(uniform * 2**32, jnp.uint32)
    index = sampling.draw_index(jnp.broadcast_to(weight, (8, size + 1)), bits)
    np.testing.assert_allclose(index, (uniform - 0.99) / 0.01 * size, atol=0.01 * size)


def test_each_word_is_used_by_its_own_level():
    logits = np.zeros((1, 4 * sampling.BLOCK), np.float32)
    token = draw(logits, np.array([[1 << 31, 3 << 30]], np.uint32)).token_b[0]
    assert int(token) == 2 * sampling.BLOCK + 3 * sampling.BLOCK // 4


# -- what comes with it ------------------------------------------------------------------------


def test_log_probability_is_that_of_the_distribution_sampled():
    rows = 16
    logits = peaky_logits(4, rows)
    for knobs in (Knobs(), Knobs(temperature=0.7), Knobs(top_k=5), Knobs(1.3, 20, 0.8, 0.05)):
        out = draw(logits, uniform_bits(5, rows), knobs)
        for b in range(rows):
            p = filtered(logits[b], knobs)
            assert p[out.token_b[b]] > 0
            np.testing.assert_allclose(out.logp_b[b], np.log(p[out.token_b[b]]), atol=2e-5)


def filtered(logits_v, knobs):
    """The filters written with sorts, in float64."""
    p = probabilities(logits_v, knobs.temperature)
    order = np.argsort(-p, kind="stable")
    if knobs.top_k:
        p[order[knobs.top_k :]] = 0
        p /= p.sum()
    if knobs.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= knobs.top_p]] = 0
        p /= p.sum()
    p[p < knobs.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "knobs",
    [Knobs(top_k=7), Knobs(top_p=0.6), Knobs(min_p=0.1), Knobs(0.8, 30, 0.9, 0.02)],
    ids=["top_k", "top_p", "min_p", "all"],
)
def test_filters_keep_exactly_the_tokens_of_the_sorted_definition(knobs):
    logits = peaky_logits(6)[0]
    tokens = many(logits, 60_000, knobs=knobs)
    p = filtered(logits, knobs)
    assert set(tokens) == set(np.flatnonzero(p))
    assert chi_square_per_degree(np.bincount(tokens, minlength=V), p) < 3


def test_ties_with_the_last_token_kept_are_kept():
    logits = np.zeros(V, np.float32)
    logits[10] = 2.0
    logits[20:23] = 1.0
    assert set(many(logits, 4096, knobs=Knobs(top_k=2))) == {10, 20, 21, 22}


def test_temperature_zero_takes_the_first_of_the_likeliest_and_is_certain():
    logits = peaky_logits(7, 8)
    logits[:, [40, 300]] = 99.0
    out = draw(logits, uniform_bits(0, 8), Knobs(temperature=0))
    np.testing.assert_array_equal(out.token_b, 40)
    np.testing.assert_array_equal(out.logp_b, 0.0)
    np.testing.assert_allclose(out.candidate_logp_bk[:, 0], np.log(0.5), atol=1e-5)


@pytest.mark.parametrize("size", [5, 130, V, 1000])
def test_candidates_are_those_of_lax_top_k_with_its_order_of_ties(size):
    # Many ties; the larger the value the rarer, so that the best of the blocks differ.
    logits = np.random.default_rng(8).geometric(0.3, (64, size)).astype(np.float32)
    out = draw(logits, uniform_bits(0, 64), num_candidates=5)
    value, ids = jax.lax.top_k(jax.nn.log_softmax(logits), 5)
    np.testing.assert_array_equal(out.candidates_bk, ids)
    np.testing.assert_allclose(out.candidate_logp_bk, value, atol=1e-5)


def test_candidates_and_entropy_are_those_of_temperature_one():
    logits = peaky_logits(9, 16)
    logits[:, 7] = -np.inf
    plain = draw(logits, uniform_bits(0, 16))
    hot = draw(logits, uniform_bits(0, 16), Knobs(temperature=0.3, top_k=2, min_p=0.5))
    for b in range(16):
        p = probabilities(logits[b])
        p = p[p > 0]
        np.testing.assert_allclose(plain.entropy_b[b], -np.sum(p * np.log(p)), rtol=1e-5)
    np.testing.assert_array_equal(hot.entropy_b, plain.entropy_b)
    np.testing.assert_array_equal(hot.candidate_logp_bk, plain.candidate_logp_bk)


def test_padded_columns_of_the_head_count_for_nothing():
    logits = peaky_logits(10, 32)
    padded = np.concatenate([logits, np.full((32, 59), 50.0, np.float32)], axis=1)
    bits = uniform_bits(1, 32)
    for a, b in zip(draw(logits, bits), draw(padded, bits, vocab_size=V), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_told_and_leave_the_others_alone(bad):
    logits, bits = peaky_logits(11, 4), uniform_bits(2, 4)
    good = draw(logits, bits)
    logits[1, 5] = bad
    logits[2] = -np.inf
    out = draw(logits, bits)
    np.testing.assert_array_equal(out.finite_b, [True, False, False, True])
    for a, b in zip(good[:-1], out[:-1], strict=True):
        np.testing.assert_array_equal(np.asarray(a)[[0, 3]], np.asarray(b)[[0, 3]])
        np.testing.assert_array_equal(np.asarray(b)[[1, 2]], 0)


def test_bfloat16_logits_are_raised_to_float32_first():
    logits = jnp.asarray(peaky_logits(12, 4), jnp.bfloat16)
    bits = uniform_bits(3, 4)
    for a, b in zip(draw(logits, bits), draw(logits.astype(jnp.float32), bits), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_filter_that_is_off_is_not_compiled():
    args = (jnp.zeros((2, V)), jnp.zeros((2, 2), jnp.uint32))
    lower = functools.partial(draw.lower, *args)
    assert "while" not in lower(knobs=Knobs()).as_text()
    assert "while" in lower(knobs=Knobs(top_k=3)).as_text()
