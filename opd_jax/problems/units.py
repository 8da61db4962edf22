# SPDX-License-Identifier: Apache-2.0
r"""Units in answers: `\text{ cm}^2`, `\,\mathrm{m/s}`, `^\circ`, `dollars per hour`, `apples`.

Any words in a text box after a number are a unit, unless they make a statement ("or more"). Outside
a box only known units are, and words: letters are algebra.
"""

import re

TEXT = r"\\(?:text(?:rm|bf|it|sf|tt|normal|up)?|math(?:rm|sf|tt)|mbox|hbox|operatorname|unit|si)"
WRAPPED = re.compile(TEXT + r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_SI = {"meter": "m", "metre": "m", "gram": "g", "gramme": "g", "liter": "L", "litre": "L"}
_SI |= {"second": "s", "sec": "s", "newton": "N", "joule": "J", "watt": "W", "volt": "V"}
_SI |= {"ampere": "A", "amp": "A", "ohm": "Ω", "hertz": "Hz", "pascal": "Pa", "tesla": "T"}
_SI |= {"coulomb": "C", "farad": "F", "kelvin": "K", "mole": "mol", "electronvolt": "eV"}
_SI |= {"byte": "B", "bit": "bit", "calorie": "cal", "parsec": "pc", "radian": "rad"}
_PREFIXES = {"kilo": "k", "centi": "c", "milli": "m", "micro": "μ", "nano": "n", "mega": "M"}
_PREFIXES |= {"giga": "G", "deci": "d", "pico": "p", "tera": "T", "femto": "f", "hecto": "h"}
_NAMES = {"minute": "min", "hour": "h", "hr": "h", "inch": "in", "inche": "in", "foot": "ft"}
_NAMES |= {"feet": "ft", "yard": "yd", "mile": "mi", "pound": "lb", "lb": "lb", "ounce": "oz"}
_NAMES |= {"gallon": "gal", "celsius": "C", "fahrenheit": "F", "degree": "°", "deg": "°"}
_NAMES |= {"percent": "%", "percentage": "%", "pct": "%", "dollar": "$", "usd": "$", "euro": "€"}
_NAMES |= {"eur": "€", "rupee": "₹", "rs": "₹", "inr": "₹", "yuan": "¥", "yen": "¥", "gbp": "£"}
_NAMES |= {"year": "year", "yr": "year", "people": "person", "persons": "person", "men": "man"}
_NAMES |= {"women": "woman", "children": "child", "l": "L", "ml": "mL", "l.": "L", "rev": "rev"}
_NAMES |= {name: name for name in "day cup pint quart week month ton tonne acre hectare".split()}
_NAMES |= {
    name: name for name in "egg box boxe bag pen car cat dog cow bus toy pie cent erg".split()
}
_SYMBOLS = {prefix + symbol for prefix in ("", *_PREFIXES.values()) for symbol in _SI.values()}
_SYMBOLS |= set(_NAMES.values()) | {"atm", "bar", "dB", "ppm", "rpm", "AU", "ly", "dyn", "Å"}
_LOWER = {symbol.lower(): symbol for symbol in sorted(_SYMBOLS) if len(symbol) > 1}
_COMPOUND = {"mph": "mi/h", "kmph": "km/h", "kph": "km/h", "kmh": "km/h", "cc": "cm^3"}
_SQUARE = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_SQUARED = {"squared": 2, "cubed": 3}
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_FILLERS = {"of", "the", "a", "an", "total", "altogether", "th", "st"}
_FILLERS |= {"nd", "rd"}
# A word of these makes a statement of what would be a unit: "5 or more", "2 if x > 0".
_STATEMENT = set("or and not no if when where than least most except plus minus times to".split())
_STATEMENT |= set("base from above below between per cent".split()) - {"per", "cent"}
# Joined to a number without a space these are units; other letters there are algebra (2mg, 3ms).
_JOINED = set("cm mm km kg ml mL ft lb lbs hr hrs min sec Hz kHz MHz GHz eV keV MeV GeV".split())
_JOINED |= set("kJ kW kPa mph kmh kph rpm mol deg".split())
_SINGLE = set("mshgLNJWVAKCFTΩÅ")  # after a number and a space, outside \text{}
_UNIT_TOKEN = re.compile(
    r"(?P<mark>\x00)|(?P<word>[^\W\d_]+(?:[-'][^\W\d_]+)*|\\?[%$€£¥₹¢]|°)\.?(?P<direct>[23](?!\d))?"
    r"|\^\s*\{?\s*(?P<power>[+-]?\d+)\s*\}?|(?P<other>[/()])|\s+|\.|\\(?:cdot|times)(?![a-z])|\*"
)
_ARGUMENT = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
_FRACTION = re.compile(rf"\\frac\s*{_ARGUMENT}\s*{_ARGUMENT}")
_NOT_INCH = re.compile(r"\W*(?:total|all|the|this|each|a)\b")
Unit = dict[str, int]  # {"m": 1, "s": -2}; {} = none


def _plain_unit(text: str) -> str:
    r"""\text{} unwrapped; each word that was outside of one is marked by NUL before it."""
    if found := _FRACTION.fullmatch(text.strip()):
        text = f"{found[1]} / ({found[2]})"
    text = text.replace("^\\circ", " ° ").replace("\\circ", " ° ").replace("\\$", "$")
    text = re.sub(r"\\AA(?![a-z])", "Å", re.sub(r"\\Omega(?![a-z])", "Ω", text))
    text = re.sub(r"\\mu(?![a-z])\s*", "μ", text)
    text = re.sub(rf"μ\s*({TEXT}\s*\{{)\s*", r"\1μ", text)  # \mu\text{m}
    text = re.sub(rf"{TEXT}\s*\{{\s*([kMGm])\s*\}}\s*Ω", r"\1Ω", text)
    out, end = [], 0
    for found in WRAPPED.finditer(text):
        inner = _FRACTION.sub(r" \1 / (\2)", found[1])
        out += [_marked(text[end : found.start()]), f" {inner}" if inner.strip() else " "]
        end = found.end()
    return "".join([*out, _marked(text[end:])]).replace("{", " ").replace("}", " ")


def _marked(text: str) -> str:
    return re.sub(r"(?<![\w\\])(?=[^\W\d_])", "\x00", text)


def read(text: str, spaced: bool = True, letters: bool = True) -> tuple[Unit, int] | None:
    """(unit, power of ten of its words like "million"); None where the text is no unit.

    `spaced`: white space was before it, so that words outside a text box may be a unit.
    `letters`: and single letters such as m and s may be.
    """
    if len(text) > 200:
        return None
    text, out, scale = _plain_unit(text), {}, 0
    sign, group, ahead, last, bare, opened, at = 1, 1, 1, None, False, False, 0
    while at < len(text):
        found = _UNIT_TOKEN.match(text, at)
        if not found or (at := found.end()) == found.start():
            return None
        if found["mark"]:
            bare = True
        elif found["power"]:
            if last is None:
                return None
            out[last[0]] += last[1] * (int(found["power"][:3]) - 1)
            last = None
        elif found["other"]:
            if found["other"] == ")" and not opened:
                return None
            opened = found["other"] == "(" or (opened and found["other"] == "/")
            sign, group = {"/": (-1, group), "(": (sign, sign), ")": (1, 1)}[found["other"]]
        elif found["word"]:
            word, folded = found["word"].lstrip("\\"), found["word"].lstrip("\\").casefold()
            if folded == "per":
                sign = -1
            elif folded in _STATEMENT or (
                bare and not _may_be_bare(word, spaced, letters or bool(out))
            ):
                return None
            elif folded in _SCALES:
                scale += _SCALES[folded]
            elif folded in _SQUARE:
                ahead = _SQUARE[folded]
            elif folded in _SQUARED and last is not None:
                out[last[0]] += last[1] * (_SQUARED[folded] - 1)
            elif folded in _COMPOUND:
                parts = read(f"\\text{{{_COMPOUND[folded]}}}")
                for name, power in parts[0].items() if parts else ():
                    out[name] = out.get(name, 0) + power
            elif folded not in _FILLERS and not (folded == "in" and _NOT_INCH.match(text, at)):
                name, power = canonical(word), (sign if sign < 0 else group) * ahead
                out[name] = out.get(name, 0) + power * int(found["direct"] or 1)
                last, sign, ahead = (name, power), 1, 1
            bare = False
    out.pop("unit", None)  # "square units" says nothing
    return {name: power for name, power in out.items() if power}, scale


def _may_be_bare(word: str, spaced: bool, letters: bool) -> bool:
    """May a word outside a text box be (part of) a unit, and not a product of letters?"""
    folded = word.casefold()
    known = folded.removesuffix("s") in _NAMES or word in _SYMBOLS or folded in _COMPOUND
    known |= folded in _SCALES or folded in _SQUARE or folded == "per" or folded in _FILLERS
    if not word[0].isalpha():
        return True
    if not spaced:
        return word in _JOINED or (known and len(word) > 3)
    return (letters and word in _SINGLE) or (known and len(word) > 1) or len(word) > 3


def canonical(word: str) -> str:
    """One name for a unit however it is written: km for km, kilometers, Kilometre."""
    if word in _SYMBOLS:
        return word
    folded = word.casefold()
    for name in (folded, folded.removesuffix("s"), folded.removesuffix("es")):
        if name in _NAMES or name in _SI:
            return _NAMES.get(name) or _SI[name]
        for prefix, symbol in _PREFIXES.items():
            if name.startswith(prefix) and name.removeprefix(prefix) in _SI:
                return symbol + _SI[name.removeprefix(prefix)]
    return _LOWER.get(folded) or _LOWER.get(folded.removesuffix("s")) or folded.removesuffix("s")


def same(a: Unit, b: Unit) -> bool:
    """A unit on one side only is dropped; on both it must be the same."""
    return not a or not b or a == b
