# SPDX-License-Identifier: Apache-2.0
"""Problems: the embedded data set or a JSONL file.

The embedded data set is a tensorflow-datasets builder that writes array_record files and reads them
with `as_data_source`; TensorFlow is never imported.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging

from opd_jax.problems import task

EMBEDDED = "embedded"
SPLITS = ("train", "heldout", "ood")
# Problems per split, and the seed of their generation: pretraining draws from seed 0.
SIZES = {"train": 5000, "heldout": 1000, "ood": 400}
TASK_SEED = 1
_FIELDS = ("id", "family", "prompt", "answer", "solution")


def build_dataset(
    name: str, split: str = "train", *, cache_dir: str = "", on_error: str = "raise"
) -> Sequence[task.Example]:
    """A random-access source of examples.

    Args:
      name: "embedded", or a path to a JSONL file (which has one split: all of it).
      split: of the embedded data set: "train", "heldout" (its families, problems that training
        never sees) or "ood" (the family that distillation never sees).
      cache_dir: where the embedded data set is written, once; "" = the environment variable
        OPD_JAX_CACHE, or ~/.cache/opd_jax.
      on_error: a bad JSONL line is raised, or skipped and counted ("raise", "skip").
    """
    if name != EMBEDDED:
        return read_jsonl(name, on_error=on_error)
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; the embedded task has {', '.join(SPLITS)}")
    return EmbeddedSource(_prepared(cache_dir).as_data_source(split=split))


# ---- the embedded data set ----


def embedded_examples(split: str) -> Iterator[task.Example]:
    """The examples of a split, as they are written to disk."""
    families = task.OUT_OF_DOMAIN if split == "ood" else task.IN_DOMAIN
    side = "train" if split == "train" else "heldout"
    yield from task.make_many(families, side, TASK_SEED, SIZES[split])


def _builder(data_dir: pathlib.Path):
    """The tensorflow-datasets builder of the embedded task, its files under `data_dir`."""
    return _builder_class()(data_dir=str(data_dir), file_format="array_record")


@functools.cache  # tensorflow-datasets refuses a second class of the same name
def _builder_class():
    """A function, because importing the library takes a while."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()

    class OpdTask(tfds.core.GeneratorBasedBuilder):
        """Multi-step problems with solutions in English prose (opd_jax/problems/task.py)."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({k: tfds.features.Text() for k in _FIELDS})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in SPLITS}

        def _generate_examples(self, split):
            for i, example in enumerate(embedded_examples(split)):
                yield i, {field: getattr(example, field) for field in _FIELDS}

    return OpdTask


def _prepared(cache_dir: str):
    """The builder with its files on disk.

    The files are written beside their place and moved there in one rename, so any number of
    processes may do this at once and a killed one leaves nothing half-written. The name holds a
    digest of what generates them: another version of the task never reads these.
    """
    default = os.environ.get("OPD_JAX_CACHE") or pathlib.Path.home() / ".cache" / "opd_jax"
    root = pathlib.Path(cache_dir or default).expanduser()
    recipe = inspect.getsource(task) + repr((SIZES, TASK_SEED, _FIELDS))
    place = root / f"embedded-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not place.exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
            staging = pathlib.Path(tempfile.mkdtemp(prefix=".embedded-", dir=root))
        except OSError as error:
            raise OSError(
                f"the embedded data set cannot be written under {root} ({error}): it needs some "
                "5 MB there; set the environment variable OPD_JAX_CACHE to a writable directory"
            ) from error
        try:
            with contextlib.redirect_stdout(None):  # tensorflow-datasets prints its progress
                _builder(staging).download_and_prepare()
            with contextlib.suppress(FileExistsError, OSError):  # another process was first
                staging.rename(place)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return _builder(place)


class EmbeddedSource(Sequence[task.Example]):
    """Examples of one split, read from array_record files at random."""

    def __init__(self, source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> task.Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return task.Example(**{k: v.decode() for k, v in self._source[index].items()})


# ---- JSONL ----


def read_jsonl(path: str, *, on_error: str = "raise") -> list[task.Example]:
    """Examples of a JSONL file: {"prompt": ..., "answer": ...} or {"messages": [...], ...} lines.

    "answer" may be missing where nothing is verified. A last message of the assistant is taken for
    the reference solution. "id" and "family" are optional.

    Args:
      path: the file.
      on_error: "raise" names the file and line of the first bad line; "skip" leaves bad lines out,
        logs each and their number at the end.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(
            f"on_error={on_error!r} is unknown; set --config.data.on_error=raise or skip"
        )
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"--config.data.source={path} is no file; set it to a JSONL file of "
            '{"prompt": ..., "answer": ...} lines, or to "embedded"'
        )
    examples, num_skipped = [], 0
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            examples.append(_parse_line(line, f"{file.stem}-{number}"))
        except (
            ValueError,
            RecursionError,
        ) as error:  # UnicodeDecodeError, JSONDecodeError: ValueErrors
            message = f"{path}:{number}: {error}"
            if on_error == "raise":
                raise ValueError(
                    f"{message}; correct the line, or set --config.data.on_error=skip to leave "
                    "such lines out"
                ) from None
            logging.warning("skipped %s", message)
            num_skipped += 1
    if num_skipped:
        logging.warning("%s: %d lines skipped, %d read", path, num_skipped, len(examples))
    if not examples:
        raise ValueError(
            f"{path} holds no problem ({num_skipped} lines skipped): a run needs at least one line "
            '{"prompt": ..., "answer": ...}; set --config.data.source to such a file'
        )
    return examples


def _parse_line(line: bytes, name: str) -> task.Example:
    """Raises ValueError that says what the line holds and what it must hold."""
    record = json.loads(line.decode("utf-8"))
    if not isinstance(record, dict):
        raise ValueError(f"a line must be an object, this is {_kind(record)}")
    if ("prompt" in record) == ("messages" in record):
        raise ValueError(f'needs either "prompt" or "messages"; the keys are {sorted(record)[:10]}')
    solution = ""
    if "prompt" in record:
        prompt = _text(record, "prompt", empty=False)
    else:
        prompt = _messages(record["messages"])
        if prompt[-1][0] == "assistant":
            prompt, solution = prompt[:-1], prompt[-1][1]
        if not prompt or prompt[-1][0] not in ("user", "tool"):
            raise ValueError('"messages" must end with a message of the user (before any solution)')
    answer = record.get("answer", "")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f'"answer" must be text or a number, this is {_kind(answer)}')
    return task.Example(
        id=_text(record, "id", name),
        family=_text(record, "family", "jsonl"),
        prompt=prompt,
        answer=str(answer),
        solution=solution,
    )


def _text(record: dict, key: str, default: str = "", *, empty: bool = True) -> str:
    value = record.get(key, default)
    if not isinstance(value, str) or not (value.strip() or empty):
        raise ValueError(f'"{key}" must be non-empty text, this is {_kind(value)}')
    return value


def _messages(messages: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'"messages" must be a list of messages, this is {_kind(messages)}')
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(k), str) for k in ("role", "content")):
            raise ValueError(
                'a message must be {"role": text, "content": text}, one is ' + _kind(message)
            )
    return tuple((m["role"], m["content"]) for m in messages)


def _kind(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
