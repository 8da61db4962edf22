# SPDX-License-Identifier: Apache-2.0
"""The files of a run directory that people and reports read: their formats, and their readers.

WORKDIR/metrics.jsonl               one object per step
WORKDIR/signals/step_000012.npz     teachability by position and by sentence, and per-row releases
WORKDIR/rollouts/step_000012.jsonl  a few whole trajectories, one object per line
WORKDIR/eval/step_000012.jsonl      every evaluation sample, one object per line

Plain dicts, lists and numpy: a reader needs none of our code. Whole files go to a temporary name
first, so a kill leaves no half file; a step that is repeated after a restart replaces its file.
A kill while a line is appended leaves it without its newline, and every reader leaves it out.
What a run appends to metrics.jsonl as it goes is writer.py's.
"""

import codecs
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging
from etils import epath

POSITION, SENTENCE, ROW = "position/", "sentence/", "row/"


# ---------------------------------------------------------------- trajectories


def token_pieces(token_bytes: Sequence[bytes]) -> list[str]:
    """The characters each token completes: the pieces join to the decoded text.

    A token that ends inside a character gets what is complete so far (perhaps ""), the token that
    completes it gets the character.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    last = len(token_bytes) - 1
    return [decoder.decode(b, final=i == last) for i, b in enumerate(token_bytes)]


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One response and what is known of its tokens; arrays cover the T valid tokens only.

    Attributes:
      prompt: as the model saw it (rendered chat template).
      correct: None = not verified.
      token_bytes_t: bytes of each response token, b"" for special tokens.
      name: token id -> the string to show for it (candidates, special tokens).
      candidate_logp_tk, teacher_logp_tk: nats, not renormalised over the K candidates.
      margin_t: nats; supervised_t: True = takes part in the update; weight_t: the loss weight.
      spans: half-open token spans of the segments; score_s: one score per segment.
      change_point: first segment after the drop, len(spans) when there is none.
      release: first token that is no longer supervised, T when nothing is released.
      gain: BIC gain of the best drop; None or not finite = no drop exists or not computed.
    """

    step: int
    row: int
    example_id: str
    family: str
    prompt: str
    answer: str
    correct: bool | None
    finished: bool
    token_t: Sequence[int]
    token_bytes_t: Sequence[bytes]
    name: Callable[[int], str]
    sampler_logp_t: np.ndarray
    candidates_tk: np.ndarray
    candidate_logp_tk: np.ndarray
    teacher_logp_t: np.ndarray | None = None
    teacher_logp_tk: np.ndarray | None = None
    margin_t: np.ndarray | None = None
    supervised_t: np.ndarray | None = None
    weight_t: np.ndarray | None = None
    spans: Sequence[tuple[int, int]] = ()
    score_s: Sequence[float] = ()
    change_point: int | None = None
    release: int | None = None
    gain: float | None = None

    def as_json(self) -> dict:
        """What one line of a rollouts file holds."""
        starts = np.cumsum([0, *(len(b) for b in self.token_bytes_t)])[:-1]
        supervised_t = self.supervised_t
        return {
            "step": int(self.step),
            "row": int(self.row),
            "example_id": str(self.example_id),
            "family": str(self.family),
            "prompt": self.prompt,
            "answer": self.answer,
            "correct": None if self.correct is None else bool(self.correct),
            "finished": bool(self.finished),
            "ids": [int(t) for t in self.token_t],
            "pieces": self._pieces(),
            "byte_start": [int(s) for s in starts],
            "sampler_logp": _numbers(self.sampler_logp_t),
            "teacher_logp": _numbers(self.teacher_logp_t),
            "sampled_candidate": _places(self.token_t, self.candidates_tk),
            "margin": _numbers(self.margin_t),
            "weight": _numbers(self.weight_t),
            "supervised": None if supervised_t is None else [int(s) for s in supervised_t],
            "candidates": self._candidates(),
            "spans": [[int(s), int(e)] for s, e in self.spans],
            "scores": _numbers(self.score_s),
            "change_point": None if self.change_point is None else int(self.change_point),
            "release": None if self.release is None else int(self.release),
            "gain": None if self.gain is None else _number(self.gain),
        }

    def _pieces(self) -> list[str]:
        """What to show for each token: its characters, or the name of a special one."""
        bytes_t, pieces = self.token_bytes_t, token_pieces(self.token_bytes_t)
        return [
            piece or ("" if own else self.name(int(token)))
            for piece, own, token in zip(pieces, bytes_t, self.token_t, strict=True)
        ]

    def _candidates(self) -> list[list[list]]:
        """[name, student's log-prob, teacher's log-prob] of each candidate of each token."""
        ids_tk, student_tk, teacher_tk = (
            self.candidates_tk,
            self.candidate_logp_tk,
            self.teacher_logp_tk,
        )
        if teacher_tk is None:
            teacher_tk = np.full(np.shape(ids_tk), np.nan)
        return [
            [
                [self.name(int(token)), _number(student), _number(teacher)]
                for token, student, teacher in zip(*of_token, strict=True)
            ]
            for of_token in zip(ids_tk, student_tk, teacher_tk, strict=True)
        ]


def _places(token_t, candidates_tk) -> list[int]:
    """Which candidate each sampled token is; -1 = none of them."""
    equal_tk = np.asarray(candidates_tk) == np.asarray(list(token_t)).reshape(-1, 1)
    return [int(np.argmax(row)) if row.any() else -1 for row in equal_tk]


def _number(x: float) -> float | None:
    """Four decimals; None where not finite (JSON has no NaN)."""
    return round(float(x), 4) if math.isfinite(x) else None


def _numbers(x) -> list | None:
    return None if x is None else [_number(v) for v in np.asarray(x, dtype=np.float64)]


# ---------------------------------------------------------------- signals


@dataclass(frozen=True)
class Signals:
    """One step's compact signals. Divide a sum by its count once, after adding steps or runs."""

    step: int
    # name -> sums[R], counts[R] by relative position
    by_position: dict[str, tuple[np.ndarray, np.ndarray]]
    # name -> sums[S], counts[S] by sentence index
    by_sentence: dict[str, tuple[np.ndarray, np.ndarray]]
    rows: dict[str, np.ndarray]  # name -> [B], one value per rollout: see signals_arrays


def signals_arrays(
    *,
    by_position: Mapping[str, np.ndarray],
    by_sentence: Mapping[str, np.ndarray],
    length_b: np.ndarray,
    release_b: np.ndarray,
    gain_b: np.ndarray,
    rescale_b: np.ndarray,
    num_segments_b: np.ndarray,
    correct_b: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The arrays of one signals file.

    Args:
      by_position, by_sentence: pairs `<name>_sum`, `<name>_count` (algorithm/profiles.py).
      length_b: valid response tokens; release_b: release point in tokens, length = no release.
      gain_b: BIC gain, nan where not computed; rescale_b: how much the row's supervised tokens are
        weighted up, 1 = nothing released; correct_b: 1 / 0, nan where not verified.
    """
    rows = {
        "length": length_b,
        "release": release_b,
        "gain": gain_b,
        "rescale": rescale_b,
        "num_segments": num_segments_b,
        "correct": np.full(np.shape(length_b), np.nan) if correct_b is None else correct_b,
    }
    for prefix, table in ((POSITION, by_position), (SENTENCE, by_sentence)):
        odd = [k for k in table if not k.endswith(("_sum", "_count"))]
        if odd:
            raise ValueError(f"{prefix} signals {odd} must come in pairs NAME_sum and NAME_count")
    return {
        **{POSITION + k: np.asarray(v) for k, v in by_position.items()},
        **{SENTENCE + k: np.asarray(v) for k, v in by_sentence.items()},
        **{ROW + k: np.asarray(v) for k, v in rows.items()},
    }


# ---------------------------------------------------------------- files


def step_path(workdir, kind: str, step: int, suffix: str) -> epath.Path:
    return epath.Path(workdir) / kind / f"step_{step:06d}{suffix}"


def write_rollouts(workdir, step: int, trajectories: Iterable[dict]) -> None:
    _write(step_path(workdir, "rollouts", step, ".jsonl"), _lines(trajectories))


def write_samples(workdir, step: int, samples: Iterable[dict]) -> None:
    _write(step_path(workdir, "eval", step, ".jsonl"), _lines(samples))


def write_jsonl(path, objects: Iterable[dict]) -> None:
    _write(epath.Path(path), _lines(objects))


def append_jsonl(path, objects: Iterable[dict]) -> None:
    """Adds lines to a file; they are on disk when this returns.

    An object store, which cannot append, gets the whole file again.
    """
    path = epath.Path(path)
    if "://" in str(path):
        before = path.read_bytes() if path.exists() else b""
        path.write_bytes(before + _lines(objects))
        return
    with open(path, "ab") as file:
        file.write(_lines(objects))
        file.flush()
        os.fsync(file.fileno())


def write_signals(workdir, step: int, arrays: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    values: dict[str, Any] = dict(arrays)
    np.savez_compressed(buffer, **values)
    _write(step_path(workdir, "signals", step, ".npz"), buffer.getvalue())


def read_rollouts(workdir) -> Iterator[dict]:
    """Every stored trajectory, in order of steps."""
    for path in _steps(workdir, "rollouts", ".jsonl"):
        yield from read_jsonl(path)


def read_signals(workdir) -> Iterator[Signals]:
    """Every stored step's signals, in order of steps."""
    for path in _steps(workdir, "signals", ".npz"):
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            arrays = {k: stored[k] for k in stored.files}
        yield Signals(
            step=int(path.stem.removeprefix("step_")),
            by_position=_pairs(arrays, POSITION),
            by_sentence=_pairs(arrays, SENTENCE),
            rows={k.removeprefix(ROW): v for k, v in arrays.items() if k.startswith(ROW)},
        )


def read_metrics(workdir) -> list[dict]:
    """Rows of metrics.jsonl by step; of a step that was repeated after a restart, the last row."""
    path = epath.Path(workdir) / "metrics.jsonl"
    rows = {int(row["step"]): row for row in read_jsonl(path)} if path.exists() else {}
    return [rows[step] for step in sorted(rows)]


def write_json(workdir, name: str, value: dict) -> None:
    """A JSON object of the run directory: config.json, run.json, done.json."""
    _write(epath.Path(workdir) / name, (json.dumps(value, indent=2) + "\n").encode())


def read_json(workdir, name: str) -> dict:
    """A JSON object of the run directory ({} when absent): config.json, run.json."""
    path = epath.Path(workdir) / name
    return json.loads(path.read_text()) if path.exists() else {}


def read_jsonl(path) -> list[dict]:
    """Objects of a JSONL file that a run has written; a last line without its newline is left out.

    Raises:
      ValueError: another line is no object: the file was changed by something else.
    """
    complete, _, cut = epath.Path(path).read_bytes().rpartition(b"\n")
    if cut:
        logging.warning("%s: a last line that was cut off is left out", path)
    objects = []
    for number, line in enumerate(complete.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            objects.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"{path}:{number} is not JSON ({error}), and no run leaves such a line: the file "
                "was changed or damaged. Delete the line, or restore the file"
            ) from error
    return objects


def _lines(records: Iterable[dict]) -> bytes:
    return "".join(json.dumps(r, allow_nan=False) + "\n" for r in records).encode()


def _write(path: epath.Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_bytes(content)
    temporary.replace(path)


def _steps(workdir, kind: str, suffix: str) -> list[epath.Path]:
    folder = epath.Path(workdir) / kind
    if not folder.exists():
        return []
    return sorted(
        p for p in folder.iterdir() if p.name.startswith("step_") and p.name.endswith(suffix)
    )


def _pairs(
    arrays: Mapping[str, np.ndarray], prefix: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    sums = [
        k.removeprefix(prefix).removesuffix("_sum")
        for k in arrays
        if k.startswith(prefix) and k.endswith("_sum")
    ]
    return {n: (arrays[f"{prefix}{n}_sum"], arrays[f"{prefix}{n}_count"]) for n in sums}
