# SPDX-License-Identifier: Apache-2.0
"""Files of others, mutated: what cannot be read is refused in our words, soon, and without a trace.

  OPD_JAX_FUZZ=20000 python -m pytest tests/test_fuzz.py tests/algorithm/test_segments.py

tries so many mutations of each kind (and so many texts for the sentence spans) instead of the few
hundred of a normal run, whose mutations are always the same.
"""

import contextlib
import copy
import json
import os
import pathlib
import random
import shutil
import signal

import pytest

from opd_jax.model import hf, qwen3
from opd_jax.problems.datasets import read_jsonl
from tests.model import tiny_models

ROUNDS = int(os.environ.get("OPD_JAX_FUZZ", 150))
SECONDS = 20  # that one mutated file may take; a hang is more
ODD_VALUES = [
    *(None, True, 0, -1, 1, 2, 3, 10**9, 2**63, 10**400, 0.5, -0.0, float("inf"), float("nan")),
    *("", "1", "a" * 5000, "\x00", "\ud800", "../..", [], [1], {}, {"a": 1}, [[]] * 3),
]
ODD_BYTES = [
    b"\x00",
    b"\xff",
    b'"',
    b"{",
    b"[" * 2000,
    b"1e999",
    b"-",
    b"9" * 5000,
    b"\\ud800",
    b"\n",
]


def mutated_bytes(rng: random.Random, given: bytes) -> bytes:
    """One to four edits: a byte changed, a piece cut out, doubled or replaced, the end lost."""
    out = bytearray(given)
    for _ in range(rng.randint(1, 4)):
        a, b = sorted(rng.randrange(len(out) + 1) for _ in range(2))
        b = min(b, a + 20)
        kind = rng.randrange(5)
        if kind == 0 and a < len(out):
            out[a] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[a:b]
        elif kind == 2:
            out[a:a] = out[a:b]
        elif kind == 3:
            out[a:b] = rng.choice(ODD_BYTES)
        elif kind == 4 and rng.random() < 0.2:
            del out[a:]
    return bytes(out)


def mutated_values(rng: random.Random, given: dict) -> dict:
    """Some values of an object, at any depth, replaced by odd ones, or lost."""
    out = json.loads(json.dumps(given))
    for _ in range(rng.randint(1, 3)):
        place = out
        while True:
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            inner = place[key]
            if not isinstance(inner, dict | list) or not inner or rng.random() < 0.2:
                break
            place = inner
        if rng.random() < 0.1:
            del place[key]
        else:
            place[key] = copy.deepcopy(rng.choice(ODD_VALUES))
        if not out:
            break
    return out


@contextlib.contextmanager
def time_limit(what: str):
    def late(*_):
        raise AssertionError(f"{what} took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def contents(root: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def check(read, place: pathlib.Path, root: pathlib.Path, case: str) -> bool:
    """Reads a mutated file: True = accepted, False = refused in our words, which name the file."""
    before = contents(root)
    try:
        with time_limit(case):
            read()
        return True
    except ValueError as error:
        assert type(error) is ValueError, f"{case}: not ours: {error!r}"
        assert str(place) in str(error), f"{case}: the message names no file: {error}"
        return False
    finally:
        assert contents(root) == before, f"{case}: reading wrote a file"


@pytest.fixture
def model(tmp_path) -> pathlib.Path:
    return tiny_models.write(tmp_path / "root" / "model", tiny_models.CONFIGS["tied"])


def test_a_mutated_config_is_read_or_refused(model, tmp_path):
    file = model / "config.json"
    good, refused = json.loads(file.read_text()), 0
    for number in range(ROUNDS):
        rng = random.Random(number)
        if number % 2:
            file.write_text(json.dumps(mutated_values(rng, good)))
        else:
            file.write_bytes(mutated_bytes(rng, json.dumps(good).encode()))
        case = f"mutation {number}: {file.read_bytes()[:3000]}"
        read = check(lambda: qwen3.Qwen3Config.from_hf(model), model, tmp_path, case)
        refused += not read
        if read:  # then its weights are of another shape, or the same
            check(lambda: hf.load(model), model, tmp_path, case)
    assert ROUNDS / 10 < refused < ROUNDS  # the mutations bite, and are not all hopeless


def test_a_mutated_safetensors_header_is_read_or_refused(model, tmp_path):
    file = model / "model.safetensors"
    whole, refused = file.read_bytes(), 0
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    for number in range(ROUNDS):
        rng = random.Random(number)
        if number % 3 == 0:
            file.write_bytes(mutated_bytes(rng, whole[:end]) + whole[end:])
        else:  # a header of the right length
            new = json.dumps(mutated_values(rng, header)).encode()
            if number % 3 == 1:
                new = mutated_bytes(rng, whole[8:end])
            file.write_bytes(len(new).to_bytes(8, "little") + new + whole[end:])
        case = f"mutation {number}"
        refused += not check(lambda: hf.load(model), model, tmp_path, case)
    assert refused > ROUNDS / 2


def test_a_mutated_index_is_read_or_refused(model, tmp_path):
    config, params = hf.load(model)
    shutil.rmtree(model)
    hf.save(config, params, model, max_shard_bytes=10_000)
    file = model / "model.safetensors.index.json"
    good = json.loads(file.read_text())
    for number in range(ROUNDS):
        rng = random.Random(number)
        if number % 2:
            file.write_text(json.dumps(mutated_values(rng, good)))
        else:
            file.write_bytes(mutated_bytes(rng, json.dumps(good).encode()))
        case = f"mutation {number}"
        with contextlib.suppress(FileNotFoundError):  # ours: lists the files that lack
            check(lambda: hf.load(model), model, tmp_path, case)


LINES = b"""{"prompt": "1+1?", "answer": "2", "id": "a"}
{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": 3}
{"prompt": "\xe2\x82\xac", "family": "f"}
"""


def test_mutated_lines_are_read_or_refused(tmp_path):
    file = tmp_path / "problems.jsonl"
    lines, refused = [json.loads(line) for line in LINES.splitlines()], 0
    for number in range(ROUNDS):
        rng = random.Random(number)
        if number % 2:
            changed = [mutated_values(rng, line) for line in lines]
            file.write_text("\n".join(map(json.dumps, changed)))
        else:
            file.write_bytes(mutated_bytes(rng, LINES))
        case = f"mutation {number}: {file.read_bytes()[:3000]}"
        read = check(lambda: read_jsonl(str(file)), file, tmp_path, case)
        refused += not read
        check(lambda: read_jsonl(str(file), on_error="skip"), file, tmp_path, case)
    assert ROUNDS / 10 < refused < ROUNDS
