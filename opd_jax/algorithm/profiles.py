# SPDX-License-Identifier: Apache-2.0
"""Teachability signals of a batch of rollouts, as sums and counts. Host, numpy.

Where along a response does the teacher's feedback stop discriminating? `per_token` names the
quantities, `by_position` bins them by relative position, `by_sentence` by sentence index. Sums and
counts of rows, hosts and steps add up; divide once, at the end. One step's file
(records.signals_arrays) is these arrays, and a notebook needs numpy.load alone.
"""

from collections.abc import Sequence

import numpy as np

from opd_jax.algorithm import margin
from opd_jax.algorithm.segments import Spans

Tokens = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> value_bt, where_bt: of `per_token`
Arrays = dict[str, np.ndarray]

NUM_BINS = 20  # relative position: bin i holds tokens with i <= 20 t / length < i + 1
NUM_SENTENCES = 64  # by sentence index; the last entry holds all later sentences

NAMES = (
    "margin",  # M_t, nats
    "advantage_variance",  # Var_{p_S}(A_t) on the candidates, nats squared
    "advantage",  # A_t of the sampled token, nats
    "abs_advantage",  # its size
    "student_entropy",  # nats
    "teacher_entropy",  # nats
    "teacher_mass",  # teacher probability of the student's candidates together
    "log_ratio_supervised",  # A_t on supervised tokens
    "log_ratio_released",  # A_t on the others
)


def per_token(
    *,
    usable_bt: np.ndarray,
    supervised_bt: np.ndarray,
    margin_bt: np.ndarray | None = None,
    teacher_logp_bt: np.ndarray | None = None,
    sampler_logp_bt: np.ndarray | None = None,
    teacher_logp_btk: np.ndarray | None = None,
    candidate_logp_btk: np.ndarray | None = None,
    student_entropy_bt: np.ndarray | None = None,
    teacher_entropy_bt: np.ndarray | None = None,
) -> Tokens:
    """Every signal that its inputs allow, as name -> (value_bt, where_bt).

    Args:
      usable_bt: bool[B, T], True = valid token whose values are all finite.
      supervised_bt: bool[B, T], True = supervised.
      margin_bt, teacher_logp_bt, sampler_logp_bt, *_entropy_bt: float[B, T], nats.
      teacher_logp_btk, candidate_logp_btk: float[B, T, K], nats, teacher's and student's values of
        the student's candidates, not renormalised. Any of them may be None.

    Returns:
      dict of pairs: value float64[B, T], and bool[B, T], True = the value counts (it is finite).
    """
    values = {
        "margin": margin_bt,
        "student_entropy": student_entropy_bt,
        "teacher_entropy": teacher_entropy_bt,
    }
    where = {}
    with np.errstate(invalid="ignore", over="ignore"):  # unusable tokens may hold anything
        if teacher_logp_bt is not None:
            advantage_bt = np.asarray(teacher_logp_bt, np.float64) - sampler_logp_bt
            values |= {"advantage": advantage_bt, "abs_advantage": np.abs(advantage_bt)}
            for name, where_bt in (("supervised", supervised_bt), ("released", ~supervised_bt)):
                values["log_ratio_" + name] = advantage_bt
                where["log_ratio_" + name] = where_bt
        if teacher_logp_btk is not None:
            teacher_btk = np.asarray(teacher_logp_btk, np.float64)
            student_btk = np.asarray(candidate_logp_btk, np.float64)
            values["teacher_mass"] = np.exp(teacher_btk).sum(axis=-1)
            values["advantage_variance"] = margin.advantage_variance(teacher_btk, student_btk)
    out = {}
    for name in NAMES:
        if values.get(name) is not None:
            value_bt = np.asarray(values[name], np.float64)
            where_bt = usable_bt & np.isfinite(value_bt) & where.get(name, True)
            out[name] = (value_bt, where_bt)
    return out


def by_position(tokens: Tokens, valid_bt: np.ndarray, num_bins: int = NUM_BINS) -> Arrays:
    """Sums and counts by relative position in the response.

    Args:
      tokens: of `per_token`.
      valid_bt: bool[B, T], True = sampled token; a row's length is its number.
      num_bins: see NUM_BINS.

    Returns:
      dict of float64[num_bins] arrays `<name>_sum` and `<name>_count`.
    """
    length_b1 = np.maximum(valid_bt.sum(axis=1, keepdims=True), 1)
    bin_bt = np.arange(valid_bt.shape[1]) * num_bins // length_b1
    return _sums(tokens, bin_bt, valid_bt, num_bins)


def by_sentence(
    tokens: Tokens,
    spans_b: Sequence[Spans],
    valid_bt: np.ndarray,
    num_sentences: int = NUM_SENTENCES,
) -> Arrays:
    """Sums and counts by index of the segment; the last entry takes all later segments.

    Args:
      tokens: of `per_token`.
      spans_b: token spans of every row's segments.
      valid_bt: bool[B, T].
      num_sentences: length of the arrays.

    Returns:
      dict of float64[num_sentences] arrays `<name>_sum` and `<name>_count`, summed over tokens.
    """
    bin_bt = np.zeros(valid_bt.shape, np.int64)
    for b, spans in enumerate(spans_b):
        for i, (start, end) in enumerate(spans):
            bin_bt[b, start:end] = min(i, num_sentences - 1)
    return _sums(tokens, bin_bt, valid_bt, num_sentences)


def _sums(tokens: Tokens, bin_bt: np.ndarray, valid_bt: np.ndarray, num_bins: int) -> Arrays:
    out = {}
    for name, (value_bt, where_bt) in tokens.items():
        where_bt = where_bt & valid_bt
        bins = bin_bt[where_bt]
        out[name + "_sum"] = np.bincount(bins, weights=value_bt[where_bt], minlength=num_bins)
        out[name + "_count"] = np.bincount(bins, minlength=num_bins).astype(np.float64)
    return out
