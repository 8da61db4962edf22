# SPDX-License-Identifier: Apache-2.0
"""Problems: the embedded data set or a JSONL file.

The embedded data set is a tensorflow-datasets builder that writes array_record files and reads them
with `as_data_source`; TensorFlow is never imported.
"""

import contextlib
import functools
import hashlib
import inspect
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from opd_jax.problems import jsonl, task

EMBEDDED = "embedded"
SPLITS = ("train", "heldout", "ood")
# Problems per split, and the seed of their generation: pretraining draws from seed 0.
SIZES = {"train": 5000, "heldout": 1000, "ood": 400}
TASK_SEED = 1
SOURCE, BENCHMARKS = "--config.data.source", "--benchmarks"  # flags that name a file
_FIELDS = ("id", "family", "prompt", "answer", "solution")


def build_dataset(
    name: str,
    split: str = "train",
    *,
    cache_dir: str = "",
    on_error: str = "raise",
    option: str = SOURCE,
) -> Sequence[task.Example]:
    """A random-access source of examples.

    Args:
      name: "embedded", or a path to a JSONL file (which has one split: all of it).
      split: of the embedded data set: "train", "heldout" (its families, problems that training
        never sees) or "ood" (the family that distillation never sees).
      cache_dir: where the embedded data set is written, once; "" = the environment variable
        OPD_JAX_CACHE, or ~/.cache/opd_jax.
      on_error: a bad JSONL line is raised, or skipped and counted ("raise", "skip").
      option: the flag that `name` was given by, for the messages.
    """
    if name != EMBEDDED:
        return read_jsonl(name, on_error=on_error, option=option)
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; the embedded task has {', '.join(SPLITS)}")
    builder: Any = _prepared(cache_dir)  # its decorated methods hide their parameters
    return EmbeddedSource(builder.as_data_source(split=split))


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

_LINE = '{"prompt": ..., "answer": ...} lines'


def read_jsonl(path: str, *, on_error: str = "raise", option: str = SOURCE) -> list[task.Example]:
    """Examples of a JSONL file: {"prompt": ..., "answer": ...} or {"messages": [...], ...} lines.

    "answer" may be missing where nothing is verified; a number stays as it is written. A last
    message of the assistant is taken for the reference solution. "id" (text or an integer) and
    "family" are optional. null is as good as missing, but for an answer.

    Args:
      path: the file.
      on_error: "raise" names the file and line of the first bad line; "skip" leaves bad lines out,
        logs each and their number at the end.
      option: the flag that `path` was given by, for the messages.

    Raises:
      FileNotFoundError, ValueError: as `jsonl.read`, or two problems have one id.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(
            f"on_error={on_error!r} is unknown; set --config.data.on_error=raise or skip"
        )
    stem = pathlib.Path(path).stem
    numbered = jsonl.read(
        path,
        lambda record, number: _example(record, f"{stem}-{number}"),
        option=option,
        form=f"{_LINE}, or to {EMBEDDED!r}" if option != BENCHMARKS else _LINE,
        skip="--config.data.on_error=skip" if option == SOURCE else "",
        on_error=on_error,
    )
    examples = [example for _, example in numbered]
    check_ids(examples, f"{option}={path}", [number for number, _ in numbered])
    return examples


def check_ids(
    examples: Sequence[task.Example], where: str, lines: Sequence[int] | None = None
) -> None:
    """Raises ValueError unless every problem has an id of its own: samples are stored by it.

    Args:
      where: what holds them, for the message.
      lines: number of each example's line, where they come from a file.
    """
    places: dict[str, list[int]] = {}
    for place, example in zip(lines or range(1, len(examples) + 1), examples, strict=True):
        places.setdefault(str(example.id), []).append(place)
    if repeated := [id_ for id_, found in places.items() if len(found) > 1]:
        first = places[repeated[0]]
        more = f" and {len(first) - 2} more" if len(first) > 2 else ""
        raise ValueError(
            f"{where}: {len(repeated)} ids belong to several problems, first {repeated[0]!r} "
            f"({'lines' if lines else 'problems'} {first[0]} and {first[1]}{more}): samples are "
            "stored by id, so all but one of such problems would be lost. Give every problem an "
            '"id" of its own, or none an "id"'
        )


def _example(record: dict, name: str) -> task.Example:
    """Raises ValueError that says what the line holds and what it must hold."""
    given = {k: v for k, v in record.items() if v is not None or k == "answer"}
    if ("prompt" in given) == ("messages" in given):
        keys = [jsonl.shortened(key) for key in sorted(given)[:10]]
        raise ValueError(f'needs either "prompt" or "messages"; the keys are {keys}')
    solution = ""
    if "prompt" in given:
        prompt = _text(given, "prompt", empty=False)
    else:
        prompt = _messages(given["messages"])
        if prompt[-1][0] == "assistant":
            prompt, solution = prompt[:-1], prompt[-1][1]
        if not prompt or prompt[-1][0] not in ("user", "tool"):
            raise ValueError('"messages" must end with a message of the user (before any solution)')
    id_ = given.get("id", name)
    return task.Example(
        id=str(id_) if jsonl.is_integer(id_) else _text({"id": id_}, "id"),
        family=_text(given, "family", "jsonl"),
        prompt=prompt,
        answer=_answer(given.get("answer", "")),
        solution=solution,
    )


def _answer(answer: Any) -> str:
    jsonl.check_number(answer, "answer")
    if not isinstance(answer, str):
        raise ValueError(f'"answer" must be text or a number, this is {jsonl.kind(answer)}')
    jsonl.check_characters(answer, "answer")
    return str(answer)


def _text(record: dict, key: str, default: str = "", *, empty: bool = True) -> str:
    value = record.get(key, default)
    if not jsonl.is_text(value) or not (value.strip() or empty):
        must = "text" if empty else "non-empty text"
        raise ValueError(f'"{key}" must be {must}, this is {jsonl.kind(value)}')
    jsonl.check_characters(value, key)
    return value


def _messages(messages: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'"messages" must be a list of messages, this is {jsonl.kind(messages)}')
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        if not all(jsonl.is_text(fields.get(k)) for k in ("role", "content")):
            raise ValueError(
                'a message must be {"role": text, "content": text}, one is ' + jsonl.kind(message)
            )
        jsonl.check_characters(fields["role"] + fields["content"], "messages")
    return tuple((m["role"], m["content"]) for m in messages)
