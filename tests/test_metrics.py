# SPDX-License-Identifier: Apache-2.0
"""Step metrics by hand, whatever the number of hosts."""

import math
import types

import numpy as np
import pytest

from opd_jax import metrics, structs


def make_rollout() -> structs.Rollout:
    """Two rows: 4 of 6 tokens valid and finished; 6 of 6 and cut."""
    B, T, K = 2, 6, 4
    valid = np.arange(T) < np.array([[4], [6]])
    return structs.Rollout(
        prompt_bp=np.zeros((B, 3), np.int32),
        prompt_valid_bp=np.ones((B, 3), bool),
        tokens_bt=np.array([[1, 2, 3, 4, 0, 0], [7, 7, 7, 7, 7, 7]], np.int32),
        valid_bt=valid,
        sampler_logp_bt=np.full((B, T), -1.0, np.float32),
        candidates_btk=np.zeros((B, T, K), np.int32),
        candidate_logp_btk=np.zeros((B, T, K), np.float32),
        entropy_bt=np.full((B, T), 0.5, np.float32),
        finished_b=np.array([True, False]),
    )


def make_table() -> dict:
    teacher = np.full((2, 6), -3.0, np.float32)
    teacher[0, 4:] = np.nan  # after the end: must not be looked at
    teacher[1, 0] = -np.inf  # a non-finite score inside: left out, never spread
    margin = np.array([[4.0, 2, 0, 0, 9, 9], [1, 1, 1, 1, 1, 1]], np.float32)
    return metrics.row_table(
        make_rollout(),
        structs.Scores(teacher_logp_bt=teacher),
        types.SimpleNamespace(
            margin_bt=margin,
            supervised_bt=np.array([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], bool),
            release_b=np.array([2, 6]),
            gain_b=np.array([8.0, -np.inf]),
            num_segments_b=np.array([3, 1]),
            rescale_b=np.array([2.0, 1.0]),
        ),
    )


def test_the_summary_is_what_one_counts_by_hand():
    row = metrics.summary(make_table())
    assert row["release/rate"] == 0.5  # row 1 ends where its supervision ends: not released
    assert row["release/position_median"] == 0.5  # token 2 of 4, over released rows only
    assert row["release/supervised_fraction"] == pytest.approx(8 / 10)
    assert row["bic/gain_mean"] == 8.0 and row["bic/gain_above_6"] == 0.5
    assert row["rescale/max"] == 2.0 and row["rescale/median"] == 1.5
    assert row["response/length_mean"] == 5.0 and row["response/truncation_rate"] == 0.5
    assert row["response/repetition_rate"] == pytest.approx((0 + 2 / 3) / 2)
    assert row["margin/mean"] == pytest.approx((6 + 6) / 10)
    assert row["log_ratio/mean"] == -2.0 and row["log_ratio/released"] == -2.0
    assert row["student/entropy"] == 0.5
    assert row["tokens/supervised"] == 8


def test_two_hosts_give_the_same_bits_as_one():
    table = make_table()
    halves = [{k: v[i : i + 1] for k, v in table.items()} for i in range(2)]
    joined = {k: np.concatenate([h[k] for h in halves]) for k in table}
    assert metrics.summary(joined) == metrics.summary(table)


def test_nothing_released_and_nothing_supervised_are_nan_not_errors():
    table = make_table()
    table["release"] = table["length"]
    table["supervised"] = np.zeros(2)
    table["gain"] = np.full(2, np.nan)
    row = metrics.summary(table)
    assert row["release/rate"] == 0.0
    for key in ("release/position_median", "bic/gain_mean", "rescale/max"):
        assert math.isnan(row[key])


def test_memory_is_in_gib():
    assert 0.01 < metrics.peak_memory_gib() < 1000
