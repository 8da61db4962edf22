# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint as a Hugging Face directory that transformers and vLLM load.

  python -m launch.export --workdir=runs/quickstart --output=exported
  python -m launch.export --workdir=gs://BUCKET/run --output=student-40 --step=40 --dtype=bfloat16

Tokenizer, chat template and generation settings are those of the student the run began with. A run
that has finished holds its last student already, in WORKDIR/student. An earlier export is replaced;
any other directory only with --overwrite, and those that are being read never.
"""

import pathlib
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath

from launch import config_flags
from opd_jax.model import hf, qwen3
from opd_jax.workdir import checkpoint, owner, records

MARK = "export.json"  # says that a directory is an export: from where, of which step


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "of the run", required=True)
    flags.DEFINE_string("output", None, "directory to write", required=True)
    flags.DEFINE_bool("overwrite", False, "replace an --output that is no export of this command")
    flags.DEFINE_integer("step", -1, "of the checkpoint; -1 = the newest")
    flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16"], '"" = as trained')


def export(
    workdir: str, output: str, step: int | None = None, dtype: str = "", overwrite: bool = False
) -> int:
    """Writes checkpoint `step` (None = the newest) of a run to `output` and returns its step.

    Args:
      dtype: of the written weights; "" = as trained.
      overwrite: `output` may be a model that this command has not written.

    Raises:
      ValueError: there is no such checkpoint, or `output` must not be replaced.
    """
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
    student = config["student"]["path"]
    source = hf.resolve(student)
    reads = {"the run": workdir, "the student that the run began with": source}
    check_output(output, reads | {f"--config.student.path={student}": student}, overwrite)
    step, params = checkpoint.Checkpoints(str(directory), read_only=True).read_params(step)
    if dtype:
        params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
    hf.save(qwen3.Qwen3Config.from_hf(source), params, output, source=source)
    records.write_json(output, MARK, dict(workdir=str(workdir), step=step, commit=owner.commit()))
    return step


def check_output(output: str, reads: Mapping[str, Any], overwrite: bool) -> None:
    """Raises unless `output` may be replaced as a whole, which is what saving a model does.

    Args:
      reads: what the export reads, name -> directory; it is never replaced, nor what holds it.
    """
    new = f"as --output={shlex.quote(output.rstrip('/') + '-exported')}"
    for name, directory in reads.items():
        if _holds(output, directory):
            raise ValueError(
                f"--output={output} is, or holds, what the export reads ({name}), and would be "
                f"replaced as a whole. Set --output to a new directory, {new}"
            )
    target = epath.Path(output)
    if overwrite or not target.exists() or (target / MARK).exists():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise ValueError(
            f"--output={output} exists and is no export of this command: it would be deleted. Set "
            f"--output to a new directory, {new}; or add --overwrite to replace the model there"
        )


def _holds(output, directory) -> bool:
    """True = `directory` is `output` or lies below it, whatever links lead there."""
    if "://" in str(output) or "://" in str(directory):
        return f"{directory}/".startswith(f"{str(output).rstrip('/')}/")
    return pathlib.Path(directory).resolve().is_relative_to(pathlib.Path(output).resolve())


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"ERROR: {argv[1:]} mean nothing here; flags are written --NAME=VALUE")
    values = flags.FLAGS
    step = None if values.step < 0 else values.step
    try:
        step = export(values.workdir, values.output, step, values.dtype, values.overwrite)
    except (ValueError, OSError) as error:
        sys.exit(f"ERROR: {error}")
    print(f"checkpoint {step} of {values.workdir} is now the model {values.output}")


if __name__ == "__main__":
    define_flags()
    config_flags.run(main)
