# SPDX-License-Identifier: Apache-2.0
"""The weight of every token's loss: loss-mass preserving rescaling and the mean. Eq. (5). Host."""

from collections.abc import Callable

import numpy as np

from opd_jax.algorithm.objective import Objective
from opd_jax.algorithm.selector import local_rows

DEFAULT = Objective()


def loss_weights(
    supervised_bt: np.ndarray,
    weight_bt: np.ndarray,
    valid_bt: np.ndarray,
    objective: Objective = DEFAULT,
    gather: Callable[[np.ndarray], np.ndarray] = local_rows,
) -> tuple[np.ndarray, float, np.ndarray]:
    r"""Final weights and denominator: loss = sum(weight * token_loss) / sum(denominator). Eq. (5).

    .. math::
      A'_t = A_t \, q_t \, \frac{\sum_t l_t}{\sum_t l_t q_t}

    with l = 1 on every valid token; then a mean over tokens counted *before* cropping. With the
    defaults this is the mean, over rows that supervise anything, of each row's mean over its
    supervised tokens. Dividing by supervised tokens after rescaling would count the release twice.

    Args:
      supervised_bt: bool[B, T], q = 1.
      weight_bt: float[B, T], the selector's weights. Positive outside supervised_bt only on a soft
        tail, where it is q as well; inside (IW-OPD) it multiplies the loss and leaves q alone.
      valid_bt: bool[B, T], l. Give Signals.usable: a token without finite values counts nowhere.
      objective: its aggregate, rescale and max_rescale.
      gather: rows of this host -> rows of all hosts; rescale "batch" calls it, on every host.

    Returns:
      weight_bt: float32[B, T].
      denominator: float, this host's. Sum over hosts, then divide once. 0 = nothing supervised.
      factor_b: float64[B], the row's rescaling factor; 1 = nothing released, or nothing supervised.
    """
    valid_bt = np.asarray(valid_bt, bool)
    taught_b = (supervised_bt & valid_bt).any(axis=1)
    q_bt = np.where(supervised_bt, 1.0, np.asarray(weight_bt, np.float64))
    sum_lq_b = np.where(taught_b, np.sum(q_bt, axis=1, where=valid_bt), 0.0)
    sum_l_b = np.where(taught_b, valid_bt.sum(axis=1), 0).astype(np.float64)

    factor_b = np.ones(len(taught_b))
    if objective.rescale == "sequence":
        factor_b = np.divide(sum_l_b, sum_lq_b, out=factor_b, where=taught_b)
    elif objective.rescale == "batch":
        sum_l, sum_lq = np.sum(gather(np.stack([sum_l_b, sum_lq_b], axis=1)), axis=0)
        factor_b[taught_b] = sum_l / sum_lq if sum_lq else 1.0
    if objective.max_rescale:
        factor_b = np.minimum(factor_b, objective.max_rescale)

    scale_b, denominator = factor_b, sum_l_b.sum()  # a mean over tokens
    if objective.aggregate == "row_mean":
        scale_b, denominator = factor_b / np.maximum(sum_l_b, 1.0), taught_b.sum()
    weight_bt = np.where(valid_bt & taught_b[:, None], weight_bt * scale_b[:, None], 0.0)
    return weight_bt.astype(np.float32), float(denominator), factor_b
