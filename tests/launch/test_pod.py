# SPDX-License-Identifier: Apache-2.0
"""The commands for a pod, word by word, and what happens when they are run against stand-ins."""

import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

from launch import pod
from tests import advice

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RUN = ("--config=configs/quickstart.py", "--workdir=gs://bucket/run", "--config.names=('a',)")


@pytest.fixture
def arguments(tmp_path):
    """Flags of a run whose config exists."""
    path = tmp_path / "config.py"
    path.write_text(
        "import ml_collections as mlc\n"
        "def get_config():\n"
        "    return mlc.ConfigDict(dict(seed=0, names=('a',)))\n"
    )
    return (f"--config={path}", "--workdir=gs://bucket/run")


def make(platform, **changes):
    values = dict(platform=platform, name="opd", commit=COMMIT, module="launch", arguments=RUN)
    if platform == "slurm":
        values |= dict(nodes=2, gpus_per_node=8)
    else:
        values |= dict(project="proj", zone="us-east5-a", accelerator="v5p-128")
    if platform == "gke":
        values |= dict(cluster="clu")
    return pod.Pod(**(values | changes))


def lines(platform, **changes):
    return [step.line for step in pod.STEPS[platform](make(platform, **changes))]


def test_cloud_tpu_vm_commands():
    tpu, where = "gcloud compute tpus tpu-vm", "--project=proj --zone=us-east5-a"
    describe = f"{tpu} describe opd {where} '--format=value(state)'"
    assert lines("tpu_vm", spot=True)[:4] == [
        f'if [ "$({describe} 2>/dev/null)" = PREEMPTED ]; then '
        f"{tpu} delete opd {where} --quiet; fi",
        f"{describe} || {tpu} create opd {where} --accelerator-type=v5p-128 "
        "--version=v2-alpha-tpuv5 --spot",
        f"mkdir -p build && git archive --format=tar.gz {COMMIT} -o "
        "build/opd_jax-0123456789ab.tar.gz",
        f"{tpu} scp build/opd_jax-0123456789ab.tar.gz opd: {where} --worker=all",
    ]
    install, start, show = lines("tpu_vm")[4:]
    assert install.startswith(
        f"{tpu} ssh opd {where} --worker=all '--command=set -e; if [ -e opd_jax"
    )
    assert start.startswith(f"{tpu} ssh opd {where} --worker=all '--command=old=$(cat opd.pid")
    assert show == f"{tpu} ssh opd {where} --worker=0 '--command=sleep 5; tail -n 20 opd.log'"
    assert "--spot" not in lines("tpu_vm")[1]
    assert "--version=mine" in lines("tpu_vm", runtime="mine")[1]


def test_gke_commands():
    where = "--project=proj --zone=us-east5-a"
    assert lines("gke", num_slices=2, arguments=RUN[:2]) == [
        "gcloud container clusters list --project=proj --filter=name=clu '--format=value(name)' "
        "| grep -qx clu || xpk cluster create --cluster=clu --tpu-type=v5p-128 --num-slices=2 "
        f"{where} --on-demand",
        'mkdir -p "build/opd_jax-0123456789ab" && '
        f'git archive --format=tar.gz {COMMIT} | tar -xz -C "build/opd_jax-0123456789ab"',
        f"xpk workload delete --workload=opd --cluster=clu {where} --force || true",
        f"xpk workload create --workload=opd --cluster=clu {where} --tpu-type=v5p-128 "
        "--num-slices=2 --base-docker-image=python:3.11 --script-dir=build/opd_jax-0123456789ab "
        "--max-restarts=100 --restart-on-user-code-failure --termination-grace-period-seconds=120 "
        "'--command=pip install -q -e '\"'\"'.[tpu,gcs]'\"'\"' && exec python -m launch "
        "--config=configs/quickstart.py --workdir=gs://bucket/run'",
    ]


def test_slurm_commands():
    assert lines("slurm", partition="gpu", time="24:00:00", arguments=RUN[:2]) == [
        'mkdir -p "$HOME/opd_jax-0123456789ab" && '
        f'git archive --format=tar.gz {COMMIT} | tar -xz -C "$HOME/opd_jax-0123456789ab"',
        '[ -e "$HOME/opd_jax-0123456789ab/.installed" ] || (cd "$HOME/opd_jax-0123456789ab" && '
        "python3 -m venv .venv && .venv/bin/pip install -q -e '.[gcs]' 'jax[cuda12]' && "
        "touch .installed)",
        "scancel --quiet --me --name=opd || true",
        "sbatch --job-name=opd --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --partition=gpu "
        "--time=24:00:00 --requeue --signal=TERM@120 --dependency=singleton --open-mode=append "
        "--output=opd.log '--wrap=cd $HOME/opd_jax-0123456789ab; srun --kill-on-bad-exit=1 "
        ".venv/bin/python -m launch --config=configs/quickstart.py --workdir=gs://bucket/run; "
        "status=$?; if [ $status -eq 75 ]; then scontrol requeue $SLURM_JOB_ID; fi; exit $status'",
    ]


@pytest.mark.parametrize("platform", ["tpu_vm", "gke", "slurm"])
def test_a_complete_pod_is_accepted(platform, arguments):
    pod.check(make(platform, arguments=arguments))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(platform="tpu_vm", zone=""), "needs more flags, as --zone=us-east5-a"),
        (
            dict(platform="gke", cluster="", accelerator=""),
            "--accelerator=v5p-128 --cluster=my-clu",
        ),
        (dict(platform="slurm", nodes=0), "needs more flags, as --nodes=4"),
        (dict(platform="gke", name="Opd_1"), "--name=Opd_1 must be 1 to 39 of a-z, 0-9 and -"),
        (dict(platform="gke", name="a" * 40), "must be 1 to 39"),
        (dict(platform="gke", arguments=("--config=x",)), "has no --workdir: add one after --"),
        (dict(platform="gke", arguments=("--workdir=runs/x",)), "set a bucket, as --workdir=gs://"),
        (dict(platform="slurm", arguments=("--config=no.py", "--workdir=r")), "no such file"),
    ],
)
def test_what_cannot_be_started_names_a_flag_that_works(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        pod.check(make(**changes))
    advice.check(error.value)


def test_a_misspelt_key_of_the_run_is_refused_before_anything_is_created(arguments):
    with pytest.raises(ValueError, match="did you mean seed"):
        pod.check(make("gke", arguments=(*arguments, "--config.sead=1")))
    with pytest.raises(ValueError, match="must be a whole number"):
        pod.check(make("gke", arguments=(*arguments, "--config.seed=x")))


@pytest.mark.parametrize(
    "secret", ["hf_" + "a1" * 17, "ya29.a0AfH6SMBx", "ghp_" + "x" * 36, "https://user:pw@host/data"]
)
def test_a_secret_is_neither_accepted_nor_repeated(arguments, secret):
    bad = make("gke", arguments=(*arguments, f"--config.names={secret}"))
    with pytest.raises(ValueError, match="holds what looks like a secret") as error:
        pod.check(bad)
    assert secret not in str(error.value)


# --- run against stand-ins: gcloud acts on this machine, Python records what it is asked ---

GCLOUD = """#!/usr/bin/env bash
echo "$4 $5" >> "$HOME/calls"
case $4 in
  describe) [ -e "$HOME/slice" ] && echo READY ;;
  create) touch "$HOME/slice" ;;
  scp) cp "$5" "$HOME" ;;
  ssh) for a in "$@"; do
    case $a in --command=*) cd "$HOME" && bash -c "${a#--command=}" ;; esac
  done ;;
esac
"""
PYTHON = """#!/usr/bin/env bash
if [ "$1 $2" = "-m uv" ] && [ "$3" = venv ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi
if [ "$1 $2" = "-m launch" ]; then
  trap 'echo checkpointed; exit 75' TERM
  echo "started in ${PWD##*/}: $*"
  for i in $(seq 300); do sleep 0.1; done
fi
"""


@pytest.fixture
def cloud(tmp_path):
    """Environment in which gcloud and python3 are stand-ins and HOME is a worker's."""
    home = tmp_path / "home"
    home.mkdir()
    for name, text in (("gcloud", GCLOUD), ("python3", PYTHON)):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(text)
        tool.chmod(0o755)
    yield home, os.environ | {"HOME": str(home), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    pid = home / "opd.pid"
    if pid.exists():
        subprocess.run(["kill", pid.read_text().strip()], check=False)


def run_pod(cloud, arguments):
    home, environment = cloud
    flags = ["--platform=tpu_vm", "--name=opd", "--project=p", "--zone=z", "--accelerator=v5p-8"]
    command = [sys.executable, "-m", "launch.pod", *flags, "--run", "--", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    pathlib.Path(re.search(r"build/opd_jax-\w+\.tar\.gz", result.stdout)[0]).unlink()
    return result


def wait_for(log, text):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if log.exists() and text in log.read_text():
            return log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{text!r} is not in the log within 20 s")


@pytest.mark.slow
def test_run_creates_installs_starts_and_a_second_time_replaces_the_run(cloud, arguments):
    home, _ = cloud
    result = run_pod(cloud, (*arguments, "--config.seed=3"))
    assert result.returncode == 0, result.stderr
    log = wait_for(home / "opd.log", "started")
    config, workdir = arguments
    assert re.fullmatch(
        r"started in opd_jax-\w{12}: -m launch "
        + re.escape(f"{config} {workdir} --config.seed=3\n"),
        log,
    )
    (installed,) = home.glob("opd_jax-*/")
    assert (installed / ".installed").exists() and (installed / "setup.py").exists()
    calls = (home / "calls").read_text().split("\n")
    assert [call.split()[0] for call in calls if call] == (
        ["describe", "describe", "create", "scp", "ssh", "ssh", "ssh"]
    )

    result = run_pod(cloud, arguments)
    assert result.returncode == 0, result.stderr
    log = wait_for(home / "opd.log", "checkpointed")
    assert log.count("started") == 2 and log.index("checkpointed") < log.rindex("started")
    assert (home / "calls").read_text().count("create") == 1


@pytest.mark.slow
def test_run_stops_at_the_first_command_that_fails(cloud, arguments, tmp_path):
    (tmp_path / "bin" / "gcloud").write_text('#!/bin/sh\necho "$4" >> "$HOME/calls"; exit 3\n')
    home, environment = cloud
    flags = ["--platform=tpu_vm", "--name=opd", "--project=p", "--zone=z", "--accelerator=v5p-8"]
    command = [sys.executable, "-m", "launch.pod", *flags, "--run", "--", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "ERROR: that command ended with status 3; nothing after it was run" in result.stderr
    assert (home / "calls").read_text().split() == ["describe", "describe", "create"]
