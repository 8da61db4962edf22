# SPDX-License-Identifier: Apache-2.0
"""Starts or joins the processes of a run.

A launcher calls `define()` beside its own flags, `initialize(workdir)` before it uses a device, and
`fail(message)` to end one process on an error.

`initialize` joins this process to the others. TPU pods and GKE describe themselves, Slurm does so
in the environment, and any other host needs --coordinator, --num_processes and --process_id. An
incomplete description is refused: N runs of one host each would write to the same workdir.

`--launcher=local:2` starts two processes on this machine, with fake CPU devices and gloo
collectives, to test the multi-host code of a pod.
"""

import functools
import os
import pathlib
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
from absl import flags

from opd_jax.workdir import preemption

HEARTBEAT_SECONDS = 30  # a process that is silent for so long is dead, and the others end
CONNECT_SECONDS = 300  # how long processes wait for each other at the start
GRACE_SECONDS = 15.0  # for the others to end by themselves once one process has failed

_END_WITH_PARENT = "OPD_JAX_END_WITH_PARENT"  # set by a parent that holds our stdin open
_SLURM = ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


flags.disclaim_key_flags()  # they belong to the launcher that calls define(), so --help shows them


FLAGS = (
    *("launcher", "devices_per_process", "compile_cache"),
    *("coordinator", "num_processes", "process_id"),
)


def define() -> None:
    """Defines `FLAGS`, which `initialize` reads."""
    flags.DEFINE_string(
        "launcher", "", "local:N starts N processes on this machine, as --launcher=local:2"
    )
    flags.DEFINE_integer(
        "devices_per_process", 4, "fake CPU devices of each process of --launcher=local:N", 1
    )
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, for hosts started by hand")
    flags.DEFINE_integer(
        "num_processes", 0, "of the run; 1 = this host alone, 0 = as the host says", 0
    )
    flags.DEFINE_integer("process_id", -1, "index of this process, from 0", -1)
    flags.DEFINE_string(
        "compile_cache",
        "~/.cache/opd_jax/compiled",
        "keeps compiled programs for the next run, local or gs://; '' = off. The variable "
        "JAX_COMPILATION_CACHE_DIR takes precedence",
    )


def initialize(workdir: str) -> None:
    """Joins this process to the run's others, and has JAX keep what it compiles.

    Call it before anything touches a device.

    With --launcher=local:N it does not return: it runs the N processes and exits with their status.
    Raises SystemExit, with a message, where the processes cannot be found or reached.
    """
    if os.environ.get(_END_WITH_PARENT):
        _end_with_parent()
    values = flags.FLAGS
    if values.launcher:
        sys.exit(run_local(_num_local(values.launcher), values.devices_per_process, workdir))
    _keep_compiled(values.compile_cache)
    coordinator = values.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    arguments = place(coordinator, values.num_processes, values.process_id, os.environ)
    if arguments is None:
        return
    print(
        f"Joining the other processes of the run (waits up to {CONNECT_SECONDS} s): "
        f"{arguments or 'as the TPU hosts name each other'}",
        file=sys.stderr,
        flush=True,  # JAX aborts where it cannot reach the coordinator, and Python says no more
    )
    # JAX's own service would swallow SIGTERM until workdir.preemption has installed its handler.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=CONNECT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except Exception as error:
        raise SystemExit(
            f"ERROR: this process could not join the others ({error}). Start every process of the "
            "run with the same --coordinator and --num_processes; --num_processes=1 runs on this "
            "host alone."
        ) from error
    sys.excepthook = _fail_with_traceback


def _keep_compiled(directory: str) -> None:
    """JAX's persistent compilation cache, unless the environment has set one."""
    known: Any = jax.config  # its attributes are made at run time
    if not directory or known.jax_compilation_cache_dir:
        return
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))
    # JAX's own least time, 1 s, would leave out most programs of a small model.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def place(
    coordinator: str, num_processes: int, process_id: int, environment: Mapping[str, str]
) -> dict | None:
    """Arguments of jax.distributed.initialize for this process; None = it is alone.

    Args:
      coordinator, num_processes, process_id: the flags; "", 0 and -1 = not set.
      environment: os.environ.
    """
    if num_processes == 1 and not coordinator and process_id <= 0:
        return None
    if coordinator or num_processes or process_id >= 0:
        return _by_flags(coordinator, num_processes, process_id)
    if "SLURM_JOB_ID" in environment:
        return _by_slurm(environment)
    known: Any = jax.config
    if (known.jax_platforms or "").startswith("tpu"):  # JAX sets it where it finds TPU chips
        return _by_tpu(environment)
    return None


def _by_flags(coordinator: str, num_processes: int, process_id: int) -> dict:
    """Arguments from the flags, which must all be set."""
    is_set = {
        "--coordinator=HOST:PORT": bool(coordinator),
        f"--num_processes={num_processes or 2}": num_processes > 0,
        "--process_id=0 (1, ... on the others)": process_id >= 0,
    }
    if missing := [flag for flag in is_set if not is_set[flag]]:
        raise SystemExit(
            f"ERROR: this process is not described in full: {' and '.join(missing)} missing. Set "
            "all of --coordinator, --num_processes and --process_id, or none of them."
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise SystemExit(
            f"ERROR: --coordinator={coordinator} must be HOST:PORT of process 0, as "
            f"--coordinator={host or coordinator.rstrip(':')}:8476"
        )
    if process_id >= num_processes:
        raise SystemExit(
            f"ERROR: --process_id={process_id} must be below --num_processes={num_processes}: the "
            f"last process is --process_id={num_processes - 1}"
        )
    arguments = dict(
        coordinator_address=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        cluster_detection_method="deactivate",
    )
    if host == "127.0.0.1":  # JAX would listen on every interface
        arguments["coordinator_bind_address"] = coordinator
    return arguments


def _by_slurm(environment: Mapping[str, str]) -> dict | None:
    """Slurm's own variables, which JAX reads; one task is a run of one process."""
    num_tasks = int(environment.get("SLURM_NTASKS", 1))
    if max(num_tasks, int(environment.get("SLURM_JOB_NUM_NODES", 1))) == 1:
        return None
    missing = [name for name in _SLURM if name not in environment]
    if missing:
        raise SystemExit(
            f"ERROR: this Slurm job has several tasks but not {', '.join(missing)}: start the run "
            "inside the job with srun, or use --num_processes=1 to run on this host alone"
        )
    return dict(cluster_detection_method="slurm")


def _by_tpu(environment: Mapping[str, str]) -> dict:
    """A TPU host: GKE names the workers in the environment, Cloud TPU VMs by their metadata."""
    workers = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if len(workers) > 1 and "TPU_WORKER_ID" not in environment:
        raise SystemExit(
            f"ERROR: TPU_WORKER_HOSTNAMES names {len(workers)} workers but TPU_WORKER_ID is not "
            "set: set TPU_WORKER_ID=0 (1, ... on the others), or --num_processes=1 to use this "
            "host alone"
        )
    return {}


def run_local(num_processes: int, devices_per_process: int, workdir: str) -> int:
    """Runs this command as `num_processes` processes and returns their exit status.

    Process 0 writes to the terminal, process I to WORKDIR/logs/process_I.log. SIGTERM and SIGINT
    are handed on. When one process fails, the others get GRACE_SECONDS to end, then are killed.
    """
    command = [sys.executable, *sys.orig_argv[1:]]
    coordinator = f"127.0.0.1:{_free_port()}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices_per_process),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        _END_WITH_PARENT: "1",
    }
    logs = _log_paths(workdir, num_processes)
    processes = []
    for index, log in enumerate(logs):
        run = [f"--coordinator={coordinator}", f"--num_processes={num_processes}"]
        with open(log, "ab") if log else open(os.dup(1), "wb") as output:
            process = subprocess.Popen(
                [*command, "--launcher=", *run, f"--process_id={index}"],
                env=environment,
                stdin=subprocess.PIPE,  # held open: its end tells a process that we are gone
                stdout=output,
                stderr=subprocess.STDOUT if log else None,
                start_new_session=True,  # Ctrl-C reaches them through us, once
            )
        processes.append(process)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: [p.send_signal(number) for p in processes])
    status = _wait(processes, logs)
    preemption.ignore()
    return status


def _wait(processes: list[subprocess.Popen], logs: list[pathlib.Path | None]) -> int:
    """Waits for all; ends the others when one has failed. Returns their status, or 1 if mixed."""
    ended = queue.SimpleQueue()
    for process in processes:
        wait = functools.partial(_put_when_ended, process, ended)
        threading.Thread(target=wait, daemon=True).start()
    timeout = None
    for _ in processes:
        try:
            process = ended.get(timeout=timeout)
        except queue.Empty:
            for process in processes:
                process.kill()
            process = ended.get()
        if process.returncode not in (0, preemption.EXIT_PREEMPTED):
            timeout = GRACE_SECONDS
    statuses = [process.returncode for process in processes]
    if any(status not in (0, preemption.EXIT_PREEMPTED) for status in statuses):
        print(_explain(statuses, logs), file=sys.stderr, flush=True)
    status = statuses[0] if len(set(statuses)) == 1 else 1
    return status if status >= 0 else 128 - status  # the shell's convention for signals


def _put_when_ended(process: subprocess.Popen, ended: queue.SimpleQueue) -> None:
    process.wait()
    ended.put(process)


def _explain(statuses: list[int], logs: list[pathlib.Path | None]) -> str:
    """The error message for processes that ended with these statuses.

    Which failed first is not known: a killed process may take longer to end than its partners take
    to notice.
    """
    lines = []
    for index, (status, log) in enumerate(zip(statuses, logs, strict=True)):
        end = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        lines.append(f"  process {index}: {end}, {log or 'above'}")
    return "\n".join(
        [
            "ERROR: a process of this run failed, which ends the others:",
            *lines,
            "The same command continues the run from its last checkpoint.",
        ]
    )


def end_with_parent_environment() -> dict[str, str]:
    """Environment of a child that must not outlive us; its stdin has to be our pipe."""
    return {_END_WITH_PARENT: "1"}


def _end_with_parent() -> None:
    """Ends this process when its parent, which holds the other end of stdin, is gone."""

    def watch():
        while os.read(0, 1):  # not sys.stdin: its lock would be held when Python shuts down
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def fail(message: str) -> NoReturn:
    """Ends this process with a message and status 1, as one of several too."""
    if not jax.distributed.is_initialized():
        sys.exit(message)
    # JAX would wait for the others before it ends, and they are waiting for us in a collective.
    print(f"{message}\nThis process ends, and with it the others.", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def _fail_with_traceback(kind: type, error: BaseException, trace: types.TracebackType) -> None:
    """sys.excepthook of one process of several."""
    traceback.print_exception(kind, error, trace)
    fail(f"ERROR: {kind.__name__} in process {jax.process_index()}")


def _num_local(text: str) -> int:
    """N of "local:N"."""
    kind, _, number = text.partition(":")
    if kind != "local" or not number.isdigit() or int(number) < 1:
        raise SystemExit(f"ERROR: --launcher={text} must be local:N, as --launcher=local:2")
    return int(number)


def _log_paths(workdir: str, num_processes: int) -> list[pathlib.Path | None]:
    """Where each process writes; None = the terminal. A bucket cannot be appended to."""
    folder = pathlib.Path(workdir) / "logs"
    if "://" in workdir:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="opd_jax_logs_"))
        print(f"Logs of processes 1 to {num_processes - 1}: {folder}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    return [None] + [folder / f"process_{index}.log" for index in range(1, num_processes)]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
