# SPDX-License-Identifier: Apache-2.0
"""The sampler: prompts in, responses with what the student thought of each token out.

Decoding has a fixed number of slots, one row of the cache each. Between chunks of decode steps the
host looks at which rows ended and puts the next prompts into their slots, so that one long response
does not hold the others back:

  prepare   weights gathered into decode sharding and cast, once per call
  insert    prefill prompts and copy their keys and values into free slots
  decode    a compiled loop of single-token steps; ends early when enough slots are free
  record    the host files what came out under each row; back to insert until nothing is left

Token t of row b is drawn with fold_in(fold_in(key, row_b), t): the same rollouts whatever the
slots, the chunk, the mesh or the number of hosts. Every host takes the same decisions, from values
that all of them hold, so that all make the same calls. Prompts come padded on the left and are
moved to the left edge: column of the cache = position.

A row stops at EOS, at its length limit, or when its logits are not finite (counted, never raised).
A later online release can stop a row in the same way: by lowering its limit between two chunks.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opd_jax import parallel
from opd_jax.model import qwen3
from opd_jax.model.backend import DTYPES
from opd_jax.settings import choice, number
from opd_jax.stages import decode, sampling
from opd_jax.structs import Prompts, Rollout, Vocabulary


@dataclasses.dataclass
class Stats:
    """Counts of one call, over all hosts except where it says so. Occupancy = busy / slot_steps."""

    num_steps: int = 0  # decode steps
    busy_steps: int = 0  # slot-steps that worked on a row
    slot_steps: int = 0  # num_steps x slots
    num_refills: int = 0  # calls of insert
    num_nonfinite: int = 0  # rows of this host that ended on logits that were not finite


# --- which row sits where: host arithmetic, the same on every host ---


class Schedule:
    """Rows waiting, rows in slots. Dims: N batch shards, S slots of a shard, R rows of a refill.

    Row numbers count the rows of a host group (`parallel.HostGroup`): only that group knows their
    tokens, but all hosts follow all groups.
    """

    def __init__(self, group_of_shard: np.ndarray, slots_per_shard: int, num_rows: int):
        self.group_of_shard = np.asarray(group_of_shard)
        self.row_ns = np.full((len(self.group_of_shard), slots_per_shard), -1)  # -1 = free
        self.num_rows = num_rows  # of each host group
        self.next_row = np.zeros(self.group_of_shard.max() + 1, int)  # of each host group

    @property
    def waiting(self) -> bool:
        return bool((self.next_row < self.num_rows).any())

    @property
    def busy(self) -> bool:
        return bool((self.row_ns >= 0).any())

    def assign(self, width: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Seats waiting rows in free slots, at most `width` per shard. None = nothing to seat.

        Returns:
          row_nr: [N, R], row to prefill, -1 = none.
          source_ns: int32[N, S], which of the shard's R rows moves into the slot, -1 = none.
        """
        row_nr = np.full((len(self.row_ns), width), -1)
        source_ns = np.full(self.row_ns.shape, -1, np.int32)
        for n, group in enumerate(self.group_of_shard):
            free = np.flatnonzero(self.row_ns[n] < 0)
            count = min(len(free), width, int(self.num_rows - self.next_row[group]))
            row_nr[n, :count] = self.next_row[group] + np.arange(count)
            source_ns[n, free[:count]] = np.arange(count)
            self.row_ns[n, free[:count]] = row_nr[n, :count]
            self.next_row[group] += count
        return (row_nr, source_ns) if (source_ns >= 0).any() else None

    def release(self, active_ns: np.ndarray) -> None:
        self.row_ns[~active_ns] = -1


class _Record:
    """The rollout of this host's rows while it grows."""

    def __init__(self, prompts: Prompts, response_len: int, num_candidates: int, pad_id: int):
        shape = (len(prompts.tokens_bp), response_len)
        self.rollout = Rollout(
            prompt_bp=prompts.tokens_bp,
            prompt_valid_bp=prompts.valid_bp,
            tokens_bt=np.full(shape, pad_id, np.int32),
            valid_bt=np.zeros(shape, bool),
            sampler_logp_bt=np.zeros(shape, np.float32),
            candidates_btk=np.zeros((*shape, num_candidates), np.int32),
            candidate_logp_btk=np.zeros((*shape, num_candidates), np.float32),
            entropy_bt=np.zeros(shape, np.float32),
            finished_b=np.zeros(shape[0], bool),
        )
        self.length_b = np.zeros(shape[0], int)

    def add(self, row_s: np.ndarray, drawn: decode.Drawn, eos_ids: tuple[int, ...]) -> None:
        """Files a chunk: row_s is the row of each of this host's slots, -1 = free."""
        s, j = np.nonzero(drawn.emitted_sj & (row_s >= 0)[:, None])
        row, t = row_s[s], self.length_b[row_s[s]] + j
        out = self.rollout
        out.valid_bt[row, t] = True
        out.tokens_bt[row, t] = drawn.token_sj[s, j]
        out.sampler_logp_bt[row, t] = drawn.logp_sj[s, j]
        out.candidates_btk[row, t] = drawn.candidates_sjk[s, j]
        out.candidate_logp_btk[row, t] = drawn.candidate_logp_sjk[s, j]
        out.entropy_bt[row, t] = drawn.entropy_sj[s, j]
        out.finished_b[row] |= np.isin(drawn.token_sj[s, j], eos_ids)
        np.add.at(self.length_b, row, 1)


# --- the sampler ---


@dataclasses.dataclass(frozen=True)
class Settings(sampling.Knobs):
    """The config's section `rollout`: how the student samples, and how much at once."""

    by: str = choice("student", ("student", "teacher"))
    response_len: int = number(192, least=1)  # T, tokens at most, EOS included
    num_candidates: int = number(4, least=1)  # K
    num_slots: int = number(0, least=0)  # rows decoded at once, over all hosts; 0 = all of a call
    decode_chunk: int = number(32, least=1)  # decode steps between two looks of the host
    # Columns of the cache at the start, doubled whenever the longest row outgrows it (each size is
    # compiled once); 0 = at once as long as the longest possible row.
    first_cache: int = number(0, least=0)
    head_dtype: str = choice("", ("", *DTYPES))  # of the head while decoding; "" = compute dtype

    @property
    def knobs(self) -> sampling.Knobs:
        return sampling.Knobs(self.temperature, self.top_k, self.top_p, self.min_p)


def build(
    config: qwen3.Qwen3Config,
    settings: Settings,
    vocabulary: Vocabulary,
    *,
    mesh: Mesh,
    backend: qwen3.Backend | None = None,
) -> "Sampler":
    """A sampler for one model shape.

    Args:
      mesh: of `parallel.build_mesh`; slots are divided over its batch axes.
      backend: None = plain float32 on this mesh.
    """
    if settings.num_slots:
        parallel.check_rows(settings.num_slots, "rollout.num_slots", mesh)
    if backend is None:
        backend = qwen3.Backend(shard=parallel.shard_activations(mesh))
    spec = decode.Spec(
        config=config,
        vocab_size=vocabulary.size,
        knobs=settings.knobs,
        num_candidates=settings.num_candidates,
        eos_ids=tuple(vocabulary.eos_ids),
        chunk=settings.decode_chunk,
        mesh=mesh,
        backend=backend,
        head_dtype=jnp.dtype(settings.head_dtype or backend.compute_dtype),
    )
    return Sampler(
        spec, vocabulary.pad_id, settings.response_len, settings.num_slots, settings.first_cache
    )


@dataclasses.dataclass(frozen=True)
class Sampler:
    """See `build`."""

    spec: decode.Spec
    pad_id: int
    response_len: int
    num_slots: int
    first_cache: int

    def of(self, config: qwen3.Qwen3Config) -> "Sampler":
        """The same sampler for another model."""
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, config=config))

    def __call__(self, params: Any, prompts: Prompts, key: jax.Array) -> Rollout:
        return self.run(params, prompts, key)[0]

    def run(
        self,
        params: Any,
        prompts: Prompts,
        key: jax.Array,
        *,
        limit_b: np.ndarray | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> tuple[Rollout, Stats]:
        """Samples one response per prompt of this host; the rollout's rows are in their order.

        Args:
          params: of the student, as trained; not donated.
          limit_b: int[B], response tokens at most, of each row; None = response_len for all.
          between: called after every chunk, equally often on all hosts; may raise to give up.
        """
        B, P = prompts.tokens_bp.shape
        limit_b = np.full(B, self.response_len) if limit_b is None else limit_b
        limit_b = np.minimum(limit_b, self.response_len).astype(np.int32)
        mine, group_of_shard = _host_groups(self.spec.mesh)
        per_shard = self._slots_per_shard(B, len(mine.shards))
        schedule = Schedule(group_of_shard, per_shard, B)
        # Refills come a few rows at a time; with a slot for every row, all at once.
        width = per_shard if B <= per_shard * len(mine.shards) else max(1, per_shard // 4)
        sizes = self.cache_sizes(P)

        weights = decode.prepare(self.spec, params)
        slots = decode.init(self.spec, per_shard * len(group_of_shard), sizes[0])
        key_data = parallel.replicate(self.spec.mesh, jax.device_get(jax.random.key_data(key)))
        tokens_bp, length_b = _left_aligned(prompts)
        record = _Record(prompts, self.response_len, self.spec.num_candidates, self.pad_id)
        stats, own = Stats(), list(mine.shards)
        longest = 0  # response tokens that any row can have by now

        while True:
            while seats := schedule.assign(width):
                row_r, source_s = (x[own].reshape(-1) for x in seats)
                rows = (tokens_bp, length_b, prompts.row_b.astype(np.int32), limit_b)
                rows = decode.Arrivals(*(x[row_r] for x in rows))
                rows = parallel.to_global(self.spec.mesh, rows)
                source_s = parallel.to_global(self.spec.mesh, source_s)
                slots = decode.insert(self.spec, weights, slots, key_data, rows, source_s)
                stats.num_refills += 1
            if not schedule.busy:
                return record.rollout, stats
            longest = min(longest + self.spec.chunk, self.response_len)
            slots = self._grown(slots, P + longest, sizes)
            # Leave the loop when a refill's worth of slots became free and rows wait for them.
            stop = width * len(group_of_shard) if schedule.waiting else schedule.row_ns.size + 1
            stop = parallel.replicate(self.spec.mesh, np.int32(stop))
            slots, drawn, control = decode.decode(self.spec, weights, slots, stop)
            drawn, control = parallel.to_host((drawn, control))
            record.add(schedule.row_ns[own].reshape(-1), drawn, self.spec.eos_ids)
            schedule.release(control.active_s.reshape(schedule.row_ns.shape))
            stats.num_steps += int(control.num_steps)
            stats.busy_steps += int(control.num_busy)
            stats.slot_steps += int(control.num_steps) * schedule.row_ns.size
            stats.num_nonfinite += int(drawn.nonfinite_s.sum())
            between()

    def _slots_per_shard(self, num_rows: int, own_shards: int) -> int:
        shards = parallel.num_batch_shards(self.spec.mesh)
        return self.num_slots // shards if self.num_slots else -(-num_rows // own_shards)

    def cache_sizes(self, prompt_len: int) -> list[int]:
        """Columns of the cache, from the first size to the largest."""
        most = prompt_len + self.response_len
        if parallel.platform(self.spec.mesh) != "cpu":  # whole tiles
            most = -(-most // 128) * 128
        sizes = [max(self.first_cache, prompt_len) if self.first_cache else most]
        while sizes[-1] < most:
            sizes.append(2 * sizes[-1])
        return [*sizes[:-1], most]

    def _grown(self, slots: decode.Slots, needed: int, sizes: list[int]) -> decode.Slots:
        size = next(size for size in sizes if size >= max(needed, slots.cache.num_columns))
        return slots if size == slots.cache.num_columns else decode.grow(self.spec, slots, size)


def _host_groups(mesh: Mesh) -> tuple[parallel.HostGroup, np.ndarray]:
    """This host's group; the group of every batch shard."""
    mine = parallel.host_group(mesh)
    group_of_shard = np.zeros(parallel.num_batch_shards(mesh), int)
    for i, leader in enumerate(mine.leaders):
        group_of_shard[list(parallel.host_group(mesh, leader).shards)] = i
    return mine, group_of_shard


def _left_aligned(prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """Prompt tokens from column 0 on, int32[B, P], and how many, int32[B]."""
    order = np.argsort(~prompts.valid_bp, axis=1, kind="stable")
    tokens = np.take_along_axis(prompts.tokens_bp, order, axis=1).astype(np.int32)
    length_b = prompts.valid_bp.sum(axis=1, dtype=np.int32)
    return np.where(np.arange(tokens.shape[1])[None] < length_b[:, None], tokens, 0), length_b
