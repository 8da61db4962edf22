# SPDX-License-Identifier: Apache-2.0
r"""Are two expressions equal as mathematics? math-verify, with two of its habits changed.

It rounds numbers to six decimals before it compares them, so 6.02\cdot10^{-23} equals
1.6\cdot10^{-19}: here numbers are compared relatively. It reads letters without their case, drops
units by a list that holds `t`, `s` and `h`, and takes any number out of what it cannot parse: here
`2t` is neither `2s` nor `2`, `AB` is not `ab`, and what cannot be parsed equals nothing.

Run it in a process of its own (`verify`): sympy can hang, crash and eat the memory.
"""

from typing import Any

import latex2sympy2_extended.latex2sympy2 as latex
import math_verify
import sympy
from math_verify import errors, grader, parser, utils

SECONDS = 3  # math-verify's own, softer limits on parsing and on comparing
DIGITS = 6  # significant, of a decimal among other numbers
MAX_BUILT = 3000  # digits of integers that are worked out, 10^{100} + 1


def equal(sides: tuple[str, str]) -> bool:
    r"""True = two LaTeX expressions are equal; False also where either cannot be read.

    `sides`: the answer given and the reference. They are not alike: "x = 5" is an answer to 5.
    """
    given, answer = sides
    try:
        read = utils.timeout(timeout_seconds=SECONDS)(_parse)
        found: Any = read(answer), read(given)
        return bool(math_verify.verify(*found, timeout_seconds=SECONDS))
    except errors.TimeoutException:
        return False
    except Exception:  # no LaTeX of the parser's grammar, or too large or too deep for sympy
        return False


def _parse(text: str):
    """A sympy object."""
    text = latex.normalize_latex(
        text, latex.NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    )

    def parse(text):
        return latex.latex2sympy(
            text,
            is_real=not grader.should_treat_as_complex(text),
            normalization_config=None,
            conversion_config=latex.ConversionConfig(lowercase_symbols=False),
        )

    try:
        return parse(text)
    except Exception:
        last = parser.get_last_eq(text)  # a = b = c
        if last == text:
            raise
        return parse(last)


def _same_symbol(a, b) -> bool:
    """Of two expressions, one of them a symbol: x is 2x/2, and neither X nor (a lone E) e."""
    return bool(a == b) or grader.sympy_symbolic_eq(a, b)


def _same_value(a, b, *_) -> bool:
    """Equal numbers, or matrices or functions of equal numbers; False = not seen to be equal."""
    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        a, b = (x.doit() if isinstance(x, sympy.MatrixExpr) else x for x in (a, b))
        same_shape = getattr(a, "shape", None) == getattr(b, "shape", 0)
        return same_shape and all(_same_value(x, y) for x, y in zip(a, b, strict=True))
    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return False
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if not symbols:
        return _same_number(a, b)
    if not (a.has(sympy.Float) or b.has(sympy.Float)):
        return False  # exact: simplifying decides
    points: list[Any] = [
        {s: sympy.Rational(7 * i + p, 5) for i, s in enumerate(symbols)} for p in (3, -4, 11)
    ]
    return all(_same_number(a.subs(point), b.subs(point)) for point in points)


def _same_number(a, b) -> bool:
    """Of two constant expressions; exactly, unless one holds a decimal."""
    x, y = (sympy.N(value, 50) for value in (a, b))
    if not (x.is_finite and y.is_finite) or not y or not x:
        return bool(x == y)
    digits = sympy.floor(sympy.log(abs(y), 10))
    if a.has(sympy.Float) or b.has(sympy.Float):
        return bool(abs(x - y) <= 5 * sympy.Pow(10, digits - DIGITS))
    if abs(x - y) > abs(y) * sympy.Float("1e-40"):
        return False
    if abs(digits) < MAX_BUILT:
        a, b = a.doit(), b.doit()
    return bool(a == b) if a.is_Rational and b.is_Rational else bool((a - b).equals(0))


# Ours in the place of math-verify's comparisons of numbers and of lone symbols. The names must be
# there already, or this would change nothing, in silence.
for _name, _ours in (("sympy_numeric_eq", _same_value), ("sympy_compare_symbols", _same_symbol)):
    assert callable(getattr(grader, _name))
    setattr(grader, _name, _ours)
