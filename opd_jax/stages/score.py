# SPDX-License-Identifier: Apache-2.0
"""What the teacher and a reference model say of a rollout: inference only, packed like the update.

All valid tokens of a row are scored; the head is applied on response positions alone, a chunk of
tokens at a time, and only what somebody reads leaves the device. Values that are not finite pass
through: selection counts and masks them.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opd_jax import parallel, structs
from opd_jax.algorithm.head import logprobs
from opd_jax.algorithm.objective import Targets
from opd_jax.model import qwen3
from opd_jax.stages import packing

IN_FLIGHT = 2  # micro-batches handed to the device before the host waits for an earlier one

TEACHER = {  # what is asked for -> what the device returns
    "teacher_logp_bt": "logp",
    "teacher_logp_btk": "candidate_logp",
    "teacher_entropy_bt": "entropy",
    "teacher_ids_btk": "top_ids",
    "teacher_ids_logp_btk": "top_logp",
    "teacher_hidden_btd": "hidden",
}
REFERENCE = {"reference_logp_bt": "logp"}


@dataclasses.dataclass(frozen=True)
class Score:
    """A compiled teacher pass; made by `build`."""

    mesh: Mesh
    backend: qwen3.Backend
    needs: frozenset[str]  # fields of structs.Scores
    packed_rows: int  # of a micro-batch on this host
    tokens: int  # of a packed row
    teacher: Callable  # (params, batch) -> dict of arrays [M, N, ...]
    reference: Callable | None

    def __call__(
        self, teacher_params: Any, rollout: structs.Rollout, reference_params: Any = None
    ) -> structs.Scores:
        """Scores of this host's rows; tokens that are not valid hold 0. Every host calls it.

        Fastest with the parameters of `qwen3.unstack_layers`.
        """
        plan = packing.plan(
            prompt_bp=rollout.prompt_bp,
            prompt_valid_bp=rollout.prompt_valid_bp,
            tokens_bt=rollout.tokens_bt,
            needed_bt=rollout.valid_bt,
            micro_batch_rows=self.packed_rows,
            micro_batch_tokens=self.tokens,
        )
        passes = [(TEACHER, self.teacher, teacher_params)]
        if self.reference is not None:
            passes.append((REFERENCE, self.reference, reference_params))
        scores = {}
        for names, model, params in passes:
            fields = {field: out for field, out in names.items() if field in self.needs}
            for packed, out in self._run(model, params, plan, rollout):
                for field, name in fields.items():
                    into_bt = scores.setdefault(field, _zeros(rollout, out[name]))
                    packed.scatter(out[name], into_bt)
        return structs.Scores(**scores)

    def _run(
        self, model: Callable, params: Any, plan: packing.Plan, rollout: structs.Rollout
    ) -> Iterator[tuple[packing.Batch, dict[str, np.ndarray]]]:
        """Micro-batches and what the model says of them; the device works ahead of the host."""
        running = deque()
        for u in range(max(1, int(parallel.max_over_hosts(len(plan))))):
            packed = plan.batch(u)
            batch = parallel.to_global(self.mesh, make_batch(packed, rollout))
            running.append((packed, model(params, batch)))
            if len(running) > IN_FLIGHT:
                packed, out = running.popleft()
                yield packed, parallel.to_host(out)
        for packed, out in running:
            yield packed, parallel.to_host(out)


def build(
    config: qwen3.Qwen3Config,
    needs: Iterable[str],
    shape: packing.MicroBatch,
    *,
    backend: qwen3.Backend,
    mesh: Mesh,
    num_top: int = 0,
    vocab_size: int | None = None,
    reference: qwen3.Qwen3Config | None = None,
) -> Score:
    """The teacher pass.

    Args:
      config: the teacher's.
      needs: what selector and objective read; names that are no field of `structs.Scores`
        ("spans") are other stages' business.
      backend: its `shard` should be `parallel.shard_activations(mesh)`.
      num_top: J, size of the teacher's own support (objective.top_k).
      vocab_size: ids from here on get no probability; None = the teacher's own vocabulary.
      reference: of the reference model, if "reference_logp_bt" is needed.
    """
    needs = frozenset(needs) & {field.name for field in dataclasses.fields(structs.Scores)}
    parallel.check_rows(shape.rows, "pack.micro_batch_rows", mesh)
    parallel.check_model(config, mesh, "teacher")
    forward = functools.partial(
        _build_forward, backend=backend, mesh=mesh, num_top=num_top, vocab_size=vocab_size
    )
    reference_pass = None
    if reference is not None and not needs.isdisjoint(REFERENCE):
        parallel.check_model(reference, mesh, "reference")
        outputs = {REFERENCE[name] for name in needs & REFERENCE.keys()}
        reference_pass = forward(reference, outputs, shape.chunk)
    outputs = {TEACHER[name] for name in needs & TEACHER.keys()}
    return Score(
        mesh=mesh,
        backend=backend,
        needs=needs,
        packed_rows=shape.rows // parallel.host_group(mesh).count,
        tokens=shape.tokens,
        teacher=forward(config, outputs, shape.chunk),
        reference=reference_pass,
    )


def make_batch(packed: packing.Batch, rollout: structs.Rollout) -> dict:
    """What the device needs of one micro-batch; host rows [M, ...]."""
    return dict(
        tokens_ml=packed.tokens_ml,
        positions_ml=packed.positions_ml,
        segment_ids_ml=packed.segment_ids_ml,
        index_mn=packed.index_mn,
        count_m=packed.count_m,
        token_mn=packed.gather(rollout.tokens_bt),
        candidates_mnk=packed.gather(rollout.candidates_btk),
    )


def _build_forward(
    config: qwen3.Qwen3Config,
    outputs: set[str],
    chunk: int,
    *,
    backend: qwen3.Backend,
    mesh: Mesh,
    num_top: int,
    vocab_size: int | None,
) -> Callable:
    """Compiled (params, batch) -> {output: [M, N, ...]}, rows divided over the batch axes."""
    local_chunk = chunk * parallel.num_batch_shards(mesh)  # over all packed rows

    def forward(params: Any, batch: dict) -> dict[str, jax.Array]:
        hidden_mld = qwen3.trunk(
            config,
            params,
            batch["tokens_ml"],
            batch["positions_ml"],
            batch["segment_ids_ml"],
            backend,
        )
        hidden_mnd = jnp.take_along_axis(hidden_mld, batch["index_mn"][..., None], axis=1)
        out = {"hidden": hidden_mnd}
        if outputs - out.keys():
            head_vd = qwen3.head_vd(config, params)
            out |= logprobs(
                hidden_mnd,
                backend.shard(head_vd, ("vocab", None)),  # gathered once, not once per chunk
                Targets(
                    token=batch["token_mn"],
                    candidates_k=batch["candidates_mnk"] if "candidate_logp" in outputs else None,
                ),
                batch["count_m"],
                num_top=num_top if outputs & {"top_ids", "top_logp"} else 0,
                entropy="entropy" in outputs,
                chunk=local_chunk,
                vocab_size=vocab_size or config.vocab_size,
            )
        return {name: out[name] for name in outputs}

    return jax.jit(forward, out_shardings=parallel.batch_sharding(mesh))


def _zeros(rollout: structs.Rollout, like_mn: np.ndarray) -> np.ndarray:
    return np.zeros((*rollout.tokens_bt.shape, *like_mn.shape[2:]), like_mn.dtype)
