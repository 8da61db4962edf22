# SPDX-License-Identifier: Apache-2.0
"""The study: every arm is a valid config and known again, and the tables are what hands compute."""

import json
import pathlib
import re

import numpy as np
import pytest
import synthetic_runs

from configs import study
from launch import config_flags, sweep
from launch.report import __main__ as report
from launch.study import __main__ as study_command
from launch.study import collect, tables

ROOT = pathlib.Path(__file__).parents[2]
EVIDENCE = (ROOT / "docs" / "evidence.md").read_text()
RESULTS = [ROOT / "configs" / "results" / pair for pair in ("collapse", "natural")]


def curve(*points):
    names = ("step", "tokens", "seconds", "accuracy", "ood")
    return [dict(zip(names, p, strict=True), families={"sum": p[3]}) for p in points]


def stored(**arms):
    """Arms by name -> one curve per seed, all with the same start."""
    return {
        "runs": [
            dict(arm=a.replace("_", " "), seed=s, commit="c", first_rollouts=str(s), curve=c)
            for a, curves in arms.items()
            for s, c in enumerate(curves)
        ]
    }


FULL = [
    curve((0, 0, 0, 0.20, 0.1), (10, 1000, 20, 0.40, 0.2), (20, 2000, 40, 0.60, 0.3)),
    curve((0, 0, 0, 0.22, 0.1), (10, 1000, 20, 0.42, 0.2), (20, 2000, 40, 0.64, 0.3)),
]
RULE = [  # half the tokens, three quarters of the time
    curve((0, 0, 0, 0.20, 0.1), (10, 500, 15, 0.38, 0.2), (20, 1000, 30, 0.58, 0.4)),
    curve((0, 0, 0, 0.22, 0.1), (10, 500, 15, 0.40, 0.2), (20, 1000, 30, 0.60, 0.4)),
]


def test_differences_at_equal_updates_tokens_and_seconds_by_hand():
    found = tables.Study(stored(full_OPD=FULL, release_rule=RULE))
    by_axis = {a: found.difference("release rule", "full OPD", a) for a in tables.AXES}
    assert by_axis["step"].mean == pytest.approx(np.mean([0.58 - 0.60, 0.60 - 0.64]))
    # 1000 tokens: full OPD is at update 10, 0.40 and 0.42
    assert by_axis["tokens"].mean == pytest.approx(np.mean([0.58 - 0.40, 0.60 - 0.42]))
    # 30 seconds: full OPD is half-way between its last two evaluations, 0.50 and 0.53
    assert by_axis["seconds"].mean == pytest.approx(np.mean([0.58 - 0.50, 0.60 - 0.53]))
    half = 12.7062 * np.std([-0.02, -0.04], ddof=1) / np.sqrt(2)  # t table, 1 degree of freedom
    assert by_axis["step"].high == pytest.approx(-0.03 + half, rel=1e-4)


def test_tables_show_the_start_both_baselines_and_every_family():
    prefixes = {"first_8_tokens": RULE, "first_16_tokens": FULL}
    found = tables.Study(stored(release_rule=RULE, full_OPD=FULL, **prefixes), study.ARMS)
    assert found.arms[:2] == ["full OPD", "release rule"]  # in the order of the study
    assert found.best_prefix() == "first 16 tokens"
    (_, head, rows), (_, head2, rows2), (_, head3, rows3) = tables.tables(found)
    assert "in-domain − full OPD" in head and "out-of-domain − first 16 tokens" in head
    assert rows[0][2].startswith("21.0 [") and rows[1][2].startswith("62.0 [")
    rule = dict(zip(head, rows[2], strict=True))
    assert rule["in-domain − full OPD"].startswith("−3.0 [−15.7, +9.7]")
    assert rule["out-of-domain − full OPD"].startswith("+10.0")
    assert rule["supervised tokens"] == "1k" and rule["seconds"] == "30"
    assert dict(zip(head2, rows2[0], strict=True))["− full OPD, equal seconds"] == ""
    assert head3 == ["arm", "sum"] and rows3[1][1].startswith("62.0")


def test_runs_without_an_out_of_domain_set_have_tables_too():
    curves = [curve((0, 0, 0, 0.2, None), (10, 1000, 20, 0.4, None))] * 2
    text = tables.markdown(tables.Study(stored(full_OPD=curves, release_rule=curves)))
    assert "| release rule | 2 | 40.0 [40.0, 40.0] | – |" in text


def test_two_runs_of_one_arm_and_seed_are_not_mixed():
    results = stored(full_OPD=FULL)
    results["runs"].append(results["runs"][0])
    with pytest.raises(ValueError, match="'full OPD' and seed 0.*--workdir"):
        tables.Study(results)


def test_unequal_starts_are_said():
    results = stored(full_OPD=FULL, release_rule=RULE)
    assert "were the same in all arms" in tables.markdown(tables.Study(results))
    results["runs"][-1]["first_rollouts"] = "other"
    assert "were NOT the same" in tables.markdown(tables.Study(results))


# ---------------------------------------------------------------- the config


@pytest.mark.parametrize("variant", study.VARIANTS)
def test_every_arm_is_a_valid_config_that_is_known_again(variant):
    elements = config_flags.load_sweep(f"{study.__file__}:{variant}")
    assert elements == list(study.sweep(variant))
    config = study.get_config(variant)
    arms = study.VARIANTS[variant]
    assert len(elements) == len(arms) * len(study.SEEDS)
    names = []
    for element in elements[: len(arms)]:  # one seed: applying overrides takes a while
        resolved = config_flags.apply_overrides(config, element)
        flat = config_flags.flatten(json.loads(json.dumps(resolved.to_dict())))
        names.append(study.arm_of(flat))
    assert names == list(arms)
    assert len({sweep.directory_name(e) for e in elements}) == len(elements)


def test_the_baselines_are_arms():
    assert {tables.BASELINE, tables.RULE} <= set(study.CORE)
    assert [a for a in study.CORE if a.startswith(tables.PREFIX)] == [
        f"first {n} tokens" for n in study.PREFIXES
    ]


def test_a_config_of_no_arm_is_none():
    flat = config_flags.flatten(study.get_config().to_dict())
    assert study.arm_of(flat) == study.RULE
    assert study.arm_of(flat | {"selector.kind": "tip"}) is None
    assert study.arm_of({}) is None


# ---------------------------------------------------------------- from runs to tables

STEPS = {"num_steps": 10}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    arms = (study.FULL, 0.4), (study.RULE, 0.3), (f"first {study.PREFIXES[0]} tokens", 0.1)
    for arm, gain in arms:
        for seed in range(2):
            overrides = {**study.ARMS[arm], "seed": seed}
            config = config_flags.apply_overrides(study.get_config(), overrides | STEPS).to_dict()
            path = root / sweep.directory_name(overrides)
            synthetic_runs.make_run(path, config=config, seed=seed, gain=gain, steps=10)
    return root


def test_the_command_writes_results_that_give_the_same_tables(runs, capsys):
    study_command.main([f"--workdir={runs}"])
    first = capsys.readouterr().out
    assert "| full OPD | 2 | " in first and "| no training |" in first
    assert (runs / "study.md").read_text() == first[:-1]
    study_command.main([f"--results={runs}"])
    assert capsys.readouterr().out == f"#### The {runs.name} pair\n\n{first}"


def test_an_arm_with_a_selector_of_ones_own_is_in_every_table(runs, tmp_path, capsys):
    """As a user adds one to a study's workdir, three seeds, under a name that the study lacks."""
    for source in runs.glob("selector*"):
        (tmp_path / source.name).symlink_to(source)
    for seed in range(3):
        overrides = {"selector.kind": "bic", "seed": seed} | STEPS
        config = config_flags.apply_overrides(study.get_config(), overrides).to_dict()
        config["selector"]["kind"] = "my_own"
        path = tmp_path / f"selector.kind=my_own,seed={seed}"
        synthetic_runs.make_run(path, config=config, seed=seed, gain=0.2, steps=10)
    study_command.main([f"--workdir={tmp_path}"])
    tables_of = capsys.readouterr().out.split("\n**")
    assert len(tables_of) == 3
    for table in tables_of:
        own = next(line for line in table.splitlines() if line.startswith("| kind=my_own |"))
        assert re.search(r"\d\.\d \[", own), own
    assert "| kind=my_own | 3 | " in tables_of[0] and "| release rule | 2 | " in tables_of[0]
    report.main([f"--workdir={tmp_path}"])
    assert (tmp_path / "report.html").read_text().count("<td>kind=my_own</td>") >= 3


def test_a_run_that_is_not_finished_is_left_out_by_name(runs):
    found = collect.find_runs([runs])
    found[0].rows.pop()
    results = tables.results(found, study.arm_of)
    assert len(results["runs"]) == len(found) - 1
    text = tables.markdown(tables.Study(results, study.ARMS))
    assert f"Left out, because not finished: {found[0].name}." in text


def test_without_a_finished_run_there_are_no_tables(tmp_path):
    overrides = {**study.ARMS[study.RULE], "seed": 0, "num_steps": 11}
    config = config_flags.apply_overrides(study.get_config(), overrides).to_dict()
    synthetic_runs.make_run(tmp_path / "run", config=config, steps=10)
    with pytest.raises(ValueError, match="launch.sweep --config=configs/study.py"):
        study_command.read_runs(str(tmp_path))


def test_two_configs_of_one_name_are_told_apart_by_their_keys(tmp_path):
    for steps in (10, 20):
        overrides = {**study.ARMS[study.RULE], "num_steps": steps}
        config = config_flags.apply_overrides(study.get_config(), overrides).to_dict()
        synthetic_runs.make_run(tmp_path / str(steps), config=config, steps=steps)
    names = [arm.label for arm in collect.arms(collect.find_runs([tmp_path]), study.arm_of)]
    assert names == ["num_steps=10", "num_steps=20"]


def test_the_report_of_a_study_holds_its_tables_and_names_its_arms(runs):
    report.main([f"--workdir={runs}"])
    text = (runs / "report.html").read_text()
    assert "Comparison" in text and "in-domain − full OPD" in text
    assert ">release rule<" in text and ">kind=bic<" not in text


def test_the_tables_of_evidence_are_made_from_the_stored_results():
    text = study_command.of_results(RESULTS)
    assert study_command.into_readme(EVIDENCE, text) == EVIDENCE


def test_a_diagnosis_alone_is_shown_beside_the_papers_figures(tmp_path, capsys):
    (tmp_path / "diagnosis.json").write_text((RESULTS[0] / "diagnosis.json").read_text())
    study_command.main([f"--results={tmp_path}"])
    text = capsys.readouterr().out
    assert "| the paper, Qwen3-1.7B |" in text and "| student's rollouts | 512 |" in text


def test_tables_go_between_the_marks():
    mark = study_command.MARK
    readme = f"before\n{mark}\nold\n{mark}\nafter\n"
    assert study_command.into_readme(readme, "new\n") == f"before\n{mark}\nnew\n{mark}\nafter\n"
    with pytest.raises(SystemExit, match="exactly two lines"):
        study_command.into_readme("nothing", "new")


def test_a_folder_of_other_runs_has_tables_without_a_baseline(tmp_path, capsys):
    for kind in ("tip", "entropy"):
        synthetic_runs.make_run(tmp_path / kind, config={"selector": {"kind": kind}}, steps=5)
    study_command.main([f"--workdir={tmp_path}"])
    text = capsys.readouterr().out
    assert "| kind=entropy | 1 | " in text and "| kind=tip | 1 | " in text
    assert "equal updates" not in text
