# SPDX-License-Identifier: Apache-2.0
"""Repeats the update of a batch that was not finite, and names what is not finite.

python -m launch.replay --fault=runs/quickstart/faults/step_000012
"""

import dataclasses
import tempfile

import jax
import ml_collections as mlc
import numpy as np
from absl import flags
from etils import epath

from launch import config_flags
from opd_jax import build
from opd_jax.workdir import checkpoint, faults, records


def define_flags() -> None:
    flags.DEFINE_string("fault", None, "WORKDIR/faults/step_... of the run", required=True)


def nonfinite(name: str, tree) -> list[str]:
    """One line per floating array of `tree` that holds NaN or infinity."""
    lines = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        x = np.asarray(leaf)
        if x.dtype.kind not in "iub":
            bad = ~np.isfinite(x.astype(np.float32))
            if bad.any():
                first = tuple(int(i) for i in np.argwhere(bad)[0])
                where = name + jax.tree_util.keystr(path)
                lines.append(f"{where}: {bad.sum()} of {x.size} not finite, first at {first}")
    return lines


def replay(fault: str) -> str:
    """Repeats the update on the stored batch, with its stored scores. Returns the findings."""
    folder = epath.Path(fault)
    rolled, scores, weight_bt, denominator = faults.read(folder)
    lines = nonfinite("rollout", dataclasses.asdict(rolled))
    lines += nonfinite("scores", {k: v for k, v in vars(scores).items() if v is not None})
    lines += nonfinite("weight", weight_bt)
    config = mlc.ConfigDict(records.read_json(folder.parent.parent, "config.json"))
    with tempfile.TemporaryDirectory() as scratch, build.build(config, scratch) as run:
        update = run.stages.update
        shapes = build.state_shapes(update, run.student)
        restored = checkpoint.Checkpoints(str(folder / "checkpoints")).restore(shapes)
        if restored is None:
            raise ValueError(
                f"--fault={fault} holds no checkpoint: set it to WORKDIR/faults/step_..."
            )
        lines += nonfinite("params", restored.state.params)
        batch = rolled, scores, weight_bt, denominator
        _, sums = update(restored.state, *batch, run.stages.frozen.teacher_head_vd)
        for name, (total, count) in sorted(jax.device_get(sums).items()):
            lines.append(f"{name:<28}{float(total) / max(float(count), 1):>14.6g}")
    return "\n".join(lines)


def main(_) -> None:
    print(replay(flags.FLAGS.fault))


if __name__ == "__main__":
    define_flags()
    config_flags.run(main)
