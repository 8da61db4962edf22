# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are either whole or refused: Orbax, asynchronous and atomic, with a digest.

A checkpoint holds the training state, and a JSON with the step, the data cursor, the resolved
config, digests of the files that the run reads, and one digest per array. The arrays' digests are
checked after every restore, because a lost chunk of an array file reads back as zeros without an
error.
"""

import dataclasses
import json
import logging as python_logging
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from opd_jax.settings import Section, number
from opd_jax.workdir import digest


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back: `state` on the devices, and what is needed to go on from `step`."""

    step: int  # updates done
    state: Any
    cursor: dict  # of the prompt stream, before the next batch is drawn
    config: dict  # resolved config of the run that wrote it
    content: dict  # digests of the files that this run read
    skipped: tuple[str, ...]  # one line per newer checkpoint that could not be used


@jax.jit
def _digests(leaves: list[jax.Array]) -> list[jax.Array]:
    def digest(x):
        x = x.reshape(-1)
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        # Odd weights, so that swapped entries show as well as changed ones; uint32 wraps.
        weights = 2 * jax.lax.iota(jnp.uint32, x.size) + 1
        return jnp.sum(x.astype(jnp.uint32) * weights, dtype=jnp.uint32)

    return [digest(x) for x in leaves]


def digests(state: Any) -> dict[str, int]:
    """One uint32 per array of `state`, by its path: equal bits give equal digests on any mesh."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    values = _digests([leaf for _, leaf in flat])
    return {jax.tree_util.keystr(p): int(v) for (p, _), v in zip(flat, values, strict=True)}


@dataclasses.dataclass(frozen=True)
class Settings(Section):
    """When a run's state is saved, and which of the checkpoints are kept."""

    section = "checkpoint"
    every_steps: int = number(20, least=0)  # updates; 0 = only after the last
    keep_last: int = number(2, least=1, why="0 would delete every checkpoint")
    keep_every_steps: int = number(0, least=0)  # those at multiples of it too; 0 = none
    keep_best: int = number(1, least=0)  # how many of the best by eval/accuracy too; 0 = none


DEFAULTS = Settings()


class Checkpoints:
    """The checkpoints of one run, under `directory`.

    Args:
      directory: local or gs:// path.
      settings: which are kept.
      content: name -> digest of what the run reads (digest.py), stored with each checkpoint: a run
        whose files were replaced does not go on.
      read_only: for a reader beside the run, which must not clean up what the run is writing.
    """

    def __init__(
        self,
        directory: str,
        settings: Settings = DEFAULTS,
        *,
        content: Mapping[str, str] | None = None,
        read_only: bool = False,
    ):
        self._content = dict(content or {})
        local = "://" not in str(directory)
        # Orbax refuses relative paths, and a run's workdir is often one.
        self.directory = epath.Path(os.path.abspath(directory) if local else directory)
        keep: list[Any] = [policies.LatestN(settings.keep_last)]
        if settings.keep_every_steps:
            keep.append(policies.EveryNSteps(settings.keep_every_steps))
        if settings.keep_best:
            keep.append(
                policies.BestN(
                    n=settings.keep_best,
                    get_metric_fn=_metric,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            # Without it Orbax forgets the metrics at a restart.
            best_fn=_metric if settings.keep_best else None,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.directory, options=self._options, item_names=("state", "meta")
        )

    def save(
        self, step: int, state: Any, *, cursor: dict, config: dict, metric: float | None
    ) -> None:
        """Starts writing; returns once `state` may be donated.

        Raises:
          OSError: this checkpoint or an earlier one cannot be written; names those that are whole.
        """
        meta = dict(step=step, cursor=cursor, config=config, digests=digests(state))
        meta["content"] = self._content
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        try:
            self._manager.check_for_errors()
            metrics = None if metric is None else {"metric": metric}
            self._manager.save(step, args=args, metrics=metrics, force=True)
        except (OSError, ValueError, RuntimeError) as e:
            raise self._write_error(e) from e

    def wait(self) -> None:
        """Returns when everything saved is on disk; raises OSError if it is not."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except (OSError, ValueError, RuntimeError) as e:
            raise self._write_error(e) from e

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def restore(self, state_shapes: Any) -> Restored | None:
        """The newest checkpoint that reads back whole; None when the run has none at all.

        Args:
          state_shapes: ShapeDtypeStructs with shardings (of this mesh, which may differ from the
            one that saved), same tree as the saved state.

        Raises:
          ValueError: checkpoints exist and none can be used, and what is wrong with each; or the
            files that the run reads are others than they were.
        """
        skipped = []
        for step in reversed(self.steps()):
            try:
                restored, trouble = self._read(step, state_shapes), ""
            except Exception as e:  # Orbax raises bare Exception for a lost file;
                # nothing is hidden: the reason is logged, returned, and raised if none is left.
                restored, trouble = None, f"{type(e).__name__}: {str(e)[:200]}"
            if _every_process(restored is not None) and restored is not None:
                self._check_content(restored)
                self._set_aside(skipped_steps=[s for s, _ in skipped])
                lines = tuple(f"step {s}: {why}" for s, why in skipped)
                return dataclasses.replace(restored, skipped=lines)
            skipped.append((step, trouble or "another process could not read it"))
            logging.error("checkpoint %s of %s is unusable: %s", step, self.directory, trouble)
        if skipped:
            listing = "\n  ".join(f"step {s}: {why}" for s, why in skipped)
            raise ValueError(
                f"no checkpoint under {self.directory} can be used:\n  {listing}\n"
                "Nothing was deleted. Repair one, or start again with another --workdir."
            )
        return None

    def _read(self, step: int, state_shapes: Any) -> Restored:
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(state_shapes), meta=ocp.args.JsonRestore()
        )
        read: Any = self._manager.restore(step, args=args)
        meta, found = read.meta, digests(read.state)
        if found != meta["digests"]:
            wrong = [path for path, value in meta["digests"].items() if found.get(path) != value]
            raise ValueError(f"{len(wrong)} arrays differ from their digest, first {wrong[:1]}")
        return Restored(
            step=meta["step"],
            state=read.state,
            cursor=meta["cursor"],
            config=meta["config"],
            content=meta.get("content", {}),
            skipped=(),
        )

    def _check_content(self, restored: Restored) -> None:
        if changed := digest.differing(restored.content, self._content):
            raise ValueError(
                f"the run in {self.directory.parent} began with other {' and other '.join(changed)}"
                ": the files under these paths were replaced, and what goes on would be a mixture "
                "of two runs. Put the old files back, or set --workdir to another directory"
            )

    def params_digest(self, step: int | None = None) -> str:
        """One digest of the parameters of checkpoint `step` (default newest)."""
        stored = self._meta(self._existing(step))["digests"]
        return digest.of_arrays({k: v for k, v in stored.items() if k.startswith(".params")})

    def read_params(self, step: int | None = None) -> tuple[int, Any]:
        """(step, host parameters) of checkpoint `step` (default newest), digest checked.

        For export and evaluation: needs neither the optimiser nor the mesh of the run.
        """
        step = self._existing(step)
        with ocp.StandardCheckpointer() as reader:
            state = reader.restore(self.directory / str(step) / "state")
        params = jax.tree.map(np.asarray, state["params"])
        stored = self._meta(step)["digests"]
        wanted = {k: v for k, v in stored.items() if k.startswith(".params")}
        found = digests({"params": params})
        if sorted(found.values()) != sorted(wanted.values()):
            raise ValueError(f"checkpoint {step} of {self.directory} differs from its digests")
        return step, params

    def _existing(self, step: int | None) -> int:
        """`step`, or the newest, of those that there are."""
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            raise ValueError(
                f"{self.directory} holds checkpoints of steps {steps}, not "
                f"{'any' if step is None else step}; set --step to one of them"
            )
        return steps[-1] if step is None else step

    def _meta(self, step: int) -> dict:
        return json.loads((self.directory / str(step) / "meta" / "metadata").read_text())

    def _set_aside(self, skipped_steps: list[int]) -> None:
        """Moves unusable checkpoints out of the way of the steps that will be saved again."""
        if not skipped_steps:
            return
        self._manager.close()
        if jax.process_index() == 0:
            aside = self.directory.parent / "checkpoints_unusable"
            aside.mkdir(parents=True, exist_ok=True)
            for step in skipped_steps:
                target, n = aside / str(step), 0
                while target.exists():
                    n += 1
                    target = aside / f"{step}.{n}"
                (self.directory / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints set aside")
        self._manager = self._open()

    def _write_error(self, e: Exception) -> OSError:
        why = str(e).partition(" [tensorstore_spec=")[0]  # TensorStore adds pages of JSON
        good = sorted(ocp.utils.checkpoint_steps(self.directory))
        last = good[-1] if good else 0
        return OSError(
            f"could not write a checkpoint under {self.directory} ({type(e).__name__}: {why}). "
            f"Whole are those of steps {good}; none was deleted for it. Free space or make the "
            f"directory writable: then the same command goes on from step {last}; or "
            "set --workdir to another directory."
        )


def _metric(metrics: dict) -> float:
    return metrics["metric"]


def quiet_orbax() -> None:
    """For a command: nothing but what `save` and `wait` raise is said of a failed write.

    Orbax's threads log it with their tracebacks, several times, asyncio logs each further array,
    and TensorStore's threads, whose event loop is then gone, report that. Nor is every checkpoint
    without an evaluation worth a warning.
    """

    def is_news(record) -> bool:
        of_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
        return not (of_orbax and (record.exc_info or "tracked_metric" in record.getMessage()))

    logging.get_absl_logger().addFilter(is_news)
    python_logging.getLogger("asyncio").addFilter(
        lambda record: "exception was never retrieved" not in record.getMessage()
    )
    report = sys.unraisablehook

    def report_others(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_others


def _every_process(ok: bool) -> bool:
    """True if `ok` on every process, so that all take the same branch."""
    if jax.process_count() == 1:
        return ok
    return bool(np.min(multihost_utils.process_allgather(np.array(ok))))
