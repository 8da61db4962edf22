# SPDX-License-Identifier: Apache-2.0
"""Signals in, supervised tokens and weights out: the release rule, its controls, its siblings.

To add a selector: a frozen dataclass in baselines.py (or release.py), whose fields are its knobs,
and its name in that file's `SELECTORS`; config.selector.kind then reaches it. Host, numpy.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from opd_jax.algorithm import baselines, release
from opd_jax.algorithm.selector import (
    NEEDS,
    Selection,
    Selector,
    Signals,
    check,
    check_in,
    own_rows,
)

__all__ = [
    "AGGREGATES",
    "NEEDS",
    "POSITIONAL",
    "RESCALES",
    "SELECTORS",
    "Selection",
    "Selector",
    "Signals",
    "build",
    "check_loss_weights",
    "check_positional",
    "knobs",
    "loss_weights",
    "own_rows",
]

AGGREGATES = ("row_mean", "token_mean")
RESCALES = ("sequence", "batch", "none")
SELECTORS = release.SELECTORS | baselines.SELECTORS
# Those that look at positions alone, at nothing that a model says.
POSITIONAL = ("full", "fixed_prefix", "fixed_fraction", "suffix_only", "growing_prefix")


def knobs(kind: str) -> tuple[str, ...]:
    """Names of the knobs that the selector `kind` has: what `build` takes beside the kind."""
    check_in(kind, "kind", tuple(SELECTORS))
    return tuple(field.name for field in dataclasses.fields(SELECTORS[kind]))


def check_positional(selector: Selector) -> None:
    """Raises ValueError unless `selector` can choose among tokens that the teacher sampled.

    Of such a token only what the teacher says is known: candidates, entropy and log-probs.
    """
    kind = next(kind for kind, cls in SELECTORS.items() if type(selector) is cls)
    if kind not in POSITIONAL:
        raise ValueError(
            f"config.selector.kind={kind!r} looks at what the student says of its own samples, but "
            "config.rollout.by='teacher'. Set "
            f"--config.selector.kind=full (or {', '.join(POSITIONAL[1:])})"
        )


def build(kind: str, **values) -> Selector:
    """The selector `kind`, a key of `SELECTORS`, with the given knobs; others keep their default.

    `fraction=0` stands for the kind's own default, as the default differs between kinds.

    Raises:
      ValueError: an unknown kind or knob, or a value out of range; names a flag that works.
    """
    known = knobs(kind)
    for name in values:
        if name not in known:
            raise ValueError(
                f"selector {kind!r} has no knob {name!r}; it has: {', '.join(known) or 'none'}. "
                f"Leave --config.selector.{name} out, or set another --config.selector.kind"
            )
    if values.get("fraction") == 0:
        del values["fraction"]
    return SELECTORS[kind](**values)


def loss_weights(
    supervised_bt,
    weight_bt,
    valid_bt,
    *,
    aggregate: str = "row_mean",
    rescale: str = "sequence",
    max_rescale: float = 0.0,
    gather: Callable = own_rows,
):
    """Final weights and denominator: loss = sum(weight * token_loss) / sum(denominator).

    Paper, eq. (5): A' = A q (sum l) / (sum l q), l = 1 on every valid token; then a mean over
    tokens counted *before* cropping. With the defaults this is the mean, over rows that supervise
    anything, of each row's mean over its supervised tokens. Dividing by supervised tokens after
    rescaling would count the release twice.

    Args:
      supervised_bt: bool[B, T], q = 1.
      weight_bt: float[B, T], the selector's weights. Positive outside supervised_bt only on a soft
        tail, where it is q as well; inside (IW-OPD) it multiplies the loss and leaves q alone.
      valid_bt: bool[B, T], l. Give Selection.usable_bt: a bad token counts nowhere.
      aggregate: "row_mean" = mean over rows of row means; "token_mean" = mean over tokens.
      rescale: "sequence" = the factor of each row (paper), "batch" = one for all rows, "none".
      max_rescale: upper limit of the factor; 0 = none (paper).
      gather: rows of this host -> rows of all hosts; called by "batch" alone, on every host.

    Returns:
      weight_bt: float32[B, T].
      denominator: float, this host's. Sum over hosts, then divide once. 0 = nothing supervised.

    Raises:
      ValueError: an unknown aggregate or rescale, or a limit below 1.
    """
    check_loss_weights(aggregate, rescale, max_rescale)
    valid_bt = np.asarray(valid_bt, bool)
    taught_b = (supervised_bt & valid_bt).any(axis=1)
    q_bt = np.where(supervised_bt, 1.0, np.asarray(weight_bt, np.float64))
    q_b = np.where(taught_b, np.sum(q_bt, axis=1, where=valid_bt), 0.0)
    length_b = np.where(taught_b, valid_bt.sum(axis=1), 0).astype(np.float64)
    scale_b = np.ones(len(q_b))
    if rescale == "sequence":
        scale_b = length_b / np.where(taught_b, q_b, 1.0)
    elif rescale == "batch":
        length, q = np.sum(gather(np.stack([length_b, q_b], axis=1)), axis=0)
        scale_b = np.full(len(q_b), length / q if q else 1.0)
    if max_rescale:
        scale_b = np.minimum(scale_b, max_rescale)
    if aggregate == "row_mean":
        scale_b = scale_b / np.where(taught_b, length_b, 1.0)
    final_bt = np.where(valid_bt & taught_b[:, None], weight_bt * scale_b[:, None], 0.0)
    denominator = float(taught_b.sum() if aggregate == "row_mean" else length_b.sum())
    return final_bt.astype(np.float32), denominator


def check_loss_weights(aggregate: str, rescale: str, max_rescale: float) -> None:
    """Raises ValueError naming the flag unless the knobs of `loss_weights` are in range."""
    check_in(aggregate, "aggregate", AGGREGATES, section="objective")
    check_in(rescale, "rescale", RESCALES, section="objective")
    must = "0 (no limit) or at least 1: rescaling only ever raises a weight"
    check(
        max_rescale == 0 or max_rescale >= 1,
        "max_rescale",
        max_rescale,
        must,
        0.0,
        section="objective",
    )
