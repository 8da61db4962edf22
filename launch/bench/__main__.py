# SPDX-License-Identifier: Apache-2.0
"""Measures one stage or a whole step: a table of medians, and one JSON object as the last line.

  python -m launch.bench --case=step                  # sizes of the peers' table, one thread
  python -m launch.bench --case=decode --vocab=4096 --json
  python -m launch.bench --case=update --threads=0 --student=2048,28,16,8,128,6144 --dtype=bfloat16

Each case's default sizes are those of the table in docs/speed.md. Weights are random: no checkpoint
is read. On CPU the process is pinned to --threads CPUs before JAX starts.
"""

import sys

from launch.bench import flags
from opd_jax.workdir import preemption


def main(argv: list[str]) -> None:
    args = flags.parse(argv, __doc__ or "")
    flags.pin(args.threads)
    from launch.bench import cases, measure

    measure.show(cases.run(args), json_only=args.json)


if __name__ == "__main__":
    with preemption.stoppable():
        main(sys.argv[1:])
