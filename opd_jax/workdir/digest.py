# SPDX-License-Identifier: Apache-2.0
"""What a result belongs to: the content of models and problems, whatever the paths are called.

An evaluation stores these digests beside its samples, a run in its checkpoints. New weights or
another file under the old path are then another result, not more of the old one.
"""

import hashlib
import json
import pathlib
import struct
from collections.abc import Iterable, Mapping

from opd_jax.problems import task

WHOLE_BYTES = 2**30  # larger models are sampled: 16 GB would take half a minute at each start
EDGE_BYTES = 2**14  # of every tensor, at either end

# What a tokenizer reads; the template and what ends a response stand in files of other purposes.
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")
_TOKENIZER_JSON = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEMPLATE = ("chat_template.jinja", "chat_template.json")


def of_model(directory) -> dict[str, str]:
    """SHA-256 of a local model directory, by part: "weights" (with config.json), "tokenizer" (with
    the ids that end a response) and "template".

    Above `WHOLE_BYTES` of weights each file is known by its header, its size and the first and last
    `EDGE_BYTES` of every tensor: a training step changes them; an edit in the middle of a tensor
    alone is not seen.
    """
    directory = pathlib.Path(directory)
    weights, tokenizer, template = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    _add(weights, "config.json", _canonical(_json(directory / "config.json")))
    files = sorted(directory.glob("*.safetensors"))
    whole = sum(path.stat().st_size for path in files) <= WHOLE_BYTES
    for path in files:
        _add(weights, path.name, _whole(path) if whole else _sampled(path))
    for name in _TOKENIZER:
        _add(tokenizer, name, _bytes(directory / name))
    for name in _TOKENIZER_JSON:
        content = _json(directory / name)
        if isinstance(content, dict) and "chat_template" in content:
            _add(template, name, _canonical(content.pop("chat_template")))
        _add(tokenizer, name, _canonical(content))
    generation = _json(directory / "generation_config.json")
    eos = generation.get("eos_token_id") if isinstance(generation, dict) else generation
    _add(tokenizer, "eos_token_id", _canonical(eos))
    for name in _TEMPLATE:
        _add(template, name, _bytes(directory / name))
    parts = dict(weights=weights, tokenizer=tokenizer, template=template)
    return {name: part.hexdigest() for name, part in parts.items()}


def of_problems(examples: Iterable[task.Example]) -> str:
    """SHA-256 of what is asked and what is right, in order; reference solutions are left out."""
    found = hashlib.sha256()
    for example in examples:
        fields = [str(example.id), example.family, example.prompt, example.answer]
        _add(found, "", _canonical(fields))
    return found.hexdigest()


def of_arrays(digests: Mapping[str, int]) -> str:
    """SHA-256 of a checkpoint's own digests (checkpoint.digests), which cover every array."""
    return hashlib.sha256(_canonical(dict(digests))).hexdigest()


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of what was there before and is another content now."""
    return [name for name in before if name in now and before[name] != now[name]]


def _add(total, name: str, content: bytes | None) -> None:
    """Adds one named content; None = there is no such file. Lengths keep neighbours apart."""
    total.update(f"{name}\0{-1 if content is None else len(content)}\0".encode())
    total.update(content or b"")


def _bytes(path: pathlib.Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _json(path: pathlib.Path):
    """The value of a JSON file, its text where it is none, None where there is no file."""
    content = _bytes(path)
    if content is None:
        return None
    try:
        return json.loads(content)
    except ValueError:
        return content.hex()


def _canonical(value) -> bytes:
    """JSON that does not depend on the order of keys or on white space."""
    return json.dumps(value, sort_keys=True).encode()


def _whole(path: pathlib.Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _sampled(path: pathlib.Path) -> bytes:
    """Of the parts of a safetensors file that `of_model` names."""
    size = path.stat().st_size
    found = hashlib.sha256(struct.pack("<Q", size))
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, size))
        found.update(header)
        try:
            tensors = json.loads(header)
            tensors.pop("__metadata__", None)
            spans = sorted(tuple(map(int, tensor["data_offsets"])) for tensor in tensors.values())
        except (ValueError, KeyError, TypeError, AttributeError):
            spans = []  # no safetensors file: whoever loads it says so
        for start, end in spans:
            for place in (start, max(start, end - EDGE_BYTES)):
                file.seek(8 + length + place)
                found.update(file.read(min(EDGE_BYTES, end - start)))
    return found.digest()
