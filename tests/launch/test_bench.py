# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from launch.bench import __main__ as bench
from launch.bench import cases, flags, measure, sizes

pytestmark = pytest.mark.usefixtures("quick_compile")

TINY = (
    "--student=32,2,4,2,8,48 --teacher=48,2,4,2,8,64 --vocab=300 --batch=4 --prompt_len=4 "
    "--new_tokens=8 --warmup=1 --repeats=1 --head_chunk=8"
).split()


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    """Rates that need no measuring; and no pinning of the process that runs the tests."""
    monkeypatch.setattr(measure, "matmul_rate", lambda *_: lambda: 80e9)
    monkeypatch.setattr(measure, "read_rate", lambda *_: lambda: 20e9)


def run(*given) -> dict:
    return cases.run(flags.parse([*TINY, *given])).result


def test_flops_are_those_of_the_peers_table():
    """GFLOP of a step at 151,936 and 4,096, from shared bench: the floor of both must be one."""
    want = {151936: (88.1, 225.4, 88.1), 4096: (10.6, 70.4, 10.6)}
    for vocab, gflop in want.items():
        student = sizes.model_config(flags.dims("256,4,4,2,64,768"), vocab)
        teacher = sizes.model_config(flags.dims("512,8,8,4,64,1536"), vocab)
        got = (
            sizes.generate_flops(student, 8, 32, 128),
            sizes.forward_flops(teacher, 8, 0, 160, 128),
            sizes.forward_flops(student, 8, 0, 160, 128),
        )
        np.testing.assert_allclose(np.array(got) / 1e9, gflop, atol=0.06)


def test_step_reports_every_stage_and_the_floor():
    found = run("--case=step")
    assert set(found["stages"]) == {"rollout", "score", "select", "update"}
    assert 0 < sum(found["stages"].values()) <= found["seconds"]
    assert found["ratio_to_floor"] == pytest.approx(found["seconds"] / found["floor_seconds"])
    # The teacher's head is counted once: where its logits are made.
    student = sizes.model_config(flags.dims("32,2,4,2,8,48"), 300)
    teacher = sizes.model_config(flags.dims("48,2,4,2,8,64"), 300)
    due = sizes.generate_flops(student, 4, 4, 8) + 3 * sizes.forward_flops(student, 4, 0, 12, 8)
    due += sizes.forward_flops(teacher, 4, 0, 12, 8)
    assert found["floor_gflop"] == pytest.approx(due / 1e9)


def test_crop_has_a_row_per_fraction_and_the_papers_mix_apart():
    found = run("--case=crop", "--objective=paper")
    assert [row["supervised_fraction"] for row in found["rows"]] == [1, 0.5, 0.25, 0.125]
    assert found["rows"][0]["time_ratio"] == 1
    assert 0.1 < found["paper_mix"]["supervised_fraction"] < 1


@pytest.mark.parametrize("objective", ["reverse_kl", "paper"])
def test_update_and_score_report_rates(objective):
    found = run("--case=update", f"--objective={objective}")
    assert found["tokens_per_second"] == pytest.approx(4 * 12 / found["seconds"])
    needs = run("--case=score", f"--objective={objective}")["needs"]
    assert needs == ("teacher_logp_bt" if objective == "paper" else "teacher_hidden_btd")


def test_decode_has_a_row_per_head_with_its_gap():
    found = run("--case=decode")
    assert [row["head"] for row in found["rows"]] == ["float32", "bfloat16"]
    assert found["rows"][0]["logp_gap"] == 0
    assert 0 < found["rows"][1]["logp_gap"] < 0.1
    assert found["seconds"] == pytest.approx(found["rows"][0]["step_ms"] / 1e3)


def test_sampler_counts_busy_slots():
    found = run("--case=sampler", "--rows=32", "--new_tokens=32", "--decode_chunk=4")
    assert 0.6 < found["occupancy"] <= 1
    assert found["decode_steps"] < found["whole_batch_steps"]


def test_host_times_segmentation_apart_from_what_a_step_waits_for():
    found = run("--case=host", "--rows=6", "--new_tokens=200", "--topology=", "--workers=1")
    assert found["segments"] > 6 * 5
    assert found["seconds"] == pytest.approx(
        found["start_and_select_seconds"] + found["segment_seconds"]
    )
    assert found["share_of_step"] is None


def test_measurements_are_interleaved_and_ratios_are_of_one_round():
    calls = []
    both = [lambda name=name: calls.append(name) or len(calls) for name in "ab"]
    assert measure.interleaved(*both, warmup=1, repeats=2) == [[3, 5], [4, 6]]
    assert "".join(calls) == "ababab"
    # A machine that slows tenfold in the middle: the ratio of the medians is 0.2.
    assert measure.ratio([2, 2, 20], [1, 10, 10]) == 2


def test_utilisation_is_given_where_peaks_are_known(monkeypatch):
    assert measure.utilisation(flops=1e12, seconds=1.0) == {}  # a CPU
    monkeypatch.setattr(measure, "peaks", lambda: (100e12, 1e12))
    used = measure.utilisation(flops=50e12, num_bytes=0.25e12, seconds=1.0)
    assert used == dict(mfu=0.5, bandwidth_utilisation=0.25)


def test_last_line_is_one_json_object_after_an_aligned_table(capsys):
    rows = [dict(name="a", seconds=1.23456789), dict(name="long name", ratio=2.0)]
    report = measure.Report(dict(case="x", seconds=1.23456789, rows=rows), rows, ["a note"])
    measure.show(report, json_only=False)
    *table, note, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["seconds"] == pytest.approx(1.23457)
    assert note == "a note"
    assert table == [
        "name       seconds  ratio",
        "a            1.235      -",
        "long name        -      2",
    ]
    measure.show(report, json_only=True)
    assert capsys.readouterr().out == last + "\n"


def test_every_case_has_defaults_of_its_own_that_flags_override():
    assert flags.parse(["--case=crop"]).new_tokens == 512
    assert flags.parse(["--case=crop", "--new_tokens=64"]).new_tokens == 64
    assert flags.parse(["--case=step"]).vocab == 151936
    assert set(cases.FUNCTIONS) == set(flags.CASES)


@pytest.mark.parametrize(
    "given, message",
    [
        (["--case=decode", "--threads=999"], "--threads=999 must be 0 (all) to"),
        (["--case=decode", "--student=256,4"], "for example 256,4,4,2,64,768"),
        (["--case=nonsense"], "invalid choice: 'nonsense'"),
    ],
)
def test_flags_that_make_no_sense_say_what_would(given, message, capsys):
    with pytest.raises(SystemExit) as error:
        bench.main(given)
    assert message in f"{error.value}{capsys.readouterr().err}"


@pytest.mark.slow
def test_loss_memory_of_the_v5e_compile_target_is_that_of_a_chunk():
    pytest.importorskip("libtpu")
    args = flags.parse(["--case=loss_memory"])
    found = cases.run(args).result
    assert found["tokens"] == 8192
    assert found["temp_bytes"] <= 0.15 * 2**30


@pytest.mark.slow
def test_the_quickstart_compiles_once():
    done = subprocess.run(
        [sys.executable, "-m", "launch.bench", "--case=compile", "--json"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    cold, cached = json.loads(done.stdout)["rows"]
    assert cold["later_compilations"] == cached["later_compilations"] == 0
    assert cached["xla_seconds"] < 0.5 * cold["xla_seconds"]
