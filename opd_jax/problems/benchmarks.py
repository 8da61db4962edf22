# SPDX-License-Identifier: Apache-2.0
"""Benchmarks by name: where their problems come from, and how a problem becomes a prompt.

A name is `NAME` (from the Hugging Face hub, which needs `pip install datasets` and the network),
`NAME=FILE.jsonl` (the same problems from a file), a plain `FILE.jsonl` of {"prompt", "answer"}
objects, `embedded` (the held-out problems of the embedded task) or `embedded_ood`.

Public copies of one benchmark differ in their fields: the hub's field is read where a row has it,
else the first of QUESTIONS or ANSWERS, in either case of letters. A problem's name is its number
among the rows: copies number them each in their own way, some twice from 0.

Left out: LiveCodeBench, HumanEval+ and MBPP+ run code that a model wrote. Export the model
(`python -m launch.export`) and give the directory to their own sandboxed harnesses.
"""

import dataclasses
import hashlib
import importlib
import itertools
import pathlib
import random
from collections.abc import Iterable
from typing import Any

from opd_jax.problems import datasets, jsonl, task, verify

# The wording that the paper's set-up uses after each mathematical problem.
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
CHOICE = "Please reason step by step, and put the letter of your final answer within \\boxed{}."
LETTERS = "ABCDEFGHIJ"
QUESTIONS = ("problem", "question")
ANSWERS = ("answer", "final_answer", "solution")
EMBEDDED = {"embedded": "heldout", "embedded_ood": "ood"}
CODE = ("livecodebench", "humaneval", "humaneval+", "mbpp", "mbpp+")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A data set on the hub. With `wrong` it is multiple choice: `answer` and `wrong` are texts."""

    path: str  # dataset id
    split: str
    question: str  # field
    answer: str  # field
    subset: str | None = None
    wrong: tuple[str, ...] = ()  # fields
    in_domain: bool = True  # of a student that learns mathematics


BENCHMARKS = {
    "aime25": Benchmark("math-ai/aime25", "test", "problem", "answer"),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", "problem", "answer"),
    "hmmt_feb25": Benchmark("MathArena/hmmt_feb_2025", "train", "problem", "answer"),
    "hmmt_nov25": Benchmark("MathArena/hmmt_nov_2025", "train", "problem", "answer"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", "problem", "answer"),
    "minerva": Benchmark("math-ai/minervamath", "test", "question", "answer"),
    "gsm8k": Benchmark("openai/gsm8k", "test", "question", "answer", subset="main"),
    "gpqa": Benchmark(
        "Idavidrein/gpqa",
        "train",
        "Question",
        "Correct Answer",
        subset="gpqa_diamond",
        wrong=tuple(f"Incorrect Answer {i}" for i in (1, 2, 3)),
        in_domain=False,
    ),
}


def load(name: str, num_problems: int = 0) -> tuple[str, list[task.Example]]:
    """(short name, problems) of one benchmark as the command line gives it; 0 problems = all."""
    known, _, file = name.partition("=")
    if name in EMBEDDED:
        source = datasets.build_dataset("embedded", EMBEDDED[name])
        count = min(num_problems or len(source), len(source))
        return name, [source[i] for i in range(count)]
    if known.casefold().replace(" ", "") in CODE:
        raise ValueError(
            f"{known} runs code that a model wrote, which this project does not do: export the "
            "model with `python -m launch.export` and give the directory to the benchmark's harness"
        )
    if known in BENCHMARKS:
        examples = _read_file(known, file) if file else to_examples(known, _read_hub(known))
    elif name.endswith(".jsonl"):
        known = pathlib.Path(name).stem
        examples = list(datasets.build_dataset(name, option=datasets.BENCHMARKS))
    else:
        raise ValueError(
            f"--benchmarks={name} is unknown: it takes {', '.join([*EMBEDDED, *BENCHMARKS])}, any "
            "of the latter as NAME=FILE.jsonl, or a FILE.jsonl of prompts and answers"
        )
    return known, examples[: num_problems or None]


def to_examples(name: str, rows: Iterable[dict]) -> list[task.Example]:
    """Problems of a known benchmark from rows with its fields."""
    examples = []
    for number, row in enumerate(rows):
        try:
            examples.append(_example(name, number, row))
        except ValueError as error:
            raise ValueError(f"row {number} of {name}: {error}") from None
    return examples


def _read_file(name: str, file: str) -> list[task.Example]:
    """Problems of a known benchmark from a file of its rows; errors name file and line."""
    numbers = itertools.count()
    benchmark = BENCHMARKS[name]
    fields = (benchmark.question, benchmark.answer, *benchmark.wrong)
    shown = ", ".join(f'"{field}": ...' for field in fields)
    read = jsonl.read(
        file,
        lambda row, _: _example(name, next(numbers), row),
        option=f"{datasets.BENCHMARKS}={name}",
        form=f"{{{shown}}} lines",
    )
    return [example for _, example in read]


def _example(name: str, number: int, row: dict) -> task.Example:
    """Problem `number` of a known benchmark; raises ValueError that says what the row lacks."""
    benchmark = BENCHMARKS[name]
    if benchmark.wrong:
        fields = (benchmark.question, benchmark.answer, *benchmark.wrong)
        question, answer, *wrong = (_found(row, (field,))[1] for field in fields)
        question, answer = multiple_choice(question, answer, wrong)
    else:
        question = _found(row, (benchmark.question, *QUESTIONS))[1]
        answer = final_answer(*_found(row, (benchmark.answer, *ANSWERS)))
    prompt = f"{question}\n{CHOICE if benchmark.wrong else BOXED}"
    return task.Example(f"{name}-{number}", name, prompt, answer)


def _found(row: dict, fields: Iterable[str]) -> tuple[str, str]:
    """(field, text) of the first of `fields` that holds something."""
    fields = tuple(dict.fromkeys(fields))
    held = {key.casefold(): value for key, value in row.items()}
    for field in fields:
        value = row.get(field, held.get(field.casefold()))
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if value is None or value == []:
            continue
        jsonl.check_number(value, field)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f'"{field}" must be text or a number, this is {jsonl.kind(value)}')
        if text := str(value).strip():
            jsonl.check_characters(text, field)
            return field, text
    raise ValueError(
        f"needs {' or '.join(map(repr, fields))}; the fields are "
        f"{[jsonl.shortened(key) for key in sorted(row)[:10]]}"
    )


def final_answer(field: str, text: str) -> str:
    r"""The answer that a text ends in: after ####, in its last \boxed{}, or the text itself.

    Raises:
      ValueError: a field of solutions names no answer in either way, or an empty one.
    """
    answer = text
    if "####" in text:
        answer = text.rpartition("####")[2]
    elif (boxed := verify.last_boxed(text)) is not None:
        answer = boxed
    elif field == "solution":
        raise ValueError('"solution" must hold its answer in \\boxed{} or after ####')
    if not answer.strip():
        raise ValueError(f'"{field}" ends in an empty answer')
    return answer.strip()


def multiple_choice(question: str, right: str, wrong: list[str]) -> tuple[str, str]:
    """The question with lettered choices, and the right letter.

    The order follows from the question's text: the same for every model, run and machine.
    """
    choices = [right, *wrong]
    order = list(range(len(choices)))
    digest = hashlib.sha256(question.encode()).digest()
    random.Random(int.from_bytes(digest[:8], "big")).shuffle(order)
    lines = [f"({LETTERS[i]}) {choices[j]}" for i, j in enumerate(order)]
    return "\n".join([question, *lines]), LETTERS[order.index(0)]


def _read_hub(name: str) -> Iterable[dict]:
    benchmark = BENCHMARKS[name]
    try:
        hub: Any = importlib.import_module("datasets")  # the library; ours is a sibling
    except ImportError as error:
        raise ValueError(
            f"{name} comes from the hub ({benchmark.path}) and needs a package that is not "
            f"installed: pip install datasets, or give its problems as "
            f"--benchmarks={name}=FILE.jsonl with the fields {benchmark.question!r} and "
            f"{benchmark.answer!r}"
        ) from error
    return hub.load_dataset(benchmark.path, benchmark.subset, split=benchmark.split)
