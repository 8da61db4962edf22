# SPDX-License-Identifier: Apache-2.0
"""Counts what a compiled module costs one device: FLOPs, HBM bytes, collective bytes.

Every loop counts as often as it runs. Why not `compiled.cost_analysis()`: it counts a scanned body
once and knows nothing of Pallas kernels.

FLOPs. A multiply-add is two. Dots and convolutions by their shapes (TPU modules have convolutions
only; positions on padding or dilation holes do not count), Pallas kernels by `kernel_costs`, one
per element of other arithmetic.

HBM bytes, an approximation: each scheduled instruction (a fusion is one) reads its operands and
writes its results once. An operand that is only sliced counts its slice, an update in place counts
the update, and what the compiler keeps in on-chip memory counts nothing. Left out: padding of small
dimensions to tiles, and operands that a matmul reads twice.

Collective bytes: what one device sends over the interconnect in a ring of n devices: (n-1)/n of the
gathered result (all-gather) or of the operand (reduce-scatter, all-to-all), twice that for
all-reduce, the operand for collective-permute.

A conditional costs as much as its most expensive branch.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np

from launch.plan import hlo

ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER = "all-gather", "all-reduce", "reduce-scatter"
COLLECTIVES = (ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, "all-to-all", "collective-permute")
_ELEMENTWISE = frozenset(
    "add subtract multiply divide maximum minimum power remainder exponential log logistic tanh "
    "exponential-minus-one log-plus-one sqrt rsqrt cbrt sine cosine tan erf atan2 negate abs floor "
    "ceil round-nearest-afz round-nearest-even compare select clamp sign".split()
)
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all domain "
    "partition-id replica-id opt-barrier add-dependency async-start async-update async-done".split()
)
# Custom calls that only name memory.
_FREE_TARGETS = (
    "AllocateBuffer",
    "ConcatBitcast",
    "Sharding",
    "SPMD",
    "AssumeGatherIndices",
    "AsyncCollective",
)
_START = "AsyncCollectiveStart"


@dataclasses.dataclass
class Costs:
    """Of one device and one execution."""

    matmul_flops: float = 0.0  # dots and convolutions
    kernel_flops: float = 0.0  # Pallas kernels
    vector_flops: float = 0.0  # the rest
    hbm_bytes: float = 0.0
    # (kind, devices of the first group) -> bytes one device sends
    collectives: dict[tuple[str, tuple[int, ...]], float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )
    dynamic_loops: set[str] = dataclasses.field(
        default_factory=set
    )  # op names; their trip count is data
    unknown_kernels: set[str] = dataclasses.field(default_factory=set)  # FLOPs not counted

    @property
    def flops(self) -> float:
        return self.matmul_flops + self.kernel_flops + self.vector_flops

    @property
    def collective_bytes(self) -> dict[str, float]:
        """kind -> bytes one device sends."""
        totals: dict[str, float] = dict.fromkeys(COLLECTIVES, 0.0)
        for (kind, _), num_bytes in self.collectives.items():
            totals[kind] += num_bytes
        return totals

    def add(self, other: "Costs", times: float = 1.0) -> None:
        for name in ("matmul_flops", "kernel_flops", "vector_flops", "hbm_bytes"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for key, num_bytes in other.collectives.items():
            self.collectives[key] += times * num_bytes
        self.dynamic_loops |= other.dynamic_loops
        self.unknown_kernels |= other.unknown_kernels


def count(module: hlo.Module, dynamic_trips: Callable[[str], float] = lambda op_name: 1.0) -> Costs:
    """Costs of one run of `module`.

    Args:
      module: from `hlo.parse`.
      dynamic_trips: op name of a loop whose trip count depends on data -> the count to assume.
    """
    return _Counter(module, dynamic_trips).computation(module.entry)


class _Counter:
    def __init__(self, module: hlo.Module, dynamic_trips):
        self.module, self.dynamic_trips = module, dynamic_trips
        self._done: dict[str, Costs] = {}
        # Channel of an overlapped collective -> the fused computations that start it. Every fusion
        # that it runs beside repeats the instruction, in the loop of the layers too.
        self._starts: dict[str, set[str]] = collections.defaultdict(set)
        for computation in module.computations.values():
            for op in computation.ops.values():
                if _target(op) == _START:
                    collective = computation.ops[op.operands[0]]
                    self._starts[_channel(collective)].add(computation.name)

    def computation(self, computation: hlo.Computation) -> Costs:
        """Costs of a scheduled computation (entry, loop body, branch)."""
        if computation.name in self._done:
            return self._done[computation.name]
        costs = Costs()
        for op in computation.ops.values():
            costs.add(self._scheduled(computation, op))
        self._done[computation.name] = costs
        return costs

    def _scheduled(self, computation, op: hlo.Op) -> Costs:
        if op.opcode == "while":
            return self._loop(computation, op)
        if op.opcode == "conditional":
            branches = [self.computation(self.module.computations[name]) for name in op.called]
            return max(branches, key=lambda costs: (costs.flops, costs.hbm_bytes))
        costs = Costs()
        if op.opcode in ("call", "async-start"):
            for name in op.called:
                costs.add(self.computation(self.module.computations[name]))
            return costs
        if op.opcode == "custom-call":
            return self._custom_call(computation, op)
        self._arithmetic(costs, computation, op)
        costs.hbm_bytes = self._hbm_bytes(computation, op)
        return costs

    def _loop(self, computation, op) -> Costs:
        costs = Costs()
        trips = hlo.trip_count(self.module, computation, op)
        if trips is None:
            costs.dynamic_loops.add(op.op_name)
            trips = self.dynamic_trips(op.op_name)
        body = self.module.computations[op.attribute(r"body=%([\w.\-]+)")]
        costs.add(self.computation(body), trips)
        return costs

    def _custom_call(self, computation, op) -> Costs:
        target = _target(op)
        operands = [array for name in op.operands for array in computation.ops[name].results]
        if target.startswith(_FREE_TARGETS):
            return Costs()
        costs = Costs(hbm_bytes=sum(a.main_bytes for a in (*operands, *op.results)))
        if target == "tpu_custom_call":
            kernel = kernel_costs(op, operands)
            if kernel is None and not op.name.startswith("ragged-dot-metadata"):  # sums of counts
                costs.unknown_kernels.add(op.name)
            elif kernel is not None:
                costs.kernel_flops, reread = kernel
                costs.hbm_bytes += reread
        return costs

    def _arithmetic(self, costs: Costs, computation, op) -> None:
        """Adds FLOPs and collective bytes of one instruction, and of those fused into it."""
        size = max((array.size for array in op.results), default=0)
        if op.opcode == "fusion":
            inner = self.module.computations[op.called[0]]
            for fused in inner.ops.values():
                self._arithmetic(costs, inner, fused)
            if inner.name.startswith("all-reduce-scatter"):
                _as_reduce_scatter(costs)
            if "ITERATION_SKIPPER_MODE_GROUP_STARTS" in op.attributes:
                # A ragged dot's weight gradient [groups, ...]: the emitter skips the rows of other
                # groups, which the convolution's shapes cannot show.
                costs.matmul_flops /= op.results[0].dims[0]
        elif op.opcode in ("dot", "convolution"):
            flops = dot_flops if op.opcode == "dot" else convolution_flops
            costs.matmul_flops += flops(op, *(computation.ops[n].results[0] for n in op.operands))
        elif op.opcode in _ELEMENTWISE:
            costs.vector_flops += size
        elif op.opcode in ("reduce", "reduce-window", "scatter"):
            costs.vector_flops += max(
                (a.size for n in op.operands for a in computation.ops[n].results), default=0
            )
        elif (kind := op.opcode.removesuffix("-start")) in COLLECTIVES:
            self._collective(costs, computation, op, kind)

    def _collective(self, costs, computation, op, kind) -> None:
        if self._is_repeated(computation, op):
            return
        operand = sum(a.num_bytes for n in op.operands for a in computation.ops[n].results)
        group = device_group(op, self.module.num_partitions)
        n = len(group)
        sent = {ALL_GATHER: operand * (n - 1), ALL_REDUCE: 2 * operand * (n - 1) / n}
        if kind == "collective-permute":
            sent[kind] = operand
        costs.collectives[kind, group] += sent.get(kind, operand * (n - 1) / n)

    def _is_repeated(self, computation, op: hlo.Op) -> bool:
        """True = a part of an overlapped collective that is not its start, where it is counted."""
        if _target(op).startswith("AsyncCollective"):
            return True
        starts = self._starts.get(_channel(op)) if op.opcode in COLLECTIVES else None
        return bool(starts) and computation.name not in starts

    def _hbm_bytes(self, computation, op: hlo.Op) -> float:
        if op.opcode in _FREE or op.opcode.endswith("-done"):
            return 0
        if op.opcode in ("copy-start", "slice-start"):
            source, target = (
                computation.ops[op.operands[0]].results[0],
                op.results[1 - (op.opcode[0] == "c")],
            )
            return target.num_bytes * ((source.memory_space == 0) + (target.memory_space == 0))
        if op.opcode != "fusion":
            return sum(self._read(computation, n, op, i) for i, n in enumerate(op.operands)) + sum(
                _written(computation, op, array) for array in op.results
            )
        inner = self.module.computations[op.called[0]]
        read = sum(
            min(array.main_bytes, self._parameter_read(inner, position))
            for position, name in enumerate(op.operands)
            if (array := computation.ops[name].results[0]).memory_space == 0
        )
        roots, results = [inner.root], op.results
        if inner.root.opcode == "tuple":
            roots = [inner.ops[name] for name in inner.root.operands]
        elif _target(inner.root) == _START:  # its results: the operand, what it becomes, signals
            roots, results = [inner.ops[inner.root.operands[0]]], op.results[1:2]
        return read + sum(
            min(array.num_bytes, _written(inner, origin, root.results[0]))
            for root, array in zip(roots, results, strict=False)
            if array.memory_space == 0
            and not self._is_repeated(inner, origin := _origin(inner, root))
        )

    def _parameter_read(self, fused: hlo.Computation, position: int) -> float:
        """Bytes of a fusion's operand that the fusion reads."""
        return self._reads(fused, fused.parameters[position])

    def _reads(self, fused, value: hlo.Op) -> float:
        total = 0.0
        for user, position in fused.users[value.name]:
            if user.opcode in ("bitcast", "get-tuple-element") or self._is_view(user, position):
                total += self._reads(fused, user)
            elif user.opcode == "fusion":
                total += self._parameter_read(self.module.computations[user.called[0]], position)
            else:
                total += self._read(fused, value.name, user, position, fused_in=True)
        return total

    def _is_view(self, op: hlo.Op, position: int) -> bool:
        """True = a fusion, inside another, whose result is that operand in another shape or tiling.

        What reads the result then reads the operand.
        """
        if op.opcode != "fusion":
            return False
        inner = self.module.computations[op.called[0]]
        inside = {x.opcode for x in inner.ops.values()}
        aliased = op.attribute(r"output_to_operand_aliasing=\{\{\}: \((\d+), ")
        return inside <= {"parameter", "bitcast"} or (
            aliased == str(position) and inside <= {"parameter", "copy", "bitcast"}
        )

    def _read(self, computation, name: str, user: hlo.Op, position: int, fused_in=False) -> float:
        """Bytes that `user` reads of its operand."""
        array = computation.ops[name].results[0] if computation.ops[name].results else None
        if array is None or (array.memory_space != 0 and not fused_in):
            return 0
        if self._is_repeated(computation, user):
            return 0
        if position == 0 and user.opcode in ("dynamic-slice", "slice", "gather"):
            return user.results[0].num_bytes
        if user.opcode == "tuple" or (
            position == 0 and user.opcode in ("dynamic-update-slice", "scatter")
        ):
            return 0  # passed through, or updated in place
        return sum(a.num_bytes for a in computation.ops[name].results)


def _target(op: hlo.Op) -> str:
    """What a custom call calls; "" for other instructions."""
    return op.attribute(r'custom_call_target="([^"]*)"') if op.opcode == "custom-call" else ""


def _channel(op: hlo.Op) -> str:
    return op.attribute(r"channel_id=(\d+)")


def _written(computation, op: hlo.Op, array: hlo.Array) -> float:
    """Bytes that `op` writes for its result `array`; an update in place writes the update."""
    if op.opcode == "parameter":
        return 0  # a fusion passes it through
    update = {"dynamic-update-slice": 1, "scatter": 2}.get(op.opcode)
    if update is not None:
        return computation.ops[op.operands[update]].results[0].num_bytes
    return array.main_bytes if array.memory_space == 0 else 0


def _origin(computation, op: hlo.Op) -> hlo.Op:
    while op.opcode == "bitcast":
        op = computation.ops[op.operands[0]]
    return op


def _as_reduce_scatter(costs: Costs) -> None:
    """TPU modules write a reduce-scatter as a fusion of an all-reduce and a slice of its result."""
    for kind, group in list(costs.collectives):
        if kind == ALL_REDUCE:
            costs.collectives[REDUCE_SCATTER, group] += costs.collectives.pop((kind, group)) / 2


def dot_flops(op: hlo.Op, left: hlo.Array, right: hlo.Array) -> float:
    """2 x (elements of the result) x (contracted size)."""
    dims = op.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
    return 2.0 * op.results[0].size * math.prod(left.dims[int(d)] for d in dims.split(",") if d)


def convolution_flops(op: hlo.Op, left: hlo.Array, right: hlo.Array) -> float:
    """2 x batch x output features x input features of a group x kernel positions that meet data."""
    lhs, rhs, out = re.split(
        r"[_>-]+", op.attribute(r"dim_labels=(\S+?)[,\s]?(?:\s|$)").rstrip(",")
    )
    out_dims = dict(zip(out, op.results[0].dims, strict=True))
    left_dims = dict(zip(lhs, left.dims, strict=True))
    right_dims = dict(zip(rhs, right.dims, strict=True))
    batch_groups = int(op.attribute(r"batch_group_count=(\d+)") or 1)
    total = 2.0 * out_dims["b"] * out_dims["f"] * right_dims["i"] / batch_groups
    window = _window(op)
    for i, label in enumerate(sorted(label for label in out if label.isdigit())):
        total *= _valid_positions(left_dims[label], out_dims[label], right_dims[label], window, i)
    return total


def _window(op: hlo.Op) -> dict[str, list[str]]:
    text = op.attribute(r"window=\{([^}]*)\}")
    return {key: value.split("x") for key, value in re.findall(r"(\w+)=(\S+)", text)}


def _valid_positions(left: int, out: int, kernel: int, window, i: int) -> int:
    """Pairs (output position, kernel position) that read data, not padding or a dilation hole."""

    def number(key, default):
        return int(window[key][i]) if key in window else default

    stride, hole, spread = number("stride", 1), number("lhs_dilate", 1), number("rhs_dilate", 1)
    low = int(window["pad"][i].split("_")[0]) if "pad" in window else 0
    at = np.arange(out)[:, None] * stride - low + np.arange(kernel)[None, :] * spread
    return int(np.sum((at >= 0) & (at <= (left - 1) * hole) & (at % hole == 0)))


def kernel_costs(op: hlo.Op, operands: list[hlo.Array]) -> tuple[float, float] | None:
    """(FLOPs, HBM bytes beyond one pass over operands and results) of a Pallas kernel.

    None = its author gave no estimate and this module has no rule for it.
    """
    estimate = re.search(r'"cost_estimate":\{"flops":"(\d+)"', op.attributes)
    if "splash" in op.name or "splash" in op.op_name:
        return splash_costs(op, operands)
    return (float(estimate[1]), 0.0) if estimate else None


def splash_costs(op: hlo.Op, operands: list[hlo.Array]) -> tuple[float, float]:
    """Causal splash attention by its shapes.

    Matmuls of L x L x H per head: 2 forward (scores, values); backward 5 in one fused kernel, or
    3 (dq) + 4 (dk, dv) in two. Only blocks that touch the lower triangle are computed, each of them
    whole. The side that the grid's inner loop walks over is read again for each outer block.
    """
    queries, keys, *_ = (a for a in operands if a.dtype in ("bf16", "f32", "f16"))
    length, head_dim = queries.dims[-2:]
    heads = math.prod(queries.dims[:-2])
    backward = "_dq" in op.name or "_dkv" in op.name
    suffix = "_dq" if "_dq" in op.name else "_dkv" if backward else ""
    block_q, block_kv = (
        _block(op, f"block_{side}{suffix}", n) for side, n in (("q", length), ("kv", keys.dims[-2]))
    )
    fused = any(len(a.dims) > len(queries.dims) for a in op.results)  # partial dq per block of keys
    matmuls = {"": 2, "_dq": 3, "_dkv": 5 if fused else 4}[suffix]
    live = sum(
        min(-(-(i + 1) * block_q // block_kv), -(-keys.dims[-2] // block_kv))
        for i in range(-(-length // block_q))
    )
    flops = 2.0 * matmuls * heads * head_dim * live * block_q * block_kv
    element = queries.num_bytes // queries.size
    outer, inner = (keys.dims[-2], block_q) if suffix == "_dkv" else (length, block_kv)
    walked = (
        2 * live * inner * head_dim * element * heads
    )  # keys and values, or queries and output gradients
    return flops, max(0.0, walked - 2 * outer * head_dim * element * heads)


def _block(op: hlo.Op, key: str, default: int) -> int:
    found = re.search(rf'\\?"{key}\\?": (\d+)', op.attributes)
    return int(found[1]) if found else default


def device_group(op: hlo.Op, num_partitions: int) -> tuple[int, ...]:
    """Devices of the first group of a collective, as positions in the mesh."""
    pairs = op.attribute(r"source_target_pairs=\{(\{\d+,\d+\})")
    if pairs:
        return tuple(int(n) for n in re.findall(r"\d+", pairs))
    text = op.attribute(r"replica_groups=(.*?)(?:, (?!device_ids)\w+=|$)")
    if not text or text == "{}":
        return tuple(range(num_partitions))
    if text.startswith("{{"):
        return tuple(int(n) for n in text[2 : text.index("}")].split(",") if n)
    if text.startswith("mesh"):
        return _mesh_group(text)
    found = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        raise ValueError(f"the device groups of a collective are not read: {text}")
    shape, dims, order = found.groups()
    return tuple(_iota(dims, order).reshape(_ints(shape))[0].tolist())


def _mesh_group(text: str) -> tuple[int, ...]:
    """replica_groups=mesh['a'=4,'b'=2] {'a'}: the devices along the named axes.

    A mesh in another order says which device stands where: device_ids=([2,4]T(1,0)), or a list.
    """
    axes = re.findall(r"'(\w+)'=(\d+)", text)
    named = re.findall(r"'(\w+)'(?!=)(?::\((\d+)\)(\d+))?", text[text.index("]") + 1 :])
    sizes = [int(n) for _, n in axes]
    grid = np.arange(math.prod(sizes))
    order = re.search(r"device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\)", text)
    if order:
        grid = _iota(order[1], order[2]) if order[1] else np.array(_ints(order[3]))
    elif "device_ids" in text:
        raise ValueError(f"the device order of a collective's mesh is not read: {text}")
    grid = grid.reshape(sizes)
    index: list[int | slice] = [0] * len(axes)
    for name, before, size in named:
        axis = [axis for axis, _ in axes].index(name)
        total = int(axes[axis][1])
        inner = total // (int(before) * int(size)) if size else 1
        index[axis] = slice(0, inner * int(size), inner) if size else slice(None)
    return tuple(grid[tuple(index)].reshape(-1).tolist())


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(dims: str, order: str | None) -> np.ndarray:
    grid = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return grid.transpose(_ints(order)) if order else grid
