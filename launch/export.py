# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint as a Hugging Face directory that transformers and vLLM load.

  python -m launch.export --workdir=runs/quickstart --output=exported
  python -m launch.export --workdir=gs://BUCKET/run --output=student-40 --step=40 --dtype=bfloat16

Tokenizer, chat template and generation settings are those of the student the run began with. A run
that has finished holds its last student already, in WORKDIR/student.
"""

import sys

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath

from launch import config_flags
from opd_jax.model import hf, qwen3
from opd_jax.workdir import checkpoint, records


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "of the run", required=True)
    flags.DEFINE_string("output", None, "directory to write", required=True)
    flags.DEFINE_integer("step", -1, "of the checkpoint; -1 = the newest")
    flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16"], '"" = as trained')


def export(workdir: str, output: str, step: int | None = None, dtype: str = "") -> int:
    """Writes checkpoint `step` (None = the newest) of a run to `output` and returns its step."""
    config = records.read_json(workdir, "config.json")
    if "student" not in config:
        raise ValueError(
            f"--workdir={workdir} holds no run: there is no config.json of one. Set --workdir to "
            "what `python -m launch --workdir=DIR` wrote, as --workdir=runs/quickstart"
        )
    directory = epath.Path(workdir) / "checkpoints"
    if not directory.exists():
        raise ValueError(
            f"--workdir={workdir} has no checkpoint yet: the first comes after "
            f"config.checkpoint.every_steps={config['checkpoint']['every_steps']} updates"
        )
    source = hf.resolve(config["student"]["path"])
    step, params = checkpoint.Checkpoints(directory, read_only=True).read_params(step)
    if dtype:
        params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
    hf.save(qwen3.Qwen3Config.from_hf(source), params, output, source=source)
    return step


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"ERROR: {argv[1:]} mean nothing here; flags are written --NAME=VALUE")
    values = flags.FLAGS
    step = None if values.step < 0 else values.step
    try:
        step = export(values.workdir, values.output, step, values.dtype)
    except (ValueError, OSError) as error:
        sys.exit(f"ERROR: {error}")
    print(f"checkpoint {step} of {values.workdir} is now the model {values.output}")


if __name__ == "__main__":
    define_flags()
    config_flags.run(main)
