# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: prompt wording, fields, multiple choice, and where problems come from."""

import json
import sys
import types

import pytest

from opd_jax.problems import benchmarks, verify

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


def test_wrong_fields_name_those_that_are_needed(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"question": "x"}])
    with pytest.raises(
        ValueError, match="a.jsonl:1: needs 'answer' or .*the fields are .'question'.; 1 of 1"
    ):
        benchmarks.load(f"aime25={file}")


def test_a_file_of_prompts_is_taken_as_it_stands(tmp_path):
    file = write(tmp_path / "mine.jsonl", [{"prompt": "1+1?", "answer": "2"}])
    name, examples = benchmarks.load(str(file))
    assert name == "mine" and examples[0].prompt == "1+1?"
