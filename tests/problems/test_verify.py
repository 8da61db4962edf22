# SPDX-License-Identifier: Apache-2.0
"""Verification: what counts as the answer, what equals it, and what hostile answers cannot.

Each table is a kind of writing: (given, reference, equal?). What a table says of the way back is
said by `both`.
"""

import os
import pathlib
import signal
import time

import pytest

from opd_jax.problems import answers, verify


@pytest.fixture(scope="module")
def verifier():
    with verify.Verifier(seconds=60.0) as v:
        yield v


def both(*pairs: tuple[str, str, bool]) -> list[tuple[str, str, bool]]:
    """The pairs, each way round."""
    return [*pairs, *((b, a, same) for a, b, same in pairs)]


def no_algebra(given, answer):
    pytest.fail(f"{given!r} and {answer!r} should be decided without a process")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The answer is \\boxed{green}.", "green"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{7} and then \\boxed{cut", "7"),  # an answer cut off by the length limit is none
        ("\\boxed{a \\boxed{b}}", "b"),
        ("\\boxed {8}", "8"),
        ("\\boxed{}", ""),
        ("no box", None),
        ("\\boxed{never closed", None),
        ("", None),
    ],
)
def test_last_boxed(text, expected):
    assert verify.last_boxed(text) == expected


def test_an_enormous_response_is_read_quickly():
    began = time.monotonic()
    assert verify.last_boxed("\\boxed{" * 20_000) is None
    assert verify.last_boxed("\\boxed{" + "{" * 1_000_000) is None
    assert verify.last_boxed("x" * 5_000_000 + "\\boxed{3}") == "3"
    assert time.monotonic() - began < 20


# ---------------------------------------------------------------- numbers: no process is asked

E_NOTATION = [
    r"4.5e33",
    r"4.5E33",
    r"4.5e+33",
    r"4.5E+033",
    r"4.5 \times 10^{33}",
    r"4.5\times10^{+33}",
    r"4.5\times {10}^{33}",
    r"4.5\cdot10^{33}",
    r"4.5 \cdot 10^ {33}",
    r"4.5*10^{33}",
    r"4.5*10**33",
    r"4.5 x 10^33",
    r"4.5 × 10³³",
    r"4.5·10^(33)",
    r"4.5\left(10^{33}\right)",
    r"4.5\,\mathrm{e}33",
    r"4.5 \mathrm{E}{+33}",
    r"4.5\text{e}33",
    r"4.5 E33",
    r"45 \times 10^{32}",
    r"0.45e34",
    r"4.50 \times 10^{33}",
    r"\frac{9}{2} \times 10^{33}",
    r"$4.5 \times 10^{33}$.",
    r"\num{4.5e33}",
    r"L \approx 4.5\times10^{33}",
    r"4.5 \times 10^{33}\ \mathrm{erg/s}",
    r"\SI{4.5e33}{erg}",
    r"4500\times10^{30}",
    r"4{,}500 \times 10^{30}",
    "45" + "0" * 32,
]


@pytest.mark.parametrize("given", E_NOTATION)
def test_e_notation_is_scientific_notation(given):
    for answer in ("4.5e33", r"4.5 \times 10^{33}", "45" + "0" * 32):
        assert answers.equal(given, answer, no_algebra)
        assert answers.equal(answer, given, no_algebra)
    for wrong in ("4.6e33", "4.5e34", "-4.5e33", "4.5e-33", "4.5", "33", "4.50001e33"):
        assert not answers.equal(given, wrong, no_algebra), wrong
        assert not answers.equal(wrong, given, no_algebra), wrong


NUMBERS = both(
    ("0.00001", "1e-05", True),  # what str() makes of a JSON number
    (r"10^{-5}", "1e-05", True),
    (r"10^-5", "1e-5", True),
    (r"10^{33}", "1e33", True),
    (r"-10^{3}", "-1000", True),
    (r"1.6\cdot10^{-19}", r"6.02\cdot10^{-23}", False),
    (r"1.6e-19", r"1.61e-19", False),
    (r"1.6e-19", "0", False),
    ("100000000000000000001", "1e20", False),
    ("10001", "10000", False),
    ("12345678", "12345679", False),
    ("1234567.8", "1234567.9", False),
    ("0.1000001", "0.1", False),
    ("3.0", "3", True),
    ("3.", "3", True),
    ("+3", "3", True),
    ("-3", "3", False),
    ("−3", "-3", True),
    ("025", "25", True),
    (".5", "0.50", True),
    (r"\frac{1}{2}", "0.5", True),
    (r"\dfrac12", "1/2", True),
    (r"\tfrac{3}{4}", "0.75", True),
    (r"\frac{-3}{4}", r"-\frac{3}{4}", True),
    (r"\frac{6}{8}", "3/4", True),
    ("-1./3", r"-\frac{1}{3}", True),
    (r"\frac{1}{3}", "0.333333", True),
    (r"\frac{1}{6}", "0.166667", True),
    (r"\frac{2}{3}", "0.6666666", True),
    (r"\frac{1}{3}", "0.33", False),
    (r"\frac{1}{3}", "0.333343", False),
    (r"\frac{1}{3}", r"\frac{333333}{1000000}", False),
    ("0.12500001", r"\frac{1}{8}", False),
    ("0.125001", r"\frac{1}{8}", False),
    ("0.1251", r"\frac{1}{8}", False),
    (r"0.\overline{3}", r"\frac{1}{3}", True),
    (r"0.1\overline{6}", r"\frac{1}{6}", True),
    (r"1\frac{1}{2}", "1.5", True),
    ("1 1/2", "3/2", True),
    ("5½", "5.5", True),
    ("1 1/2", "11/2", False),
    (r"1\frac{1}{2}", r"\frac{1}{2}", False),
    ("1,000", "1000", True),
    ("1{,}234{,}567.5", "1234567.5", True),
    (r"1\,000\,000", "10^6", True),
    ("1 000", "1000", True),
    ("1,000", "1.000", False),
    (r"\$18.50", "18.5", True),
    ("$18", "18", True),
    ("$18$", "18", True),
    ("€ 18", "18", True),
    ("-\\$5", "-5", True),
    (r"10\%", "10", True),
    ("10%", "0.1", True),
    (r"12.5\%", r"\frac{1}{8}", True),
    (r"10\%", "0.2", False),
    (r"10\%", "1", False),
    (r"10\text{ percent}", "10%", True),
    ("0.1", "10", False),
    (r"90^\circ", "90", True),
    (r"90^{\circ}", "90°", True),
    (r"90\degree", "90", True),
    (r"x = 5", "5", True),
    (r"\text{Area} = 5\text{ cm}^2", "5", True),
    (r"f(2)=5", "5", True),
    (r"x = 5", "6", False),
    (r"4^{\text{th}}", "4", True),
    (r"5\text{ million}", "5000000", True),
    (r"5\text{ million}", "5", False),
    (r"\mathbf{5}", "5", True),
    (r"\text{5}", "5", True),
    (r"\(5\)", "5", True),
    (r"101_2", "101_{2}", True),
    (r"2516_8", r"2516_{\text{eight}}", True),
    (r"101_2", "101_3", False),
    ("1e99999999999999", "10^{99999999999999}", True),
    ("1e99999999999999", "1e99999999999998", False),
    ("1e99999999999999", "7", False),
    ("9e" + "9" * 500, "7", False),
)


@pytest.mark.parametrize("given, answer, expected", NUMBERS)
def test_numbers_are_exact_and_need_no_process(given, answer, expected):
    assert answers.equal(given, answer, no_algebra) is expected


@pytest.mark.parametrize(
    "given, answer, expected",
    [
        ("4343", "4343_6", True),  # the question named the base
        ("4343_6", "4343", False),
        ("101_2", "5", True),
        ("5", "101_2", False),
    ],
)
def test_the_base_of_a_number(given, answer, expected):
    assert answers.equal(given, answer, no_algebra) is expected


# ---------------------------------------------------------------- units

UNITS = [
    *(
        r"\text{ dollars}",
        r"\text{ cm}",
        r"\,\text{cm}",
        r"\ \text{cm}",
        r"~\text{cm}",
        r"\mathrm{~cm}",
    ),
    *(r"\,\mathrm{cm}", r"\;\mathrm{kg}", r"\ \mathrm{m/s}", r"\,\mathrm{m}\,\mathrm{s}^{-1}"),
    *(
        r"\, \text{m/s}",
        r"\text{ m}/\text{s}",
        r"\ \text{m/s}^2",
        r"\text{ cm}^2",
        r"\text{ cm}^{3}",
    ),
    *(r"\text{ square meters}", r"\text{ cubic inches}", r"\,\text{cm}^{-1}", r"\ \mathrm{cm}^2"),
    *(r"\text{ sq. ft.}", r"\text{ miles per hour}", r"\text{ mph}", r"\,\mathrm{km/h}"),
    *(r"\text{ dollars per hour}", r"\frac{\text{m}}{\text{s}}", r"\,\mathrm{m\,s^{-2}}"),
    *(r"^\circ", r"^{\circ}", r"^\circ\text{C}", r"^{\circ}\mathrm{F}", "°C", r"\,^\circ", r"\%"),
    *(
        r"\text{ degrees}",
        r"\text{ percent}",
        r"\text{ hours}",
        r"\text{ minutes}",
        r"\text{ days}",
    ),
    *(r"\text{ apples}", r"\text{ red apples}", r"\text{ people}", r"\text{ students}"),
    *(
        r"\text{ units}",
        r"\text{ square units}",
        r"\text{ ways}",
        r"\,\Omega",
        r"\ \mathrm{k\Omega}",
    ),
    *(
        r"\,\mu\text{m}",
        r"\text{ J/(kg K)}",
        r"\,\mathrm{N\cdot m}",
        r"\mbox{ ft}",
        r"\textrm{ lb}",
    ),
    *(r"\,\operatorname{Hz}", r"{\rm\ cm}", r"\text{ in}", " cm", "cm", " dollars", " m", " m/s"),
    *(" km/h", " apples", " cm^2", " sq ft", r"\text{ in total}", r"\text{ dollars in all}"),
]


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_on_one_side_is_dropped(verifier, unit):
    for number, wrong in (("18", "19"), (r"\frac{3}{4}", "0.76"), ("2.5", "25"), ("1,200", "13")):
        if number.startswith("\\") and unit in ("cm", " m", " m/s"):
            continue  # letters beside a fraction are algebra
        given = f"\\boxed{{{number}{unit}}}"
        assert verifier.is_correct(given, number), given
        assert verifier.is_correct(f"\\boxed{{{number}}}", number + unit), given
        assert verifier.is_correct(given, number + unit), given
        assert not verifier.is_correct(given, wrong), given
        assert not verifier.is_correct(f"\\boxed{{{wrong}}}", number + unit), given


SAME_UNITS = both(
    (r"18\text{ cm}", "18 centimeters", True),
    (r"18\,\mathrm{km/h}", r"18\text{ kilometres per hour}", True),
    (r"18\text{ mph}", r"18\text{ miles/hour}", True),
    (r"18\ \mathrm{m\,s^{-1}}", r"18\text{ m/s}", True),
    (r"18\text{ square feet}", r"18\text{ ft}^2", True),
    (r"18\text{ feet squared}", r"18\text{ sq ft}", True),
    (r"\$18", r"18\text{ dollars}", True),
    (r"18^\circ", r"18\text{ degrees}", True),
    (r"18^\circ\text{C}", r"18\text{ degrees Celsius}", True),
    (r"18\text{ hrs}", r"18\text{ hours}", True),
    (r"18\text{ apple}", r"18\text{ Apples}", True),
    (r"18\text{ units}", r"18\text{ cm}", True),
    (r"18\,\mu\text{m}", r"18\text{ micrometers}", True),
    ("18 m", "18 cm", False),
    (r"18\text{ m}", r"18\text{ cm}", False),
    (r"18\text{ m}", "18 cm", False),
    (r"18\text{ cm}^2", r"18\text{ cm}", False),
    (r"18\text{ cm}^2", r"18\text{ cm}^3", False),
    (r"18\text{ m/s}", r"18\text{ m}", False),
    (r"18\text{ m/s}", r"18\text{ s/m}", False),
    (r"18\text{ m/s}", r"18\text{ km/h}", False),
    (r"\$18", "€18", False),
    (r"18^\circ\text{C}", r"18^\circ\text{F}", False),
    (r"18\text{ hours}", r"18\text{ minutes}", False),
    (r"18\text{ apples}", r"18\text{ pears}", False),
    (r"18\text{ mm}", r"18\text{ Mm}", False),
    (r"18\%", r"18\text{ dollars}", False),
)


@pytest.mark.parametrize("given, answer, expected", SAME_UNITS)
def test_units_on_both_sides_must_be_one(given, answer, expected):
    assert answers.equal(given, answer, no_algebra) is expected


@pytest.mark.parametrize(
    "given, answer, expected",
    [
        (r"2\pi\text{ cm}", r"2\pi", True),
        (r"2\pi\text{ cm}", r"3\pi", False),
        (r"2\pi\text{ cm}", r"2\pi\text{ m}", False),
        (r"\frac{\sqrt{3}}{2}\,\mathrm{m}^2", r"\frac{\sqrt{3}}{2}", True),
        (r"(1, 2)\text{ seconds}", "(1,2)", True),
        (r"x^2\text{ cm}", "x^2", True),
        # Statements, compound quantities and letters are no units.
        (r"18\text{ or more}", "18", False),
        (r"5\text{ if }x>0", "5", False),
        (r"5\text{ or }6", "5", False),
        (r"5\text{ hours }30\text{ minutes}", "5", False),
        ("5 ft 6 in", "5", False),
        ("18x", "18", False),
        ("18 xy", "18", False),
        ("2t", "2", False),
        ("2t", "2s", False),
        ("2mg", "2", False),
        (r"2.2 \tau", "2.2", False),
        (r"\frac{37}{4}", r"\frac{37}{4} m", False),
        ("18", r"18\pi", False),
        (r"18 \pi", "18", False),
        ("18i", "18", False),
    ],
)
def test_what_is_no_unit_is_not_dropped(verifier, given, answer, expected):
    assert verifier.is_correct(f"\\boxed{{{given}}}", answer) is expected


# ---------------------------------------------------------------- letters and words


@pytest.mark.parametrize(
    "given, answer, expected",
    both(
        ("yx", "xy", True),
        ("BA", "AB", True),
        ("zyx", "xyz", True),
        ("abcd", "dcba", True),
        ("2ba", "2ab", True),
        ("y + x", "x+y", True),
        (r"\beta\alpha", r"\alpha\beta", True),
        (r"\frac{2x}{2}", "x", True),
        ("AB", "ab", False),
        ("X", "x", False),
        ("E", "e", False),
        ("X+y", "x+y", False),
        ("abc", "ABC", False),
        (r"\Omega", r"\omega", False),
        ("x_1", "x_2", False),
        ("xy", "x+y", False),
        ("xy", "x", False),
    ),
)
def test_letters_are_algebra(verifier, given, answer, expected):
    assert verifier.is_correct(f"\\boxed{{{given}}}", answer) is expected


@pytest.mark.parametrize(
    "given, answer, expected",
    [
        ("green", "green", True),
        (" Green ", "green", True),
        ("\\text{green}.", "green", True),
        ("Evelyn", r"\text{Evelyn}", True),
        (r"\text{evelyn}", "Evelyn", True),
        (r"\textbf{EVEN}", "even", True),
        (r"\mathrm{No}", "no", True),
        ("No Solution", "no solution", True),
        (r"\text{nosolution}", "no solution", True),
        (r"\text{no}\ \text{solution}", "No solution", True),
        (r"\text{ab}", r"\text{AB}", True),
        ("José", "josé", True),
        ("blue", "green", False),
        ("greenish", "green", False),
        ("neve", "even", False),
        ("listen", "silent", False),
        (r"\text{ba}", r"\text{ab}", False),
        ("", "", False),
        ("", "green", False),
        ("3", "three", False),
        ("no real solution", "no solution", False),
    ],
)
def test_words_are_compared_without_case_and_spaces(given, answer, expected):
    assert answers.equal(given, answer, no_algebra) is expected


@pytest.mark.parametrize(
    "given, answer, expected",
    [
        ("C", "C", True),
        ("(C)", "C", True),
        ("C", "(C)", True),
        ("C) the mitochondrion", "C", True),
        ("C. 5", "C", True),
        (r"\textbf{(C)}\ 5", "C", True),
        ("\\text{C}", "C", True),
        (r"\mathrm{(C)}", r"\text{(C)}", True),
        ("D", "C", False),
        ("CD", "C", False),
        ("C and D", "C", False),
        ("(D) C", "C", False),
        ("c", "C", False),
        ("5", "C", False),
        ("4:30 p.m.", r"4:30 \text{ PM}", True),
        ("4:30", "4:30 pm", True),
        ("4:30 am", "4:30 pm", False),
        ("4:35 pm", "4:30 pm", False),
    ],
)
def test_choices_and_times(given, answer, expected):
    assert answers.equal(given, answer, no_algebra) is expected


# ---------------------------------------------------------------- parts and algebra


@pytest.mark.parametrize(
    "given, answer, expected",
    both(
        ("(1,2)", "(1, 2)", True),
        (r"\left(\frac12, 0.5\right)", "(0.5, 1/2)", True),
        (r"(1.6\times10^{-19}, 2)", "(1.6e-19, 2)", True),
        (r"(6.02e-23, 2)", "(1.6e-19, 2)", False),
        (r"(3\text{ cm}, 4\text{ cm})", "(3, 4)", True),
        (r"(\text{red}, 4)", "(Red, 4)", True),
        ("(2,1)", "(1,2)", False),
        ("(1,2)", "(1,2,3)", False),
        ("[1,2)", "[1, 2.0)", True),
        ("[1,2)", "(1,2]", False),
        ("[1,2]", "(1,2)", False),
        (r"(-\infty, 5]", r"\left(-\infty,5\right]", True),
        (r"(-\infty, 5]", r"(-\infty,5)", False),
        (r"(-\infty,0)\cup(1,2)", r"(1,2)\cup(-\infty,0)", True),
        (r"(-\infty,0)\cup(1,2)", r"(-\infty,0)\cup(1,3)", False),
        (r"x \in [1,2]", "[1,2]", True),
        (r"\{2,1\}", r"\{1,2\}", True),
        (r"\{1,\frac{1}{2}\}", r"\{0.5,1\}", True),
        (r"\{1,2\}", r"\{1,3\}", False),
        ("3, -3", "-3,3", True),
        (r"3\text{ and }-3", "3, -3", True),
        (r"\pm 3", "3,-3", True),
        ("100, 200", "200,100", True),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2.0\end{bmatrix}", True),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", False),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}", False),
    ),
)
def test_parts_are_compared_one_by_one(verifier, given, answer, expected):
    assert verifier.is_correct(f"so \\boxed{{{given}}}", answer) is expected


@pytest.mark.parametrize(
    "given, answer, expected",
    both(
        ("x+1", "1+x", True),
        ("x=5", "y=5", False),
        ("y = 2x+3", "2x + 3", True),
        ("y = 2x+3", "3x + 2", False),
        ("x > 5", "5 < x", True),
        ("x > 5", "x < 5", False),
        (r"2\sqrt{2}", r"\sqrt{8}", True),
        (r"\sqrt2/2", r"\frac{1}{\sqrt{2}}", True),
        (r"2\sqrt{2}", r"\sqrt{7}", False),
        (r"1+\sqrt{3} i", r"\sqrt{3}i+1", True),
        (r"\sin^2 x + \cos^2 x", "1", True),
        (r"\frac{3.2\cdot10^{-19}}{2}", r"1.6\cdot10^{-19}", True),
        (r"\frac{6.02\cdot10^{-23}}{2}", r"1.6\cdot10^{-19}", False),
        (r"1.6\cdot10^{-19}x", r"6.02\cdot10^{-23}x", False),
        (r"1.6e-19x", r"1.6\cdot10^{-19}x", True),
        ("10^{-23}x", "10^{-19}x", False),
        ("0.5x", r"\frac{x}{2}", True),
        (r"\sqrt{2}", "1.41421356", True),
        (r"\sqrt{2}", "1.414", False),
        ("10^{100}+1", "10^{100}", False),
        ("2^{100}", "1267650600228229401496703205376", True),
        ("2^{100}", "1267650600228229401496703205377", False),
        (r"x=1\text{ or }x=2", "1,2", True),
        (r"\pi", "3.14159265", True),
        (r"\pi", "3.14", False),
        (r"e-5", "1e-05", False),
        ("2e - 5", "2e-05", False),
        (r"\arcsin(10/13)", "np.arcsin(10/13)", True),
        ("7", "{{7", False),  # what cannot be read equals nothing
    ),
)
def test_algebra(verifier, given, answer, expected):
    assert verifier.is_correct(f"so \\boxed{{{given}}}", answer) is expected


# ---------------------------------------------------------------- processes


def test_plain_answers_start_no_process():
    with verify.Verifier() as v:
        assert v.is_correct("\\boxed{green}", "green")
        assert not v.is_correct("\\boxed{blue}", "green")
        assert v.is_correct("\\boxed{18\\text{ cm}}", "18.0")
        assert not v.is_correct("\\boxed{" + "9" * 3000 + "}", "9" * 3001)
        assert v._pool._idle.queue[0].pid is None


HOSTILE = [
    "9**9**9**9",
    "10^{10^{10^{10}}}",
    "1000000000!",
    "\\binom{10^{9}}{5\\cdot 10^8}",
    "\\int_0^1 x^{x^{x^{x}}} dx",
    "\\sqrt{" * 200 + "2" + "}" * 200,
    "(" * 900,
    "{" * 900 + "}" * 900,
    "(1e99999,(" * 100 + "1" + "))" * 100,
    "\\{" + ",".join(["\\sqrt{x!}"] * 12) + "\\}",
    "\\text{" * 300 + "7 cm" + "}" * 300,
    "1,000" * 380,
    "7" + " cm" * 600,
    "1e" + "9" * 1990,
    '__import__("os").system("touch pwned")',
    "\x00",
    "\ud800",
    "\\input{/etc/passwd}",
]


@pytest.mark.slow
def test_hostile_answers_are_wrong_and_the_next_answer_is_still_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with verify.Verifier(num_workers=2, seconds=3.0) as v:
        pairs = [(f"\\boxed{{{h}}}", ("7", "(\\sqrt{7}, 2)")[i % 2]) for i, h in enumerate(HOSTILE)]
        assert v.are_correct(pairs) == [False] * len(HOSTILE)
        v._seconds = v._pool._seconds = 60.0
        assert v.are_correct([("\\boxed{\\sqrt 8}", "2\\sqrt 2")] * 4) == [True] * 4
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", HOSTILE + ["\\frac" * 400, "x=" * 900, "(" + "1," * 900 + "1)"])
def test_hostile_answers_are_read_quickly(text):
    began = time.monotonic()
    assert not answers.equal(text, "7", lambda *_: False)
    assert not answers.equal("7", text, lambda *_: False)
    assert time.monotonic() - began < 2


def test_a_worker_that_hangs_or_dies_is_counted_and_replaced(verifier, monkeypatch):
    """A real hang: the process is stopped by a signal, as a loop in C code would stop it."""
    root = ("so \\boxed{\\sqrt{8}}", "2\\sqrt{2}")
    assert verifier.is_correct(*root)
    with monkeypatch.context() as patch:
        patch.setattr(verifier._pool, "_seconds", 0.5)
        hung = verifier._pool._idle.queue[0].pid
        os.kill(hung, signal.SIGSTOP)
        assert not verifier.is_correct(*root)
    assert verifier.num_killed == 1
    with pytest.raises(ProcessLookupError):
        os.kill(hung, 0)
    assert verifier.is_correct(*root)
    verifier._pool._idle.queue[0].kill()
    assert verifier.is_correct(*root)  # its death was not this answer's doing
    assert verifier.num_killed == 2


def test_the_memory_of_a_worker_is_limited():
    with verify.Verifier(seconds=60.0, memory_mib=512) as v:
        assert v.is_correct("\\boxed{\\sqrt{8}}", "2\\sqrt{2}")
        worker = v._pool._idle.queue[0].pid
        limits = (pathlib.Path("/proc") / str(worker) / "limits").read_text()
        assert str(512 * 2**20) in limits


def test_wrong_limits_are_refused():
    with pytest.raises(ValueError, match="try \\(1, 10.0, 2048\\)"):
        verify.Verifier(num_workers=0)
