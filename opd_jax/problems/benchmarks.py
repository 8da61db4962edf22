# SPDX-License-Identifier: Apache-2.0
"""Benchmarks by name: where their problems come from, and how a problem becomes a prompt.

A name is `NAME` (from the Hugging Face hub, which needs `pip install datasets` and the network),
`NAME=FILE.jsonl` (the same fields from a file), a plain `FILE.jsonl` of {"prompt", "answer"}
objects, `embedded` (the held-out problems of the embedded task) or `embedded_ood`.

Left out: LiveCodeBench, HumanEval+ and MBPP+ run code that a model wrote. Export the model
(`python -m launch.export`) and give the directory to their own sandboxed harnesses.
"""

import dataclasses
import hashlib
import json
import pathlib
import random
from collections.abc import Iterable

from opd_jax.problems import task
from opd_jax.problems.datasets import build_dataset

# The wording that the paper's set-up uses after each mathematical problem.
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
CHOICE = "Please reason step by step, and put the letter of your final answer within \\boxed{}."
LETTERS = "ABCDEFGHIJ"
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
    "hmmt_feb25": Benchmark("MathArena/hmmt_feb_2025", "train", "problem", "answer"),
    "hmmt_nov25": Benchmark("MathArena/hmmt_nov_2025", "train", "problem", "answer"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", "problem", "answer"),
    "minerva": Benchmark("math-ai/minervamath", "test", "question", "answer"),
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
        source = build_dataset("embedded", EMBEDDED[name])
        count = min(num_problems or len(source), len(source))
        return name, [source[i] for i in range(count)]
    if known.casefold().replace(" ", "") in CODE:
        raise ValueError(
            f"{known} runs code that a model wrote, which this project does not do: export the "
            "model with `python -m launch.export` and give the directory to the benchmark's harness"
        )
    if known in BENCHMARKS:
        rows = _read_jsonl(file) if file else _read_hub(known)
        examples = to_examples(known, rows)
    elif name.endswith(".jsonl"):
        known, examples = pathlib.Path(name).stem, list(build_dataset(name))
    else:
        raise ValueError(
            f"--benchmarks={name} is unknown: it takes {', '.join([*EMBEDDED, *BENCHMARKS])}, any "
            "of the latter as NAME=FILE.jsonl, or a FILE.jsonl of prompts and answers"
        )
    return known, examples[: num_problems or None]


def to_examples(name: str, rows: Iterable[dict]) -> list[task.Example]:
    """Problems of a known benchmark from rows with its fields."""
    benchmark, out = BENCHMARKS[name], []
    for number, row in enumerate(rows):
        fields = (benchmark.question, benchmark.answer, *benchmark.wrong)
        missing = [f for f in fields if f not in row]
        if missing:
            raise ValueError(
                f"row {number} of {name} lacks {missing}; it has {sorted(row)}. A file given as "
                f"{name}=FILE.jsonl needs the fields of {benchmark.path}: {', '.join(fields)}"
            )
        question, answer = str(row[benchmark.question]).strip(), str(row[benchmark.answer]).strip()
        if benchmark.wrong:
            wrong = [str(row[f]).strip() for f in benchmark.wrong]
            question, answer = multiple_choice(question, answer, wrong)
        prompt = f"{question}\n{CHOICE if benchmark.wrong else BOXED}"
        out.append(task.Example(f"{name}-{number}", name, prompt, answer))
    return out


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


def _read_jsonl(file: str) -> list[dict]:
    path = pathlib.Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{file} is no file; give the benchmark as NAME=FILE.jsonl")
    return [json.loads(line) for line in path.read_text().split("\n") if line.strip()]


def _read_hub(name: str) -> Iterable[dict]:
    benchmark = BENCHMARKS[name]
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{name} comes from the hub ({benchmark.path}) and needs a package that is not "
            f"installed: pip install datasets, or give its problems as "
            f"--benchmarks={name}=FILE.jsonl with the fields {benchmark.question!r} and "
            f"{benchmark.answer!r}"
        ) from error
    return datasets.load_dataset(benchmark.path, benchmark.subset, split=benchmark.split)
