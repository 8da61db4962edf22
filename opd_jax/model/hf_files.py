# SPDX-License-Identifier: Apache-2.0
"""The safetensors files of a model directory, found and checked before any weight is read."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_AGAIN = "Download or export the model again."
_MOST_PATTERNS = 18  # lines of a message about tensors


@dataclass(frozen=True)
class Entry:
    """One stored tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: "BF16", ...


def by_pattern(tensors: Iterable[tuple[str, str]]) -> list[str]:
    """Pairs (name, remark) as lines "model.layers.N.mlp.up_proj.weight [64, 32], 28 tensors".

    Tensors whose names differ in the numbers of layer and expert only, and whose remarks are equal,
    share a line; one that stands alone keeps its name. Further lines than a terminal holds are
    counted, not shown.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, remark in tensors:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "N", name)
        groups.setdefault((pattern, remark), []).append(name)
    lines = [
        f"{pattern}{remark}, {len(names)} tensors" if len(names) > 1 else f"{names[0]}{remark}"
        for (pattern, remark), names in groups.items()
    ]
    if len(lines) > _MOST_PATTERNS:
        lines[_MOST_PATTERNS:] = [f"and {len(lines) - _MOST_PATTERNS} further patterns"]
    return lines


class WeightFiles:
    """All tensors of a directory by name; opens each header, reads no weight until asked."""

    def __init__(self, directory: Path):
        self.directory = directory
        weight_map = _weight_map(directory)
        self._open = {}
        self.entries: dict[str, Entry] = {}
        names = sorted(set(weight_map.values())) if weight_map else [SINGLE]
        for name in names:
            self._add(name)
        lost = sorted(set(weight_map) - set(self.entries))
        if lost:
            raise ValueError(
                f"{directory / INDEX} lists {len(lost)} tensors that its files do not hold: "
                f"{'; '.join(by_pattern((key, '') for key in lost))}. The index and the files are "
                f"of different exports. {_AGAIN}"
            )

    def _add(self, name: str) -> None:
        path = self.directory / name
        try:
            handle = safe_open(path, framework="np")
            keys = list(handle.keys())
        except SafetensorError as error:
            raise ValueError(
                f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file: "
                f"{str(error)[:300]}. "
                f"It was probably cut while being copied. {_AGAIN}"
            ) from error
        self._open[name] = handle
        for key in keys:
            if key in self.entries:
                raise ValueError(
                    f"tensor {key!r} is both in {self.entries[key].file} and in {name} of "
                    f"{self.directory}: one of them is stale. {_AGAIN}"
                )
            view = handle.get_slice(key)
            self.entries[key] = Entry(name, tuple(view.get_shape()), view.get_dtype())

    def view(self, key: str):
        """`view(key)[slices]` -> numpy array: reads those bytes only."""
        return self._open[self.entries[key].file].get_slice(key)


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name -> file name from the index; {} when the model is the single file."""
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is not a directory. Name a model directory or a hub id."
        )
    if (directory / SINGLE).exists():
        return {}  # as transformers does: the single file goes before an index
    index = directory / INDEX
    if not index.exists():
        raise FileNotFoundError(_no_weights(directory))
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{index} is not an index with a weight_map ({error!r}). {_AGAIN}"
        ) from error
    if not (isinstance(weight_map, dict) and all(isinstance(x, str) for x in weight_map.values())):
        raise ValueError(f"the weight_map of {index} must map tensor names to file names. {_AGAIN}")
    if not weight_map:
        raise ValueError(f"the weight_map of {index} names no tensor. {_AGAIN}")
    files = sorted(set(weight_map.values()))
    # By name only, never by resolved path: the hub's cache is made of links that lead outside.
    outside = [
        name
        for name in files
        if Path(name).name != name or not name.endswith(".safetensors") or not name.isprintable()
    ]
    if outside:
        raise ValueError(
            f"{index} points to {outside}: every file must be a *.safetensors directly inside "
            f"{directory}, so that loading a model reads nothing else. Do not trust this index."
        )
    missing = [name for name in files if not os.path.exists(directory / name)]  # or too long
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {len(missing)} of the {len(files)} files in its index: {missing}. "
            f"{_AGAIN}"
        )
    return weight_map


def _no_weights(directory: Path) -> str:
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLES)
    if pickles:
        return (
            f"{directory} holds its weights as pickles {pickles}, which run code when read; we "
            "read safetensors only. Convert them where you trust them (transformers: "
            "from_pretrained(...).save_pretrained(...)), or name a revision with safetensors."
        )
    return (
        f"{directory} holds neither {SINGLE} nor {INDEX} (found: "
        f"{sorted(p.name for p in directory.iterdir())}): it is not, or only half, a model. "
        f"{_AGAIN}"
    )
