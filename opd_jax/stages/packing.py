# SPDX-License-Identifier: Apache-2.0
"""Rows of prompt + response packed into micro-batches of one fixed shape (host, numpy).

Attention is causal, so what stands after the last token that a loss (or a score) asks for cannot
change it: rows are cropped there, and several cropped rows share a packed row of L tokens, told
apart by segment ids and restarted positions. Cost then follows the tokens asked for, while every
micro-batch has the same compiled shape.

Dims: M packed rows per micro-batch, L tokens in each, N = L target positions in each. A *target*
is a response token that somebody asks for; the targets of a packed row stand at its front. Here,
and nowhere else, the next-token shift is made: response token t of a row is predicted by the hidden
state at the token before it.
"""

from dataclasses import dataclass

import numpy as np

from opd_jax.settings import Section, number


@dataclass(frozen=True)
class MicroBatch:
    """The one compiled shape of score and update."""

    rows: int  # packed rows, over all hosts
    tokens: int  # of a packed row
    chunk: int  # tokens whose logits exist at once, per device


@dataclass(frozen=True)
class Settings(Section):
    section = "pack"

    micro_batch_rows: int = number(0, least=0)  # packed rows, over all hosts; 0: `default_shape`
    micro_batch_tokens: int = number(0, least=0)  # of a packed row; 0: `default_shape`
    head_chunk: int = number(128, least=1)  # tokens whose logits exist at once, per device

    def micro_batch(
        self, prompt_len: int, response_len: int, batch_size: int, num_shards: int
    ) -> MicroBatch:
        """The shape for `batch_size` rows of at most prompt_len + response_len tokens."""
        rows, tokens = default_shape(
            prompt_len=prompt_len,
            response_len=response_len,
            batch_size=batch_size,
            num_shards=num_shards,
        )
        rows, tokens = self.micro_batch_rows or rows, self.micro_batch_tokens or tokens
        check_shape(prompt_len, response_len, rows, tokens)
        return MicroBatch(rows, tokens, self.head_chunk)


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Padding is token 0 in segment 0; unused targets have index 0, row -1."""

    tokens_ml: np.ndarray  # int32[M, L]
    positions_ml: np.ndarray  # int32[M, L], 0 at the first prompt token of every row
    segment_ids_ml: np.ndarray  # int32[M, L], 1, 2, ... along a packed row; 0 = padding
    index_mn: np.ndarray  # int32[M, N], column of the hidden state that predicts the target
    row_mn: np.ndarray  # int32[M, N], row of the rollout, -1 = unused
    t_mn: np.ndarray  # int32[M, N], response token of that row
    count_m: np.ndarray  # int32[M], targets

    @property
    def used_mn(self) -> np.ndarray:
        """bool[M, N], True = a token that was asked for."""
        return self.row_mn >= 0

    def gather(self, values_bt: np.ndarray, fill=0) -> np.ndarray:
        """Per-token values [B, T, ...] -> [M, N, ...], `fill` where unused."""
        values_mn = values_bt[self.row_mn, self.t_mn]
        values_mn[~self.used_mn] = fill
        return values_mn

    def scatter(self, values_mn: np.ndarray, into_bt: np.ndarray) -> None:
        """Writes the values [M, N, ...] of targets to their tokens in [B, T, ...], in place."""
        used_mn = self.used_mn
        into_bt[self.row_mn[used_mn], self.t_mn[used_mn]] = values_mn[used_mn]


@dataclass(frozen=True)
class Plan:
    """Which row goes where. Cheap; the arrays of a micro-batch are made when it is asked for."""

    shape: tuple[int, int]  # (M, L)
    sequence_bl: np.ndarray  # int32[B, P + T], prompt and response, contiguous across column P
    needed_bt: np.ndarray  # bool[B, T], True = somebody asks for this token
    prompt_len_b: np.ndarray  # int64[B]
    length_b: np.ndarray  # int64[B], tokens the model must see; 0 = nothing asked for, row left out
    offset_b: np.ndarray  # int64[B], first column of the row in its packed row
    packed: tuple[np.ndarray, ...]  # rows of every packed row, in the order they stand in it

    def __len__(self) -> int:
        """Number of micro-batches."""
        return -(-len(self.packed) // self.shape[0])

    @property
    def num_tokens(self) -> int:
        """Tokens the model sees, padding excluded."""
        return int(self.length_b.sum())

    @property
    def num_targets(self) -> int:
        """Tokens asked for."""
        return int(self.needed_bt.sum())

    def batch(self, u: int) -> Batch:
        """The arrays of micro-batch u; past the end an empty one (another host may have more)."""
        M, L = self.shape
        packed = self.packed[u * M : (u + 1) * M]
        rows_r = np.concatenate([*packed, np.zeros(0, np.int64)]).astype(np.int64)
        num_rows_p = [len(rows) for rows in packed]
        packed_r = np.repeat(np.arange(len(packed)), num_rows_p).astype(np.int64)
        segment_r = np.concatenate([np.arange(len(rows)) for rows in packed] or [rows_r]) + 1
        tokens, positions, segments = (np.zeros((M, L), np.int32) for _ in range(3))

        length_r = self.length_b[rows_r]
        position = _ranges(length_r)
        at, column = np.repeat(packed_r, length_r), np.repeat(self.offset_b[rows_r], length_r)
        column += position
        P = self.sequence_bl.shape[1] - self.needed_bt.shape[1]
        first_r = P - self.prompt_len_b[rows_r]
        tokens[at, column] = self.sequence_bl[
            np.repeat(rows_r, length_r), np.repeat(first_r, length_r) + position
        ]
        positions[at, column] = position
        segments[at, column] = np.repeat(segment_r, length_r)
        return Batch(tokens, positions, segments, *self._targets(rows_r, packed_r))

    def _targets(self, rows_r: np.ndarray, packed_r: np.ndarray) -> tuple[np.ndarray, ...]:
        """index_mn, row_mn, t_mn, count_m of the rows r that stand in the packed rows packed_r."""
        M, L = self.shape
        index, t_mn = np.zeros((M, L), np.int32), np.zeros((M, L), np.int32)
        row = np.full((M, L), -1, np.int32)
        r, t = np.nonzero(self.needed_bt[rows_r])
        count = np.bincount(packed_r[r], minlength=M).astype(np.int32)
        where = packed_r[r], _ranges(count)
        # The next-token shift: token t stands at prompt_len + t, its prediction one place before.
        index[where] = (self.offset_b + self.prompt_len_b)[rows_r[r]] + t - 1
        row[where] = rows_r[r]
        t_mn[where] = t
        return index, row, t_mn, count


def plan(
    *,
    prompt_bp: np.ndarray,
    prompt_valid_bp: np.ndarray,
    tokens_bt: np.ndarray,
    needed_bt: np.ndarray,
    micro_batch_rows: int,
    micro_batch_tokens: int,
) -> Plan:
    """Packs the rows, cropped at their last needed token, first-fit decreasing.

    Args:
      prompt_bp, prompt_valid_bp: int32, bool [B, P], left-padded; every row has a token.
      tokens_bt: int32[B, T], responses; token t is read when any token after it is needed.
      needed_bt: bool[B, T], True = a loss or a score is asked of this token.
      micro_batch_rows: M, packed rows of a micro-batch on this host.
      micro_batch_tokens: L, tokens of a packed row; at least P + T, so that any row fits.
    """
    B, T = tokens_bt.shape
    P = prompt_bp.shape[1]
    check_shape(P, T, micro_batch_rows, micro_batch_tokens)
    prompt_len_b = prompt_valid_bp.sum(axis=1, dtype=np.int64)
    if not prompt_valid_bp[:, -1:].all() or (np.diff(prompt_valid_bp.astype(np.int8)) < 0).any():
        raise ValueError(
            "prompt_valid_bp must be left-padded, a token at least per row: a response starts "
            "right after column P - 1. Build prompts with prompts.PromptStream."
        )
    any_b = needed_bt.any(axis=1)
    last_b = T - 1 - np.argmax(needed_bt[:, ::-1], axis=1)
    # The last needed token is predicted, not read: prompt_len + last, not + 1.
    length_b = np.where(any_b, prompt_len_b + last_b, 0)
    packed, offset_b = _first_fit_decreasing(length_b, micro_batch_tokens)
    # Packed rows with as many targets stand together: a micro-batch pays for its fullest's head.
    targets_b = needed_bt.sum(axis=1)
    packed.sort(key=lambda rows: -targets_b[rows].sum())
    return Plan(
        shape=(micro_batch_rows, micro_batch_tokens),
        sequence_bl=np.concatenate([prompt_bp, tokens_bt], axis=1),
        needed_bt=needed_bt,
        prompt_len_b=prompt_len_b,
        length_b=length_b,
        offset_b=offset_b,
        packed=tuple(packed),
    )


def default_shape(
    *,
    prompt_len: int,
    response_len: int,
    batch_size: int,
    num_shards: int = 1,
    target_tokens: int = 2048,
) -> tuple[int, int]:
    """(micro_batch_rows, micro_batch_tokens), both global, for `batch_size` rows in all.

    Packed rows just hold the longest row: longer ones would pack a little tighter, but
    attention costs their square. Each of `num_shards` gets at most `target_tokens` tokens of
    them together (larger ones would gain no speed), and a fully supervised batch makes eight
    micro-batches, because cost is rounded up to whole ones; but none is so small (512 tokens)
    that adding up its gradients costs as much as making them.
    """
    unit = 128 if prompt_len + response_len > 1024 else 32
    tokens = -(-(prompt_len + response_len) // unit) * unit
    batch_lines = -(-batch_size // num_shards)
    rows = min(max(-(-512 // tokens), batch_lines // 8), target_tokens // tokens, batch_lines)
    return num_shards * max(1, rows), tokens


def check_shape(prompt_len: int, response_len: int, rows: int, tokens: int) -> None:
    """Raises unless the longest possible row fits in a packed row."""
    longest = prompt_len + response_len
    if rows < 1:
        raise ValueError(
            f"micro_batch_rows={rows} leaves a micro-batch without rows. Set "
            f"--config.pack.micro_batch_rows=1 or more."
        )
    if tokens < longest:
        raise ValueError(
            f"micro_batch_tokens={tokens} is shorter than the longest possible row: prompt_len + "
            f"response_len = {prompt_len} + {response_len} = {longest}, and a row is never split. "
            f"Set --config.pack.micro_batch_tokens={longest}."
        )


def _first_fit_decreasing(length_b: np.ndarray, size: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows of every packed row, longest first, and the column at which each starts in it."""
    order = np.argsort(-length_b, kind="stable")
    order = order[length_b[order] > 0]
    free = np.full(len(order), size, np.int64)  # of every packed row that could be opened
    offset_b = np.zeros(len(length_b), np.int64)
    packed: list[list[int]] = []
    for b in order:
        at = int(np.argmax(free >= length_b[b]))  # an unopened one always fits
        if at == len(packed):
            packed.append([])
        offset_b[b] = size - free[at]
        free[at] -= length_b[b]
        packed[at].append(b)
    return [np.array(rows, np.int64) for rows in packed], offset_b


def _ranges(counts: np.ndarray) -> np.ndarray:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    ends = np.cumsum(counts, dtype=np.int64)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
