# SPDX-License-Identifier: Apache-2.0
"""What a step's numbers are: one table of per-row quantities, summarised once over all hosts.

Each host fills a float64 [B, F] table of its own rows; `summary` takes the table of the whole batch
(rows in the order of their global index), so the figures do not depend on how many hosts there are.
"""

import resource

import jax
import numpy as np

from opd_jax import structs
from opd_jax.algorithm.change_point import STRONG_GAIN

NGRAM = 4  # tokens; the repetition rate counts repeated runs of this many


def row_table(
    rollout: structs.Rollout, scores: structs.Scores, supervision: structs.Supervision
) -> dict[str, np.ndarray]:
    """Per-row quantities, float64[B] each; `*_sum` are over the row's valid tokens.

    `release` is the index of the first token that is no longer supervised; the length of the
    response when nothing is released.
    """
    margin_bt, supervised_bt = supervision.margin_bt, supervision.supervised_bt
    valid_bt = rollout.valid_bt
    length_b = valid_bt.sum(-1)
    table = dict(
        length=length_b,
        supervised=supervised_bt.sum(-1),
        release=np.minimum(supervision.release_b, length_b),
        gain=supervision.gain_b,
        num_segments=supervision.num_segments_b,
        rescale=supervision.rescale_b,
        truncated=~rollout.finished_b,
        repeated=[_repetition(t[v]) for t, v in zip(rollout.tokens_bt, valid_bt, strict=True)],
        entropy_sum=_row_sum(rollout.entropy_bt, valid_bt),
    )
    if margin_bt is not None:
        finite_bt = valid_bt & np.isfinite(margin_bt)
        table.update(margin_sum=_row_sum(margin_bt, finite_bt), margin_count=finite_bt.sum(-1))
    if scores.teacher_logp_bt is not None:
        ratio_bt = scores.teacher_logp_bt - rollout.sampler_logp_bt
        finite_bt = valid_bt & np.isfinite(ratio_bt)
        for name, where_bt in (
            ("ratio", finite_bt),
            ("ratio_supervised", finite_bt & supervised_bt),
            ("ratio_released", finite_bt & ~supervised_bt),
        ):
            table[f"{name}_sum"] = _row_sum(ratio_bt, where_bt)
            table[f"{name}_count"] = where_bt.sum(-1)
    return {name: np.asarray(value, np.float64) for name, value in table.items()}


def summary(table: dict[str, np.ndarray]) -> dict[str, float]:
    """The metrics of a step from the table of its whole batch; NaN where nothing is to be taken."""
    length, num_tokens = table["length"], table["length"].sum()
    released = table["release"] < length
    position = table["release"][released] / np.maximum(length[released], 1)
    gain = table["gain"]
    found = np.isfinite(gain)
    supervises = table["supervised"] > 0
    out = {
        "release/rate": np.mean(released),
        "release/supervised_fraction": divide(table["supervised"].sum(), num_tokens),
        "release/segments_mean": np.mean(table["num_segments"]),
        "bic/gain_mean": np.mean(gain[found]) if found.any() else np.nan,
        "bic/gain_above_6": np.mean(gain > STRONG_GAIN) if found.any() else np.nan,
        "rescale/median": np.median(table["rescale"][supervises]) if supervises.any() else np.nan,
        "rescale/max": np.max(table["rescale"][supervises]) if supervises.any() else np.nan,
        "response/length_mean": np.mean(length),
        "response/length_max": np.max(length),
        "response/truncation_rate": np.mean(table["truncated"]),
        "response/repetition_rate": np.mean(table["repeated"]),
        "student/entropy": divide(table["entropy_sum"].sum(), num_tokens),
        "tokens/sampled": num_tokens,
        "tokens/supervised": table["supervised"].sum(),
    }
    for q, name in ((10, "p10"), (50, "median"), (90, "p90")):
        key = f"release/position_{name}"
        out[key] = np.percentile(position, q) if position.size else np.nan
    for name, key in (
        ("margin", "margin/mean"),
        ("ratio", "log_ratio/mean"),
        ("ratio_supervised", "log_ratio/supervised"),
        ("ratio_released", "log_ratio/released"),
    ):
        if f"{name}_sum" in table:
            out[key] = divide(table[f"{name}_sum"].sum(), table[f"{name}_count"].sum())
    return {name: float(value) for name, value in out.items()}


def divide(total: float, count: float) -> float:
    """A (sum, count) pair's quotient; NaN where nothing was counted."""
    return float(total) / float(count) if count else np.nan


def speeds(row: dict[str, float], seconds: dict[str, float]) -> dict[str, float]:
    """`time/STAGE` in seconds, and tokens per second of the stages that work on tokens."""
    out = {f"time/{stage}": value for stage, value in seconds.items()}
    out["time/step"] = sum(seconds.values())
    for stage, tokens in (
        ("rollout", row["tokens/sampled"]),
        ("score", row["tokens/sampled"]),
        ("update", row["tokens/supervised"]),
    ):
        if stage in seconds:
            out[f"time/{stage}_tokens_per_second"] = divide(tokens, seconds[stage])
    return out


def peak_memory_gib() -> float:
    """Peak bytes of the first local device where it tells, else of this process; GiB."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use") or (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return peak / 2**30


def _row_sum(x_bt: np.ndarray, where_bt: np.ndarray) -> np.ndarray:
    return np.sum(x_bt, axis=-1, where=where_bt, dtype=np.float64)


def _repetition(tokens_t: np.ndarray) -> float:
    """Share of the row's n-grams that occurred earlier in it; 0 for rows of one n-gram or less."""
    if len(tokens_t) <= NGRAM:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(tokens_t, NGRAM)
    return 1.0 - len(np.unique(grams, axis=0)) / len(grams)
