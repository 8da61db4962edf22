# SPDX-License-Identifier: Apache-2.0
"""Which Hugging Face tensors make up each parameter, and how their axes map.

A checkpoint holds one [out, in] matrix per layer (and expert); we hold one stacked array per kind
of matrix, input first, heads as an axis of their own. Reading maps a slice of ours to slices of
theirs, so that a process touches only the bytes its shards need.
"""

import math
from dataclasses import dataclass

import numpy as np

from opd_jax.model.config import Qwen3Config

Index = tuple[slice, ...]
LM_HEAD = "lm_head.weight"
EMBED = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Leaf:
    """One array of the parameter tree.

    ours[stack index] = theirs.reshape(split).transpose(perm).
    """

    keys: np.ndarray  # names of their tensors, object array of the stacked axes' shape
    groups: tuple[tuple[int, ...], ...]  # their axes, each split into these sizes
    perm: tuple[int, ...]

    @property
    def split(self) -> tuple[int, ...]:
        return tuple(size for group in self.groups for size in group)

    @property
    def hf_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(group) for group in self.groups)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.keys.shape + tuple(self.split[axis] for axis in self.perm)

    def read(self, view, index: Index) -> np.ndarray:
        """The part `index` (without stacked axes) of one unstacked array; `view[slices]` reads."""
        wanted = [slice(None)] * len(self.perm)
        for ours, theirs in enumerate(self.perm):
            wanted[theirs] = index[ours]
        axis, outer, inner, shape = 0, [], [], []
        for group in self.groups:
            # Of a split axis only the first part is read by range; the rest is cut in memory.
            start, stop, _ = wanted[axis].indices(group[0])
            rest = math.prod(group[1:])
            outer.append(slice(start * rest, stop * rest))
            inner += [slice(None), *wanted[axis + 1 : axis + len(group)]]
            shape += [stop - start, *group[1:]]
            axis += len(group)
        return view[tuple(outer)].reshape(shape)[tuple(inner)].transpose(self.perm)

    def to_hf(self, ours: np.ndarray) -> np.ndarray:
        """One unstacked array of ours -> their contiguous matrix."""
        theirs = ours.transpose(np.argsort(self.perm)).reshape(self.hf_shape)
        return np.ascontiguousarray(theirs)


def leaves(config: Qwen3Config) -> dict[tuple[str, ...], Leaf]:
    """Path in the parameter tree -> Leaf, in the order of `jax.tree.leaves`."""
    D, H = config.hidden_size, config.head_dim
    N, G = config.num_heads, config.num_kv_heads
    depth = range(config.num_layers)
    dense = [i for i in depth if not config.sparse_layers[i]]
    sparse = [i for i in depth if config.sparse_layers[i]]

    def layer(ids, name, groups, perm):
        return Leaf(_names([f"model.layers.{i}.{name}.weight" for i in ids]), groups, perm)

    def linear(ids, name, out_size, in_size):
        return layer(ids, name, ((out_size,), (in_size,)), (1, 0))

    found = {
        ("embed",): Leaf(np.array(EMBED, object), ((config.vocab_size,), (D,)), (0, 1)),
        ("final_norm",): Leaf(np.array("model.norm.weight", object), ((D,),), (0,)),
        ("layers", "input_norm"): layer(depth, "input_layernorm", ((D,),), (0,)),
        ("layers", "post_norm"): layer(depth, "post_attention_layernorm", ((D,),), (0,)),
    }
    for name, heads in (("q", N), ("k", G), ("v", G)):
        path = ("layers", "attention", f"{name}_proj")
        found[path] = layer(depth, f"self_attn.{name}_proj", ((heads, H), (D,)), (2, 0, 1))
    found["layers", "attention", "o_proj"] = layer(
        depth, "self_attn.o_proj", ((D,), (N, H)), (1, 2, 0)
    )
    for name in ("q_norm", "k_norm"):
        found["layers", "attention", name] = layer(depth, f"self_attn.{name}", ((H,),), (0,))
    if dense:
        F = config.intermediate_size
        found["layers", "mlp", "gate_proj"] = linear(dense, "mlp.gate_proj", F, D)
        found["layers", "mlp", "up_proj"] = linear(dense, "mlp.up_proj", F, D)
        found["layers", "mlp", "down_proj"] = linear(dense, "mlp.down_proj", D, F)
    if sparse:
        found |= _moe_leaves(config, sparse)
    if not config.tie_embeddings:
        found["head",] = Leaf(np.array(LM_HEAD, object), ((config.vocab_size,), (D,)), (0, 1))
    return dict(sorted(found.items()))


def _moe_leaves(config: Qwen3Config, sparse: list[int]) -> dict[tuple[str, ...], Leaf]:
    D, F, E = config.hidden_size, config.moe_intermediate_size, config.num_experts
    prefix = "model.layers.{}.mlp"

    def experts(name, out_size, in_size):
        names = [
            [f"{prefix.format(i)}.experts.{e}.{name}.weight" for e in range(E)] for i in sparse
        ]
        return Leaf(_names(names), ((out_size,), (in_size,)), (1, 0))

    router = _names([f"{prefix.format(i)}.gate.weight" for i in sparse])
    return {
        ("layers", "moe", "router"): Leaf(router, ((E,), (D,)), (1, 0)),
        ("layers", "moe", "gate_proj"): experts("gate_proj", F, D),
        ("layers", "moe", "up_proj"): experts("up_proj", F, D),
        ("layers", "moe", "down_proj"): experts("down_proj", D, F),
    }


def _names(names: list) -> np.ndarray:
    return np.array(names, object)
