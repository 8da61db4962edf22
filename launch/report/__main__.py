# SPDX-License-Identifier: Apache-2.0
"""One HTML file about one run, several runs, or a study. It opens offline.

  python -m launch.report --workdir=runs/quickstart
  python -m launch.report --workdir=runs/study --output=study.html
  python -m launch.report --workdir=runs/a --workdir=runs/b --output=ab.html

Each --workdir is a run (a directory with metrics.jsonl), a diagnosis, or a folder of them. Runs
whose configs differ in the seed alone are shown as one arm with an interval over its seeds.
"""

import argparse
import sys

from etils import epath

from configs import base, study
from launch import config_flags
from launch.report import evidence, page
from launch.study import collect
from opd_jax.settings import flatten
from opd_jax.workdir import preemption


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launch.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workdir", action="append", required=True, help="a run, or a folder of runs"
    )
    parser.add_argument("--output", default="", help="HTML file; default: WORKDIR/report.html")
    parser.add_argument("--title", default="", help="default: the names of the directories")
    parser.add_argument("--trajectories", type=int, default=60, help="at most so many; default 60")
    parser.add_argument(
        "--max_tokens", type=int, default=120_000, help="of all shown trajectories; default 120000"
    )
    args = parser.parse_args(config_flags.expand_home(sys.argv[1:] if argv is None else argv))
    try:
        runs = collect.find_runs(args.workdir)
        diagnoses = collect.find_diagnoses(args.workdir)
        if not runs and not diagnoses:
            raise ValueError(collect.NOTHING.format(", ".join(args.workdir)))
    except ValueError as error:
        parser.error(str(error))
    output = epath.Path(args.output or epath.Path(args.workdir[0]) / "report.html")
    title = args.title or ", ".join(args.workdir)
    output.write_text(make(runs, diagnoses, title, args.trajectories, args.max_tokens))
    print(f"{len(runs)} runs -> {output} ({output.stat().length / 2**20:.1f} MiB)")


def make(
    runs: list[collect.Run], diagnoses: dict[str, dict], title: str, limit: int, max_tokens: int
) -> str:
    """The report of some runs and diagnoses (collect.find_*) as HTML text."""
    trajectories, left_out = collect.trajectories(runs, limit, max_tokens)
    order = {name: i for i, name in enumerate(study.ARMS)}
    arms = sorted(
        collect.arms(runs, study.arm_of), key=lambda arm: order.get(arm.label, len(order))
    )
    return page.build(
        runs,
        arms,
        trajectories,
        title=title,
        base_config=flatten(base.get_config().to_dict()),
        left_out=left_out,
        extra=[
            ("Diagnosis", evidence.diagnosis(diagnoses)),
            ("Comparison", evidence.comparison(runs)),
        ],
    )


if __name__ == "__main__":
    with preemption.stoppable():
        main()
