# SPDX-License-Identifier: Apache-2.0
"""The tables of a study: every arm against full OPD and the best fixed prefix, paired by seed.

  python -m launch.study --workdir=runs/study
  python -m launch.study --results=configs/results/collapse --results=configs/results/natural \\
      --readme=docs/evidence.md

Arms of configs/study.py have the names given there, any other arm is named by the keys in which it
differs. From a workdir of runs the command also writes WORKDIR/study.json, the few numbers that the
tables need, and WORKDIR/study.md. --results makes the same tables from such a file, each under the
name of its folder; a diagnosis.json there (launch.diagnose) is shown too. --readme puts it all
between two marks <!-- study --> of a Markdown file.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from etils import epath

from configs import study as arms
from launch import config_flags, diagnose
from launch.study import collect, tables
from opd_jax.workdir import preemption

MARK = "<!-- study -->"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launch.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--workdir", help="the folder of a study's runs")
    given.add_argument(
        "--results", action="append", help="a folder with study.json, diagnosis.json or both"
    )
    parser.add_argument("--readme", default="", help="Markdown file to write the tables into")
    args = parser.parse_args(config_flags.expand_home(sys.argv[1:] if argv is None else argv))
    try:
        text = of_workdir(args.workdir) if args.workdir else of_results(args.results)
    except ValueError as error:
        parser.error(str(error))
    if args.readme:
        path = epath.Path(args.readme)
        path.write_text(into_readme(path.read_text(), text))
    print(text)


def of_workdir(workdir: str) -> str:
    """The tables of a workdir's runs; their numbers are stored beside them."""
    stored, folder = read_runs(workdir), epath.Path(workdir)
    text = as_markdown(stored, {})
    lines = ",\n".join(json.dumps(run) for run in stored["runs"])
    unfinished = json.dumps(stored["unfinished"])
    (folder / "study.json").write_text(f'{{"unfinished": {unfinished}, "runs": [\n{lines}\n]}}\n')
    (folder / "study.md").write_text(text)
    return text


def of_results(folders: Sequence[str]) -> str:
    """The tables of stored results, under the names of their folders."""
    parts = []
    for folder in map(epath.Path, folders):
        found = {name: folder / f"{name}.json" for name in ("study", "diagnosis")}
        found = {name: json.loads(p.read_text()) for name, p in found.items() if p.exists()}
        if not found:
            raise ValueError(
                f"{folder} holds no study.json and no diagnosis.json; launch.study and "
                "launch.diagnose write them into their workdirs"
            )
        text = as_markdown(found.get("study", {}), found.get("diagnosis", {}))
        parts.append(f"#### The {folder.name} pair\n\n{text}")
    return "\n".join(parts)


def as_markdown(stored: dict, diagnosis: dict) -> str:
    """The diagnosis and the study's tables; {} = not given."""
    parts = []
    if diagnosis:
        head, rows = diagnose.table(diagnosis)
        caption = (
            "Diagnosis before training: drops of the teacher margin, beside the paper's figures"
        )
        parts.append(tables.markdown_table(caption, head, rows))
        if "commit" in diagnosis:
            parts.append(f"Commit {diagnosis['commit']}: `{diagnosis['command']}`.\n")
    if stored:
        parts.append(tables.markdown(tables.Study(stored, list(arms.ARMS))))
    return "\n".join(parts)


def into_readme(readme: str, tables_text: str) -> str:
    """The README with the tables between its two marks."""
    parts = readme.split(MARK)
    if len(parts) != 3:
        raise SystemExit(f"the README needs exactly two lines {MARK}, it has {len(parts) - 1}")
    return f"{parts[0]}{MARK}\n{tables_text}{MARK}{parts[2]}"


def read_runs(workdir: str) -> dict:
    stored = tables.results(collect.find_runs([workdir], with_signals=False), arms.arm_of)
    if not stored["runs"]:
        raise ValueError(
            f"no run below {workdir} is finished, and tables compare finished runs. Run "
            f"`python -m launch.sweep --config=configs/study.py --workdir={workdir}` to the end, "
            "or set --workdir to a folder of finished runs"
        )
    return stored


if __name__ == "__main__":
    with preemption.stoppable():
        main()
