# SPDX-License-Identifier: Apache-2.0
"""The embedded task: seeded, splits disjoint by content, solutions that hold."""

import dataclasses
import itertools
import re

import pytest

from opd_jax.problems import task, verify

FAMILIES = tuple(task.FAMILIES)
SAMPLE = {split: task.make_many(FAMILIES, split, 3, 600) for split in task.SPLITS}
BOTH = [*SAMPLE["train"], *SAMPLE["heldout"]]


def of_family(family):
    return [e for e in BOTH if e.family == family]


def number(word):
    return task.NUMBERS.index(word)


GOLDEN = {
    "total": (
        "A box holds one coins and four people come. Ann takes one. Bob adds two. Cara takes "
        "one. Dan takes one. How many coins are there?",
        "zero",
        "We start with one. Ann takes one from one, leaving zero. Bob adds two to zero and we "
        "have two. Cara takes one from two, leaving one. Next Dan takes one from one and we "
        "have zero. The answer is \\boxed{zero}.",
    ),
    "heading": (
        "A boat faces north and eight people come. Ann turns it around. Bob turns it around. "
        "Cara turns it left. Dan turns it right. Eve turns it right. Finn turns it left. Gus "
        "turns it around. Hana turns it right. Where does it face?",
        "west",
        "We start at north. Ann turns it around from north to south. Then Bob turns it around "
        "from south to north. Then Cara turns it left from north to west. Then Dan turns it "
        "right from west and we face north. Next Eve turns it right from north and we face "
        "east. Finn turns it left from east and we face north. Then Gus turns it around from "
        "north to south. Next Hana turns it right from south to west. The answer is "
        "\\boxed{west}.",
    ),
}


@pytest.mark.parametrize("family", GOLDEN)
def test_problems_never_change(family):
    """If this fails, the embedded pair no longer fits: train it again (configs/tiny.py)."""
    example = task.make(family, "heldout", 0, 1)
    assert (example.prompt, example.answer, example.solution) == GOLDEN[family]


def test_the_same_arguments_give_the_same_problem_and_others_another():
    for family in FAMILIES:
        assert task.make(family, "train", 0, 5) == task.make(family, "train", 0, 5)
        prompts = {
            task.make(family, split, seed, index).prompt
            for split, seed, index in itertools.product(task.SPLITS, (0, 1), (5, 6))
        }
        assert len(prompts) == 8


def test_train_and_heldout_share_no_problem_whatever_the_seed():
    train = {
        (e.family, e.prompt) for s in range(4) for e in task.make_many(FAMILIES, "train", s, 900)
    }
    heldout = {(e.family, e.prompt) for e in task.make_many(FAMILIES, "heldout", 9, 900)}
    assert not train & heldout


def test_the_split_follows_the_content_and_not_the_wording():
    """The wording of a solution is drawn at random; it must not move a problem across."""
    contents = [f"total {i}" for i in range(4000)]
    heldout = sum(task.split_of(c) == "heldout" for c in contents)
    assert abs(heldout / len(contents) - 1 / task.HELDOUT_SHARE) < 0.02
    assert all(task.split_of(c) == task.split_of(c) for c in contents[:5])


def test_distillation_never_meets_the_held_out_family():
    assert task.OUT_OF_DOMAIN == ("smallest",) and len(task.IN_DOMAIN) == 5
    assert not set(task.IN_DOMAIN) & set(task.OUT_OF_DOMAIN)
    assert {*task.IN_DOMAIN, *task.OUT_OF_DOMAIN} <= set(FAMILIES)


def test_solutions_are_prose_that_ends_in_the_boxed_answer():
    for example in BOTH:
        sentences = re.split(r"(?<=\.) ", example.solution)
        assert 5 <= len(sentences) <= 30
        assert all(s[0].isupper() and s.endswith(".") for s in sentences)
        assert sentences[-1] == f"The answer is \\boxed{{{example.answer}}}."
        assert verify.is_correct(example.solution, example.answer)


def test_no_answer_can_be_guessed():
    for family in FAMILIES:
        answers = [e.answer for e in of_family(family)]
        assert max(map(answers.count, set(answers))) / len(answers) < 0.35


def test_total_is_the_sum_of_what_is_told():
    for example in of_family("total"):
        total = number(re.search(r"holds (\w+) coins", example.prompt)[1])
        for verb, amount in re.findall(r"(adds|takes) (\w+)\.", example.prompt):
            total += number(amount) if verb == "adds" else -number(amount)
            assert 0 <= total <= 20
        assert example.answer == task.NUMBERS[total]


@pytest.mark.parametrize("family, best", [("largest", max), ("smallest", min)])
def test_largest_and_smallest_are_so(family, best):
    for example in of_family(family):
        numbers = [number(w) for w in re.findall(r"has (\w+)\.", example.prompt)]
        assert example.answer == task.NUMBERS[best(numbers)]


def test_count_counts_the_even_numbers():
    for example in of_family("count"):
        numbers = [number(w) for w in re.findall(r"has (\w+)\.", example.prompt)]
        assert example.answer == task.NUMBERS[sum(n % 2 == 0 for n in numbers)]


def test_calendar_ends_on_the_right_day():
    for example in of_family("calendar"):
        day = task.DAYS.index(re.search(r"shows (\w+)", example.prompt)[1])
        for verb, amount in re.findall(r"(adds|takes) (\w+)\.", example.prompt):
            day += number(amount) if verb == "adds" else -number(amount)
        assert example.answer == task.DAYS[day % 7]


def test_heading_ends_at_the_right_point():
    circle = {"right": 90, "around": 180, "left": -90}  # degrees, clockwise
    for example in of_family("heading"):
        degrees = 90 * task.POINTS.index(re.search(r"faces (\w+)", example.prompt)[1])
        degrees += sum(circle[t] for t in re.findall(r"turns it (\w+)\.", example.prompt))
        assert example.answer == task.POINTS[degrees // 90 % 4]


@pytest.mark.parametrize("rough", [0, 2])
def test_a_style_changes_the_solution_alone(rough):
    """What the weak students learn from: the problem and its answer stay those of the reference."""
    style, slipped = task.Style(slip=0.2, rough=rough), 0
    for family, index in itertools.product(FAMILIES, range(60)):
        right = task.make(family, "train", 0, index)
        example = task.make(family, "train", 0, index, style)
        solution = {"solution": right.solution}
        assert dataclasses.replace(example, **solution) == right
        slipped += example.solution != right.solution
    assert slipped > 0.6 * 360  # 1 - 0.8^6 of them have a slip


def test_a_slip_is_carried_on_and_ends_in_a_wrong_answer():
    """Every later sentence starts from the wrong result, so the answer shows the slip."""
    example = task.make("total", "train", 0, 3, task.Style(slip=1.0))
    results = re.findall(r"(?:making|leaving|we have) (\w+)", example.solution)
    operands = re.findall(r"(?:to|from) (\w+)(?:,| and)", example.solution)
    assert operands[1:] == results[:-1]
    assert verify.last_boxed(example.solution) == results[-1] != example.answer


def test_a_rough_writer_loses_the_thread_at_the_first_slip():
    for index in range(40):
        style = task.Style(slip=0.3, rough=2)
        example = task.make("largest", "train", 0, index, style)
        sentences = re.split(r"(?<=\.) ", example.solution)[:-1]
        rough = [s.split()[0] in task.ROUGH[0] for s in sentences]
        assert rough == sorted(rough)  # once lost, lost for good
        if any(rough):
            assert sum(rough) >= 2 and example.solution.endswith("}.")


def test_a_wrong_family_or_split_is_refused_with_the_right_ones():
    with pytest.raises(ValueError, match="'walk' is unknown; choose from total, largest"):
        task.make("walk", "train", 0, 0)
    with pytest.raises(ValueError, match="'test' is unknown; choose 'train' or 'heldout'"):
        task.make("total", "test", 0, 0)
