# SPDX-License-Identifier: Apache-2.0
"""Advice of a message, pasted into bash and parsed by the flags: it must work as it is printed."""

import ast
import pathlib
import re
import subprocess

from launch import config_flags

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = [p for r in ("opd_jax", "launch", "configs") for p in sorted((ROOT / r).rglob("*.py"))]

# A flag and its value to the end of the shell's word; quoted parts may hold anything.
_FLAG = re.compile(r"""(?<![\w-])--([\w.]+)=(?:'[^']*'|"[^"]*"|\\.|[^\s'"\\])*""")
_DEFINED = re.compile(r"""(?:DEFINE_\w+|add_argument)\(\s*"(?:--)?(\w+)\"""")


def words(message: str) -> list[str]:
    """Every --NAME=VALUE as it stands in a message, without the punctuation of the sentence."""
    return [match[0].rstrip(".,;:)`") for match in _FLAG.finditer(message)]


def pasted(words: list[str]) -> list[str]:
    """What a program gets of words that are pasted into bash. AssertionError: bash refuses them."""
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {' '.join(words)}"], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, f"bash refuses {words}: {done.stderr}"
    return done.stdout.split("\0")[:-1] if words else []


def check(error: object, config: str = f"{ROOT}/configs/base.py") -> None:
    """Fails unless every flag that the message of an error advises can be pasted and is known.

    A flag at the very beginning is what was given, and may be as wrong as it likes.
    """
    message = str(error).removeprefix("ERROR: ")
    advised = words(message)[message.startswith("--") :]
    arguments = pasted(advised)
    assert len(arguments) == len(advised), f"bash takes {advised} apart: {arguments}"
    known = set(_DEFINED.findall("\n".join(p.read_text() for p in SOURCES)))
    for argument in arguments:
        name = argument[2:].partition("=")[0]
        if name.startswith("config."):
            config_flags.config_of([f"--config={config}", argument])
        else:
            assert name in known, f"no launcher has a flag --{name}"


def texts(path: pathlib.Path) -> list[str]:
    """Every string of a module but single arguments; what is filled in at run time reads X."""
    found, inside = [], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            inside |= set(node.values)
            parts = (v.value if isinstance(v, ast.Constant) else "X" for v in node.values)
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            found.append(node.value)
    return [text for text in found if not re.fullmatch(r"--\S+", text)]  # given without a shell
