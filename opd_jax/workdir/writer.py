# SPDX-License-Identifier: Apache-2.0
"""What one run writes as it goes: metrics.jsonl, TensorBoard, and the terminal. Process 0 only.

One JSON object per step, which records.read_metrics reads. A resumed run drops the rows after its
checkpoint before it writes again, so that no row is lost, doubled or out of order; NaN is written
as null, which every reader takes.
"""

import math
import sys

import tensorboardX
import tqdm
from etils import epath

from opd_jax.workdir import records

# What a person follows while it runs: metric, label, format.
SHOWN = (
    ("loss", "loss", "{:.3f}"),
    ("log_ratio/mean", "log ratio", "{:+.3f}"),
    ("release/rate", "released", "{:.0%}"),
    ("release/position_median", "at", "{:.0%}"),
    ("response/length_mean", "tokens", "{:.0f}"),
    ("eval/accuracy", "accuracy", "{:.1%}"),
    ("time/step", "s/step", "{:.2f}"),
)


class Writer:
    """Writes rows in step order.

    Args:
      workdir: local or remote (gs://) directory.
      keep_through: rows of later steps that a killed run left behind are dropped; -1 = all.
      num_steps: for the progress bar.
      every_steps: how often a line is printed where standard error is no terminal; 0 = only when
        a step was evaluated.
      enabled: False on every process but the first: then all methods do nothing.
    """

    def __init__(
        self,
        workdir: str,
        *,
        keep_through: int,
        num_steps: int,
        every_steps: int = 1,
        tensorboard: bool = True,
        enabled: bool = True,
    ):
        self._enabled = enabled
        if not enabled:
            return
        self._path = epath.Path(workdir) / "metrics.jsonl"
        kept = [row for row in records.read_metrics(workdir) if row["step"] <= keep_through]
        records.write_jsonl(self._path, kept)
        self._every_steps, self._num_steps = every_steps, num_steps
        self._tensorboard = None
        if tensorboard:
            self._tensorboard = tensorboardX.SummaryWriter(
                str(epath.Path(workdir) / "tensorboard"), purge_step=keep_through + 1
            )
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=num_steps, initial=max(keep_through, 0), unit="step")

    def write(self, row: dict[str, float]) -> None:
        """Appends a step's row; it is on disk when this returns."""
        if not self._enabled:
            return
        records.append_jsonl(self._path, [{k: _plain(v) for k, v in row.items()}])
        if self._tensorboard:
            for name, value in row.items():
                if name != "step" and math.isfinite(value):
                    self._tensorboard.add_scalar(name, value, int(row["step"]))
        self._show(row)

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if not self._enabled:
            return
        if self._bar:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _show(self, row: dict[str, float]) -> None:
        parts = [f"{label} {form.format(row[name])}" for name, label, form in SHOWN if name in row]
        # A share of nothing, as the release point where nothing is released, is "-".
        line = "  ".join(parts).replace("nan%", "-")
        step = int(row["step"])
        if self._bar:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(line)
        due = self._every_steps and step % self._every_steps == 0
        if "eval/accuracy" in row or (due and not self._bar):
            self.say(f"step {step:>4}/{self._num_steps}  {line}")

    def close(self) -> None:
        if not self._enabled:
            return
        if self._bar:
            self._bar.close()
        if self._tensorboard:
            self._tensorboard.close()


def _plain(value: float) -> float | int | None:
    if isinstance(value, int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None
