# SPDX-License-Identifier: Apache-2.0
"""What the README and the pages of docs/ say of the code is what the code says."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from configs import base
from launch import config_flags, diagnose
from opd_jax.algorithm import selectors
from opd_jax.algorithm.objective import KINDS, SUPPORTS, TAILS
from tests import fakes

ROOT = fakes.ROOT
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES, WIDTH = 150, 110  # of the README; its tables and pictures may be wider


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text()


def section(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """Cells of the first table in a text, header left out."""
    lines = text[text.index("\n|") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def commands(text: str) -> list[list[str]]:
    """The lines of a page's code blocks that start one of our commands, as words."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.rpartition("&& ")[2] for line in lines]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("python -m ")]


# ---------------------------------------------------------------- every page


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_every_relative_link_leads_to_a_file_and_a_heading(path):
    for target in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        file = path.parent / file if file else path
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            slugs = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
            assert anchor in slugs, target


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_every_module_and_every_key_that_a_page_names_exists(path):
    text = path.read_text()
    for module in re.findall(r"python -m ((?:launch|tests)(?:\.\w+)*)", text):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), module
    keys = config_flags.flatten(base.get_config())
    for key in re.findall(r"(?<![/\w])config\.(?!json)(\w+(?:\.\w+)?)", text):
        known = key in keys or any(name.startswith(f"{key}.") for name in keys)
        assert known, f"{path.name} names the key {key}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_every_printed_command_names_a_config_that_loads_with_its_flags(path):
    for words in commands(path.read_text()):
        flags = dict(w[2:].split("=", 1) for w in words if w.startswith("--") and "=" in w)
        if "config" in flags and "..." not in flags["config"]:
            file, _, variant = flags.pop("config").partition(":")
            config = config_flags.load(f"{ROOT / file}{':' * bool(variant)}{variant}")
            known = config_flags.flatten(config)
            changed = {k.removeprefix("config.") for k in flags if k.startswith("config.")}
            assert changed <= set(known), words


# ---------------------------------------------------------------- README


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= LINES
    wide = [ln for ln in lines if len(ln) > WIDTH and not ln.startswith(("|", "!["))]
    assert not wide


def test_the_map_of_the_code_names_every_room_and_nothing_else():
    """Folders and modules of opd_jax, and the top-level folders of code."""
    package = ROOT / "opd_jax"
    rooms = {f"opd_jax/{p.parent.name}/" for p in package.glob("*/__init__.py")}
    modules = {p.name for p in package.glob("*.py") if p.name != "__init__.py"}
    named = " ".join(row[0] for row in rows(section(README, "The code")))
    found = {name.removeprefix("opd_jax/") for name in re.findall(r"`([\w/.]+\.py)`", named)}
    folders = set(re.findall(r"`([\w/]+/)`", named))
    assert found == modules
    assert folders - {"examples/"} == rooms | {"configs/", "launch/", "tests/"}
    assert all((ROOT / folder).is_dir() for folder in folders)


def test_the_table_of_commands_has_every_command():
    table = README.split("| command |")[1].split("\n\n")[0]
    named = set(re.findall(r"^\| `python -m (launch(?:\.\w+)?)` \|", table, re.M))
    launch = ROOT / "launch"
    runnable = {p for p in launch.glob("*.py") if "\nif __name__ ==" in p.read_text()}
    folders = {p.parent for p in launch.glob("*/__main__.py")}
    own = {"launch"} | {f"launch.{p.stem}" for p in runnable | folders if p.stem != "__main__"}
    assert named == own


def test_the_diagnosis_in_the_readme_is_the_stored_one():
    """Its first seven columns; `launch.study` holds docs/evidence.md to the same file."""
    stored = (ROOT / "configs/results/collapse/diagnosis.json").read_text()
    _, body = diagnose.table(json.loads(stored))
    wanted = [" ".join(" ".join(map(str, row[:7])).split()) for row in body]
    shown = README.split("\nrollouts of ")[1].split("```")[0].splitlines()[1:]
    assert [" ".join(line.split()) for line in shown] == wanted


@pytest.mark.slow
def test_the_readmes_command_runs_as_it_is_printed(pair, tmp_path):
    """From the folder of the checkout, into a workdir that is named relative to it."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    printed = re.search(r"&& python (-m launch --config=\S+ --workdir=\S+)$", README, re.M)[1]
    ended = subprocess.run(
        [
            sys.executable,
            *shlex.split(printed),
            *config_flags.as_flags(fakes.small_overrides(pair)),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert "held-out accuracy" in ended.stderr + ended.stdout
    workdir = tmp_path / "runs" / "quickstart"
    assert (workdir / "student" / "model.safetensors").exists()
    table = rows(section(page("workdir"), "A run's directory"))
    named = {row[0].strip("`").split("/")[0] for row in table}
    assert {path.name for path in workdir.iterdir()} <= named


# ---------------------------------------------------------------- docs/


def test_the_table_of_selectors_is_the_codes():
    """Each kind once, with the first line of its docstring, which ends with its source."""
    table = rows(section(page("selectors"), "Selectors"))
    said = {kind.strip("`"): text.replace("\\|", "|") for kind, text in table}
    own = {kind: cls.__doc__.splitlines()[0] for kind, cls in selectors.SELECTORS.items()}
    assert said == own


def test_the_table_of_objectives_is_the_codes():
    text = section(page("selectors"), "Objectives")
    table = rows(text)
    assert [row[0].strip("`") for row in table] == list(KINDS)
    assert all("arXiv" in row[2] or "paper" in row[2] for row in table)
    named = set(re.findall(r"`(\w+)`", text.split("Supports:")[1]))
    assert named == {*SUPPORTS, *TAILS}


def test_every_test_that_the_table_of_faults_names_exists():
    table = rows(page("faults"))
    assert len(table) > 15
    for *_, cell in table:
        files = re.findall(r"\]\(\.\./(tests/[^)]+\.py)\)", cell)
        source = "".join((ROOT / file).read_text() for file in files)
        assert files, cell
        for name in re.findall(r"`(test_\w+)`", cell):
            assert f"def {name}(" in source, name


def test_every_case_of_the_table_of_speed_exists():
    from launch.bench.flags import CASES

    text = page("speed")
    cases = {re.match(r"`(\w+)", row[0])[1] for row in rows(text)}
    named = set(re.search(r"--case=(\w+) +# or update (.*)", text)[2].split()) | {"step", "update"}
    assert cases <= named == set(CASES)


def test_evidence_opens_with_the_claim_and_what_it_does_not_show():
    opening = page("evidence").split("\n## ")[0]
    places = [opening.index(f"**{w}.**") for w in ("Claim", "Evidence", "What it does not show")]
    assert places == sorted(places)
