# SPDX-License-Identifier: Apache-2.0
"""Lines of a JSONL file: the objects in them, and messages that name file and line."""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

from absl import logging

from opd_jax.problems import file_kinds

Parsed = TypeVar("Parsed")
_BOM = b"\xef\xbb\xbf"
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


class Number(str):
    """A number of the file, as it is written there: 0.00001 stays that, and is not text."""


_decoder = json.JSONDecoder(parse_float=Number, parse_int=Number, parse_constant=Number)


def read(
    path: str,
    parse: Callable[[dict, int], Parsed],
    *,
    option: str,
    form: str,
    skip: str = "",
    on_error: str = "raise",
) -> list[tuple[int, Parsed]]:
    """(line number from 1, `parse(object, line number)`) of each line that is not blank.

    UTF-8, with or without a byte order mark; lines end in LF or CRLF.

    Args:
      path: the file.
      parse: raises ValueError where an object is not what it must be.
      option: the flag that names the file: "--config.data.source".
      form: what a line must be, for the messages.
      skip: the flag that leaves bad lines out; "" = there is none.
      on_error: "raise" names the first bad line; "skip" logs each and their number.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no JSONL, a line is bad, or nothing is left.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{option}={path} is no file; set it to a JSONL file of {form}")
    data = file.read_bytes().removeprefix(_BOM)
    file_kinds.check(data, path)
    good, bad = [], []
    for number, line in enumerate(data.split(b"\n"), 1):
        line = line.strip().removeprefix(_BOM)  # inside, where files were joined
        if not line:
            continue
        try:
            good.append((number, parse(_object(line), number)))
        except (ValueError, RecursionError) as error:
            bad.append(f"{path}:{number}: {error}")
            if on_error == "skip":
                logging.warning("skipped %s", bad[-1])
    if not good:
        lines = f"{len(bad)} of {len(bad)} lines are bad"
        trouble = f"{bad[0]}; {lines}" if bad else f"{path} holds no problem"
        raise ValueError(f"{trouble}: set {option} to a JSONL file of {form}")
    if bad and on_error == "raise":
        others = f" ({len(bad)} of {len(good) + len(bad)} lines are bad)" if len(bad) > 1 else ""
        leave = f", or set {skip} to leave such lines out" if skip else ""
        raise ValueError(f"{bad[0]}; correct the line{others}{leave}")
    if bad:
        logging.warning("%s: %d lines skipped, %d read", path, len(bad), len(good))
    return good


def _object(line: bytes) -> dict:
    try:
        record = _decoder.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text: {error}") from None
    except json.JSONDecodeError as error:  # its own "line 1" would be taken for the file's
        raise ValueError(f"is no JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise ValueError(f"a line must be an object, this is {kind(record)}")
    return record


def is_text(value: Any) -> bool:
    """True = text between quotes, False also for a number."""
    return isinstance(value, str) and not isinstance(value, Number)


def is_integer(value: Any) -> bool:
    """True = a number that is written without point and exponent."""
    return isinstance(value, Number) and value.removeprefix("-").isdigit()


def check_number(value: Any, key: str) -> None:
    """Raises ValueError for NaN and the infinities, which Python writes where JSON has none."""
    lost = isinstance(value, float) and not math.isfinite(value)
    if lost or (isinstance(value, Number) and value in _NOT_FINITE):
        raise ValueError(f'"{key}" is {value}, which is no number and no JSON')


def check_characters(text: str, key: str) -> None:
    """Raises ValueError where a text cannot be written as UTF-8, as every tokenizer must."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f'"{key}" holds \\u{ord(text[error.start]):04x}, half of a surrogate pair, which is '
            "no character"
        ) from None


def kind(value: Any) -> str:
    """A value in words, for messages."""
    if isinstance(value, Number):
        return f"the number {shortened(value)}"
    words = {str: "text", dict: "an object", list: "a list", bool: "a truth value"}
    if value is None:
        return "null"
    return f"{words.get(type(value), type(value).__name__)}: {shortened(repr(value))}"


def shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
