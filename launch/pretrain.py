# SPDX-License-Identifier: Apache-2.0
"""Makes the embedded pair: `python -m launch.pretrain --config=configs/tiny.py:teacher --out=DIR`.

Plain supervised training from random weights on solutions of the embedded task, all six families:
cross-entropy on the solution's tokens and the <|im_end|> after it, Muon on the matrices of the
layers and Adam on the rest. `slip` and `rough` of the config say whether these are reference
solutions (opd_jax.problems.task.Style). Writes a Hugging Face directory (tokenizer included) and
prints the accuracy per family on held-out problems, sampled at temperature 1.

Left out: checkpoints during training. An interrupted run starts again; it takes minutes.
"""

import functools
import itertools
import json
import tempfile
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from launch import config_flags
from opd_jax import parallel
from opd_jax.model import hf, qwen3
from opd_jax.problems import task, tiny_tokenizer, verify
from opd_jax.problems.tokenizer import Tokenizer, load_tokenizer
from opd_jax.stages import evaluate, rollout

CONFIG = config_flags.define()
OUT = flags.DEFINE_string("out", None, "directory to write the model to", required=True)

EVAL_BATCH = 128  # responses sampled at once
PROMPT_LEN, RESPONSE_LEN = 96, 160  # tokens; every prompt and reference solution fits


def encode(tokenizer: Tokenizer, example: task.Example) -> tuple[list[int], list[int]]:
    """(prompt ids, solution ids with the end of the turn) of one problem."""
    end = tokenizer.hf.eos_token_id
    return tokenizer.encode_prompt(example.prompt), [*tokenizer.encode(example.solution), end]


def packed_batches(tokenizer, config) -> Iterator[dict[str, np.ndarray]]:
    """Batches of `batch_rows` x `row_tokens`, several problems to a row, every problem new.

    Keys: tokens, positions, segments (0 = padding): int32[M, L]; learn: bool[M, L], True = the
    token AFTER this one belongs to a solution.
    """
    M, L = config.batch_rows, config.row_tokens
    families, style = tuple(task.FAMILIES), task.Style(config.slip, config.rough)
    problems = (
        encode(tokenizer, task.make(families[i % len(families)], "train", config.seed, i, style))
        for i in itertools.count()
    )
    waiting = next(problems)
    while True:
        batch = {k: np.zeros((M, L), np.int32) for k in ("tokens", "positions", "segments")}
        batch["learn"] = np.zeros((M, L), bool)
        used, count = np.zeros(M, int), np.zeros(M, int)
        while (used + len(waiting[0]) + len(waiting[1]) <= L).any():
            prompt, solution = waiting
            size = len(prompt) + len(solution)
            row = int(np.argmax(used + size <= L))
            span = slice(used[row], used[row] + size)
            count[row] += 1
            batch["tokens"][row, span] = prompt + solution
            batch["positions"][row, span] = np.arange(size)
            batch["segments"][row, span] = count[row]
            batch["learn"][row, used[row] + len(prompt) - 1 : used[row] + size - 1] = True
            used[row] += size
            waiting = next(problems)
        yield batch


def optimizer(config) -> optax.GradientTransformation:
    """Muon on the layers' matrices (heads flattened), Adam on embeddings and norms."""

    def schedule(peak):
        decay = int(config.num_steps * config.decay_share)
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, config.warmup_steps),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, 0.0, decay),
            ],
            [config.warmup_steps, config.num_steps - decay],
        )

    def dims(params):
        spec = optax.contrib.MuonDimensionNumbers
        to_heads, from_heads, plain = spec((1,), (2, 3)), spec((1, 2), (3,)), spec((1,), (2,))
        names = dict(q_proj=to_heads, k_proj=to_heads, v_proj=to_heads, o_proj=from_heads)
        names |= dict(gate_proj=plain, up_proj=plain, down_proj=plain)
        return jax.tree_util.tree_map_with_path(lambda path, _: names.get(path[-1].key), params)

    return optax.contrib.muon(
        schedule(config.muon_lr),
        adam_learning_rate=schedule(config.adam_lr),
        muon_weight_dimension_numbers=dims,
        adam_b2=0.98,
        consistent_rms=None,
    )


def loss_fn(model: qwen3.Qwen3Config, params, batch) -> tuple[jax.Array, jax.Array]:
    """(mean cross-entropy in nats, share of tokens whose likeliest prediction is right)."""
    hidden = qwen3.trunk(model, params, batch["tokens"], batch["positions"], batch["segments"])
    logits = jnp.einsum("mld,vd->mlv", hidden, qwen3.head_vd(model, params))
    target = jnp.roll(batch["tokens"], -1, axis=1)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    learn, count = batch["learn"], batch["learn"].sum()
    right = jnp.where(learn, logits.argmax(-1) == target, False).sum() / count
    return jnp.where(learn, loss, 0.0).sum() / count, right


def accuracy(model, params, tokenizer, num_per_family: int, seed: int) -> dict[str, float]:
    """Accuracy per family on held-out problems, sampled at temperature 1 as a run samples."""
    families = tuple(task.FAMILIES)
    examples = task.make_many(families, "heldout", seed, num_per_family * len(families))
    sampler = rollout.build(
        model,
        rollout.Settings(response_len=RESPONSE_LEN),
        tokenizer.vocabulary,
        mesh=parallel.build_mesh({"data": 1}.items(), jax.devices()[:1]),
    )
    with verify.Verifier() as verifier:
        evaluator = evaluate.build(
            sampler, tokenizer, verifier, prompt_len=PROMPT_LEN, batch_size=EVAL_BATCH
        )
        row, _ = evaluator(params, examples, 1, jax.random.key(seed))
    return {family: row[f"eval/{family}/accuracy"] for family in families}


def summary(by_family: dict[str, float]) -> dict[str, float]:
    """The families, and their mean over the in-domain ones."""
    return {"in_domain": float(np.mean([by_family[f] for f in task.IN_DOMAIN])), **by_family}


def main(_):
    with tempfile.TemporaryDirectory() as directory:
        tiny_tokenizer.save(directory)
        train(CONFIG.value, load_tokenizer(directory), directory)


def train(config, tokenizer: Tokenizer, tokenizer_dir: str) -> None:
    """Trains, saves and evaluates one model."""
    vocab_size = tokenizer.vocab_size
    model = qwen3.Qwen3Config(
        vocab_size=vocab_size, tie_embeddings=True, max_positions=1024, **config.model
    )
    params = qwen3.init_params(model, jax.random.key(config.seed))
    print(f"{qwen3.num_params(model):,} parameters, vocabulary {vocab_size}", flush=True)
    tx = optimizer(config)
    opt_state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step_fn(params, opt_state, batch):
        grad_fn = jax.value_and_grad(functools.partial(loss_fn, model), has_aux=True)
        (loss, right), grads = grad_fn(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, right

    began = time.time()
    for step, batch in enumerate(packed_batches(tokenizer, config), 1):
        params, opt_state, loss, right = step_fn(params, opt_state, batch)
        if step % config.log_every_steps == 0:
            minutes = (time.time() - began) / 60
            print(f"step {step} loss {loss:.4f} right {right:.4f} {minutes:.1f} min", flush=True)
        if step % config.eval_every_steps == 0 and step < config.num_steps:
            by_family = accuracy(model, params, tokenizer, max(1, config.num_eval // 6), 1)
            print(f"step {step} accuracy {json.dumps(summary(by_family))}", flush=True)
        if step == config.num_steps:
            break
    hf.save(model, params, OUT.value, source=tokenizer_dir)
    by_family = accuracy(model, params, tokenizer, config.num_eval, 0)
    print(f"final accuracy {json.dumps(summary(by_family))}", flush=True)


if __name__ == "__main__":
    config_flags.run(main)
