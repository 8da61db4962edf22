# SPDX-License-Identifier: Apache-2.0
"""Inputs of the cases: model shapes from flags, random weights and data, and counted FLOPs."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opd_jax import parallel, structs
from opd_jax.model import qwen3


def model_config(size: dict[str, int], vocab: int) -> qwen3.Qwen3Config:
    """Embeddings tied, as in the small Qwen3 models."""
    return qwen3.Qwen3Config(
        vocab_size=vocab,
        hidden_size=size["hidden"],
        intermediate_size=size["ffn"],
        num_layers=size["layers"],
        num_heads=size["heads"],
        num_kv_heads=size["kv_heads"],
        head_dim=size["head_dim"],
        rope_theta=10_000.0,
        tie_embeddings=True,
    )


def build_mesh(args) -> Mesh:
    """Over the first --devices devices."""
    return parallel.build_mesh((("fsdp", -1),), jax.devices()[: args.devices or None])


def backend(args, mesh: Mesh) -> qwen3.Backend:
    return qwen3.Backend(
        compute_dtype=args.dtype,
        remat=args.remat,
        unroll=qwen3.choose_unroll(args.unroll, parallel.platform(mesh)),
        shard=parallel.shard_activations(mesh),
    )


def random_params(config: qwen3.Qwen3Config, seed: int, dtype) -> dict:
    init = jax.jit(lambda key: qwen3.init_params(config, key, dtype))
    return jax.block_until_ready(init(jax.random.key(seed)))


def random_prompts(rows: int, length: int, vocab: int, seed: int) -> structs.Prompts:
    """Prompts without padding."""
    tokens = np.random.default_rng(seed).integers(0, vocab, (rows, length)).astype(np.int32)
    return structs.Prompts(tokens, np.ones(tokens.shape, bool), np.arange(rows, dtype=np.int32))


def random_rollout(rows: int, prompt_len: int, response_len: int, vocab: int, seed: int, k: int):
    """A random rollout, every response of full length."""
    rng = np.random.default_rng(seed)
    prompts = random_prompts(rows, prompt_len, vocab, seed + 1)
    shape = (rows, response_len)
    logp = np.full(shape, -np.log(vocab), np.float32)
    return structs.Rollout(
        prompt_bp=prompts.tokens_bp,
        prompt_valid_bp=prompts.valid_bp,
        tokens_bt=rng.integers(0, vocab, shape).astype(np.int32),
        valid_bt=np.ones(shape, bool),
        sampler_logp_bt=logp,
        candidates_btk=rng.integers(0, vocab, (*shape, k)).astype(np.int32),
        candidate_logp_btk=np.repeat(logp[..., None], k, axis=2),
        entropy_bt=-logp,
        finished_b=np.zeros(rows, bool),
    )


def random_scores(rollout: structs.Rollout, needs, teacher_width: int, seed: int, dtype):
    """Random scores, of the fields in `needs`."""
    rng = np.random.default_rng(seed)
    shape = rollout.tokens_bt.shape
    values = dict(
        teacher_logp_bt=lambda: rollout.sampler_logp_bt + 0.1,
        teacher_logp_btk=lambda: rollout.candidate_logp_btk + 0.1,
        teacher_hidden_btd=lambda: np.asarray(
            jnp.asarray(rng.normal(size=(*shape, teacher_width)), dtype)
        ),
    )
    return structs.Scores(**{name: values[name]() for name in needs})


# --- FLOPs: matmuls only, 2 per multiply-add, causal attention ---


def trunk_matmul_params(config: qwen3.Qwen3Config) -> int:
    """Parameters that every token is multiplied with: no embeddings, no norms."""
    D, H = config.hidden_size, config.head_dim
    attention = D * H * (2 * config.num_heads + 2 * config.num_kv_heads)
    return config.num_layers * (attention + 3 * D * config.intermediate_size)


def forward_flops(
    config: qwen3.Qwen3Config, rows: int, start: int, length: int, head_positions: int
) -> float:
    """Of positions start .. start + length - 1 of `rows` rows, the head on some of each row's."""
    pairs = sum(range(start + 1, start + length + 1))  # (query, key) of a row and head
    attention = 4 * pairs * config.num_heads * config.head_dim * config.num_layers
    trunk = 2 * trunk_matmul_params(config) * length
    head = 2 * config.hidden_size * config.vocab_size * head_positions
    return float(rows * (trunk + attention + head))


def generate_flops(config: qwen3.Qwen3Config, rows: int, prompt_len: int, new: int) -> float:
    """Prefill with the head on one position, then a step for each further token."""
    prefill = forward_flops(config, rows, 0, prompt_len, 1)
    return prefill + forward_flops(config, rows, prompt_len, new - 1, new - 1)


def decode_bytes(
    config: qwen3.Qwen3Config, rows: int, columns: float, weight, head, cache
) -> float:
    """Read by one decode step: weights once, `columns` filled columns of each row's cache.

    weight, head, cache: bytes of one element.
    """
    entries = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    embedding = config.hidden_size * config.vocab_size
    return (
        trunk_matmul_params(config) * weight + embedding * head + rows * columns * entries * cache
    )
