# SPDX-License-Identifier: Apache-2.0
"""What the README says of the code is what the code says."""

import pathlib
import re

from opd_jax.algorithm import selectors
from opd_jax.algorithm.objective import KINDS, SUPPORTS, TAILS

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def rows_after(heading: str) -> list[list[str]]:
    """Cells of the first table after a heading, header left out."""
    section = README.split(f"\n### {heading}\n")[1].split("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_table_of_selectors_is_the_codes():
    """Each kind once, with the first line of its docstring, which ends with its source."""
    table = {kind.strip("`"): text.replace("\\|", "|") for kind, text in rows_after("Selectors")}
    own = {kind: cls.__doc__.splitlines()[0] for kind, cls in selectors.SELECTORS.items()}
    assert table == own


def test_the_table_of_objectives_is_the_codes():
    rows = rows_after("Objectives")
    assert [row[0].strip("`") for row in rows] == list(KINDS)
    assert all("arXiv" in row[2] or "paper" in row[2] for row in rows)
    section = README.split("\n### Objectives\n")[1].split("\n#")[0]
    named = set(re.findall(r"`(\w+)`", section.split("Supports:")[1]))
    assert named == {*SUPPORTS, *TAILS}


def test_every_link_and_every_module_it_names_exist():
    for target in re.findall(r"\]\(((?!http|#)[^)]+)\)", README):
        assert (ROOT / target).exists(), target
    for module in re.findall(r"python -m (launch(?:\.\w+)?)", README):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_every_test_that_the_table_of_faults_names_exists():
    section = README.split("\n## What happens when things go wrong\n")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for *_, cell in rows:
        files = re.findall(r"\]\((tests/[^)]+\.py)\)", cell)
        source = "".join((ROOT / file).read_text() for file in files)
        assert files, cell
        for name in re.findall(r"`(test_\w+)`", cell):
            assert f"def {name}(" in source, name
