# SPDX-License-Identifier: Apache-2.0
"""The batch of an update that was not finite, kept so that it can be looked at and replayed.

WORKDIR/faults/step_000012/batch.npz     rollout, scores and weights of this run's first host
WORKDIR/faults/step_000012/checkpoints/  the training state; the skipped update left it as it was

`python -m launch.replay --fault=WORKDIR/faults/step_000012` runs that update again and names what
is not finite.
"""

import dataclasses
import io

import jax
import numpy as np
from etils import epath

from opd_jax import structs
from opd_jax.workdir import checkpoint


def folder(workdir, step: int) -> epath.Path:
    return epath.Path(workdir) / "faults" / f"step_{step:06d}"


def dump(workdir, step: int, taken, state, config: dict) -> None:
    """Writes the batch of update `step` and the state it was tried on. Every process calls it.

    `taken` has the fields rollout, scores and supervision (step.Step).
    """
    place = folder(workdir, step)
    supervision = taken.supervision
    arrays = {"weight_bt": supervision.weight_bt}
    arrays["denominator"] = np.float64(supervision.denominator)
    for kind, struct in (("rollout", taken.rollout), ("scores", taken.scores)):
        for field in dataclasses.fields(struct):
            value = getattr(struct, field.name)
            if value is not None:
                value = np.asarray(value)
                # npz knows no bfloat16; float32 holds it exactly.
                wide = value.astype(np.float32) if value.dtype.kind == "V" else value
                arrays[f"{kind}/{field.name}"] = wide
    if jax.process_index() == 0:
        place.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        (place / "batch.npz").write_bytes(buffer.getvalue())
    one = checkpoint.Settings(keep_last=1, keep_best=0)
    saved = checkpoint.Checkpoints(str(place / "checkpoints"), one)
    if step not in saved.steps():
        saved.save(step, state, cursor={}, config=config, metric=None)
    saved.close()


def read(place) -> tuple[structs.Rollout, structs.Scores, np.ndarray, float]:
    """rollout, scores, weight_bt and denominator of a dumped batch."""
    with np.load(io.BytesIO((epath.Path(place) / "batch.npz").read_bytes())) as stored:
        arrays = {name: stored[name] for name in stored.files}

    def rebuild(kind, cls):
        prefix = f"{kind}/"
        own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        return cls(**own)

    return (
        rebuild("rollout", structs.Rollout),
        rebuild("scores", structs.Scores),
        arrays["weight_bt"],
        float(arrays["denominator"]),
    )
