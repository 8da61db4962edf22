# SPDX-License-Identifier: Apache-2.0
"""Agreement with published verdicts and references; docs/verification.md shows the numbers.

The files are public and not part of this project: they are read beside the checkout
(shared/data/README.md names their origins). The edits this catches: any rule of `answers`,
`quantity` or `units` that refuses a usual writing of a published reference or takes a wrong one.
"""

import decimal
import json
import pathlib
import re

import pytest

from opd_jax.problems import verify

ROOT = pathlib.Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
DOC = (ROOT / "docs" / "verification.md").read_text()
NUMBER = re.compile(r"[+-]?(?=[\d.])[\d,]*\.?\d*(?:e[+-]?\d+)?")

pytestmark = pytest.mark.skipif(
    not DATA.is_dir(),
    reason="needs the published files of docs/verification.md in ../shared/data",
)


@pytest.fixture(scope="module")
def verifier():
    with verify.Verifier(num_workers=2, seconds=60.0) as v:
        yield v


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def references(name: str) -> list[str]:
    if name == "GSM8K":
        return [row["answer"].split("####")[1].strip() for row in rows("gsm8k_test.jsonl")]
    if name == "AIME24":
        return [row["answer"] for row in rows("aime24_test.jsonl")]
    every = [verify.last_boxed(row["solution"]) for row in rows("minerva_math_test.jsonl")]
    return [a for a in every if bool(NUMBER.fullmatch(a)) == (name == "Minerva, numbers")]


def scientific(value: decimal.Decimal) -> str:
    """-1.5 \\times 10^{3}"""
    sign, digits, exponent = value.as_tuple()
    text = "".join(map(str, digits)).lstrip("0") or "0"
    mantissa = text[0] + (f".{text[1:]}" if text[1:] else "")
    return f"{'-' * sign}{mantissa} \\times 10^{{{exponent + len(text) - 1}}}"


def writings(answer: str) -> dict[str, str]:
    """Three other writings of one answer."""
    if not NUMBER.fullmatch(answer):
        text = answer.strip()
        wide = text.replace("\\frac", "\\dfrac").replace("(", "\\left(").replace(")", "\\right)")
        return {
            "spaces": re.sub(r"(?<!\\)([+=/-])", r" \1 ", text),
            "display style": f"\\displaystyle {text}.",
            "large fractions": f"${wide}$",
        }
    value = decimal.Decimal(answer.replace(",", ""))
    grouped = value == value.to_integral_value() and value.adjusted() < 12
    return {
        "power of ten": scientific(value),
        "unit": f"{answer}\\,\\mathrm{{kg}}",
        "digits": f"{int(value):,}.00" if grouped else f"{value:f}",
    }


def neighbour(answer: str) -> str:
    """A wrong answer: one more in the last digit, or another first digit."""
    if not NUMBER.fullmatch(answer):
        other = re.sub(r"\d", lambda found: str((int(found[0]) + 1) % 10), answer, count=1)
        return other if other != answer else f"{answer.strip()}+1"
    sign, digits, exponent = decimal.Decimal(answer.replace(",", "")).as_tuple()
    more = int("".join(map(str, digits))) + 1
    return scientific(decimal.Decimal((sign, tuple(map(int, str(more))), exponent)))


def test_verdicts_are_those_of_the_answers_authors(verifier):
    """Every disagreement would be in the message: there is none."""
    asked = [
        (response, row["answer"], bool(right))
        for row in rows("qwen_math_cot_50.jsonl")
        for response, right in zip(row["responses"], row["right"], strict=True)
    ]
    verdicts = verifier.are_correct([(response, answer) for response, answer, _ in asked])
    apart = [
        (verify.last_boxed(response), answer, "we say right" if ours else "we say wrong")
        for ours, (response, answer, theirs) in zip(verdicts, asked, strict=True)
        if ours != theirs
    ]
    assert not apart
    assert f"| {len(asked)} | 0 | 0 |" in DOC


@pytest.mark.parametrize(
    "name",
    ["GSM8K", "AIME24", "Minerva, numbers"]
    + [pytest.param("Minerva, formulas", marks=pytest.mark.slow)],
)
def test_a_reference_equals_its_other_writings_and_not_its_neighbour(verifier, name):
    answers = references(name)
    right: dict[str, list[bool]] = {}
    for answer in answers:
        for writing, given in {"itself": answer, **writings(answer)}.items():
            same = verifier.is_correct(f"\\boxed{{{given}}}", answer)
            right.setdefault(writing, []).append(same)
        same = verifier.is_correct(f"\\boxed{{{neighbour(answer)}}}", answer)
        right.setdefault("neighbour refused", []).append(not same)
    for writing, found in right.items():
        row = rf"\| {name} \| {writing} \| \d+ \| {sum(found)} of {len(answers)} \|"
        assert re.search(row, DOC), f"docs/verification.md has no row {row}"
