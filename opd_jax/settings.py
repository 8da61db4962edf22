# SPDX-License-Identifier: Apache-2.0
"""A section of the config as a frozen dataclass that checks itself.

    @dataclasses.dataclass(frozen=True)
    class Settings(Section):
        section = "margin"
        kind: str = choice("top1_top2", KINDS)
        temperature: float = number(1.0, above=0)

Every setting is declared once, beside the code that reads it: type, default and range. configs/
base.py shows them all to the user; a test holds the two equal. Imports nothing of ours.
"""

import dataclasses
import math
import shlex
from collections.abc import Sequence
from typing import Any, ClassVar

TYPES = {"bool": bool, "int": int, "float": (float, int), "str": str, "tuple": tuple}


def number(
    default: float,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    why: str = "",
) -> Any:
    """A field that holds a finite int or float in a range; `why` goes into the error."""
    bounds = dict(least=least, most=most, above=above, below=below)
    return dataclasses.field(default=default, metadata=dict(bounds=bounds, why=why))


def choice(default: str, options: Sequence[str]) -> Any:
    """A field that holds one of `options`."""
    return dataclasses.field(default=default, metadata=dict(options=tuple(options)))


@dataclasses.dataclass(frozen=True)
class Section:
    """Base of the settings dataclasses. Raises ValueError, naming the flag, when made of bad ones.

    Conditions on several settings at once go into the subclass's `__post_init__`, after super's.
    """

    section: ClassVar[str] = ""  # of the config; "" = its top level

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check(field)

    def require(self, ok: bool, name: str, must: str, works: Any) -> None:
        """Raises ValueError unless `ok`: what `name` holds, what it must be, a value that works."""
        if not ok:
            path = f"{self.section}.{name}" if self.section else name
            raise ValueError(
                f"config.{path}={getattr(self, name)!r} must be {must}. Set {flag(path, works)}"
            )

    def _check(self, field: dataclasses.Field) -> None:
        value = getattr(self, field.name)
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
        good = isinstance(value, TYPES.get(kind, object)) and (
            kind not in ("int", "float") or not isinstance(value, bool)
        )
        self.require(good, field.name, f"of type {kind}", field.default)
        if "options" in field.metadata:
            options = field.metadata["options"]
            self.require(
                value in options, field.name, f"one of {', '.join(options)}", field.default
            )
        if kind in ("int", "float"):
            if "bounds" not in field.metadata:
                raise TypeError(f"{type(self)}.{field.name} has no range: declare it by `number`")
            bounds, why = field.metadata["bounds"], field.metadata["why"]
            must = f"a number {words(**bounds)}" + (f": {why}" if why else "")
            self.require(inside(value, **bounds), field.name, must, field.default)


def inside(value, least=None, most=None, above=None, below=None) -> bool:
    """True = a finite number within the bounds that are given."""
    return math.isfinite(value) and not (
        (least is not None and value < least)
        or (most is not None and value > most)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
    )


def words(least=None, most=None, above=None, below=None) -> str:
    """The bounds in words: "at least 0 and below 0.5"."""
    said = [("at least", least), ("above", above), ("at most", most), ("below", below)]
    return (
        " and ".join(f"{word} {bound:g}" for word, bound in said if bound is not None) or "(finite)"
    )


def flag(path: str, value: Any) -> str:
    """The flag that sets a key of the config, as a shell takes it."""
    if isinstance(value, tuple):
        return f'--config.{path}="{_written(value)}"'
    return f"--config.{path}={shlex.quote(str(value))}"


def _written(value: Any) -> str:
    """A tuple as Python reads it, without spaces."""
    if not isinstance(value, tuple):
        return repr(value)
    return f"({','.join(map(_written, value))}{',' * (len(value) == 1)})"


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of a nested config, a dict or a ConfigDict."""
    flat = {}
    for name, value in config.items():
        is_section = hasattr(value, "items")
        flat |= flatten(value, f"{prefix}{name}.") if is_section else {prefix + name: value}
    return flat
