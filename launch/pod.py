# SPDX-License-Identifier: Apache-2.0
"""The commands that put a run on a pod: get the slice, install this commit, start every worker.

  python -m launch.pod --platform=tpu_vm --name=opd --project=PROJECT --zone=us-east5-a \\
      --accelerator=v5p-128 -- --config=configs/paper.py:1.7b --workdir=gs://BUCKET/run
  python -m launch.pod --platform=gke --name=opd --cluster=CLUSTER --project=PROJECT \\
      --zone=us-east5-a --accelerator=v5p-128 -- --config=... --workdir=gs://BUCKET/run
  python -m launch.pod --platform=slurm --name=opd --nodes=4 --gpus_per_node=8 \\
      -- --config=... --workdir=/shared/run

What follows `--` are the flags of `python -m launch`. The commands are printed; --run executes
them. An existing slice is reused; a run on it is stopped (it checkpoints) and resumes with this
commit. No command holds a secret: workers use the cloud's service accounts, and HF_TOKEN where it
is set in their environment.
"""

import dataclasses
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from launch import config_flags

# The requirement of each platform, with a value that shows its form.
REQUIRED = {
    "tpu_vm": dict(project="my-project", zone="us-east5-a", accelerator="v5p-128"),
    "gke": dict(
        project="my-project", zone="us-east5-a", accelerator="v5p-128", cluster="my-cluster"
    ),
    "slurm": dict(nodes="4", gpus_per_node="8"),
}
STOP_SECONDS = 120  # for a run to checkpoint when its machine is preempted

# Values no one may write into a command: Hugging Face, Google and GitHub keys, private keys.
_SECRET = re.compile(
    r"\bhf_\w{16,}|\bya29\.\S{10,}|\bAIza[\w-]{20,}|\bgh[pousr]_\w{20,}|-----BEGIN|(?<=://)\S+:\S+@"
)


@dataclasses.dataclass(frozen=True)
class Step:
    """One shell line and why it is there."""

    why: str
    line: str


@dataclasses.dataclass(frozen=True)
class Pod:
    """What the flags say; "" and 0 = not given."""

    platform: str
    name: str  # of the slice, workload or job
    commit: str  # full hash
    module: str  # launch, launch.evaluate, ...
    arguments: tuple[str, ...]  # flags of the module
    project: str = ""
    zone: str = ""
    accelerator: str = ""
    runtime: str = ""
    cluster: str = ""
    num_slices: int = 1
    nodes: int = 0
    gpus_per_node: int = 0
    partition: str = ""
    time: str = ""
    spot: bool = False

    @property
    def source(self) -> str:
        """Directory of the installed commit, on the workers."""
        return f"opd_jax-{self.commit[:12]}"

    @property
    def program(self) -> list[str]:
        return ["-m", self.module, *self.arguments]


def define_flags() -> None:
    flags.DEFINE_enum("platform", None, list(REQUIRED), "where the pod is", required=True)
    flags.DEFINE_string("name", None, "of the slice, workload or job", required=True)
    flags.DEFINE_string("project", "", "Google Cloud project")
    flags.DEFINE_string("zone", "", "as us-east5-a")
    flags.DEFINE_string("accelerator", "", "TPU type, as v5p-128 or v5litepod-256")
    flags.DEFINE_string("runtime", "", "tpu_vm: software version; default by accelerator")
    flags.DEFINE_string("cluster", "", "gke: name of the cluster")
    flags.DEFINE_integer("num_slices", 1, "gke: slices of the run", 1)
    flags.DEFINE_integer("nodes", 0, "slurm: hosts", 0)
    flags.DEFINE_integer("gpus_per_node", 0, "slurm: GPUs of a host, one process each", 0)
    flags.DEFINE_string("partition", "", "slurm: partition")
    flags.DEFINE_string("time", "", "slurm: limit, as 24:00:00")
    flags.DEFINE_bool("spot", False, "capacity that may be preempted; the run resumes later")
    flags.DEFINE_string("commit", "HEAD", "what to install")
    flags.DEFINE_string("module", "launch", "what to run: launch, launch.evaluate, ...")
    flags.DEFINE_bool("run", False, "execute the commands, do not only print them")


def check(pod: Pod) -> None:
    """Raises ValueError, naming flags and values that work, for what cannot be started."""
    example = REQUIRED[pod.platform]
    missing = [f"--{name}={example[name]}" for name in example if not getattr(pod, name)]
    if missing:
        raise ValueError(f"--platform={pod.platform} needs more flags, as {' '.join(missing)}")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,37}[a-z0-9])?", pod.name):
        raise ValueError(
            f"--name={pod.name} must be 1 to 39 of a-z, 0-9 and -, from a letter to a letter or "
            "digit (the clouds' rule), as --name=opd-paper"
        )
    if found := [text for text in pod.arguments if _SECRET.search(text)]:
        raise ValueError(
            f"the flag {found[0].partition('=')[0]} holds what looks like a secret, and commands "
            "are printed and logged. Set it in the environment of the workers, as HF_TOKEN"
        )
    if pod.module != "launch":
        return
    workdirs = [text for text in pod.arguments if text.startswith("--workdir=")]
    if not workdirs:
        raise ValueError("the run has no --workdir: add one after --, as --workdir=gs://BUCKET/run")
    if pod.platform != "slurm" and not workdirs[-1].startswith("--workdir=gs://"):
        raise ValueError(
            f"{workdirs[-1]} would be on one worker's own disk, which goes with it: set a bucket, "
            "as --workdir=gs://BUCKET/run"
        )
    config_flags.config_of(pod.arguments)  # refuses a wrong file, key or value


# --- the three platforms ---


def tpu_vm_steps(pod: Pod) -> list[Step]:
    """Cloud TPU VMs, by gcloud."""
    tpu = ["gcloud", "compute", "tpus", "tpu-vm"]
    where = [f"--project={pod.project}", f"--zone={pod.zone}"]
    describe = shlex.join([*tpu, "describe", pod.name, *where, "--format=value(state)"])
    create = [
        *(*tpu, "create", pod.name, *where),
        *(f"--accelerator-type={pod.accelerator}", f"--version={_runtime(pod)}"),
        *(["--spot"] if pod.spot else []),
    ]
    tarball = f"build/{pod.source}.tar.gz"
    ssh = [*tpu, "ssh", pod.name, *where]
    return [
        Step(
            "a slice that was taken away still has its name",
            f'if [ "$({describe} 2>/dev/null)" = PREEMPTED ]; then '
            f"{shlex.join([*tpu, 'delete', pod.name, *where, '--quiet'])}; fi",
        ),
        Step("create the slice, unless it is there", f"{describe} || {shlex.join(create)}"),
        Step("pack the commit", f"mkdir -p build && {_archive(pod)} -o {tarball}"),
        Step(
            "copy it to every worker",
            shlex.join([*tpu, "scp", tarball, f"{pod.name}:", *where, "--worker=all"]),
        ),
        Step(
            "install it on every worker, unless it is there",
            shlex.join([*ssh, "--worker=all", f"--command={install_script(pod)}"]),
        ),
        Step(
            "stop what runs there, and start",
            shlex.join([*ssh, "--worker=all", f"--command={start_script(pod)}"]),
        ),
        Step(
            "the start of the log; tail -f follows it",
            shlex.join([*ssh, "--worker=0", f"--command=sleep 5; tail -n 20 {pod.name}.log"]),
        ),
    ]


def _runtime(pod: Pod) -> str:
    """The software version that belongs to a TPU generation."""
    if pod.runtime:
        return pod.runtime
    kinds = {"v6e": "v2-alpha-tpuv6e", "v5p": "v2-alpha-tpuv5", "v5litepod": "v2-alpha-tpuv5-lite"}
    return kinds.get(pod.accelerator.partition("-")[0], "tpu-ubuntu2204-base")


def install_script(pod: Pod) -> str:
    """Bash, in the home directory of a TPU worker, where the packed commit is."""
    return "; ".join(
        [
            "set -e",
            f"if [ -e {pod.source}/.installed ]; then exit 0; fi",
            f"mkdir -p {pod.source}",
            f"tar -xzf {pod.source}.tar.gz -C {pod.source}",
            f"cd {pod.source}",
            "python3 -m pip install -q --user uv",  # the image's own Python is too old
            "python3 -m uv venv -q --clear --python 3.11 .venv",
            "python3 -m uv pip install -q --python .venv/bin/python -e '.[tpu,gcs]'",
            "touch .installed",
        ]
    )


def start_script(pod: Pod) -> str:
    """Bash, in the home directory of a TPU worker: ends the run that is there, starts this one."""
    pid = f"{pod.name}.pid"
    return "; ".join(
        [
            f"old=$(cat {pid} 2>/dev/null)",
            "if grep -qs launch /proc/$old/cmdline",  # not some other process of that number
            "then kill -TERM $old",  # it checkpoints; every worker gets this at the same time
            f"for i in $(seq {STOP_SECONDS})",
            "do [ -e /proc/$old ] || break",
            "sleep 1",
            "done",
            "if [ -e /proc/$old ]",
            "then kill -KILL $old",
            "fi",
            "fi",
            f"cd {pod.source}",
            f"nohup .venv/bin/python {shlex.join(pod.program)} "
            f">> ../{pod.name}.log 2>&1 < /dev/null & echo $! > ../{pid}",
        ]
    )


def gke_steps(pod: Pod) -> list[Step]:
    """Google Kubernetes Engine, by xpk."""
    where = [f"--project={pod.project}", f"--zone={pod.zone}"]
    size = [f"--tpu-type={pod.accelerator}", f"--num-slices={pod.num_slices}"]
    named = [f"--workload={pod.name}", f"--cluster={pod.cluster}", *where]
    find = ["gcloud", "container", "clusters", "list", f"--project={pod.project}"]
    find += [f"--filter=name={pod.cluster}", "--format=value(name)"]
    create = ["xpk", "cluster", "create", f"--cluster={pod.cluster}", *size, *where]
    create += ["--spot" if pod.spot else "--on-demand"]
    # exec: the signal that announces the end has to reach Python, not a shell.
    command = f"pip install -q -e '.[tpu,gcs]' && exec python {shlex.join(pod.program)}"
    start = [
        *("xpk", "workload", "create", *named, *size),
        *("--base-docker-image=python:3.11", f"--script-dir=build/{pod.source}"),
        *("--max-restarts=100", "--restart-on-user-code-failure"),
        *(f"--termination-grace-period-seconds={STOP_SECONDS}", f"--command={command}"),
    ]
    return [
        Step(
            "create the cluster, unless it is there",
            f"{shlex.join(find)} | grep -qx {pod.cluster} || {shlex.join(create)}",
        ),
        Step("lay out the commit", _unpacked(pod, f"build/{pod.source}")),
        Step(
            "stop what runs under this name",
            shlex.join(["xpk", "workload", "delete", *named, "--force"]) + " || true",
        ),
        Step("start every worker; a failed one restarts them all", shlex.join(start)),
    ]


def slurm_steps(pod: Pod) -> list[Step]:
    """Slurm with GPUs, from a login node whose home directory the workers share."""
    source = f"$HOME/{pod.source}"
    optional = [("partition", pod.partition), ("time", pod.time)]
    script = "; ".join(
        [
            f"cd {source}",
            f"srun --kill-on-bad-exit=1 .venv/bin/python {shlex.join(pod.program)}",
            "status=$?",
            "if [ $status -eq 75 ]; then scontrol requeue $SLURM_JOB_ID; fi",  # 75: preempted
            "exit $status",
        ]
    )
    submit = [
        *("sbatch", f"--job-name={pod.name}", f"--nodes={pod.nodes}"),
        *(f"--ntasks-per-node={pod.gpus_per_node}", f"--gpus-per-node={pod.gpus_per_node}"),
        *(f"--{flag}={value}" for flag, value in optional if value),
        *("--requeue", f"--signal=TERM@{STOP_SECONDS}", "--dependency=singleton"),
        *("--open-mode=append", f"--output={pod.name}.log", f"--wrap={script}"),
    ]
    install = (
        f'cd "{source}" && python3 -m venv .venv && '
        ".venv/bin/pip install -q -e '.[gcs]' 'jax[cuda12]' && touch .installed"
    )
    return [
        Step("lay out the commit", _unpacked(pod, source)),
        Step("install it, unless it is there", f'[ -e "{source}/.installed" ] || ({install})'),
        Step("stop what runs under this name", f"scancel --quiet --me --name={pod.name} || true"),
        Step("start on every node, after the earlier job has ended", shlex.join(submit)),
    ]


def _archive(pod: Pod) -> str:
    return f"git archive --format=tar.gz {pod.commit}"


def _unpacked(pod: Pod, directory: str) -> str:
    return f'mkdir -p "{directory}" && {_archive(pod)} | tar -xz -C "{directory}"'


STEPS: dict[str, Callable[[Pod], list[Step]]] = {
    "tpu_vm": tpu_vm_steps,
    "gke": gke_steps,
    "slurm": slurm_steps,
}


# --- the command line ---


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    own = {field.name for field in dataclasses.fields(Pod)} - {"commit", "arguments"}
    try:
        commit = resolve_commit(values.commit)
        given: dict[str, Any] = {name: values[name].value for name in own}
        pod = Pod(commit=commit, arguments=tuple(argv[1:]), **given)
        check(pod)
    except (ValueError, flags.Error) as error:
        sys.exit(f"ERROR: {error}")
    for step in STEPS[pod.platform](pod):
        print(f"# {step.why}\n{step.line}", flush=True)
        if values.run and (status := subprocess.run(["bash", "-c", step.line]).returncode):
            sys.exit(f"ERROR: that command ended with status {status}; nothing after it was run")


def resolve_commit(name: str) -> str:
    """The full hash of a commit; says so where uncommitted changes will be missing."""
    git = ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    found = subprocess.run(git, capture_output=True, text=True)
    if found.returncode:
        raise ValueError(
            f"--commit={name} is no commit here; run from a clone of the project, as --commit=HEAD"
        )
    changed = subprocess.run(
        ["git", "status", "--porcelain"], capture_output=True, text=True
    ).stdout.splitlines()
    if changed:
        print(f"# NOTE: {len(changed)} files have changes that are in no commit", file=sys.stderr)
    return found.stdout.strip()


if __name__ == "__main__":
    define_flags()
    config_flags.run(main, takes_arguments=True)
