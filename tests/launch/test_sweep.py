# SPDX-License-Identifier: Apache-2.0
"""A sweep runs each element once, goes on where it stopped, and refuses what cannot be one."""

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from launch import config_flags, sweep
from tests import advice

CONFIG = """
import ml_collections as mlc

def get_config():
    c = mlc.ConfigDict(dict(seed=0, num_steps=4, rate=1.0, mesh=(("data", 1),)))
    c.selector = dict(kind="bic")
    return c

def sweep():
    yield from ({"seed": seed, "rate": 1e-5} for seed in range(2))
"""

# Stands in for `python -m launch`: writes a row per 0.05 s, goes on where it stopped.
STUB = """
import json, pathlib, sys, time
workdir = pathlib.Path(sys.argv[-1].removeprefix("--workdir="))
seed = int(sys.argv[-2].removeprefix("--config.seed="))
path = workdir / "metrics.jsonl"
done = len(path.read_text().splitlines()) if path.exists() else 0
print("starts at", done, flush=True)
for step in range(done, 5):
    if seed == 7 and step == 2:
        sys.exit("planted failure")
    with path.open("a") as file:
        accuracy = 0.1 * seed + 0.01 * (step != 3)
        file.write(json.dumps({"step": step, "eval/accuracy": accuracy}) + "\\n")
    time.sleep(0.05)
(workdir / "done.json").write_text("{}")
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    return config_flags.load(str(tmp_path / "config.py"))


@pytest.fixture
def jobs(config, tmp_path):
    """Runs of seeds 1, 2, 3 whose command is the stub's."""

    def make(seeds="1,2,3"):
        (tmp_path / "stub.py").write_text(STUB)
        found = sweep.elements([f"config.seed={seeds}"], zipped=False)
        runs = sweep.plan(config, found, str(tmp_path / "sweep"))
        flags = [
            (f"--config.seed={run.overrides['seed']}", f"--workdir={run.workdir}") for run in runs
        ]
        return [
            (run, ["python", str(tmp_path / "stub.py"), *own])
            for run, own in zip(runs, flags, strict=True)
        ]

    return make


def test_flags_give_the_product_and_zip_pairs():
    texts = ["config.seed=0,1", "selector.kind=bic,full"]
    assert sweep.elements(texts, zipped=False) == [
        {"seed": "0", "selector.kind": "bic"},
        {"seed": "0", "selector.kind": "full"},
        {"seed": "1", "selector.kind": "bic"},
        {"seed": "1", "selector.kind": "full"},
    ]
    assert sweep.elements(texts, zipped=True) == [
        {"seed": "0", "selector.kind": "bic"},
        {"seed": "1", "selector.kind": "full"},
    ]


def test_commas_inside_a_value_do_not_separate():
    text = """config.mesh=(("data", 1), ("a,b", 2)),'x,y',[1,{2,3}]"""
    assert sweep.parse_sweep_flag(text) == (
        "mesh",
        ['(("data", 1), ("a,b", 2))', "'x,y'", "[1,{2,3}]"],
    )


@pytest.mark.parametrize(
    ("texts", "zipped", "message"),
    [
        (
            ["config.seed"],
            False,
            "must be config.KEY=VALUE,VALUE,... as --sweep='config.seed=0,1,2'",
        ),
        (["config.seed=0,,1"], False, "--sweep=config.seed=0,,1 must be"),
        (["seed=0", "config.seed=1"], False, "--sweep names seed twice"),
        (["seed=0,1", "rate=1,2,3"], True, "given are {'seed': 2, 'rate': 3}"),
        (["sead=0,1"], False, "config has no key 'sead'; did you mean seed?"),
        (["seed=0,x"], False, "--config.seed=x must be a whole number"),
        (["rate=1.0,0.5,1"], False, "are the same run: 'rate=1.0' and 'rate=1'"),
        (["seed=0,1"], False, "holds a run of another config"),
        ([], False, "nothing to sweep"),
    ],
)
def test_what_cannot_be_a_sweep_is_refused_before_anything_starts(
    texts, zipped, message, config, tmp_path
):
    other = json.loads(json.dumps(config.to_dict())) | {"rate": 0.25}
    (tmp_path / "seed=1").mkdir()
    (tmp_path / "seed=1" / "config.json").write_text(json.dumps(other))
    (tmp_path / "seed=1" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        found = sweep.elements(texts, zipped) if texts else []
        sweep.plan(config, found, str(tmp_path))
    advice.check(error.value, str(tmp_path / "config.py"))


@pytest.mark.parametrize(("trim", "goes_on"), [(0.1, True), (0.2, False)])
def test_a_run_that_is_older_than_a_key_of_base_is_one_of_the_sweep(trim, goes_on, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG.replace('"bic"', f'"bic", trim={trim}'))
    newer = config_flags.load(str(tmp_path / "config.py"))
    stored = json.loads(json.dumps(newer.to_dict())) | {"seed": 1, "selector": {"kind": "bic"}}
    (tmp_path / "seed=1").mkdir()
    (tmp_path / "seed=1" / "config.json").write_text(json.dumps(stored))
    (tmp_path / "seed=1" / "metrics.jsonl").write_text("")
    refused = pytest.raises(ValueError, match=r"selector.trim: 0\.1 there, 0\.2 now")
    with contextlib.nullcontext() if goes_on else refused:
        sweep.plan(newer, [{"seed": 1}], str(tmp_path))


def test_a_workdir_that_is_a_run_is_no_sweep(config, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="is a run, not a sweep"):
        sweep.plan(config, [{"seed": 1}], str(tmp_path))


def test_directory_names_are_plain_stable_and_distinct():
    assert sweep.directory_name({"seed": "1", "selector.kind": "bic"}) == "seed=1,selector.kind=bic"
    names = {
        sweep.directory_name({"mesh": text}) for text in ("((1,),)", "[[1,],]", "../../x", "a b")
    }
    names |= {sweep.directory_name({"mesh": "x" * length}) for length in (200, 201)}
    assert len(names) == 6
    assert all("/" not in name and len(name) <= 120 for name in names)


def test_the_command_of_a_run_sets_its_keys_over_the_shared_ones(config, tmp_path):
    (run,) = sweep.plan(config, [{"seed": 5}], str(tmp_path))
    shared = {"seed": 1, "mesh": (("data", 2),)}
    assert sweep.command(run, "c.py:v", shared, ["--launcher=local:2"]) == [
        "python",
        "-m",
        "launch",
        "--config=c.py:v",
        "--config.seed=5",
        '--config.mesh=(("data", 2),)',
        f"--workdir={tmp_path}/seed=5",
        "--launcher=local:2",
    ]


def test_a_sweep_runs_all_then_skips_what_is_finished(jobs, tmp_path, capsys):
    assert sweep.run_all(jobs(), 2, str(tmp_path / "sweep")) == 0
    output = capsys.readouterr().out
    assert "3 runs, 0 finished before" in output
    kinds = [line.split()[0] for line in output.splitlines() if line.startswith(("start", "end"))]
    assert sorted(kinds[:2]) == ["start", "start"] and kinds[2] == "end"  # two at once
    assert output.splitlines()[-5:-2] == [
        "eval/accuracy after the last update",
        "arm  finished    mean  spread    best",
        "all       3/3  0.2100  0.1000  0.3100",
    ]
    assert sweep.run_all(jobs(), 2, str(tmp_path / "sweep")) == 0
    assert "3 runs, 3 finished before" in capsys.readouterr().out
    assert (tmp_path / "sweep" / "seed=1" / "log.txt").read_text() == "starts at 0\n"
    with open(tmp_path / "sweep" / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["1", "2", "3"]
    assert (
        rows[1]["status"] == "finished" and float(rows[1]["eval/accuracy last"]) == 0.1 * 2 + 0.01
    )


def test_the_end_of_a_run_is_printed_before_the_start_of_the_next(jobs, tmp_path, capsys):
    sweep.run_all(jobs(), 1, str(tmp_path / "sweep"))
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "seed=" in line]
    order = [[word, f"seed={seed}"] for seed in (1, 2, 3) for word in ("start", "end")]
    assert lines == order


def test_a_failed_run_is_shown_and_the_others_go_on(jobs, tmp_path, capsys):
    assert sweep.run_all(jobs("1,7,2"), 1, str(tmp_path / "sweep")) == 1
    captured = capsys.readouterr()
    assert "exit 1  seed=7  step 1 of 4" in captured.out
    assert "all       2/3  0.1600  0.0707  0.2100" in captured.out
    assert "ERROR: seed=7 failed:\n  starts at 0\n  planted failure" in captured.err


def test_a_stopped_sweep_resumes_broken_runs(jobs, tmp_path, capsys):
    workdir = str(tmp_path / "sweep")
    old = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    timer = threading.Timer(0.4, signal.raise_signal, [signal.SIGTERM])
    timer.start()
    try:
        assert sweep.run_all(jobs(), 1, workdir) == 75
    finally:
        timer.join()
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), old, strict=True):
            signal.signal(number, handler)
    stopped = [sweep.outcome(run).status for run, _ in jobs()]
    assert stopped.count("finished") < 3 and stopped[-1] == "not started"
    assert "ERROR" not in capsys.readouterr().err
    assert sweep.run_all(jobs(), 1, workdir) == 0
    assert "all       3/3  0.2100" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_end_when_their_sweep_is_killed(tmp_path):
    """The child of a killed sweep would go on writing where the next sweep's child does."""
    program = tmp_path / "sweep_program.py"
    child = "import os; os.read(0, 1); open('ended', 'w').close()"
    program.write_text(
        "from launch import sweep\n"
        f"run = sweep.Run({{'seed': '1'}}, {str(tmp_path / 'run')!r}, {{}})\n"
        f"print(list(sweep.Runner(1)([(run, ['python', '-c', {child!r}])])))\n"
    )
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(
        [sys.executable, str(program)], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith("start")
    time.sleep(0.5)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while not (tmp_path / "ended").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "ended").exists()


def test_arms_are_runs_that_differ_in_the_seed_alone(config, tmp_path):
    found = sweep.elements(["seed=0,1", "selector.kind=bic,full"], zipped=False)
    groups = sweep.arms(sweep.plan(config, found, str(tmp_path)))
    assert {name: [run.overrides["seed"] for run in runs] for name, runs in groups.items()} == {
        "selector.kind=bic": ["0", "1"],
        "selector.kind=full": ["0", "1"],
    }
