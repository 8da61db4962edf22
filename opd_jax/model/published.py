# SPDX-License-Identifier: Apache-2.0
"""The published Qwen3 models, so that plans and checks need no download.

Where a directory is given, its config.json rules.
"""

import dataclasses

from opd_jax.model.config import Qwen3Config


def _dense(hidden, intermediate, layers, heads, tied) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        tie_embeddings=tied,
    )


def _sparse(hidden, intermediate, layers, heads, expert) -> Qwen3Config:
    return dataclasses.replace(
        _dense(hidden, intermediate, layers, heads, tied=False),
        num_kv_heads=4,
        num_experts=128,
        num_experts_per_token=8,
        moe_intermediate_size=expert,
        norm_topk_prob=True,
    )


def _july(config: Qwen3Config, rope_theta: float) -> Qwen3Config:
    """The 2507 variants differ in context length and rotary base only."""
    return dataclasses.replace(config, rope_theta=rope_theta, max_positions=262144)


_4B = _dense(2560, 9728, 36, 32, tied=True)
_30B = _sparse(2048, 6144, 48, 32, expert=768)
_235B = _sparse(4096, 12288, 94, 64, expert=1536)

CONFIGS: dict[str, Qwen3Config] = {
    "Qwen/Qwen3-0.6B": _dense(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-1.7B": _dense(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-4B": _4B,
    "Qwen/Qwen3-8B": _dense(4096, 12288, 36, 32, tied=False),
    "Qwen/Qwen3-14B": _dense(5120, 17408, 40, 40, tied=False),
    "Qwen/Qwen3-32B": _dense(5120, 25600, 64, 64, tied=False),
    "Qwen/Qwen3-30B-A3B": _30B,
    "Qwen/Qwen3-235B-A22B": _235B,
    "Qwen/Qwen3-4B-Instruct-2507": _july(_4B, 5e6),
    "Qwen/Qwen3-4B-Thinking-2507": _july(_4B, 5e6),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _july(_30B, 1e7),
    "Qwen/Qwen3-30B-A3B-Thinking-2507": _july(_30B, 1e7),
    "Qwen/Qwen3-235B-A22B-Instruct-2507": _july(_235B, 5e6),
    "Qwen/Qwen3-235B-A22B-Thinking-2507": _july(_235B, 5e6),
}
