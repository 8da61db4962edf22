# SPDX-License-Identifier: Apache-2.0
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_jax.stages import packing

PAD = 99  # a token that must never reach the model


def make_rows(rng, B, P, T, share=0.5):
    """Random left-padded prompts, responses and needed tokens; tokens name their row and place."""
    prompt_len_b = rng.integers(1, P + 1, B)
    prompt_valid = np.arange(P) >= P - prompt_len_b[:, None]
    prompt = np.where(prompt_valid, 1000 * np.arange(1, B + 1)[:, None] + np.arange(P), PAD)
    tokens = 1000 * np.arange(1, B + 1)[:, None] + 500 + np.arange(T)
    length_b = rng.integers(0, T + 1, B)  # 0: nothing needed of this row
    needed = (np.arange(T) < length_b[:, None]) & (rng.random((B, T)) < share)
    return dict(
        prompt_bp=prompt.astype(np.int32),
        prompt_valid_bp=prompt_valid,
        tokens_bt=tokens.astype(np.int32),
        needed_bt=needed,
    )


sizes = dict(
    seed=st.integers(0, 2**31),
    B=st.integers(1, 12),
    P=st.integers(1, 7),
    T=st.integers(1, 9),
    M=st.integers(1, 4),
    spare=st.integers(0, 20),
    share=st.sampled_from([0.0, 0.2, 1.0]),
)


@given(**sizes)
def test_every_needed_token_is_asked_for_once_after_exactly_its_own_context(
    seed, B, P, T, M, spare, share
):
    rows = make_rows(np.random.default_rng(seed), B, P, T, share)
    plan = packing.plan(**rows, micro_batch_rows=M, micro_batch_tokens=P + T + spare)
    seen = np.zeros((B, T), int)
    for u in range(len(plan)):
        batch = plan.batch(u)
        assert batch.tokens_ml.shape == (M, P + T + spare)
        for m, n in np.argwhere(batch.used_mn):
            b, t = batch.row_mn[m, n], batch.t_mn[m, n]
            seen[b, t] += 1
            i = batch.index_mn[m, n]
            # What causal attention inside the segment lets this position see.
            same = batch.segment_ids_ml[m, : i + 1] == batch.segment_ids_ml[m, i]
            context = batch.tokens_ml[m, : i + 1][same]
            prompt = rows["prompt_bp"][b, rows["prompt_valid_bp"][b]]
            np.testing.assert_array_equal(
                context, np.concatenate([prompt, rows["tokens_bt"][b, :t]])
            )
            np.testing.assert_array_equal(
                batch.positions_ml[m, : i + 1][same], np.arange(len(context))
            )
    np.testing.assert_array_equal(seen, rows["needed_bt"])


@given(**sizes)
def test_lines_are_dense_and_slots_stand_at_the_front(seed, B, P, T, M, spare, share):
    rows = make_rows(np.random.default_rng(seed), B, P, T, share)
    plan = packing.plan(**rows, micro_batch_rows=M, micro_batch_tokens=P + T + spare)
    num_tokens = num_targets = 0
    for u in range(len(plan)):
        batch = plan.batch(u)
        real = batch.segment_ids_ml > 0
        assert (np.diff(real.astype(int), axis=1) <= 0).all()  # no hole inside a line
        assert (batch.tokens_ml[~real] == 0).all()
        assert PAD not in batch.tokens_ml
        # A new segment exactly where positions restart.
        new = np.diff(batch.segment_ids_ml, axis=1, prepend=0) == 1
        np.testing.assert_array_equal(new, real & (batch.positions_ml == 0))
        columns = np.arange(batch.used_mn.shape[1])
        np.testing.assert_array_equal(batch.used_mn, columns < batch.count_m[:, None])
        num_tokens += real.sum()
        num_targets += batch.count_m.sum()
    assert num_tokens == plan.num_tokens
    assert num_targets == plan.num_targets == rows["needed_bt"].sum()


@given(**sizes)
def test_gather_then_scatter_gives_the_values_back(seed, B, P, T, M, spare, share):
    rng = np.random.default_rng(seed)
    rows = make_rows(rng, B, P, T, share)
    plan = packing.plan(**rows, micro_batch_rows=M, micro_batch_tokens=P + T + spare)
    values = rng.normal(size=(B, T, 3))
    out = np.full_like(values, -7.0)
    for u in range(len(plan)):
        batch = plan.batch(u)
        packed = batch.gather(values, fill=np.nan)
        assert np.isnan(packed[~batch.used_mn]).all()
        batch.scatter(packed, out)
    np.testing.assert_array_equal(out, np.where(rows["needed_bt"][..., None], values, -7.0))


def test_a_row_is_cropped_before_its_last_needed_token():
    needed = np.array([[True, False, True, False, False, False]])
    plan = packing.plan(
        prompt_bp=np.array([[PAD, 1, 2]]),
        prompt_valid_bp=np.array([[False, True, True]]),
        tokens_bt=np.array([[3, 4, 5, 6, 7, 8]]),
        needed_bt=needed,
        micro_batch_rows=1,
        micro_batch_tokens=10,
    )
    batch = plan.batch(0)
    np.testing.assert_array_equal(batch.tokens_ml, [[1, 2, 3, 4, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.index_mn[:, :2], [[1, 3]])
    np.testing.assert_array_equal(batch.t_mn[:, :2], [[0, 2]])
    np.testing.assert_array_equal(batch.count_m, [2])


def test_short_rows_share_a_line_and_equal_lines_share_a_micro_batch():
    B, P, T = 20, 4, 96
    needed = np.arange(T) < np.where(np.arange(B) < 10, 96, 7)[:, None]  # 10 whole rows, 10 cropped
    plan = packing.plan(
        prompt_bp=np.ones((B, P), np.int32),
        prompt_valid_bp=np.ones((B, P), bool),
        tokens_bt=np.ones((B, T), np.int32),
        needed_bt=needed,
        micro_batch_rows=2,
        micro_batch_tokens=P + T,
    )
    assert len(plan.packed) == 11  # the ten cropped rows, ten tokens each, fill one line exactly
    counts = np.stack([plan.batch(u).count_m for u in range(len(plan))])
    np.testing.assert_array_equal(counts, [[96, 96]] * 5 + [[70, 0]])


def test_lines_with_as_many_slots_share_a_micro_batch():
    """Else each micro-batch would pay the head for its fullest line's slots."""
    B, P, T = 4, 90, 96
    few = np.arange(B) % 2 == 0  # long prompts with few supervised tokens, and the opposite
    plan = packing.plan(
        prompt_bp=np.ones((B, P), np.int32),
        prompt_valid_bp=np.arange(P) >= P - np.where(few, 90, 1)[:, None],
        tokens_bt=np.ones((B, T), np.int32),
        needed_bt=np.arange(T) < np.where(few, 7, 96)[:, None],
        micro_batch_rows=2,
        micro_batch_tokens=P + T,
    )
    assert len(plan.packed) == B  # no two rows of 96 tokens fit in 186
    counts = np.stack([plan.batch(u).count_m for u in range(len(plan))])
    assert (counts.max(axis=1) - counts.min(axis=1)).max() == 0


def test_nothing_needed_makes_no_micro_batch_and_one_past_the_end_is_empty():
    rows = make_rows(np.random.default_rng(0), 4, 3, 5)
    rows["needed_bt"][:] = False
    plan = packing.plan(**rows, micro_batch_rows=2, micro_batch_tokens=8)
    assert len(plan) == 0
    batch = plan.batch(0)
    assert not batch.segment_ids_ml.any() and not batch.used_mn.any() and not batch.count_m.any()


def test_a_line_as_long_as_the_longest_row_is_enough():
    packing.check_shape(64, 192, 8, 256)  # 255: tests/test_bad_input.py


@pytest.mark.parametrize("valid", [[[True, False]], [[False, False]], [[True, True, False]]])
def test_prompts_that_are_not_left_padded_are_refused(valid):
    valid = np.array(valid)
    with pytest.raises(ValueError, match="left-padded"):
        packing.plan(
            prompt_bp=np.ones(valid.shape, np.int32),
            prompt_valid_bp=valid,
            tokens_bt=np.ones((1, 2), np.int32),
            needed_bt=np.ones((1, 2), bool),
            micro_batch_rows=1,
            micro_batch_tokens=8,
        )


@pytest.mark.parametrize(
    "size, expected",
    [
        (dict(prompt_len=64, response_len=192, batch_size=64), (8, 256)),
        (dict(prompt_len=32, response_len=512, batch_size=8), (1, 544)),
        (dict(prompt_len=32, response_len=128, batch_size=8), (4, 160)),
        (dict(prompt_len=32, response_len=128, batch_size=2), (2, 160)),
        (dict(prompt_len=2048, response_len=16384, batch_size=1024, num_shards=16), (16, 18432)),
    ],
)
def test_default_shape_holds_the_longest_row_and_rounds_cost_finely(size, expected):
    assert packing.default_shape(**size) == expected


def test_a_paper_sized_step_packs_in_seconds():
    B, P, T = 1024, 64, 16384
    rng = np.random.default_rng(0)
    needed = np.arange(T) < rng.lognormal(7.5, 1.0, B).clip(1, T)[:, None]
    rows = dict(
        prompt_bp=np.ones((B, P), np.int32),
        prompt_valid_bp=np.ones((B, P), bool),
        tokens_bt=np.ones((B, T), np.int32),
        needed_bt=needed,
    )
    start = time.process_time()
    plan = packing.plan(**rows, micro_batch_rows=16, micro_batch_tokens=P + T)
    for u in range(len(plan)):
        plan.batch(u)
    assert time.process_time() - start < 10  # Python loops over tokens take minutes
    fill = plan.num_tokens / (len(plan.packed) * (P + T))
    assert fill > 0.95
