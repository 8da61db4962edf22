# SPDX-License-Identifier: Apache-2.0
"""Whose workdir it is: who is in it now, the config a run was started with, who started it."""

import contextlib
import datetime
import errno
import functools
import importlib.metadata
import json
import os
import pathlib
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import filelock
import jax
from absl import logging
from etils import epath

from opd_jax.settings import flatten
from opd_jax.workdir import records

LOCK_SECONDS = 10.0  # how long a new run waits for a killed one to be gone
HOLDER = "lock.json"  # who holds WORKDIR/lock
# Errors of file systems without lock support (Lustre and some network mounts).
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)

# What a run may change when it goes on: it touches nothing that has been computed.
MAY_CHANGE = (
    *("num_steps", "log.", "checkpoint.", "segment.num_workers"),
    *("evaluate.every_steps", "evaluate.teacher"),
)


@contextlib.contextmanager
def hold(workdir: str) -> Iterator[None]:
    """Keeps other runs out of the workdir as long as this one is in it; process 0 does.

    The kernel drops the lock with the process, so nothing is left to clean up after a kill. Not
    locked are gs:// and other remote paths, and file systems without lock support: there the user
    must see to it that one run at a time uses a workdir.

    Raises:
      ValueError: another run is in it, or it cannot be written.
    """
    if "://" in str(workdir) or jax.process_index() != 0:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            os.makedirs(workdir, exist_ok=True)
            # Never filelock's soft lock, a file that a killed run leaves behind.
            lock = filelock.FileLock(os.path.join(workdir, "lock"), fallback_to_soft=False)
            stack.enter_context(lock.acquire(timeout=LOCK_SECONDS))
        except filelock.Timeout:
            raise ValueError(
                f"--workdir={workdir} is in use: {_holder(workdir)}. Two runs in one directory "
                "would overwrite each other's files. Wait for that one or end it, or set "
                f"--workdir to another directory, as --workdir={shlex.quote(f'{workdir}_2')}"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise ValueError(
                    f"--workdir={workdir} must be a directory that can be written ({error}); set "
                    "--workdir to one, as --workdir=runs/mine"
                ) from error
            logging.warning(
                "%s is not locked: its file system has no lock support (%s)", workdir, error
            )
        about = dict(pid=os.getpid(), host=socket.gethostname(), since=_now())
        records.write_json(workdir, HOLDER, about)
        yield


def _holder(workdir: str) -> str:
    """Who is in a workdir that is locked."""
    try:
        about = records.read_json(workdir, HOLDER)
        return f"process {about['pid']} on {about['host']} has been there since {about['since']}"
    except (KeyError, ValueError):  # locked a moment ago, and not yet written
        return "another run has just begun there"


def check_same_run(
    config: dict, workdir: epath.Path, defaults: Mapping[str, Any] | None = None
) -> None:
    """Raises if the workdir holds a run that is not to go on with `config`; see `compare`.

    A run that ended before its first row of metrics has computed nothing.
    """
    if not (workdir / "metrics.jsonl").exists():
        return
    if there := records.read_json(workdir, "config.json"):
        compare(config, there, workdir, defaults)


def compare(
    config: dict, there: dict, workdir: epath.Path, defaults: Mapping[str, Any] | None = None
) -> None:
    """Raises if a run of config `there` is not to go on with `config`; names the differing keys.

    Args:
      defaults: of the config's keys, nested or dotted. The run may be older than a key: it was
        computed as this key's default does, which every new setting must see to.
    """
    stored = flatten(there)
    old = json.loads(json.dumps(flatten(defaults or {}))) | stored  # no tuples: as it was stored
    new = flatten(config)
    differ = [
        f"{key}: {_shown(old, key)} there, {_shown(new, key)} now"
        for key in sorted(stored.keys() | new.keys())
        if old.get(key) != new.get(key) and not _may_change(key, old)
    ]
    if differ:
        raise ValueError(
            f"--workdir={workdir} holds a run of another config: a run goes on only as it began. "
            f"Different are {'; '.join(differ)}. Set --workdir to a new directory, or give these "
            "keys the values that are there."
        )


def _shown(flat: dict, key: str) -> str:
    return repr(flat[key]) if key in flat else "no such key"


def check_num_steps(num_steps: int, done: int, workdir) -> None:
    """Raises if the run that goes on has done more than it is asked for."""
    if num_steps < done:
        raise ValueError(
            f"config.num_steps={num_steps}, but the run in {workdir} has done {done} updates and "
            f"cannot undo them. Set --config.num_steps={done} (it ends there) or more"
        )


def _may_change(key: str, config: dict) -> bool:
    """True = a run of this flat config goes on as it was with another value of `key`."""
    growing = config.get("selector.kind") == "growing_prefix" and not config.get(
        "selector.grow_steps"
    )
    if key == "num_steps" and (config.get("optim.decay") == "cosine" or growing):
        return False  # what has been computed followed a schedule of that length
    return key.startswith(MAY_CHANGE)


def claim(workdir: epath.Path, config: dict) -> None:
    """Writes what was asked (config.json) and who asked (run.json)."""
    if jax.process_index() != 0:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    records.write_json(workdir, "config.json", config)
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "nltk")
    run = dict(
        started=_now(),
        commit=commit(),
        command=[pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        python=sys.version.split()[0],
        versions={name: importlib.metadata.version(name) for name in packages},
        devices=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        processes=jax.process_count(),
    )
    if not (workdir / "run.json").exists():
        records.write_json(workdir, "run.json", run)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def commit() -> str:
    """The source's commit, with "+" when files differ from it; "" outside a git checkout."""
    git = ["git", "-C", str(pathlib.Path(__file__).parent)]
    ask = functools.partial(subprocess.run, capture_output=True, text=True, check=False)
    try:
        head = ask([*git, "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        dirty = ask([*git, "status", "--porcelain", "-uno"]).stdout.strip()
    except FileNotFoundError:  # no git on this machine
        return ""
    return head + ("+" if dirty else "")
