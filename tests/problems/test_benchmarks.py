# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: prompt wording, fields, multiple choice, and where problems come from."""

import json
import pathlib
import sys
import types

import pytest

from opd_jax.problems import benchmarks, verify

DATA = pathlib.Path(__file__).parents[3] / "shared" / "data"
AIME = [{"problem": " What is 1+1? ", "answer": 2}, {"problem": "x?", "answer": "33"}]
GPQA = {
    "Question": "Which one?",
    "Correct Answer": "iron",
    "Incorrect Answer 1": "tin",
    "Incorrect Answer 2": "lead",
    "Incorrect Answer 3": "zinc",
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_problem_becomes_the_papers_prompt(tmp_path):
    file = write(tmp_path / "a.jsonl", AIME)
    name, examples = benchmarks.load(f"aime25={file}")
    assert name == "aime25" and [e.answer for e in examples] == ["2", "33"]
    assert examples[0].prompt == (
        "What is 1+1?\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    assert [e.id for e in benchmarks.load(f"aime25={file}", 1)[1]] == ["aime25-0"]


def test_multiple_choice_is_shuffled_by_the_question_and_verified_by_letter():
    questions = [GPQA | {"Question": f"Which one, {i}?"} for i in range(40)]
    examples = benchmarks.to_examples("gpqa", questions)
    assert {e.answer for e in examples} == set("ABCD")  # the right one is everywhere
    for e in examples:
        assert f"({e.answer}) iron" in e.prompt and "letter of your final answer" in e.prompt
        assert verify.is_correct(f"so \\boxed{{{e.answer}}}", e.answer)
        assert not verify.is_correct("so \\boxed{iron}", e.answer)
    assert examples == benchmarks.to_examples("gpqa", questions)


def test_the_hub_is_asked_for_the_named_split(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [GPQA]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    _, examples = benchmarks.load("gpqa")
    assert asked == [(("Idavidrein/gpqa", "gpqa_diamond"), {"split": "train"})]
    assert len(examples) == 1


def test_without_the_datasets_package_the_message_says_what_to_give(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets, or .*math500=FILE.jsonl"):
        benchmarks.load("math500")


# ---- public copies ----

FIELDS = [
    # What one row holds, the answer that is read.
    ({"problem": "p", "answer": "5"}, "5"),
    ({"question": "p", "answer": 5}, "5"),
    ({"Problem": "p", "Answer": 5, "ID": "2024-I-1", "Solution": r"\boxed{5}"}, "5"),
    ({"problem": "p", "final_answer": "5"}, "5"),
    ({"problem": "p", "final_answer": ["5"]}, "5"),
    ({"question": "p", "solution": r"It is $\boxed{5}$."}, "5"),
    ({"problem": "p", "answer": None, "solution": r"\boxed{4}, no, \boxed{\frac{1}{5}}"}, "1/5"),
    ({"problem": "p", "answer": " ", "solution": r"\boxed{5}"}, "5"),
    ({"problem": "p", "answer": "2 + 3 = <<2+3=5>>5.\n#### 5"}, "5"),
    ({"problem": "p", "solution": "2 + 3 = 5.\n#### 1,005\n"}, "1005"),
    ({"problem": "p", "answer": r"$\boxed{5}$"}, "5"),
    ({"problem": "p", "answer": "5", "solution": "no box"}, "5"),
    ({"problem": "p", "answer": "#5"}, "#5"),
    ({"problem": "p", "answer": r"\text{north}", "id": 1, "tags": ["a", "b"], "n": None}, "north"),
]


@pytest.mark.parametrize("row, answer", FIELDS, ids=range(len(FIELDS)))
@pytest.mark.parametrize("from_file", [True, False], ids=["file", "hub"])
def test_fields_of_public_copies_are_read(tmp_path, from_file, row, answer):
    rows = [row, {"problem": "q", "answer": 0.00001}]
    if from_file:
        _, examples = benchmarks.load(f"aime25={write(tmp_path / 'a.jsonl', rows)}")
    else:
        examples = benchmarks.to_examples("aime25", rows)
    assert examples[0].prompt == f"p\n{benchmarks.BOXED}"
    assert verify.is_correct(f"\\boxed{{{answer}}}", examples[0].answer)
    assert [e.id for e in examples] == ["aime25-0", "aime25-1"]


BAD_ROWS = [
    ('{"question": "x"}', "needs 'answer' or 'final_answer' or 'solution'; the fields are ."),
    ('{"answer": "5"}', "needs 'problem' or 'question'; the fields are ..answer"),
    ('{"prompt": "p", "answer": "5"}', "needs 'problem' or 'question'"),
    ('{"problem": "", "answer": "5"}', "needs 'problem' or 'question'"),
    ('{"problem": "p", "answer": null}', "needs 'answer' or"),
    ('{"problem": "p", "answer": []}', "needs 'answer' or"),
    ('{"problem": "p", "answer": ["1", "2"]}', '"answer" must be text or a number, this is a li'),
    ('{"problem": "p", "answer": true}', '"answer" must be text or a number, this is a truth'),
    ('{"problem": "p", "answer": NaN}', '"answer" is NaN, which is no number'),
    ('{"problem": "p", "answer": [Infinity]}', '"answer" is Infinity, which is no number'),
    ('{"problem": "p", "solution": "so 5"}', '"solution" must hold its answer in .boxed{} or'),
    ('{"problem": "p", "answer": "so\\n####  "}', '"answer" ends in an empty answer'),
    ('{"problem": "p", "solution": "\\\\boxed{}"}', '"solution" ends in an empty answer'),
    ('{"problem": "\\ud800", "answer": "5"}', r'"problem" holds .ud800, half of a surrogate'),
    ('{"problem": "p", "answer": "\\ud800"}', r'"answer" holds .ud800, half of a surrogate'),
    ('["p", "5"]', "a line must be an object, this is a list"),
    ('{"problem": "p", "answer": "5"', "is no JSON"),
]


@pytest.mark.parametrize("line, says", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_line_of_a_benchmark_is_named_by_file_and_line(tmp_path, line, says):
    file, good = tmp_path / "a.jsonl", '{"problem": "p", "answer": "1"}'
    file.write_bytes(f"\ufeff{good}\r\n\r\n{line}\r\n{good}".encode())
    with pytest.raises(ValueError, match=f"^{file}:3: .*{says}.*correct the line$") as error:
        benchmarks.load(f"aime25={file}")
    assert "config" not in str(error.value) and "skip" not in str(error.value)


def test_where_every_line_is_bad_the_fields_are_named(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"x": "y"}] * 2)
    with pytest.raises(ValueError) as error:
        benchmarks.load(f"gpqa={file}")
    assert f"{file}:1: needs 'Question'; the fields are ['x']; 2 of 2" in str(error.value)
    assert 'set --benchmarks=gpqa to a JSONL file of {"Question": ..., ' in str(error.value)
    assert '"Incorrect Answer 3": ...} lines' in str(error.value)


def test_bad_rows_of_the_hub_are_named_by_number():
    rows = [AIME[0], {"problem": "p", "answer": float("nan")}]
    with pytest.raises(ValueError, match='^row 1 of aime25: "answer" is nan'):
        benchmarks.to_examples("aime25", rows)


@pytest.mark.parametrize("text", ["aime25={}", "{}"])
def test_a_missing_file_is_blamed_on_the_benchmark(tmp_path, text):
    given = text.format(tmp_path / "nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match=f"^--benchmarks={given} is no file") as error:
        benchmarks.load(given)
    assert "config" not in str(error.value) and "embedded" not in str(error.value)


def test_ids_of_a_file_are_refused_where_they_name_problems_and_ignored_where_they_do_not(tmp_path):
    rows = [{"id": i, "prompt": "p", "problem": "p", "answer": "1"} for i in (0, 0, 1)]
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=f"^--benchmarks={file}: 1 ids .*'0' .lines 1 and 2."):
        benchmarks.load(str(file))
    assert len({e.id for e in benchmarks.load(f"aime25={file}")[1]}) == 3


PUBLISHED = {"gsm8k": 1319, "minerva_math": 272, "aime24": 30}


@pytest.mark.skipif(
    not DATA.is_dir(), reason="needs the published files of docs/verification.md in ../shared/data"
)
@pytest.mark.parametrize("file", PUBLISHED)
def test_published_files_are_read_whole_and_each_answer_is_itself(file):
    name = file.removesuffix("_math")
    _, examples = benchmarks.load(f"{name}={DATA / file}_test.jsonl")
    assert len(examples) == PUBLISHED[file] == len({e.id for e in examples})
    assert all(e.answer and len(e.prompt) > len(benchmarks.BOXED) + 20 for e in examples)
    with verify.Verifier(num_workers=2, seconds=60.0) as verifier:
        right = verifier.are_correct([(f"\\boxed{{{e.answer}}}", e.answer) for e in examples])
    assert [e.answer for e, ok in zip(examples, right, strict=True) if not ok] == []


def test_a_file_of_prompts_is_taken_as_it_stands(tmp_path):
    file = write(tmp_path / "mine.jsonl", [{"prompt": "1+1?", "answer": "2"}])
    name, examples = benchmarks.load(str(file))
    assert name == "mine" and examples[0].prompt == "1+1?"
