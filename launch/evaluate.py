# SPDX-License-Identifier: Apache-2.0
"""Accuracy of any model on any set of benchmarks; every sample is kept, and it can be cut off.

  python -m launch.evaluate --model=embedded:student --num_samples=4
  python -m launch.evaluate --model=runs/quickstart --benchmarks=embedded,embedded_ood
  python -m launch.evaluate --model=Qwen/Qwen3-1.7B --benchmarks=aime25,hmmt_feb25,math500,gpqa \\
      --num_samples=32 --response_len=16384 --prompt_len=2048 --dtype=bfloat16 --mesh=fsdp:-1

--model is a Hugging Face directory or hub id, or the workdir of a run (its newest checkpoint, or
--step). Samples go to OUTPUT/BENCHMARK.jsonl, figures to OUTPUT/results.json; the same command goes
on where it stopped. Benchmarks: opd_jax/problems/benchmarks.py; any of them as NAME=FILE.jsonl.
"""

import json
import sys
from collections.abc import Sequence

from absl import flags

from launch import config_flags, launcher

launcher.define()
MODEL = flags.DEFINE_string("model", None, "directory, hub id or workdir of a run", required=True)
STEP = flags.DEFINE_integer("step", -1, "checkpoint of a workdir; -1 = the newest")
BENCHMARKS = flags.DEFINE_list("benchmarks", ["embedded", "embedded_ood"], "names or JSONL files")
OUTPUT = flags.DEFINE_string("output", "", "directory; default: evaluations/NAME")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "responses per problem", 1)
NUM_PROBLEMS = flags.DEFINE_integer("num_problems", 0, "the first so many of each; 0 = all", 0)
RESPONSE_LEN = flags.DEFINE_integer("response_len", 192, "tokens at most, EOS included", 1)
PROMPT_LEN = flags.DEFINE_integer("prompt_len", 256, "tokens at most, template included", 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "responses in flight, over all hosts", 1)
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 = greedy", 0.0)
TOP_K = flags.DEFINE_integer("top_k", 0, "0 = off", 0)
TOP_P = flags.DEFINE_float("top_p", 1.0, "1 = off", 0.0, 1.0)
MIN_P = flags.DEFINE_float("min_p", 0.0, "0 = off", 0.0, 1.0)
THINKING = flags.DEFINE_bool("thinking", False, "the chat template's thinking mode")
SEED = flags.DEFINE_integer("seed", 42, "of the sampling keys")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of weights and matmuls")
MESH = flags.DEFINE_list("mesh", ["fsdp:-1"], "AXIS:SIZE of data, fsdp, tensor, expert; -1 = rest")


def settings(step: int | None) -> dict:
    """What the samples of an output directory depend on: a second run must agree."""
    flag_values = (RESPONSE_LEN, TEMPERATURE, TOP_K, TOP_P, MIN_P, THINKING, SEED, DTYPE)
    return {"model": MODEL.value, "step": step} | {f.name: f.value for f in flag_values}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"ERROR: {argv[1:]} mean nothing here; flags are written --NAME=VALUE")
    from etils import epath

    default = "evaluations/" + MODEL.value.strip("/").replace("/", "_").replace(":", "_")
    output = epath.Path(OUTPUT.value or default)
    launcher.initialize(str(output))
    try:
        run(output)
    except (ValueError, FileNotFoundError) as error:
        launcher.fail(f"ERROR: {error}")


def run(output) -> dict[str, dict]:
    """Evaluates as the flags say; returns the metrics per benchmark."""
    import jax  # after launcher.initialize

    from opd_jax.problems import benchmarks, verify

    chief = jax.process_index() == 0
    directory, step = find_model(MODEL.value)
    check_settings(output, settings(step), chief)
    problems = dict(benchmarks.load(name, NUM_PROBLEMS.value) for name in BENCHMARKS.value)
    results = {}
    with verify.Verifier(num_workers=2) as verifier:
        evaluator, params = build(verifier, directory, step)
        for name, examples in problems.items():
            samples = sample(evaluator, params, name, examples, output / f"{name}.jsonl", chief)
            results[name] = summarise(samples)
    if chief:
        about = settings(step) | {"results": results}
        (output / "results.json").write_text(json.dumps(about, indent=1) + "\n")
        print(format_table(results))
    return results


def check_settings(output, now: dict, chief: bool) -> None:
    """Refuses to mix samples of different settings in one directory."""
    path = output / "settings.json"
    if path.exists():
        before = json.loads(path.read_text())
        changed = [k for k in now if before.get(k) != now[k]]
        if changed:
            raise ValueError(
                f"{output} holds samples taken with other settings: "
                + ", ".join(f"{k} was {before.get(k)!r}, is {now[k]!r}" for k in changed)
                + ". Set --output to another directory, or delete that one"
            )
    elif chief:
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=1) + "\n")


def build(verifier, directory, step: int | None):
    """(evaluator, parameters) of --model, a directory or a run's checkpoint `step`, on --mesh."""
    import jax.numpy as jnp

    from opd_jax import parallel
    from opd_jax.model import hf, qwen3
    from opd_jax.model.config import check_context
    from opd_jax.problems.tokenizer import load_tokenizer
    from opd_jax.stages import evaluate, rollout

    mesh = parallel.build_mesh([(axis, int(size)) for axis, size in parse_mesh(MESH.value)])
    tokenizer = load_tokenizer(directory)
    config = qwen3.Qwen3Config.from_hf(directory)
    check_context(config, PROMPT_LEN.value, RESPONSE_LEN.value, "model", prefixes=("", ""))
    parallel.check_model(config, mesh, "model")
    shardings = parallel.shardings(qwen3.param_axes(config), mesh)
    if step is None:
        _, params = hf.load(directory, jnp.dtype(DTYPE.value), shardings)
    else:
        params = read_checkpoint(MODEL.value, step, shardings)
    settings = rollout.Settings(
        response_len=RESPONSE_LEN.value,
        num_slots=BATCH_SIZE.value,
        num_candidates=1,
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
        min_p=MIN_P.value,
        first_cache=min(512, PROMPT_LEN.value + RESPONSE_LEN.value),
    )
    backend = qwen3.Backend(
        compute_dtype=jnp.dtype(DTYPE.value),
        unroll=qwen3.choose_unroll(-1, parallel.platform(mesh)),
        shard=parallel.shard_activations(mesh),
    )
    sampler = rollout.build(config, settings, tokenizer.vocabulary, mesh=mesh, backend=backend)
    evaluator = evaluate.build(
        sampler,
        tokenizer,
        verifier,
        prompt_len=PROMPT_LEN.value,
        batch_size=BATCH_SIZE.value,
        thinking=THINKING.value,
    )
    return evaluator, params


def parse_mesh(pairs: Sequence[str]) -> list[tuple[str, str]]:
    out = [tuple(pair.split(":")) for pair in pairs]
    if any(len(pair) != 2 for pair in out):
        raise ValueError(f"--mesh={','.join(pairs)} must be AXIS:SIZE pairs, as --mesh=fsdp:-1")
    return out


def find_model(name: str):
    """(directory of the model, None), or (directory of the student, step) where `name` is a run."""
    from etils import epath

    from opd_jax.model import hf

    stored = epath.Path(name) / "config.json"
    config = json.loads(stored.read_text()) if stored.exists() else {}
    if "student" not in config:
        return hf.resolve(name), None
    steps = _checkpoints(name).steps()  # --step=-1: the newest one there is now
    step = steps[-1] if STEP.value < 0 and steps else STEP.value
    return hf.resolve(config["student"]["path"]), step


def _checkpoints(workdir: str):
    from etils import epath

    from opd_jax.workdir import checkpoint

    return checkpoint.Checkpoints(str(epath.Path(workdir) / "checkpoints"), read_only=True)


def read_checkpoint(workdir: str, step: int, shardings):
    """Parameters of a run after `step` updates, on the mesh."""
    import jax
    import jax.numpy as jnp

    _, params = _checkpoints(workdir).read_params(None if step < 0 else step)
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(DTYPE.value)), params)
    return jax.device_put(params, shardings)


def sample(evaluator, params, name: str, examples, path, chief: bool) -> list[dict]:
    """All samples of a benchmark: those that `path` holds, and the rest, stored as they come."""
    import jax
    import tqdm

    from opd_jax.workdir import records

    wanted = {(e.id, i) for e in examples for i in range(NUM_SAMPLES.value)}
    stored = records.read_jsonl(path) if path.exists() else []
    samples = [s for s in stored if (s["example_id"], s["index"]) in wanted]
    if chief and stored:
        records.write_jsonl(path, stored)  # without a line that was cut off
    done = {(s["example_id"], s["index"]) for s in samples}
    key = jax.random.key(SEED.value)
    calls = evaluator.calls(params, examples, NUM_SAMPLES.value, key, group=name, done=done)
    bar = tqdm.tqdm(total=len(wanted), initial=len(done), desc=name, disable=not chief)
    for fresh in calls:
        samples += fresh
        if chief:
            records.append_jsonl(path, fresh)
        bar.update(len(fresh))
        bar.set_postfix_str(f"accuracy {sum(s['correct'] for s in samples) / len(samples):.1%}")
    bar.close()
    return samples


def summarise(samples: Sequence[dict]) -> dict[str, float]:
    from opd_jax.stages import evaluate

    return {k.removeprefix("eval/"): v for k, v in evaluate.summary(samples).items()}


def format_table(results: dict[str, dict]) -> str:
    """One line per benchmark, aligned; shares in percent."""
    names = list(dict.fromkeys(k for r in results.values() for k in r if k.count("_at_")))
    head = ["benchmark", "problems", "accuracy", "95 % interval", *names, "tokens", "cut", "none"]
    rows = [head]
    for name, r in results.items():
        interval = f"[{100 * r['accuracy_low']:.1f}, {100 * r['accuracy_high']:.1f}]"
        at = [f"{100 * r[k]:.1f}" if k in r else "" for k in names]
        rest = [f"{r['length_mean']:.0f}"]
        rest += [f"{100 * r[k]:.1f}" for k in ("truncation_rate", "no_answer_rate")]
        rows.append(
            [name, str(r["num_problems"]), f"{100 * r['accuracy']:.1f}", interval, *at, *rest]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = (
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(lines) + "\ncut: stopped by --response_len; none: no \\boxed{}. Percent."


if __name__ == "__main__":
    config_flags.run(main)
