# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import parallel
from opd_jax.model import qwen3
from opd_jax.stages import decode, rollout
from opd_jax.structs import Prompts, Vocabulary

pytestmark = pytest.mark.usefixtures("quick_compile")

B, P, T = 8, 6, 12
CONFIG = qwen3.Qwen3Config(
    vocab_size=150,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
EOS = tuple(range(20))  # about one token in ten
VOCABULARY = Vocabulary(150, EOS, pad_id=0)
BACKEND = qwen3.Backend()  # one object: samplers of the same numbers share their compilations


@pytest.fixture(scope="module")
def params():
    params = qwen3.init_params(CONFIG, jax.random.key(0))
    return params | {"embed": params["embed"] * 50, "head": params["head"] * 15}  # peaky logits


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    valid = np.arange(P)[None] >= P - np.array([1, 2, 3, 4, 5, 6, 6, 3])[:, None]
    tokens = np.where(valid, rng.integers(20, 150, (B, P)), 0).astype(np.int32)
    return Prompts(tokens, valid, np.arange(B, dtype=np.int32))


def build(mesh, **changes):
    backend, head_dtype = changes.pop("backend", BACKEND), changes.pop("head_dtype", "")
    vocabulary = VOCABULARY._replace(
        size=changes.pop("vocab_size", VOCABULARY.size), eos_ids=changes.pop("eos_ids", EOS)
    )
    settings = dict(response_len=T, num_slots=3, decode_chunk=5, head_dtype=head_dtype) | changes
    return rollout.build(
        CONFIG, rollout.Settings(**settings), vocabulary, mesh=mesh, backend=backend
    )


@pytest.fixture(scope="module")
def sampled(one_device_mesh, params, prompts):
    """Eight prompts through three slots."""
    return build(one_device_mesh).run(params, prompts, jax.random.key(1))


def assert_same_rollout(a, b, atol=1e-5):
    np.testing.assert_array_equal(a.tokens_bt, b.tokens_bt)
    np.testing.assert_array_equal(a.valid_bt, b.valid_bt)
    np.testing.assert_array_equal(a.finished_b, b.finished_b)
    np.testing.assert_array_equal(a.candidates_btk, b.candidates_btk)
    for name in ("sampler_logp_bt", "candidate_logp_btk", "entropy_bt"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=atol)


def test_padding_of_the_head_is_never_drawn_nor_a_candidate(one_device_mesh, params, prompts):
    """Published heads have more rows than the tokenizer has tokens."""
    out = build(one_device_mesh, vocab_size=40)(params, prompts, jax.random.key(1))
    assert out.tokens_bt.max() < 40 and out.candidates_btk.max() < 40
    likeliest = np.exp(out.candidate_logp_btk[out.valid_bt]).sum(axis=-1)
    assert (likeliest <= 1 + 1e-5).all() and likeliest.max() > 0.2


def full_pass_logp(params, out, temperature=1.0):
    """float32[B, T, V] of one uncached pass over prompt and response."""
    tokens = np.concatenate([out.prompt_bp, out.tokens_bt], axis=1)
    valid = np.concatenate([out.prompt_valid_bp, out.valid_bt], axis=1)
    logits = qwen3.logits(CONFIG, params, tokens, valid)[:, P - 1 : -1]
    return np.asarray(jax.nn.log_softmax(logits / temperature))


def assert_says_what_the_full_pass_says(params, out, atol=1e-5):
    logp = full_pass_logp(params, out)
    valid = out.valid_bt
    ids, logps = out.candidates_btk[valid], out.candidate_logp_btk[valid]
    best, best_ids = jax.lax.top_k(logp, 4)
    np.testing.assert_array_equal(ids, np.asarray(best_ids)[valid])
    np.testing.assert_allclose(logps, np.asarray(best)[valid], atol=atol)
    entropy = -np.sum(np.exp(logp) * logp, axis=-1)
    np.testing.assert_allclose(out.entropy_bt[valid], entropy[valid], atol=10 * atol)


def test_cached_sampler_says_what_a_full_pass_says(params, sampled):
    out, _ = sampled
    logp = np.take_along_axis(full_pass_logp(params, out), out.tokens_bt[..., None], axis=2)
    np.testing.assert_allclose(
        out.sampler_logp_bt[out.valid_bt], logp[..., 0][out.valid_bt], atol=1e-5
    )
    assert_says_what_the_full_pass_says(params, out)
    assert len(np.unique(out.tokens_bt[out.valid_bt])) > 20  # the test would see a mix-up of rows


@pytest.mark.parametrize("slots, chunk", [(2, 5), (8, 5), (0, 5)])
def test_slots_and_chunk_do_not_change_the_rollout(
    one_device_mesh, params, prompts, sampled, slots, chunk
):
    other = build(one_device_mesh, num_slots=slots, decode_chunk=chunk)
    assert_same_rollout(other(params, prompts, jax.random.key(1)), sampled[0])


def test_a_row_keeps_its_key_when_the_batch_is_another(one_device_mesh, params, prompts, sampled):
    """row_b names the key, not the place in the batch."""
    order = np.array([5, 2, 7, 0, 1, 3, 6, 4])
    moved = Prompts(prompts.tokens_bp[order], prompts.valid_bp[order], prompts.row_b[order])
    out = build(one_device_mesh)(params, moved, jax.random.key(1))
    np.testing.assert_array_equal(out.tokens_bt, sampled[0].tokens_bt[order])
    other = build(one_device_mesh)(params, prompts, jax.random.key(2))
    assert (other.tokens_bt != sampled[0].tokens_bt).mean() > 0.3


def test_left_padding_leaves_no_trace(one_device_mesh, params, prompts, sampled):
    dirty = dataclasses.replace(
        prompts, tokens_bp=np.where(prompts.valid_bp, prompts.tokens_bp, 149).astype(np.int32)
    )
    assert_same_rollout(build(one_device_mesh)(params, dirty, jax.random.key(1)), sampled[0], 0.0)
    tokens, length = rollout._left_aligned(dirty)
    np.testing.assert_array_equal(length, [1, 2, 3, 4, 5, 6, 6, 3])
    np.testing.assert_array_equal(tokens[2, :3], prompts.tokens_bp[2, 3:])
    np.testing.assert_array_equal(tokens[2, 3:], 0)


def test_rows_end_at_their_first_eos_or_at_the_limit(sampled):
    out, _ = sampled
    length = out.valid_bt.sum(axis=1)
    assert 2 <= out.finished_b.sum() <= 7, "choose a seed with both kinds of row"
    for b in range(B):
        np.testing.assert_array_equal(out.valid_bt[b], np.arange(T) < length[b])
        is_eos = np.isin(out.tokens_bt[b, : length[b]], EOS)
        assert not is_eos[:-1].any()
        assert is_eos[-1] == out.finished_b[b]
        assert out.finished_b[b] or length[b] == T
        for name in ("tokens_bt", "sampler_logp_bt", "candidates_btk", "entropy_bt"):
            np.testing.assert_array_equal(getattr(out, name)[b, length[b] :], 0)


def test_an_eos_drawn_first_is_a_response_of_one_token(one_device_mesh, params, prompts):
    sampler = build(one_device_mesh, eos_ids=tuple(range(150)))
    out, stats = sampler.run(params, prompts, jax.random.key(1))
    np.testing.assert_array_equal(out.valid_bt.sum(axis=1), 1)
    assert out.finished_b.all()
    assert stats.num_steps == 3  # eight rows through three slots, which are refilled at once


def test_limits_of_rows(one_device_mesh, params, prompts, sampled):
    limit = np.array([0, 1, 2, 3, 4, 5, 6, 99])
    out, stats = build(one_device_mesh).run(params, prompts, jax.random.key(1), limit_b=limit)
    full = sampled[0].valid_bt.sum(axis=1)
    np.testing.assert_array_equal(out.valid_bt.sum(axis=1), np.minimum(limit, full))
    assert not out.finished_b[0]
    np.testing.assert_array_equal(out.tokens_bt[out.valid_bt], sampled[0].tokens_bt[out.valid_bt])
    assert stats.busy_steps == out.valid_bt.sum()


def test_decoding_stops_when_all_rows_have_ended(one_device_mesh, params, prompts):
    sampler = build(one_device_mesh, num_slots=0)
    _, stats = sampler.run(params, prompts, jax.random.key(1), limit_b=np.full(B, 3))
    assert stats.num_steps == 3
    assert stats.slot_steps == 3 * B
    assert stats.num_refills == 1


def test_a_prompt_without_tokens_gets_an_empty_response(one_device_mesh, params, prompts, sampled):
    valid = prompts.valid_bp.copy()
    valid[4] = False
    out = build(one_device_mesh)(
        params, dataclasses.replace(prompts, valid_bp=valid), jax.random.key(1)
    )
    assert not out.valid_bt[4].any()
    others = np.arange(B) != 4
    np.testing.assert_array_equal(out.tokens_bt[others], sampled[0].tokens_bt[others])


def test_logits_that_are_not_finite_end_their_row_only(one_device_mesh, params, prompts, sampled):
    tokens = prompts.tokens_bp.copy()
    tokens[3, -1] = 19  # an EOS id: no row draws it and goes on
    poisoned = params | {"embed": params["embed"].at[19].set(jnp.nan)}
    out, stats = build(one_device_mesh).run(
        poisoned, dataclasses.replace(prompts, tokens_bp=tokens), jax.random.key(1)
    )
    assert stats.num_nonfinite == 1
    assert not out.valid_bt[3].any() and not out.finished_b[3]
    others = np.arange(B) != 3
    np.testing.assert_array_equal(out.tokens_bt[others], sampled[0].tokens_bt[others])
    assert all(np.isfinite(x).all() for x in (out.sampler_logp_bt, out.candidate_logp_btk))


def test_other_temperature_is_in_the_log_probability(one_device_mesh, params, prompts):
    out = build(one_device_mesh, temperature=0.7)(params, prompts, jax.random.key(1))
    logp = full_pass_logp(params, out, 0.7)
    logp = np.take_along_axis(logp, out.tokens_bt[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(out.sampler_logp_bt[out.valid_bt], logp[out.valid_bt], atol=2e-5)
    assert_says_what_the_full_pass_says(params, out)


@pytest.mark.parametrize("unroll", [0, 8])
def test_a_cache_that_grows_gives_the_same_rollout(
    one_device_mesh, params, prompts, sampled, unroll
):
    backend = dataclasses.replace(BACKEND, unroll=unroll)
    sampler = build(one_device_mesh, first_cache=7, decode_chunk=4, backend=backend)
    assert_same_rollout(sampler(params, prompts, jax.random.key(1)), sampled[0])


def test_a_bf16_head_is_close(one_device_mesh, params, prompts):
    """On CPU it is also stored transposed."""
    sampler = build(one_device_mesh, head_dtype="bfloat16", response_len=1, num_slots=8)
    out = sampler(params, prompts, jax.random.key(1))
    logp = np.take_along_axis(full_pass_logp(params, out)[:, :1], out.tokens_bt[..., None], axis=2)
    gap = np.abs(out.sampler_logp_bt - logp[..., 0])
    assert 1e-6 < gap.max() < 0.05


def test_nothing_recompiles_and_no_transfer_is_hidden(one_device_mesh, params, prompts, sampled):
    sampler = build(one_device_mesh)
    functions = (decode.prepare, decode.init, decode.insert, decode.decode)
    before = [f._cache_size() for f in functions]
    flipped = jax.tree.map(lambda x: x[::-1].copy(), prompts)
    key = jax.random.key(7)
    with jax.transfer_guard("disallow"):
        sampler(params, flipped, key)
    assert [f._cache_size() for f in functions] == before


# -- the schedule ------------------------------------------------------------------------------


def simulate(lengths_fb, group_of_shard, slots_per_shard, chunk):
    """Runs the schedule as `Sampler.run` does, rows of given lengths; -> occupancy, rows seated."""
    num_host_groups, num_rows = lengths_fb.shape
    schedule = rollout.Schedule(group_of_shard, slots_per_shard, num_rows)
    left_ns = np.zeros(schedule.row_ns.shape, int)
    seated = [[] for _ in range(num_host_groups)]
    width = max(1, slots_per_shard // 4)
    busy = steps = 0
    while True:
        while seats := schedule.assign(width):
            row_nr, source_ns = seats
            for n, s in zip(*np.nonzero(source_ns >= 0), strict=True):
                host_group, row = group_of_shard[n], row_nr[n, source_ns[n, s]]
                seated[host_group].append(row)
                left_ns[n, s] = lengths_fb[host_group, row]
        if not schedule.busy:
            return busy / steps / left_ns.size, seated
        active = left_ns > 0
        stop = width * len(group_of_shard) if schedule.waiting else left_ns.size + 1
        for _ in range(chunk):
            busy, steps = busy + (left_ns > 0).sum(), steps + 1
            left_ns = np.maximum(left_ns - 1, 0)
            freed = (active & (left_ns == 0)).sum()
            if freed >= stop or not left_ns.any():
                break
        schedule.release(left_ns > 0)


def heavy_tailed(seed, size, median):
    """Lognormal, cut at eight times its median."""
    lengths = np.random.default_rng(seed).lognormal(np.log(median), 0.9, size)
    return np.clip(lengths, 1, 8 * median).astype(int)


def test_slots_stay_busy_when_lengths_are_heavy_tailed():
    lengths = heavy_tailed(0, (1, 128), 128)
    lengths[0, 50] = 8 * 128
    occupancy, seated = simulate(lengths, [0], 8, chunk=32)
    assert seated == [list(range(128))]
    assert occupancy >= 0.85
    whole_batches = lengths.reshape(-1, 8)  # what waiting for the longest of each batch costs
    assert whole_batches.mean() / whole_batches.max(axis=1).mean() < 0.5


def test_every_feed_seats_its_own_rows_once():
    group_of_shard = [0, 1, 0, 1]  # the shards of a host need not be neighbours
    occupancy, seated = simulate(heavy_tailed(1, (2, 96), 100), group_of_shard, 4, chunk=16)
    assert [sorted(rows) for rows in seated] == [list(range(96))] * 2
    assert occupancy > 0.7


# -- meshes and mistakes -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unroll", "frozen"), [(0, False), (8, False), (8, True)], ids=["scanned", "unrolled", "frozen"]
)
@pytest.mark.parametrize("sizes", [(("fsdp", 8),), (("data", 2), ("fsdp", 2), ("tensor", 2))])
def test_a_mesh_does_not_change_the_rollout(params, prompts, sampled, sizes, unroll, frozen):
    mesh = parallel.build_mesh(sizes)
    backend = qwen3.Backend(shard=parallel.shard_activations(mesh), unroll=unroll)
    shardings = parallel.shardings(qwen3.param_axes(CONFIG), mesh)
    sampler = build(mesh, num_slots=8, backend=backend)
    big = jax.tree.map(lambda x: np.concatenate([x, x, x]), prompts)
    params = jax.device_put(params, shardings)
    params = qwen3.unstack_layers(CONFIG, params, backend) if frozen else params
    out = sampler(params, big, jax.random.key(1))
    for i in range(3):
        part = jax.tree.map(lambda x, i=i: x[i * B : (i + 1) * B], out)
        assert_same_rollout(part, sampled[0])
