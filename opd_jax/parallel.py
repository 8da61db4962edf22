# SPDX-License-Identifier: Apache-2.0
"""The mesh, which axis of an array goes where on it, and host rows <-> global arrays.

The model names the axes of its arrays ("embed", "heads", "batch", ...) and knows no mesh; the rules
below send those names to mesh axes. Everything works alike on one device, on fake devices and in
several processes.

Rows of the batch are divided over `data`, `fsdp` and `expert` into *shards*. A host holds the rows
of its own devices' shards, in the order of the shards. Hosts whose devices hold the same shards
(a `tensor` axis across hosts) form one *host group*: they must be given the same rows.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor", "expert")
BATCH_AXES = ("data", "fsdp", "expert")
DEFAULT_MESH = (("data", 1), ("fsdp", -1), ("tensor", 1), ("expert", 1))  # axis, size; -1: the rest

Rules = dict[str, tuple[str, ...]]

# Parameters and optimiser state in training. A mesh axis serves an array once, for the leftmost
# name that asks: experts' matrices use `expert` for their experts, all others for their width.
TRAIN_RULES: Rules = {
    "vocab": ("tensor",),
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
}
# While decoding, one token's work must not wait for weights: they are gathered over fsdp once.
DECODE_RULES: Rules = {name: axes for name, axes in TRAIN_RULES.items() if name != "embed"}
# Activations: rows over the batch axes, widths whole.
ACTIVATION_RULES: Rules = {"batch": BATCH_AXES} | DECODE_RULES


def build_mesh(axis_sizes: Iterable[tuple[str, int]], devices: list | None = None) -> Mesh:
    """Mesh over all devices (or `devices`) from (axis, size) pairs; -1: all that are left."""
    given = dict(axis_sizes)
    sizes = dict.fromkeys(AXES, 1) | given
    num_devices = len(devices or jax.devices())
    good = _flag(dict.fromkeys(AXES, 1) | {"fsdp": -1})
    unknown = [axis for axis in given if axis not in AXES]
    if unknown:
        raise ValueError(
            f"config.mesh names the axis {unknown[0]!r}, which does not exist: the axes are "
            f"{AXES}. To divide parameters over all devices, set {good}."
        )
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(
                f"config.mesh gives {axis!r} the size {size}: an axis has at least one device, or "
                f"-1 for all that are left. Set {_flag(sizes | {axis: 1})}."
            )
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(
            f"config.mesh leaves {free[0]!r} and {free[1]!r} at -1: only one axis can take all "
            f"devices that are left. Set {_flag(sizes | {free[1]: 1})}."
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if num_devices % fixed or (not free and fixed != num_devices):
        others = fixed // max(sizes["fsdp"], 1)
        better = sizes | {"fsdp": -1} if num_devices % others == 0 and not free else None
        raise ValueError(
            f"config.mesh={sizes} multiplies to {fixed}{' times the rest' if free else ''}, which "
            f"does not make {num_devices}, the number of devices: every device has one place. Set "
            f"{_flag(better) if better else good}."
        )
    if free:
        sizes[free[0]] = num_devices // fixed
    return jax.make_mesh(
        tuple(sizes[axis] for axis in AXES),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices,
    )


def spec(names: tuple[str | None, ...], mesh: Mesh, rules: Rules) -> PartitionSpec:
    """Logical axis names of an array -> which mesh axes divide each of its dimensions."""
    used: set[str] = set()
    entries: list = []
    for name in names:
        axes = [
            a for a in (rules.get(name, ()) if name else ()) if mesh.shape[a] > 1 and a not in used
        ]
        used.update(axes)
        entries.append(axes[0] if len(axes) == 1 else tuple(axes) or None)
    while entries and entries[-1] is None:  # one spelling per sharding, or jit compiles twice
        entries.pop()
    return PartitionSpec(*entries)


def shardings(axes: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """Tree of logical axis names (`qwen3.param_axes`) -> tree of NamedSharding, for training."""
    rules = TRAIN_RULES if rules is None else rules
    return jax.tree.map(
        lambda names: NamedSharding(mesh, spec(names, mesh, rules)),
        axes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Dimension 0 is rows of the batch."""
    return NamedSharding(mesh, spec(("batch",), mesh, ACTIVATION_RULES))


@dataclass(frozen=True)
class shard_activations:  # noqa: N801 (called as the function it stands for)
    """What `qwen3.Backend(shard=...)` takes: which part of each activation a device of `mesh`
    holds.

    Equal for equal meshes, so that two backends made alike share their compilations.
    """

    mesh: Mesh

    def __call__(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        """Pins an activation to its place."""
        if self.mesh.size == 1:
            return x
        place = spec(names, self.mesh, ACTIVATION_RULES)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, place))

    def per_device(self, function: Callable, in_names: tuple, out_names: tuple) -> Callable:
        """`function` of whole arrays, run by each device on its parts of them."""
        if self.mesh.size == 1:
            return function
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=tuple(spec(names, self.mesh, ACTIVATION_RULES) for names in in_names),
            out_specs=spec(out_names, self.mesh, ACTIVATION_RULES),
            check_vma=False,  # Pallas kernels do not say over which axes their results vary
        )

    def mesh_axes(self, name: str) -> tuple[str, ...]:
        """Mesh axes that divide this axis of an activation: what `function` above reduces over."""
        return tuple(a for a in ACTIVATION_RULES.get(name, ()) if self.mesh.shape[a] > 1)


def platform(mesh: Mesh) -> str:
    """What its devices are: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def num_batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


# --- checks: before the first step, naming the flag ---


def check_rows(num_rows: int, flag: str, mesh: Mesh) -> None:
    """Raises unless `num_rows`, set by --config.`flag`, divides over the batch shards."""
    shards = num_batch_shards(mesh)
    if num_rows < 1 or num_rows % shards:
        below = num_rows - num_rows % shards
        choices = " or ".join(str(n) for n in (below, below + shards) if n > 0)
        sizes = {axis: mesh.shape[axis] for axis in BATCH_AXES}
        raise ValueError(
            f"config.{flag}={num_rows} does not split over the {shards} shards of mesh axes "
            f"{sizes}: each shard must hold the same number of rows. Set "
            f"--config.{flag}={choices}, or change config.mesh."
        )


def check_model(model_config: Any, mesh: Mesh, name: str) -> None:
    """Raises unless the mesh divides the model's heads, experts, widths and vocabulary.

    `model_config` is a `Qwen3Config`; `name` ("student", "teacher") is for the message.
    """
    dims = ["num_heads", "num_kv_heads", "vocab_size", "intermediate_size"]
    if model_config.num_experts:
        dims.append("moe_intermediate_size")
        _check_divides(model_config, name, mesh, "expert", ["num_experts"])
    _check_divides(model_config, name, mesh, "tensor", dims)
    _check_divides(model_config, name, mesh, "fsdp", ["hidden_size"])


def _check_divides(model_config, name: str, mesh: Mesh, axis: str, dims: list[str]) -> None:
    sizes = {dim: getattr(model_config, dim) for dim in dims}
    # The width is divided by fsdp and expert together.
    others = mesh.shape["expert"] if axis == "fsdp" else 1
    parts = mesh.shape[axis] * others
    bad = [f"{dim}={n}" for dim, n in sizes.items() if n % parts]
    if bad:
        common = math.gcd(*sizes.values())
        smaller = range(1, mesh.shape[axis] + 1)
        good = max(
            (n for n in smaller if mesh.shape[axis] % n == common % (n * others) == 0), default=1
        )
        spare = "data" if axis == "fsdp" else "fsdp"
        change = {axis: good, spare: mesh.shape[spare] * (mesh.shape[axis] // good)}
        raise ValueError(
            f"the {name}'s {' and '.join(bad)} cannot be cut into {parts} equal parts, one per "
            f"device along mesh axis {axis!r}{' (times expert)' if others > 1 else ''}. Set "
            f"{_flag(dict(mesh.shape) | change)}."
        )


def check_coverage(shapes: Any, shardings: Any, mesh: Mesh, limit: float = 0.02) -> None:
    """Raises if more than `limit` of the parameters are whole along an axis made to divide them.

    Args:
      shapes, shardings: matching trees of ShapeDtypeStruct (or arrays) and NamedSharding.
    """
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    flat = jax.tree.leaves(shardings)
    total = sum(leaf.size for _, leaf in leaves)
    for axis in ("fsdp", "tensor", "expert"):
        if mesh.shape[axis] == 1:
            continue
        whole = [
            (leaf.size, jax.tree_util.keystr(path))
            for (path, leaf), sharding in zip(leaves, flat, strict=True)
            if axis not in jax.tree.leaves(tuple(sharding.spec))
        ]
        share = sum(size for size, _ in whole) / total
        if share > limit:
            largest = ", ".join(key for _, key in sorted(whole, reverse=True)[:3])
            raise ValueError(
                f"{share:.1%} of the parameters are replicated over mesh axis {axis!r} (size "
                f"{mesh.shape[axis]}), more than the {limit:.0%} allowed: each of its devices "
                f"would hold {largest} whole. Name an axis of these arrays that "
                f"parallel.TRAIN_RULES sends to {axis!r}, or set "
                f"{_flag(dict.fromkeys(AXES, 1) | {'data': -1})}."
            )


def _flag(sizes: dict[str, int]) -> str:
    pairs = ",".join(f"('{axis}',{sizes[axis]})" for axis in AXES)
    return f'--config.mesh="({pairs})"'


# --- host rows <-> global arrays ---


@dataclass(frozen=True)
class HostGroup:
    """Which rows this host is given."""

    index: int  # of this host's group; hosts of one group are given the same rows
    count: int  # groups; a stream of prompts is divided into this many parts
    shards: tuple[int, ...]  # batch shards on this host's devices, ascending
    leaders: tuple[int, ...]  # the lowest process of every group: speaks for its rows


def host_group(mesh: Mesh, process: int | None = None) -> HostGroup:
    """The host group of this process (or of `process`). Raises if hosts share rows only in part."""
    process = jax.process_index() if process is None else process
    owner = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    order = [mesh.axis_names.index(axis) for axis in BATCH_AXES]
    rest = [i for i in range(owner.ndim) if i not in order]
    owner_sr = owner.transpose(order + rest).reshape(num_batch_shards(mesh), -1)
    shards = {p: tuple(np.flatnonzero((owner_sr == p).any(axis=1))) for p in np.unique(owner)}
    distinct = sorted(set(shards.values()))
    sizes = {len(s) for s in distinct}
    if sum(map(len, distinct)) != len(owner_sr) or len(sizes) != 1:
        raise ValueError(
            f"config.mesh={dict(mesh.shape)} gives two hosts rows that they share only in part: "
            f"they must hold the same rows or none in common, and equally many. Make 'tensor' "
            f"divide the devices of one host: "
            f"{_flag(dict.fromkeys(AXES, 1) | {'fsdp': -1})} always works."
        )
    leaders = tuple(min(p for p in shards if shards[p] == s) for s in distinct)
    return HostGroup(
        distinct.index(shards[process]),
        len(distinct),
        tuple(int(s) for s in shards[process]),
        tuple(int(p) for p in leaders),
    )


def to_global(mesh: Mesh, rows: Any) -> Any:
    """Tree of this host's rows [B_host, ...] -> tree of global arrays [B, ...]."""
    mine = host_group(mesh)
    sharding = batch_sharding(mesh)

    def put(x: np.ndarray) -> jax.Array:
        per_shard = len(x) // len(mine.shards)

        def local(index):
            i = mine.shards.index((index[0].start or 0) // per_shard) * per_shard
            return x[i : i + per_shard]

        shape = (per_shard * num_batch_shards(mesh), *x.shape[1:])
        with jax.transfer_guard_host_to_device("allow"):  # this transfer is not a hidden one
            return jax.make_array_from_callback(shape, sharding, local)

    return jax.tree.map(put, rows)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Tree of numpy values, equal on all hosts -> global arrays that every device holds whole."""
    sharding = replicated(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
    )


def to_host(tree: Any) -> Any:
    """Tree of global arrays -> tree of numpy: what this host's devices hold, copies left out.

    The inverse of `to_global` and of `replicate`; waits for the arrays.
    """
    return jax.tree.map(_assemble, tree)


def _assemble(x: jax.Array) -> np.ndarray:
    if x.is_fully_replicated:
        return np.asarray(jax.device_get(x.addressable_data(0)))
    blocks = {tuple(s.start or 0 for s in b.index): b.data for b in x.addressable_shards}
    blocks = jax.device_get(blocks)
    places, sizes = [], []  # per dimension: start in the global array -> start here; size here
    for dim in range(x.ndim):
        extent = {starts[dim]: block.shape[dim] for starts, block in blocks.items()}
        ends = itertools.accumulate((extent[start] for start in sorted(extent)), initial=0)
        places.append(dict(zip(sorted(extent), ends, strict=False)))
        sizes.append(sum(extent.values()))
    out = np.empty(sizes, x.dtype)
    for starts, block in blocks.items():
        here = [place[start] for place, start in zip(places, starts, strict=True)]
        out[tuple(slice(i, i + n) for i, n in zip(here, block.shape, strict=True))] = block
    return out


def allgather(x: np.ndarray) -> np.ndarray:
    """A small value of every process, stacked [processes, ...]. Every process must call it."""
    x = np.ascontiguousarray(x)
    if jax.process_count() == 1:
        return x[None]
    # As bytes: float64 would arrive as float32.
    gathered = multihost_utils.process_allgather(x.reshape(-1).view(np.uint8))
    return np.ascontiguousarray(gathered).view(x.dtype).reshape(-1, *x.shape)


def max_over_hosts(x: float) -> float:
    """The largest of the hosts' values."""
    return float(allgather(np.array(x, np.float64)).max())


def sum_over_host_groups(mesh: Mesh, x: np.ndarray) -> np.ndarray:
    """Sum of a small value over the hosts, those that hold the same rows counted once."""
    return allgather(x)[list(host_group(mesh).leaders)].sum(axis=0)


def gather_rows(mesh: Mesh, rows: np.ndarray) -> np.ndarray:
    """Small rows [B_host, ...] of all host groups, [B, ...] in their order, on every host."""
    return np.concatenate(allgather(rows)[list(host_group(mesh).leaders)])
