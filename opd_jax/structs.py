# SPDX-License-Identifier: Apache-2.0
"""What crosses a stage border. Arrays are numpy: each host holds its own rows of the batch.

Dims: B rows of this host, P prompt tokens, T response tokens, K candidates, D teacher width.
Index t of every response array means response token t; a log-probability at t is that of token t
given everything before it.
"""

from typing import Any, NamedTuple

import numpy as np
from flax import struct


class Vocabulary(NamedTuple):
    """Token ids that sampling must know."""

    size: int  # real tokens, the tokenizer's; a head may have more rows, which are never drawn
    eos_ids: tuple[int, ...]  # a response ends with any of them
    pad_id: int


@struct.dataclass
class Prompts:
    """Prompts of one step."""

    tokens_bp: np.ndarray  # int32[B, P], left-padded
    valid_bp: np.ndarray  # bool[B, P], True = real token
    row_b: np.ndarray  # int32[B], index of the row in the global batch: names its sampling key
    examples: tuple = struct.field(pytree_node=False, default=())  # task.Example per row


@struct.dataclass
class Rollout:
    """Responses the student sampled, with what the sampler saw on the way."""

    prompt_bp: np.ndarray  # int32[B, P], left-padded
    prompt_valid_bp: np.ndarray  # bool[B, P], True = real token
    tokens_bt: np.ndarray  # int32[B, T], padded after the end
    valid_bt: np.ndarray  # bool[B, T], True = sampled token, EOS included
    sampler_logp_bt: np.ndarray  # float32[B, T], nats, of the distribution actually sampled
    candidates_btk: np.ndarray  # int32[B, T, K], the student's top-K ids, best first
    candidate_logp_btk: np.ndarray  # float32[B, T, K], nats, at T = 1, over all V
    entropy_bt: np.ndarray  # float32[B, T], nats, of the student at temperature 1
    finished_b: np.ndarray  # bool[B], True = ended with EOS, False = cut by the length limit


@struct.dataclass
class Scores:
    """What the teacher and a reference model say of a rollout. None = not needed by this run."""

    teacher_logp_bt: np.ndarray | None = None  # float32[B, T], nats, of the sampled token
    teacher_logp_btk: np.ndarray | None = None  # float32[B, T, K], nats, of the candidates
    teacher_entropy_bt: np.ndarray | None = None  # float32[B, T], nats
    teacher_ids_btk: np.ndarray | None = None  # int32[B, T, J], its own top ids, best first
    teacher_ids_logp_btk: np.ndarray | None = None  # float32[B, T, J], nats, at these ids
    teacher_hidden_btd: Any | None = None  # compute dtype [B, T, D], state that predicts token t
    reference_logp_bt: np.ndarray | None = None  # float32[B, T], nats, of the sampled token


@struct.dataclass
class Supervision:
    """What a step does with each token of this host's rows: the selection stage's result."""

    supervised_bt: np.ndarray  # bool[B, T], True = supervised at full strength
    weight_bt: np.ndarray  # float32[B, T], of the token's loss, rescaling included; 0 = none
    denominator: float  # this host's: loss = sum(weight * token_loss) / sum(denominator)
    release_b: np.ndarray  # int[B], first token no longer supervised; = length: nothing released
    gain_b: np.ndarray  # float[B], nats; -inf = no drop, NaN = not sought
    num_segments_b: np.ndarray  # int[B]; 0 where the selector reads no segments
    rescale_b: np.ndarray  # float[B], the row's rescaling factor of eq. (5); 1 = nothing released
    usable_bt: np.ndarray  # bool[B, T], valid, and every value that the run trains on is finite
    margin_bt: np.ndarray | None  # float32[B, T], nats; NaN where not usable
    spans_b: list | None  # per row, token spans of its segments; None = not asked for
    stats: dict[str, tuple[float, float]]  # name -> (sum, count) over this host's rows
