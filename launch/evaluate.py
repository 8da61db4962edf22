# SPDX-License-Identifier: Apache-2.0
"""Accuracy of any model on any set of benchmarks; every sample is kept, and it can be cut off.

  python -m launch.evaluate --model=embedded:student --num_samples=4
  python -m launch.evaluate --model=runs/quickstart --benchmarks=embedded,embedded_ood
  python -m launch.evaluate --model=Qwen/Qwen3-1.7B --benchmarks=aime25,hmmt_feb25,math500,gpqa \\
      --num_samples=32 --response_len=16384 --prompt_len=2048 --dtype=bfloat16 --mesh=fsdp:-1

--model is a Hugging Face directory or hub id, or the workdir of a run (its newest checkpoint, or
--step). Samples go to OUTPUT/BENCHMARK.jsonl, figures to OUTPUT/results.json; the same command goes
on where it stopped. Samples belong to the content of weights, tokenizer, template and problems:
where a file was replaced under its old name they are refused, unless --overwrite deletes them.
SIGTERM or Ctrl-C: status 75, with the samples so far; the same command goes on.
Benchmarks: opd_jax/problems/benchmarks.py; any of them as NAME=FILE.jsonl.
"""

import collections
import json
import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence

from absl import flags

from launch import config_flags, launcher


def define_flags() -> None:
    launcher.define()
    flags.DEFINE_string("model", None, "directory, hub id or workdir of a run", required=True)
    flags.DEFINE_integer("step", -1, "checkpoint of a workdir; -1 = the newest")
    flags.DEFINE_list("benchmarks", ["embedded", "embedded_ood"], "names or JSONL files")
    flags.DEFINE_string("output", "", "directory; default: evaluations/NAME")
    flags.DEFINE_bool("overwrite", False, "delete samples of other settings or content")
    flags.DEFINE_integer("num_samples", 1, "responses per problem", 1)
    flags.DEFINE_integer("num_problems", 0, "the first so many of each; 0 = all", 0)
    flags.DEFINE_integer("response_len", 192, "tokens at most, EOS included", 1)
    flags.DEFINE_integer("prompt_len", 256, "tokens at most, template included", 1)
    flags.DEFINE_integer("batch_size", 64, "responses in flight, over all hosts", 1)
    flags.DEFINE_float("temperature", 1.0, "0 = greedy", 0.0)
    flags.DEFINE_integer("top_k", 0, "0 = off", 0)
    flags.DEFINE_float("top_p", 1.0, "1 = off", 0.0, 1.0)
    flags.DEFINE_float("min_p", 0.0, "0 = off", 0.0, 1.0)
    flags.DEFINE_bool("thinking", False, "the chat template's thinking mode")
    flags.DEFINE_integer("seed", 42, "of the sampling keys")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of weights and matmuls")
    flags.DEFINE_list("mesh", ["fsdp:-1"], "AXIS:SIZE of data, fsdp, tensor, expert; -1 = rest")


def settings(step: int | None) -> dict:
    """What the samples of an output directory depend on: a second run must agree."""
    names = ("response_len", "temperature", "top_k", "top_p", "min_p", "thinking", "seed", "dtype")
    return {"model": flags.FLAGS.model, "step": step} | {n: flags.FLAGS[n].value for n in names}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"ERROR: {argv[1:]} mean nothing here; flags are written --NAME=VALUE")
    from etils import epath

    default = "evaluations/" + flags.FLAGS.model.strip("/").replace("/", "_").replace(":", "_")
    output = epath.Path(flags.FLAGS.output or default)
    launcher.initialize(str(output))
    from opd_jax.workdir import preemption

    try:
        run(output)
    except preemption.Preempted:
        print(
            f"stopped: samples are kept under {output}; the same command goes on", file=sys.stderr
        )
        sys.exit(preemption.EXIT_PREEMPTED)
    except (ValueError, FileNotFoundError) as error:
        launcher.fail(f"ERROR: {error}")


def run(output) -> dict[str, dict]:
    """Evaluates as the flags say; returns the metrics per benchmark."""
    import jax  # after launcher.initialize

    from opd_jax.problems import verify
    from opd_jax.workdir import preemption

    chief = jax.process_index() == 0
    directory, step = find_model(flags.FLAGS.model)
    problems = load_benchmarks(flags.FLAGS.benchmarks)
    now = settings(step) | {"content": content(directory, step, problems)}
    prepare(output, now, list(problems), flags.FLAGS.overwrite)
    results = {}
    with verify.Verifier(num_workers=2) as verifier:
        evaluator, params = build(verifier, directory, step)
        prompts = [example.prompt for examples in problems.values() for example in examples]
        evaluator.tokenizer.check_template(prompts, flags.FLAGS.thinking)
        guard = preemption.Guard()
        guard.install()  # from here on there are samples to keep
        for name, examples in problems.items():
            examples = examples[: flags.FLAGS.num_problems or None]
            path = output / f"{name}.jsonl"
            samples = sample(evaluator, params, name, examples, path, guard.check)
            results[name] = summarise(samples)
    if chief:
        about = settings(step) | {"results": results}
        (output / "results.json").write_text(json.dumps(about, indent=1) + "\n")
        print(format_table(results))
    return results


# ---------------------------------------------------------------- what is evaluated


def load_benchmarks(given: Sequence[str]) -> dict[str, list]:
    """All problems of each benchmark, by a name of its own.

    Two files of one name are called by their folders too: a/test.jsonl and b/test.jsonl are a_test
    and b_test.
    """
    from opd_jax.problems import benchmarks

    loaded = [(text, *benchmarks.load(text)) for text in given]
    counts = collections.Counter(name for _, name, _ in loaded)
    problems = {}
    for text, name, examples in loaded:
        if counts[name] > 1 and text.endswith(".jsonl") and "=" not in text:
            name = f"{pathlib.Path(text).absolute().parent.name}_{name}"
        if name in problems:
            raise ValueError(
                f"--benchmarks={','.join(given)} names {name} twice, and its samples go to one "
                "file: name each benchmark once, or evaluate them one by one, each with an "
                "--output of its own"
            )
        problems[name] = examples
    return problems


def content(directory, step: int | None, problems: Mapping[str, Sequence]) -> dict[str, str]:
    """Digests of what the samples belong to, by the name that a message gives each."""
    from opd_jax.workdir import digest

    parts = digest.of_model(directory)
    if step is not None:
        parts["weights"] = _checkpoints(flags.FLAGS.model).params_digest(_none_if_newest(step))
    return parts | {_problems_of(name): digest.of_problems(p) for name, p in problems.items()}


def _problems_of(name: str) -> str:
    return f"problems of {name}"


def prepare(output, now: dict, names: Sequence[str], overwrite: bool) -> None:
    """Makes `output` ready for samples of `now`: settings, and the digests in its "content".

    Args:
      names: of the benchmarks; OUTPUT/NAME.jsonl holds the samples.
      overwrite: samples of anything else are deleted, not refused.

    Raises:
      ValueError: there are samples that were taken otherwise or belong to other content.
    """
    import jax
    from jax.experimental import multihost_utils

    path = output / "settings.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    there = [name for name in names if (output / f"{name}.jsonl").exists()]
    trouble = _trouble(before, now, there)
    if trouble and not overwrite:
        raise ValueError(
            f"{output} holds samples {trouble}. Set --output={shlex.quote(f'{output}_2')}, or "
            "--overwrite to delete the samples that are there"
        )
    if jax.process_index() == 0:
        stored = before.get("content", {})
        if trouble:
            known = [key.removeprefix(_problems_of("")) for key in stored]
            for file in ("results.json", *(f"{name}.jsonl" for name in {*known, *names})):
                (output / file).unlink(missing_ok=True)
            stored = {}
        output.mkdir(parents=True, exist_ok=True)
        merged = now | {"content": stored | now["content"]}
        path.write_text(json.dumps(merged, indent=1) + "\n")
    if jax.process_count() > 1:  # nobody reads samples that are being deleted
        multihost_utils.sync_global_devices("evaluation prepared")


def _trouble(before: dict, now: dict, there: Sequence[str]) -> str:
    """Why the samples in a directory are not those of `now`; "" = they are."""
    from opd_jax.workdir import digest

    unknown = f"of {', '.join(there)} that nothing is known of"
    if not before:
        return unknown if there else ""
    changed = [key for key in now if key != "content" and before.get(key) != now[key]]
    if changed:
        differ = (f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in changed)
        return f"taken with other settings: {', '.join(differ)}"
    stored = before.get("content", {})
    if replaced := digest.differing(stored, now["content"]):
        return f"of other {' and other '.join(replaced)}: the files under these names were replaced"
    return "" if all(_problems_of(name) in stored for name in there) else unknown


# ---------------------------------------------------------------- the model


def build(verifier, directory, step: int | None):
    """(evaluator, parameters) of --model, a directory or a run's checkpoint `step`, on --mesh."""
    import jax.numpy as jnp

    from opd_jax import parallel
    from opd_jax.model import hf, qwen3
    from opd_jax.model.config import check_context
    from opd_jax.problems.tokenizer import load_tokenizer
    from opd_jax.stages import evaluate

    mesh = parallel.build_mesh([(axis, int(size)) for axis, size in parse_mesh(flags.FLAGS.mesh)])
    tokenizer = load_tokenizer(directory)
    config = qwen3.Qwen3Config.from_hf(directory)
    lengths = flags.FLAGS.prompt_len, flags.FLAGS.response_len
    check_context(config, *lengths, "model", prefixes=("", ""))
    parallel.check_model(config, mesh, "model")
    shardings = parallel.shardings(qwen3.param_axes(config), mesh)
    if step is None:
        _, params = hf.load(directory, jnp.dtype(flags.FLAGS.dtype), shardings)
    else:
        params = read_checkpoint(flags.FLAGS.model, step, shardings)
    evaluator = evaluate.build(
        _sampler(config, tokenizer, mesh),
        tokenizer,
        verifier,
        prompt_len=flags.FLAGS.prompt_len,
        batch_size=flags.FLAGS.batch_size,
        thinking=flags.FLAGS.thinking,
    )
    return evaluator, params


def _sampler(config, tokenizer, mesh):
    """What samples as the flags say."""
    import jax.numpy as jnp

    from opd_jax import parallel
    from opd_jax.model import qwen3
    from opd_jax.stages import rollout

    settings = rollout.Settings(
        response_len=flags.FLAGS.response_len,
        num_slots=flags.FLAGS.batch_size,
        num_candidates=1,
        temperature=flags.FLAGS.temperature,
        top_k=flags.FLAGS.top_k,
        top_p=flags.FLAGS.top_p,
        min_p=flags.FLAGS.min_p,
        first_cache=min(512, flags.FLAGS.prompt_len + flags.FLAGS.response_len),
    )
    backend = qwen3.Backend(
        compute_dtype=jnp.dtype(flags.FLAGS.dtype),
        unroll=qwen3.choose_unroll(-1, parallel.platform(mesh)),
        shard=parallel.shard_activations(mesh),
    )
    return rollout.build(config, settings, tokenizer.vocabulary, mesh=mesh, backend=backend)


def parse_mesh(pairs: Sequence[str]) -> list[tuple[str, str]]:
    if any(pair.count(":") != 1 for pair in pairs):
        raise ValueError(f"--mesh={','.join(pairs)} must be AXIS:SIZE pairs, as --mesh=fsdp:-1")
    return [(axis, size) for axis, _, size in (pair.partition(":") for pair in pairs)]


def find_model(name: str):
    """(directory of the model, None), or (directory of the student, step) where `name` is a run."""
    from etils import epath

    from opd_jax.model import hf

    stored = epath.Path(name) / "config.json"
    config = json.loads(stored.read_text()) if stored.exists() else {}
    if "student" not in config:
        return hf.resolve(name), None
    steps = _checkpoints(name).steps()  # --step=-1: the newest one there is now
    step = steps[-1] if flags.FLAGS.step < 0 and steps else flags.FLAGS.step
    return hf.resolve(config["student"]["path"]), step


def _checkpoints(workdir: str):
    from etils import epath

    from opd_jax.workdir import checkpoint

    return checkpoint.Checkpoints(str(epath.Path(workdir) / "checkpoints"), read_only=True)


def _none_if_newest(step: int) -> int | None:
    return None if step < 0 else step


def read_checkpoint(workdir: str, step: int, shardings):
    """Parameters of a run after `step` updates, on the mesh."""
    import jax
    import jax.numpy as jnp

    _, params = _checkpoints(workdir).read_params(_none_if_newest(step))
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(flags.FLAGS.dtype)), params)
    return jax.device_put(params, shardings)


# ---------------------------------------------------------------- samples and figures


def sample(
    evaluator, params, name: str, examples: Sequence, path, between: Callable[[], None]
) -> list[dict]:
    """All samples of a benchmark: those that `path` holds, and the rest, stored as they come.

    `between` is called after every chunk of decoding; it may raise to give up.
    """
    import jax
    import tqdm

    from opd_jax.workdir import records

    chief = jax.process_index() == 0
    wanted = {(str(e.id), i) for e in examples for i in range(flags.FLAGS.num_samples)}
    stored = records.read_jsonl(path) if path.exists() else []
    samples = [s for s in stored if (s["example_id"], s["index"]) in wanted]
    if chief and stored:
        records.write_jsonl(path, stored)  # without a line that was cut off
    done = {(s["example_id"], s["index"]) for s in samples}
    key = jax.random.key(flags.FLAGS.seed)
    calls = evaluator.calls(
        params, examples, flags.FLAGS.num_samples, key, group=name, done=done, between=between
    )
    with tqdm.tqdm(total=len(wanted), initial=len(done), desc=name, disable=not chief) as bar:
        for fresh in calls:
            samples += fresh
            if chief:
                records.append_jsonl(path, fresh)
            bar.update(len(fresh))
            verified = [s["correct"] for s in samples if s["correct"] is not None]
            if verified:
                bar.set_postfix_str(f"accuracy {sum(verified) / len(verified):.1%}")
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
        accuracy, interval = "not verified", "no answers given"
        if "accuracy" in r:
            accuracy = f"{100 * r['accuracy']:.1f}"
            interval = f"[{100 * r['accuracy_low']:.1f}, {100 * r['accuracy_high']:.1f}]"
        at = [f"{100 * r[k]:.1f}" if k in r else "" for k in names]
        rest = [f"{r['length_mean']:.0f}"]
        rest += [f"{100 * r[k]:.1f}" for k in ("truncation_rate", "no_answer_rate")]
        rows.append([name, str(r["num_problems"]), accuracy, interval, *at, *rest])
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
    define_flags()
    config_flags.run(main)
