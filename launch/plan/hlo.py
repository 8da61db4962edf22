# SPDX-License-Identifier: Apache-2.0
"""Reads the text of a compiled XLA module: instructions, array types, loop trip counts.

The text is `jax.jit(...).lower(...).compile().as_text()`: the partitioned, optimised and scheduled
program of one device, so every shape is one device's share. `hlo_cost` counts what it costs.
"""

import dataclasses
import functools
import math
import re

BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "bf16": 16, "c64": 64, "c128": 128}
# TPU layouts end in S(n): 0 = HBM, 1 = VMEM, others = scalar and synchronisation memories.
MAIN_MEMORY = 0

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_DEFINITION = re.compile(r"^\s+(ROOT )?%(\S+) = (.*)$", re.DOTALL)
_NAME = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array type."""

    dtype: str
    dims: tuple[int, ...]
    memory_space: int  # MAIN_MEMORY or an on-chip memory

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        bits = BITS.get(self.dtype) or int((re.search(r"\d+", self.dtype) or [0])[0])
        return -(-self.size * bits // 8)

    @property
    def main_bytes(self) -> int:
        """Bytes in main memory (HBM): 0 for an array the compiler keeps on the chip."""
        return self.num_bytes if self.memory_space == MAIN_MEMORY else 0


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction."""

    name: str
    opcode: str
    results: tuple[Array, ...]  # leaves of the result type, left to right
    operands: tuple[str, ...]  # names, in the same computation
    payload: str  # text between the parentheses: a constant's value, a parameter's number
    attributes: str  # text after the parentheses
    is_root: bool

    def attribute(self, pattern: str) -> str:
        """First group of `pattern` in the attributes, "" if it is not there."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""

    @property
    def op_name(self) -> str:
        """Where it comes from in the Python program, e.g. "jit(f)/while/body/dot_general"."""
        return self.attribute(r'op_name="([^"]*)"')

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it runs (loop bodies, branches, fusions), not reducers."""
        names = re.findall(
            r"\b(?:calls|body|true_computation|false_computation)=%([\w.\-]+)", self.attributes
        )
        names += _NAME.findall(self.attribute(r"branch_computations=\{([^}]*)\}"))
        if self.opcode in ("call", "async-start"):
            names += re.findall(r"\bto_apply=%([\w.\-]+)", self.attributes)
        return tuple(dict.fromkeys(names))


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in schedule order."""

    name: str
    ops: dict[str, Op]

    @functools.cached_property
    def root(self) -> Op:
        return next(op for op in self.ops.values() if op.is_root)

    @functools.cached_property
    def parameters(self) -> dict[int, Op]:
        return {int(op.payload): op for op in self.ops.values() if op.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Op, int]]]:
        """name -> [(instruction that reads it, at which operand)]."""
        users: dict[str, list[tuple[Op, int]]] = {name: [] for name in self.ops}
        for op in self.ops.values():
            for position, name in enumerate(op.operands):
                users[name].append((op, position))
        return users


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program of one device."""

    computations: dict[str, Computation]
    entry: Computation
    num_partitions: int

    def arrays(self):
        """Yields every array type that occurs, with the instruction that makes it."""
        for computation in self.computations.values():
            for op in computation.ops.values():
                for array in op.results:
                    yield array, op


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`."""
    computations, entry, ops = {}, None, None
    for line in _logical_lines(text):
        header = _HEADER.match(line)
        if header:
            ops = {}
            computations[header[2]] = Computation(header[2], ops)
            entry = header[2] if header[1] else entry
        elif ops is not None and (definition := _DEFINITION.match(line)):
            op = _parse_op(definition)
            ops[op.name] = op
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of a compiled HLO module")
    partitions = re.search(r"num_partitions=(\d+)", text)
    return Module(computations, computations[entry], int(partitions[1]) if partitions else 1)


def _logical_lines(text: str):
    """Lines; an attribute with line breaks (a kernel's metadata) stays with its instruction."""
    held = ""
    for line in text.splitlines():
        starts = line.startswith(("  %", "  ROOT %", "%", "ENTRY ", "}")) or not held
        if not starts:
            held += line
            continue
        if held:
            yield held
        held = _COMMENT.sub("", line) if line.strip() else ""
    if held:
        yield held


def _parse_op(definition: re.Match) -> Op:
    rest = definition[3]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    results, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    payload = rest[start + 1 : stop]
    opcode = rest[:start]
    operands = () if opcode in ("constant", "parameter") else tuple(_NAME.findall(payload))
    return Op(
        definition[2],
        opcode,
        _arrays(results),
        operands,
        payload,
        rest[stop + 1 :],
        bool(definition[1]),
    )


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]!r}")


@functools.lru_cache(maxsize=65536)
def _arrays(text: str) -> tuple[Array, ...]:
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
        arrays.append(Array(dtype, sizes, int(space[1]) if space else MAIN_MEMORY))
    return tuple(arrays)


# Trip counts. A loop's condition compares a carried counter with a bound; the counter starts at a
# constant in the loop's operand and the body adds a constant to it. Values are ("constant", n),
# ("carry", tuple index) or None.

_PASS = ("copy", "bitcast", "convert", "reshape")


def trip_count(module: Module, parent: Computation, loop: Op) -> int | None:
    """How often a `while` runs; None where the bound is data.

    Exact for counted loops, the upper bound where the condition also has an early exit.
    """
    known = re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations[loop.attribute(r"condition=%([\w.\-]+)")]
    body = module.computations[loop.attribute(r"body=%([\w.\-]+)")]
    counts = []
    for direction, left, right in _comparisons(module, condition, condition.root, None):
        if left and left[0] == "constant":
            direction, left, right = direction.translate(str.maketrans("LG", "GL")), right, left
        if not (left and left[0] == "carry" and right):
            continue
        step = _step(module, body, left[1])
        start, bound = (_initial(module, parent, loop, value) for value in (left, right))
        if step is None or start is None or bound is None:
            continue
        counts.append(_num_trips(direction, start, bound, step))
    counts = [n for n in counts if n is not None]
    return min(counts) if counts else None


def _num_trips(direction: str, start: int, bound: int, step: int) -> int | None:
    distance = (bound - start) * (1 if step > 0 else -1)
    rising = direction in ("LT", "LE", "NE") if step > 0 else direction in ("GT", "GE", "NE")
    if not rising:
        return None
    return max(0, -(-(distance + (direction in ("LE", "GE"))) // abs(step)))


def _value(module, computation: Computation, name: str, inputs: dict | None):
    """What a scalar is. `inputs`: parameter number -> value; None = a loop's carry."""
    op = computation.ops[name]
    if op.opcode == "constant":
        return ("constant", int(op.payload)) if re.fullmatch(r"-?\d+", op.payload) else None
    if op.opcode in _PASS:
        return _value(module, computation, op.operands[0], inputs)
    if op.opcode == "parameter" and inputs is not None:
        return inputs.get(int(op.payload))
    if op.opcode == "get-tuple-element" and inputs is None:
        source = computation.ops[op.operands[0]]
        if source.opcode == "parameter":
            return ("carry", int(op.attribute(r"index=(\d+)")))
    return None


def _fused(module, computation, op, inputs):
    """(computation, inputs) inside a fusion."""
    values = {i: _value(module, computation, name, inputs) for i, name in enumerate(op.operands)}
    return module.computations[op.called[0]], values


def _comparisons(module, computation, op, inputs):
    """Yields (direction, left, right) of each comparison that a further iteration needs."""
    if op.opcode == "and" or op.opcode in _PASS:
        for name in op.operands:
            yield from _comparisons(module, computation, computation.ops[name], inputs)
    elif op.opcode == "fusion":
        inner, values = _fused(module, computation, op, inputs)
        yield from _comparisons(module, inner, inner.root, values)
    elif op.opcode == "compare":
        left, right = (_value(module, computation, name, inputs) for name in op.operands)
        yield op.attribute(r"direction=(\w+)"), left, right


def _step(module, body: Computation, index: int) -> int | None:
    """What the body adds to element `index` of its carry."""
    return _increment(module, body, body.root.operands[index], None, index)


def _increment(module, computation, name, inputs, index) -> int | None:
    op = computation.ops[name]
    if op.opcode in _PASS:
        return _increment(module, computation, op.operands[0], inputs, index)
    if op.opcode == "fusion":
        inner, values = _fused(module, computation, op, inputs)
        return _increment(module, inner, inner.root.name, values, index)
    if op.opcode == "get-tuple-element":
        source = computation.ops[op.operands[0]]
        if source.opcode == "fusion":
            inner, values = _fused(module, computation, source, inputs)
            element = inner.root.operands[int(op.attribute(r"index=(\d+)"))]
            return _increment(module, inner, element, values, index)
    if op.opcode == "add":
        values = [_value(module, computation, operand, inputs) for operand in op.operands]
        constants = [v[1] for v in values if v and v[0] == "constant"]
        return constants[0] if constants and ("carry", index) in values else None
    return None


def _initial(module, parent: Computation, loop: Op, value) -> int | None:
    """A constant, or the constant that a carried element holds when the loop starts."""
    if value[0] == "constant":
        return value[1]
    operand = parent.ops[loop.operands[0]]
    if operand.opcode != "tuple":
        return None
    start = _value(module, parent, operand.operands[value[1]], {})
    return start[1] if start else None
