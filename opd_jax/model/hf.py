# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories <-> parameters: safetensors only; never a pickle, never remote code.

`load` checks every header first and raises once, naming all that is wrong; then each parameter is
filled slice by slice, straight into this process's shards. `save` writes beside the target and
renames, so that a failure leaves what was there.
"""

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from opd_jax.model import hf_layout
from opd_jax.model.config import Qwen3Config
from opd_jax.model.hf_files import DTYPES, INDEX, SINGLE, WeightFiles, by_pattern

ASSETS = Path(__file__).parents[1] / "assets"
SHARD_BYTES = 5_000_000_000
_PROGRESS_BYTES = 1_000_000_000  # smaller models load before a bar is read
# All that a directory needs beside weights; .bin and .py are never fetched.
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
_HUB_TRIES = 3
_CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_CARRIED_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


# ---- names ----


def resolve(name: str) -> Path:
    """Directory of "embedded:student", a path, a remote path or a hub id ("Qwen/Qwen3-0.6B[@rev]").

    Only a hub id touches the network, and only for what is not in the hub's cache.
    """
    if name.startswith("embedded:"):
        path = ASSETS / name.removeprefix("embedded:")
        if not (path / "config.json").exists():
            known = sorted(f"embedded:{p.parent.name}" for p in ASSETS.glob("*/config.json"))
            raise ValueError(f"model {name!r} is not in this package; it has {known}.")
        return path
    if "://" in name:
        return _fetch_remote(name)
    if os.path.isdir(name):
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        raise FileNotFoundError(
            f"model {name!r} is neither a directory here nor a hub id (organisation/name). Give "
            "'embedded:student', 'embedded:teacher', a directory, or an id like 'Qwen/Qwen3-0.6B'."
        )
    return _fetch_hub(name)


def _fetch_hub(name: str) -> Path:
    import huggingface_hub  # here: importing it costs half a second that most runs never need
    from huggingface_hub.errors import (
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = name.partition("@")
    last: Exception | None = None
    for attempt in range(_HUB_TRIES):
        try:
            return Path(
                huggingface_hub.snapshot_download(
                    repo, revision=revision or None, allow_patterns=_HUB_FILES
                )
            )
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise ValueError(
                f"the hub has no model {name!r} that you may read ({error}). No directory of that "
                "name exists here either. Correct the name, or log in with `hf auth login`."
            ) from error
        # OSError covers refused connections and the hub's own "not in the cache and no network".
        except (HfHubHTTPError, OSError) as error:
            last = error
            if attempt + 1 < _HUB_TRIES and not huggingface_hub.constants.HF_HUB_OFFLINE:
                time.sleep(2.0**attempt)
    raise ConnectionError(
        f"model {name!r} is neither a directory here nor in the hub's cache, and the hub cannot be "
        f"reached ({type(last).__name__}: {last}). Connect, or run `hf download {repo}` on a "
        "machine that can, copy the directory here and give its path."
    ) from last


def _fetch_remote(name: str) -> Path:
    """Copies a remote directory (gs://...) to local disk: safetensors are read by memory map."""
    source = epath.Path(name)
    target = Path.home() / ".cache" / "opd_jax" / re.sub(r"[^\w.-]+", "_", name)
    if not source.is_dir():
        raise FileNotFoundError(
            f"model {name!r} is not a directory. Check the address and your access."
        )
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        local = target / file.name
        if file.is_dir() or not any(file.match(pattern) for pattern in _HUB_FILES):
            continue
        if not local.exists() or local.stat().st_size != file.stat().length:
            partial = local.with_name(f"{local.name}.{os.getpid()}")
            file.copy(partial)
            partial.rename(local)
    return target


# ---- load ----


def load(directory, dtype=None, shardings=None) -> tuple[Qwen3Config, dict[str, Any]]:
    """Reads a Hugging Face directory.

    Args:
      directory: path that holds config.json and safetensors; see `resolve` for names.
      dtype: of the parameters; None keeps what is stored.
      shardings: tree of jax Sharding like `qwen3.param_axes`; None puts all on one device. Each
        process reads only the slices its own shards need.

    Raises:
      ValueError: naming every missing, unused, misshapen, mistyped and non-finite tensor at once.
    """
    directory = Path(directory)
    config = Qwen3Config.from_hf(directory)
    files = WeightFiles(directory)
    layout = hf_layout.leaves(config)
    _check_headers(config, layout, files)
    if shardings is None:
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        flat = dict.fromkeys(layout, one)
    else:
        flat = {_path(path): x for path, x in jax.tree_util.tree_leaves_with_path(shardings)}
    total = sum(np.prod(leaf.shape) for leaf in layout.values())
    bar = tqdm.tqdm(
        total=int(total),
        desc=f"loading {directory.name}",
        unit="parameters",
        unit_scale=True,
        # None: a bar on a terminal, nothing in a log file.
        disable=None if total * 2 > _PROGRESS_BYTES and jax.process_index() == 0 else True,
    )
    not_finite: set[str] = set()
    params: dict[str, Any] = {}
    with bar:
        for path, leaf in layout.items():
            node = params
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = _fill(leaf, files, dtype, flat[path], not_finite)
            bar.update(int(np.prod(leaf.shape)))
    if not_finite:
        raise ValueError(
            f"{directory} holds NaN or infinity in {len(not_finite)} tensors: "
            f"{'; '.join(by_pattern((key, '') for key in sorted(not_finite)))}. Weights must be "
            "finite, or every loss is NaN. The run that wrote it diverged; use an earlier "
            "checkpoint."
        )
    return config, params


def _path(path) -> tuple[str, ...]:
    return tuple(entry.key for entry in path)


def _fill(leaf: hf_layout.Leaf, files: WeightFiles, dtype, sharding, not_finite: set[str]):
    """One parameter, each shard read from the files that hold it."""
    if dtype is None:
        stored = {files.entries[key].dtype for key in leaf.keys.flat}
        dtype = np.result_type(*(jnp.dtype(DTYPES[name]) for name in stored))
    read: dict[str, np.ndarray] = {}  # replicas of a shard share one read

    def shard(index):
        if str(index) in read:
            return read[str(index)]
        stack = leaf.keys.ndim
        keys = leaf.keys[index[:stack]]
        size = [len(range(*s.indices(n))) for s, n in zip(index, leaf.shape, strict=True)]
        out = np.empty(size, dtype)
        for where in np.ndindex(keys.shape if stack else ()):
            key = str(keys[where] if stack else leaf.keys.item())
            part = leaf.read(files.view(key), index[stack:])
            if not np.isfinite(part).all():
                not_finite.add(key)
            out[where] = part
        read[str(index)] = out
        return out

    return jax.make_array_from_callback(leaf.shape, sharding, shard)


def _check_headers(config: Qwen3Config, layout, files: WeightFiles) -> None:
    """Raises one ValueError with everything that does not fit; reads no weights."""
    expected = {key: leaf.hf_shape for leaf in layout.values() for key in leaf.keys.flat}
    problems = [
        (f"missing: {key}", f" {list(shape)}")
        for key, shape in expected.items()
        if key not in files.entries
    ]
    for key, entry in files.entries.items():
        shape = list(entry.shape)
        if config.tie_embeddings and key == hf_layout.LM_HEAD:
            problems += _check_tied(files)  # some published files hold the tied head twice
        elif key not in expected:
            problems.append((f"unused: {key}", f" {shape}"))
        elif entry.shape != expected[key]:
            problems.append(
                (f"wrong shape: {key}", f" is {shape}, config.json implies {list(expected[key])}")
            )
        elif entry.dtype not in DTYPES:
            problems.append(
                (f"wrong dtype: {key}", f" is {entry.dtype}, we read {', '.join(sorted(DTYPES))}")
            )
    if problems:
        raise ValueError(
            f"the weights in {files.directory} do not fit its config.json ({len(problems)} "
            "problems). Use the config.json that was published with these weights, or the "
            "unquantised, unmerged model:\n  " + "\n  ".join(by_pattern(problems))
        )


def _check_tied(files: WeightFiles) -> list[tuple[str, str]]:
    """A head stored beside tied embeddings must be the same matrix: problems (name, remark)."""
    head, embed = files.entries[hf_layout.LM_HEAD], files.entries.get(hf_layout.EMBED)
    if embed is None or embed.shape != head.shape:
        remark = f" {list(head.shape)}: config.json ties it to the embedding"
        return [(f"unused: {hf_layout.LM_HEAD}", remark)]
    a, b = files.view(hf_layout.LM_HEAD), files.view(hf_layout.EMBED)
    rows = 4096  # by pieces: whole, the two would be the largest allocation of the load
    for first in range(0, head.shape[0], rows):
        part = slice(first, min(first + rows, head.shape[0]))
        if not np.array_equal(a[part], b[part], equal_nan=True):
            remark = (
                f" differs from {hf_layout.EMBED}, but config.json says tie_word_embeddings=true: "
                "one of them would be lost. Set it to false"
            )
            return [(f"unused: {hf_layout.LM_HEAD}", remark)]
    return []


# ---- save ----


def save(
    config: Qwen3Config,
    params: dict[str, Any],
    directory,
    source=None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a directory that transformers and vLLM load; dtype as in params.

    Written under a temporary name and renamed: a failure leaves an earlier directory as it was. In
    a multi-process run every process calls this and process 0 writes.

    Args:
      directory: created; replaced if it holds a model already. May be remote (gs://...).
      source: directory whose tokenizer, chat template and generation_config are carried over.
      max_shard_bytes: larger models are split into files of at most this size, with an index.
    """
    target = epath.Path(directory)
    if target.exists() and not (target / "config.json").exists() and any(target.iterdir()):
        raise FileExistsError(
            f"{target} exists and holds no model: it would be replaced as a whole. Give a new "
            "directory."
        )
    remote = "://" in str(directory)
    stem = Path.cwd() if remote else Path(target).absolute().parent
    temporary = stem / f".{target.name}.tmp-{os.getpid()}"
    writer = jax.process_index() == 0
    try:
        if writer:
            temporary.mkdir(parents=True)
        _write_weights(config, params, temporary, max_shard_bytes, writer)
        if writer:
            _write_extras(config, params, temporary, Path(source) if source else None)
            for file in temporary.glob("*.safetensors"):  # safetensors writes them for us alone
                shutil.copymode(temporary / "config.json", file)
            _publish(temporary, target, remote)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_weights(config, params, directory: Path, max_shard_bytes: int, writer: bool) -> None:
    flat = {_path(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    layout = hf_layout.leaves(config)
    _check_params(layout, flat)
    plan: list[list[tuple]] = [[]]  # per file: (key, leaf, path, stack index)
    size = total = 0
    for path, leaf in layout.items():
        num_bytes = int(np.prod(leaf.hf_shape)) * flat[path].dtype.itemsize
        for where in np.ndindex(leaf.keys.shape):
            if plan[-1] and size + num_bytes > max_shard_bytes:
                plan.append([])
                size = 0
            plan[-1].append((leaf.keys[where] if where else leaf.keys.item(), leaf, path, where))
            size += num_bytes
            total += num_bytes
    weight_map = {}
    for number, shard in enumerate(plan, 1):
        file = SINGLE if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        tensors = {key: leaf.to_hf(_to_host(flat[path], where)) for key, leaf, path, where in shard}
        weight_map |= dict.fromkeys(tensors, file)
        if writer:
            save_file(tensors, directory / file, metadata={"format": "pt"})
    if writer and len(plan) > 1:
        index = dict(metadata=dict(total_size=total), weight_map=weight_map)
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _check_params(layout, flat) -> None:
    problems = [f"missing: {'/'.join(path)}" for path in layout.keys() - flat.keys()]
    problems += [f"unused: {'/'.join(path)}" for path in flat.keys() - layout.keys()]
    problems += [
        f"wrong shape: {'/'.join(path)} is {flat[path].shape}, config implies {leaf.shape}"
        for path, leaf in layout.items()
        if path in flat and flat[path].shape != leaf.shape
    ]
    if problems:
        raise ValueError("params do not fit the config:\n  " + "\n  ".join(sorted(problems)))


_pick = jax.jit(lambda x, where: x[tuple(where)])


def _to_host(x, where: tuple[int, ...]) -> np.ndarray:
    """One unstacked array; gathered when other processes hold parts of it."""
    if where and isinstance(x, jax.Array):
        x = _pick(x, tuple(np.int32(i) for i in where))
    elif where:
        x = x[where]
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _write_extras(config: Qwen3Config, params, directory: Path, source: Path | None) -> None:
    raw = config.to_hf()
    dtypes = {str(x.dtype) for x in jax.tree.leaves(params)}
    # Both dialects' names; transformers casts to it on load, so the widest that is stored.
    raw["dtype"] = raw["torch_dtype"] = str(np.result_type(*map(jnp.dtype, dtypes)))
    if source is not None:
        for name in _CARRIED:
            if (source / name).exists():
                shutil.copyfile(source / name, directory / name)
        old = json.loads((source / "config.json").read_text())
        raw |= {key: old[key] for key in _CARRIED_KEYS if old.get(key) is not None}
    (directory / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def _publish(temporary: Path, target: epath.Path, remote: bool) -> None:
    if remote:  # no rename there: config.json goes last, and nothing loads without it
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").unlink(missing_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda p: p.name == "config.json"):
            epath.Path(file).copy(target / file.name, overwrite=True)
        return
    place = Path(target).absolute()
    old = temporary.with_name(f".{place.name}.old-{os.getpid()}")
    if place.exists():
        place.rename(old)
    try:
        temporary.rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)
