# SPDX-License-Identifier: Apache-2.0
r"""Does one answer's text say what another's says? Everything short of algebra.

In this order: the same text; the letter of a multiple choice; words; numbers with units (quantity);
tuples, sets and matrices, part by part. What is left is algebra, and the caller's to decide.

Letters are algebra (xy is yx, AB is not ab), unless the reference is words: in a text box, or a
bare word such as `Evelyn` or `even`. Words are compared without case and spaces.
"""

import functools
import re
import unicodedata
from collections.abc import Callable

from opd_jax.problems import quantity, units
from opd_jax.problems.units import TEXT

MAX_ANSWER = 2000  # characters; no answer is longer, and parsers are worse than linear
MAX_PARTS = 12  # of a set whose parts are matched in every order

_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "/", "⁄": "/"}
    | {"π": "\\pi ", "∞": "\\infty ", "°": "^\\circ ", "≈": "\\approx ", "∈": "\\in ", "’": "'"}
    | {"≤": "\\le ", "≥": "\\ge ", "∪": "\\cup ", "∅": "\\emptyset ", "\u00a0": " "}
)
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_REWRITES = tuple(
    (re.compile(pattern), into)
    for pattern, into in (
        (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda found: f"^{{{found[0].translate(_SUPERSCRIPT)}}}"),
        (r"[¼-¾⅐-⅞]", lambda found: _vulgar_fraction(found[0])),
        (r"\\(?:left|right)(?![a-z])\s*\.?|\\[bB]igg?[lrm]?(?![a-z])|\\(?:display|text)style", ""),
        (r"(\\\\)|\\!", r"\1"),  # \\ ends a row of a matrix: keep it, here and below
        (r"(\\\\)|\\[,;:> ]|~|\\q?quad(?![a-z])|\\(?:thin|en)space", lambda f: f[1] or " "),
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (r"\\(?:mathbf|mathit|boldsymbol|bm)\s*\{([^{}]*)\}", r"\1"),
        (r"\{\s*\\(?:rm|bf|it)\s+([^{}]*)\}", r"\\text{\1}"),
        (r"\\(?:SI|qty)\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1 \\text{\2}"),
        (r"\\num\s*\{([^{}]*)\}", r"\1"),
        (r"\\degree(?![a-z])|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-z])", r"^\\circ "),
        (r"(?<!\\)%", r"\\%"),
        (r"\^\s*\{\s*(?:\\text\{\s*)?(st|nd|rd|th)\s*\}?\s*\}", r"\\text{\1}"),  # 4^{th}
        (r"\bnp\.(?=[a-z])", r"\\"),  # Minerva writes np.arcsin(10/13)
        (r"^\\?\(|\\\)$", lambda found: "" if "\\" in found[0] else found[0]),
        (r"^\\\[(.*)\\\]$", r"\1"),
    )
)


def _vulgar_fraction(character: str) -> str:
    above, below = unicodedata.normalize("NFKC", character).split("⁄")
    return f"\\frac{{{above}}}{{{below}}}"


@functools.lru_cache(4096)
def clean(text: str) -> str:
    r"""The same mathematics in fewer writings: no $, \left, \dfrac, thin spaces, final full stop.

    Words stay in their \text{}: what is outside one may be algebra.
    """
    text = text.strip()
    money = text.startswith("$") and len(re.findall(r"(?<!\\)\$", text)) % 2
    text = ("\\$" if money else "") + re.sub(r"(?<!\\)\$", "", text)
    for pattern, into in _REWRITES[:2]:
        text = pattern.sub(into, text)
    text = unicodedata.normalize("NFKC", text.translate(_UNICODE))
    for pattern, into in _REWRITES[2:]:
        text = pattern.sub(into, text.strip())
    text = re.sub(r"^(?:=|\\approx|\\sim|\\simeq)\s*", "", " ".join(text.split()))
    text = re.sub(r"(?<!\.)(?<!\\)[.,;]$|(?<=\\%)\.$", "", text).strip()
    whole = re.fullmatch(r"\{([^{}]*)\}", text)
    return whole[1].strip() if whole else text


def normalise(answer: str) -> str:
    r"""The answer for a person to read: no $, no \text{}, no double spaces."""
    return _unwrapped(clean(answer))


def _unwrapped(text: str) -> str:
    r"""Without \text{} and its kin, what they hold kept."""
    while (inner := units.WRAPPED.sub(r" \1 ", text)) != text:
        text = inner
    return " ".join(text.split())


# ---------------------------------------------------------------- the comparison

# Whether two answers that are algebra are equal: (given, answer) -> bool.
Algebra = Callable[[str, str], bool]


def equal(given: str, answer: str, algebra: Algebra) -> bool:
    """True = `given` says what the reference `answer` says; `algebra` decides what is algebra."""
    if max(len(given), len(answer)) > MAX_ANSWER:
        return False
    given, answer = clean(given), clean(answer)
    return bool(given) and bool(answer) and _equal(given, answer, algebra, depth=0)


def _equal(given: str, answer: str, algebra: Algebra, depth: int) -> bool:
    if _tight(_unwrapped(given)) == _tight(_unwrapped(answer)):
        return True
    for rule in (_same_choice, _same_words, _same_letters, _same_time):
        if (same := rule(given, answer)) is not None:
            return same
    given, answer = _without_name(given, answer)
    g, a = quantity.read(given), quantity.read(answer)
    if g.number and a.number:  # 1,000 is a number, or else a list
        return quantity.same(g, a) or bool(_same_parts(given, answer, algebra, depth))
    if not units.same(g.unit, a.unit):
        return False
    if depth < 3 and (same := _same_parts(g.core, a.core, algebra, depth)) is not None:
        return same
    return _tight(g.core) == _tight(a.core) or algebra(_powers(g.core), _powers(a.core))


_LETTERS = re.compile(r"(\\[A-Za-z]+)\s+(?=[A-Za-z])")
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # not the one in 1 1/2
_ONE_IN_BRACES = re.compile(r"(?<=[\^_])\{(\w)\}")


def _tight(text: str) -> str:
    """A text that two writings of one answer share; no two answers do."""
    return _ONE_IN_BRACES.sub(r"\1", _SPACE.sub("", _LETTERS.sub(r"\1{}", text)))


_CHOICE = re.compile(r"\(\s*([A-Z])\s*\).*|([A-Z])\)?(?:[.:)].*)?", re.DOTALL)  # C, (C), C. text


def _same_choice(given: str, answer: str) -> bool | None:
    """A reference that is a letter A to J, alone or in parentheses; None = it is not."""
    wanted = re.fullmatch(r"\(?([A-J])\)?", _unwrapped(answer))
    if not wanted:
        return None
    chosen = _CHOICE.fullmatch(_unwrapped(given))
    return bool(chosen) and (chosen[1] or chosen[2]) == wanted[1]


_BARE_WORDS = re.compile(r"[^\W\d_]{2,}(?:[-' ]+[^\W\d_]+)*")
_SHORT_WORDS = {"no", "yes", "odd", "all", "nan", "dne"}


def _same_words(given: str, answer: str) -> bool | None:
    """A reference in words; None = it is algebra, or it holds a number."""
    if not _is_words(answer):
        return None
    return _word_key(given) == _word_key(answer)


def _is_words(answer: str) -> bool:
    plain = _unwrapped(answer)
    if re.search(r"\d|\\|[=<>^]", plain) or not re.search(r"[^\W\d_]{2}", plain):
        return False
    if not units.WRAPPED.sub("", answer).strip(" .,'-"):
        return True  # all of it in text boxes
    if units.WRAPPED.search(answer) or not _BARE_WORDS.fullmatch(answer):
        return False
    return any(map(_is_word, re.split(r"[-' ]+", answer)))


def _is_word(letters: str) -> bool:
    """A bare run of letters that no product of variables looks like."""
    folded = letters.casefold()
    if folded in _SHORT_WORDS or not folded.isascii():
        return True
    if len(folded) < 3:
        return False
    run = [*range(ord(min(folded)), ord(min(folded)) + len(folded))]  # abc, zyx
    capitals = letters.isupper() and len(letters) < 4  # ABD is a triangle
    return not capitals and sorted(map(ord, folded)) != run and bool({*folded} & {*"aeiouy"})


def _word_key(text: str) -> str:
    return re.sub(r"[\s.,'\"“”`-]", "", _unwrapped(text)).casefold()


def _same_letters(given: str, answer: str) -> bool | None:
    """Of two products of single letters: xy is yx; None = not two of them."""
    letters = [text.replace(" ", "") for text in (given, answer)]
    if not all(re.fullmatch(r"[A-Za-z]+", text) for text in letters):
        return None
    return sorted(letters[0]) == sorted(letters[1])


_TIME = re.compile(r"(\d{1,2}):(\d\d)\s*(?:([ap])\.?\s*m\.?)?", re.IGNORECASE)


def _same_time(given: str, answer: str) -> bool | None:
    """Of two times of day; None = not two times."""
    a, b = (_TIME.fullmatch(_unwrapped(text)) for text in (given, answer))
    if a is None or b is None:
        return None
    halves = [half.lower() for half in (a[3], b[3]) if half]
    if not halves:  # 3:30 may be a ratio
        return None
    return a.group(1, 2) == b.group(1, 2) and len(set(halves)) == 1


_NAME = rf"(?:[A-Za-z]|\\[A-Za-z]+|{TEXT}\s*\{{[^{{}}]*\}})(?:_(?:\w|\{{[^{{}}]*\}}))?'*(?:\(\w\))?"
_NAMED = re.compile(rf"\s*({_NAME})\s*(?::?=|\\approx|\\in(?![a-z]))\s*(.+)", re.DOTALL)


def _without_name(given: str, answer: str) -> tuple[str, str]:
    """5 for "x = 5" where the other side has no equation, or one with the same name.

    Of a list each part has its own name: "x = 1, y = 2".
    """
    g, a = (None if _parts(side) else _NAMED.fullmatch(side) for side in (given, answer))
    if g and a and _tight(g[1]) == _tight(a[1]):
        return g[2], a[2]
    if g and not re.search(r"[=<>]|\\in(?![a-z])|\\[gl]eq?(?![a-z])", answer):
        given = g[2].split("=")[-1].strip()
    if a and not re.search(r"[=<>]|\\in(?![a-z])|\\[gl]eq?(?![a-z])", given):
        answer = a[2].split("=")[-1].strip()
    return given, answer


# ---------------------------------------------------------------- parts

_CLOSING = {"(": ")", "[": "]", "\\{": "\\}", "\\langle": "\\rangle", "{": "}"}
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_MATRIX = re.compile(
    r"\\begin\{([pbBvV]?matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", re.DOTALL
)
_AND = re.compile(
    rf"(?:,\s*)?(?:(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|{TEXT}\{{\s*(?:and|or)\s*\}})"
)


def _parts(text: str) -> tuple[str, list[str]] | None:
    """("(]", parts) of an interval, ("", parts) of a bare list, ...; None = a text of one part."""
    if matrix := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        kind = matrix[1] if matrix[1] in ("vmatrix", "Vmatrix") else "matrix"
        nested = "\\begin" in matrix[2] or len({len(row) for row in rows}) != 1
        return None if nested else (f"{kind}{len(rows)}", [p.strip() for row in rows for p in row])
    text = _AND.sub(",", text)
    tokens = [(found[0], found.start()) for found in _TOKEN.finditer(text)]
    if not tokens:
        return None
    opening = tokens[0][0] if tokens[0][0] in _CLOSING and tokens[0][0] != "{" else ""
    depth, cuts = 0, []
    for i, (token, at) in enumerate(tokens):
        if token in _CLOSING:
            depth += 1
        elif token in _CLOSING.values():
            depth -= 1
            if opening and depth == 0 and i < len(tokens) - 1:
                return None  # (0,1) \cup (2,3)
        elif token == "," and depth == (1 if opening else 0):
            cuts.append(at)
    closing = tokens[-1][0] if opening else ""
    if not cuts or depth or (opening and closing not in _CLOSING.values()):
        return None
    edges = [len(opening) - 1, *cuts, len(text) - len(closing)]
    parts = [text[a + 1 : b].strip() for a, b in zip(edges, edges[1:], strict=False)]
    return (opening + closing, parts) if all(parts) else None


def _same_parts(given: str, answer: str, algebra: Algebra, depth: int) -> bool | None:
    """Of two tuples, intervals, sets or matrices of one kind; None = of different kinds."""
    g, a = _parts(given), _parts(answer)
    if not g or not a or g[0] != a[0] or len(g[1]) != len(a[1]):
        return None
    if g[0] not in ("", "\\{\\}"):
        return all(_equal(x, y, algebra, depth + 1) for x, y in zip(g[1], a[1], strict=True))
    if len(a[1]) > MAX_PARTS:
        return None
    left = list(g[1])
    for y in a[1]:
        found = next((x for x in left if _equal(x, y, algebra, depth + 1)), None)
        if found is None:
            return False
        left.remove(found)
    return True


_E_NOTATION = re.compile(
    rf"(?<![\w.])(\d+\.?\d*|\.\d+)(?:[eE]|\s*{TEXT}\{{\s*[eE]\s*\}}\s*)"
    r"(?:\{([+-]?\d{1,4})\}|([+-]?\d{1,4}))(?![\d.^])"
)


def _powers(text: str) -> str:
    """4.5e33 as a power of ten: algebra reads e as Euler's number."""
    return _E_NOTATION.sub(
        lambda found: f"{found[1]} \\cdot 10^{{{int(found[2] or found[3])}}}", text
    )
