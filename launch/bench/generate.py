# SPDX-License-Identifier: Apache-2.0
"""Cases decode (one token step) and sampler (slots under heavy-tailed lengths)."""

import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.bench import measure, sizes
from launch.bench.measure import Report
from opd_jax import parallel
from opd_jax.stages import decode, rollout, sampling
from opd_jax.structs import Vocabulary


def decode_case(args) -> Report:
    """Seconds per token step of a full batch, with the head in each of --head_dtypes."""
    config = sizes.model_config(args.student, args.vocab)
    params = sizes.random_params(config, args.seed, args.dtype)
    columns = args.prompt_len + args.new_tokens / 2  # filled, on average over the steps
    flops = sizes.generate_flops(config, args.batch, args.prompt_len, args.new_tokens)
    flops /= args.new_tokens
    steps = [_DecodeSteps(args, config, params, dtype) for dtype in args.head_dtypes]
    matmul, read, *taken = measure.interleaved(
        measure.matmul_rate(), measure.read_rate(), *steps, warmup=args.warmup, repeats=args.repeats
    )
    floors = [flops / rate for rate in matmul]
    matmul, read = statistics.median(matmul), statistics.median(read)
    rows = []
    for head_dtype, step, each in zip(args.head_dtypes, steps, taken, strict=True):
        weight, head = jnp.dtype(args.dtype).itemsize, jnp.dtype(head_dtype).itemsize
        num_bytes = sizes.decode_bytes(config, args.batch, columns, weight, head, weight)
        seconds = statistics.median(each)
        rows.append(
            dict(
                head=jnp.dtype(head_dtype).name,
                step_ms=1e3 * seconds,
                tokens_per_second=args.batch / seconds,
                floor_ms=1e3 * statistics.median(floors),
                ratio_to_floor=measure.ratio(each, floors),
                memory_floor_ms=1e3 * num_bytes / read,
                logp_gap=_gap(steps[0].first, step.first),
                **measure.utilisation(flops, num_bytes, seconds),
            )
        )
    parts = _parts(args, steps[0])
    result = dict(
        case="decode",
        seconds=rows[0]["step_ms"] / 1e3,
        floor_seconds=rows[0]["floor_ms"] / 1e3,
        ratio_to_floor=rows[0]["ratio_to_floor"],
        matmul_gflops=matmul / 1e9,
        read_gb_per_second=read / 1e9,
        rows=rows,
        parts_ms=parts,
    )
    notes = [
        f"floor: {flops / 1e9:.2f} GFLOP a step at the {matmul / 1e9:.1f} GFLOP/s of a square "
        f"float32 product; memory floor: the weights read once at {read / 1e9:.1f} GB/s",
        "logp_gap: largest difference of a token's log-probability to the first row's, same tokens",
        "alone: " + ", ".join(f"{k} {v:.2f} ms" for k, v in parts.items()),
    ]
    return Report(result, rows, notes)


def build_sampler(args, config, head_dtype, **changes) -> rollout.Sampler:
    """A sampler without EOS, so that every row runs to its limit; `changes` are settings."""
    mesh = sizes.build_mesh(args)
    settings = dict(response_len=args.new_tokens, decode_chunk=args.new_tokens)
    settings |= dict(head_dtype=jnp.dtype(head_dtype).name)
    vocabulary = Vocabulary(config.vocab_size, eos_ids=(), pad_id=0)
    backend = sizes.backend(args, mesh)
    settings = rollout.Settings(**settings | changes)
    return rollout.build(config, settings, vocabulary, mesh=mesh, backend=backend)


class _DecodeSteps:
    """A measurement: seconds of a token step, from decoding a full batch afresh.

    `first`: what the first call drew.
    """

    def __init__(self, args, config, params, head_dtype):
        self.args = args
        self.spec = build_sampler(args, config, head_dtype).spec
        self.weights = jax.block_until_ready(decode.prepare(self.spec, params))
        prompts = sizes.random_prompts(args.batch, args.prompt_len, args.vocab, args.seed)
        length = np.full(args.batch, args.prompt_len, np.int32)
        limit = np.full(args.batch, args.new_tokens, np.int32)
        self.rows = decode.Arrivals(prompts.tokens_bp, length, prompts.row_b, limit)
        self.source = np.arange(args.batch, dtype=np.int32)  # prompt i goes to slot i
        self.key = jax.random.key_data(jax.random.key(args.seed))
        self.first: Any = None

    def __call__(self) -> float:
        args, spec, weights = self.args, self.spec, self.weights
        slots = decode.init(spec, args.batch, args.prompt_len + args.new_tokens)
        rows = jax.tree.map(jnp.asarray, self.rows)
        slots = decode.insert(spec, weights, slots, self.key, rows, jnp.asarray(self.source))
        jax.block_until_ready(slots)
        clock = measure.Clock()
        out = decode.decode(spec, weights, slots, jnp.int32(args.batch + 1))
        jax.block_until_ready(out)
        seconds = clock.seconds() / args.new_tokens
        self.first = self.first or parallel.to_host(out[1])
        return seconds


def _gap(a: decode.Drawn, b: decode.Drawn) -> float:
    """Largest difference of log-probabilities while both rows drew the same tokens."""
    same = np.cumprod(a.token_sj == b.token_sj, axis=1).astype(bool)
    return float(np.abs(np.where(same, a.logp_sj - b.logp_sj, 0.0)).max())


def _parts(args, step) -> dict[str, float]:
    """Milliseconds of a step's parts, each compiled alone, and of JAX's own draw and top-k."""
    B, V = args.batch, args.vocab
    head = step.weights.head
    hidden = jnp.ones((B, step.spec.config.hidden_size), args.dtype)
    logits = jax.random.normal(jax.random.key(0), (B, V))
    bits = jax.random.bits(jax.random.key(1), (B, 2), jnp.uint32)
    functions = {
        "head": (functools.partial(decode.logits, step.spec), head, hidden),
        "sampling (draw, top-4, entropy)": (
            lambda x, b: sampling.sample(x, b, sampling.Knobs(), num_candidates=4),
            logits,
            bits,
        ),
        "jax.random.categorical": (jax.random.categorical, jax.random.key(2), logits),
        "jax.lax.top_k": (lambda x: jax.lax.top_k(x, 4), logits),
    }
    calls = [measure.seconds_of(jax.jit(f), *x) for f, *x in functions.values()]
    taken = measure.interleaved(*calls, warmup=1, repeats=args.repeats)
    return {
        name: 1e3 * statistics.median(seconds)
        for name, seconds in zip(functions, taken, strict=True)
    }


def sampler_case(args) -> Report:
    """Prompts through few slots, lengths lognormal with the longest 8 x the median."""
    config = sizes.model_config(args.student, args.vocab)
    params = sizes.random_params(config, args.seed, args.dtype)
    longest = args.new_tokens
    rng = np.random.default_rng(args.seed)
    limit = rng.lognormal(np.log(longest / 8), 0.9, args.rows)
    limit = np.clip(limit, 1, longest).astype(np.int32)
    limit[args.rows // 2] = longest
    prompts = sizes.random_prompts(args.rows, args.prompt_len, args.vocab, args.seed)
    sampler = build_sampler(
        args, config, args.dtype, num_slots=args.batch, decode_chunk=args.decode_chunk
    )
    key = jax.random.key(args.seed)
    runs = []

    def run():
        runs.append(sampler.run(params, prompts, key, limit_b=limit))
        return runs[-1][0].tokens_bt

    (taken,) = measure.interleaved(
        measure.seconds_of(run), warmup=args.warmup, repeats=args.repeats
    )
    seconds = statistics.median(taken)
    stats, tokens = runs[-1][1], int(limit.sum())
    batches = (
        np.sort(limit.reshape(-1, args.batch), axis=1) if args.rows % args.batch == 0 else None
    )
    row = dict(
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        occupancy=stats.busy_steps / stats.slot_steps,
        decode_steps=stats.num_steps,
        refills=stats.num_refills,
        whole_batch_steps=None if batches is None else int(batches[:, -1].sum()),
    )
    notes = [
        f"{args.rows} rows through {args.batch} slots, lengths {int(np.median(limit))} (median) to "
        f"{longest}; whole_batch_steps: what batches of {args.batch} that wait for their longest "
        "row would take"
    ]
    return Report(dict(case="sampler", **row), [row], notes)
