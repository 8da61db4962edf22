# SPDX-License-Identifier: Apache-2.0
"""Trains, or resumes the run in the workdir.

  python -m launch --config=configs/quickstart.py --workdir=runs/quickstart
  python -m launch --config=configs/paper.py:1.7b --workdir=gs://BUCKET/run --config.seed=1

Exit codes: 0 finished, 1 an error (the message says what to set), 75 preempted: checkpointed, run
the same command again, 76 ended at once by a second signal. SIGTERM and Ctrl-C do the same.
"""

import sys

from absl import flags

from launch import config_flags, launcher

CONFIG = config_flags.define()
launcher.define()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "where the run writes, local or gs://; as runs/quickstart", required=True
)


def main(_) -> None:
    launcher.initialize(WORKDIR.value)
    from opd_jax import train
    from opd_jax.workdir import checkpoint, preemption

    checkpoint.quiet_orbax()
    try:
        train.run(CONFIG.value, WORKDIR.value)
        status = 0
    except preemption.Preempted:
        print(
            f"preempted after a checkpoint under {WORKDIR.value}; the same command resumes there",
            file=sys.stderr,
        )
        status = preemption.EXIT_PREEMPTED
    except (ValueError, FloatingPointError, OSError) as error:
        launcher.fail(f"ERROR: {_advised(error)}")
    finally:
        preemption.ignore()
    sys.exit(status)


def _advised(error: Exception) -> str:
    """The error's message, with what to do where it comes from the operating system."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    return (
        f"{error}. Put that right (free space, make it writable), or set --workdir to another "
        f"directory; the same command goes on from the last checkpoint under {WORKDIR.value}."
    )


if __name__ == "__main__":
    config_flags.run(main)
