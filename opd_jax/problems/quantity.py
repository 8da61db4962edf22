# SPDX-License-Identifier: Apache-2.0
r"""A number with a unit, read from the text of an answer: `-1.6 \times 10^{-19}\text{ C}`.

Numbers are exact. Two numbers are equal when their values are; only a decimal of six or more
significant digits is also taken for a rounding, and equals what rounds (or is cut) to it. So
0.333333 is 1/3 and 0.33 is not, 6.02e-23 is never 1.6e-19, and 10^20 + 1 is never 1e20. Published
graders compare all numbers as floats with a relative tolerance (1e-4 in Qwen2.5-Math's, 1e-5 in
numpy.isclose), by which 10001 is 10000, or round to six decimals (math-verify), by which every
number below 5e-7 is zero.

A unit on one side only is dropped; units on both sides must be the same unit. Nothing is converted:
18 cm is not 0.18 m. A percent sign on one side may stand for 1/100 or be dropped.
"""

import functools
import re
from typing import NamedTuple

from opd_jax.problems import units
from opd_jax.problems.units import TEXT

SIX_DIGITS = 6  # significant digits from which a decimal may be a rounding
MAX_SHIFT = 10_000  # no two different powers of ten so far apart are equal for texts of our length
_CURRENCY = r"(?:US|C|A)?\\\$|€|£|¥|₹|\\(?:euro|pounds?|yen)(?![a-z])|Rs\.?(?=\s*\d)"
_UNIT_STARTS = re.compile(
    TEXT + r"\s*\{|\\%|\^\\circ|\\frac\s*\{\s*" + TEXT + r"|\\(?:Omega|mu|AA)\b"
)
_MONEY = re.compile(rf"([+-]?)\s*(?:{TEXT}\{{\s*({_CURRENCY})\s*\}}|({_CURRENCY}))\s*")


class Number(NamedTuple):
    """numerator / denominator * 10**exponent, exactly; huge powers of ten are never built."""

    numerator: int
    denominator: int
    exponent: int
    digits: int  # significant digits of a decimal as it is written; 0 = an integer or a fraction


_GROUPED = r"\d{1,3}(?:(?:\{,\}|,|\s)\d{3})+(?!\d)"
_DECIMAL = rf"(?:(?:{_GROUPED}|\d+)(?:\.\d*)?|\.\d+)(?:\\overline\s*\{{\d+\}})?"
_POWER = r"\{?10\}?\s*(?:\^|\*\*)\s*(?:\{\s*(?P<p1>[+-]?\s*\d+)\s*\}|\(?(?P<p2>[+-]?\d+)\)?)"
_E = rf"(?:[eE]|\s+[eE](?=\+?\d)|\s+E(?=-)|\s*{TEXT}\s*\{{\s*[eE]\s*\}}\s*)"
_E += r"(?:\{(?P<p3>[+-]?\d+)\}|(?P<p6>[+-]?\d+))(?![\d.]*[A-DF-Za-df-z^])"
_NUMBER = re.compile(
    rf"""(?P<sign>(?:\{{[+-]\}}|[+-])?)\s*
    (?:
      {_POWER.replace("p1", "p4").replace("p2", "p5")}
      | (?: (?:(?P<whole>\d+)\s*)? \\frac\s*
          (?:\{{\s*(?P<n1>[+-]?\s*{_DECIMAL})\s*\}}|(?P<n2>\d))\s*
          (?:\{{\s*(?P<d1>[+-]?\s*{_DECIMAL})\s*\}}|(?P<d2>\d))
        | (?:(?P<whole2>\d+)\s+)? (?P<n3>{_DECIMAL})\s*/\s*(?P<d3>{_DECIMAL})
        | (?P<decimal>{_DECIMAL}) (?:{_E})?
      )
      (?:\s*(?:\\times|\\cdot|\\ast|\*|[xX]|(?<=\s)|(?=[({{]))\s*
         (?:\(\s*(?=[^()]*\)))?{_POWER}(?:\s*\))?)?
    )""",
    re.VERBOSE,
)


def read_number(text: str) -> tuple[Number, str] | None:
    """The number that a cleaned text begins with, and the text that follows it; None = none."""
    found = _NUMBER.match(text)
    if not found:
        return None
    part = found.groupdict()
    mantissa = _mantissa(part)
    if mantissa is None:
        return None
    sign = -1 if "-" in part["sign"] else 1
    powers = [part[name] for name in ("p1", "p2", "p3", "p4", "p5", "p6") if part[name]]
    exponent = sum(int(power.replace(" ", "")) for power in powers)
    above, below, shift, digits = mantissa
    if powers and not digits:  # 3e5: as exact as 3 * 10^5; 10^{-3} is a decimal as 0.001 is
        digits = len(str(abs(above)).strip("0")) if below == 1 else 0
    return Number(sign * above, below, shift + exponent, digits), text[found.end() :]


def _mantissa(part: dict[str, str | None]) -> Number | None:
    if part["decimal"]:
        return _read_decimal(part["decimal"])
    above = part["n1"] or part["n2"] or part["n3"]
    if above is None:
        return Number(1, 1, 0, 0)  # a power of ten alone
    below = part["d1"] or part["d2"] or part["d3"] or ""
    a, b = _read_decimal(above), _read_decimal(below)
    if not b.numerator:
        return None
    n, d, e = a.numerator * b.denominator, a.denominator * b.numerator, a.exponent - b.exponent
    n, d = (n, d) if d > 0 else (-n, -d)
    whole = int(part["whole"] or part["whole2"] or 0)
    return Number(n + whole * d * 10 ** max(-e, 0), d, e, 0) if e <= 0 else Number(n, d, e, 0)


def _read_decimal(text: str) -> Number:
    text = re.sub(r"\{,\}|[,\s]", "", text)
    repeats = re.search(r"\\overline\{(\d+)\}", text)
    text = text[: repeats.start()] if repeats else text
    sign, text = (-1 if text.startswith("-") else 1), text.lstrip("+-")
    whole, point, places = text.partition(".")
    value, shift = int(whole + places or "0"), -len(places)
    if repeats:  # 0.1(6) = (16 - 1) / 90
        ones = 10 ** len(repeats[1]) - 1
        return Number(sign * (value * ones + int(repeats[1])), ones, shift, 0)
    return Number(sign * value, 1, shift, len((whole + places).lstrip("0")) if point else 0)


def same_number(a: Number, b: Number) -> bool:
    """Equal in value; or one is a decimal of six or more digits to which the other rounds."""
    above, below = a.numerator * b.denominator, b.numerator * a.denominator
    shift = a.exponent - b.exponent
    if not above or not below or abs(shift) > MAX_SHIFT:
        return above == below == 0
    above, below = above * 10 ** max(shift, 0), below * 10 ** max(-shift, 0)
    return above == below or _rounds_to(a, b) or _rounds_to(b, a)


def _rounds_to(exact: Number, rounded: Number) -> bool:
    """`rounded` is `exact` rounded, or cut off, after its last written digit."""
    if rounded.digits < SIX_DIGITS or rounded.denominator != 1 or rounded.numerator == 0:
        return False
    # In units of the last written digit of `rounded`.
    shift = exact.exponent - rounded.exponent
    numerator = exact.numerator * 10 ** max(shift, 0)
    denominator = exact.denominator * 10 ** max(-shift, 0)
    if (numerator < 0) != (rounded.numerator < 0):
        return False
    more = abs(numerator) - abs(rounded.numerator) * denominator
    return -denominator <= 2 * more <= denominator or 0 <= more < denominator


_BASED = re.compile(
    r"([+-]?[\dA-Z]*\d[\dA-Z]*)\s*_\s*"
    rf"(?:(\d)|\{{\s*(?:{TEXT}\{{\s*)?(?:(\d\d?)|(two|three|four|five|six|seven|eight|nine|ten))"
    r"\s*\}?\s*\})"
)
_BASES = dict(two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10)


class Quantity(NamedTuple):
    """An answer taken apart."""

    core: str  # the cleaned text without its unit
    number: Number | None  # the core's value; None = the core is no plain number
    unit: units.Unit


@functools.lru_cache(4096)
def read(text: str) -> Quantity:
    r"""Takes a cleaned answer apart; what cannot be a unit stays in the core.

    The core is a plain number, or what stands before the \text{} with a unit: `2\pi\text{ cm}`.
    """
    unit: units.Unit = {}
    if whole := re.fullmatch(TEXT + r"\s*\{([^{}]*\d[^{}]*)\}", text):  # \text{18 dollars}
        text = whole[1].strip()
    if money := _MONEY.match(text):
        unit, text = {_symbol(money[2] or money[3]): 1}, money[1] + text[money.end() :]
    if based := _BASED.fullmatch(text):
        base = int(based[2] or based[3] or _BASES[based[4]])
        if 1 < base < 37 and (value := _in_base(based[1], base)) is not None:
            return Quantity(based[1], Number(value, 1, 0, 0), {f"base {base}": 1})
    if number := read_number(text):
        value, rest = number
        if found := units.read(
            rest, spaced=rest[:1] in ("", " ", "\\", "^", "/"), letters="\\frac" not in text
        ):
            core = text[: len(text) - len(rest)].strip()
            value = value._replace(exponent=value.exponent + found[1])
            return Quantity(core, value, _joined(unit, found[0]))
    for start in _UNIT_STARTS.finditer(text):
        core = text[: start.start()].strip()
        balanced = core.count("{") == core.count("}") and core[-1:] not in ("_", "^", "=", "")
        if balanced and (found := units.read(text[start.start() :])) and not found[1]:
            return Quantity(core, None, _joined(unit, found[0]))
    return Quantity(text, None, unit)


def _in_base(digits: str, base: int) -> int | None:
    try:
        return int(digits, base)
    except ValueError:  # 29_8
        return None


def _symbol(currency: str) -> str:
    names = {"\\euro": "€", "\\pound": "£", "\\pounds": "£", "\\yen": "¥", "Rs": "₹", "Rs.": "₹"}
    return names.get(currency, currency.lstrip("USCA\\"))


def _joined(money: units.Unit, unit: units.Unit) -> units.Unit:
    return unit if set(money) & set(unit) else money | unit


def same(given: Quantity, answer: Quantity) -> bool:
    """Of two plain numbers: equal in value and unit; see the module's text for percent."""
    a, b = given.number, answer.number
    if a is None or b is None:
        return False
    if not (given.unit and answer.unit) and {"%": 1} in (given.unit, answer.unit):
        a_whole = a._replace(exponent=a.exponent - 2 * len(given.unit))
        b_whole = b._replace(exponent=b.exponent - 2 * len(answer.unit))
        return same_number(a, b) or same_number(a_whole, b_whole)
    named = next(iter(answer.unit), "")
    if named.startswith("base ") and not given.unit:  # the question named it
        return given.core == answer.core
    return units.same(given.unit, answer.unit) and same_number(a, b)
