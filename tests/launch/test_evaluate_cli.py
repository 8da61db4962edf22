# SPDX-License-Identifier: Apache-2.0
"""`python -m launch.evaluate` on a tiny random model: samples kept, gone on with, not mixed."""

import json
import re
import subprocess
import sys

import jax
import pytest
import tiny_model

from launch import evaluate as command
from opd_jax.model import hf, qwen3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("model"))


def evaluate(model, output, benchmark, *flags):
    command = [sys.executable, "-m", "launch.evaluate", f"--model={model}", f"--output={output}"]
    command += [f"--benchmarks={benchmark}", "--response_len=12", "--batch_size=4", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def write_problems(path, answers):
    path.parent.mkdir(exist_ok=True)
    rows = [{"prompt": f"What is {i} + 1 ?", "answer": a} for i, a in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------- names and ids


def test_two_files_of_one_name_are_two_benchmarks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [write_problems(tmp_path / name / "test.jsonl", "123") for name in "ab"]
    found = command.load_benchmarks(["a/test.jsonl", str(files[1]), "embedded_ood"])
    assert list(found) == ["a_test", "b_test", "embedded_ood"]
    assert list(command.load_benchmarks(["a/test.jsonl"])) == ["test"]


@pytest.mark.parametrize("given", ["a/test.jsonl,a/test.jsonl", "embedded,embedded"])
def test_a_benchmark_named_twice_is_refused(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_problems(tmp_path / "a" / "test.jsonl", "1")
    with pytest.raises(ValueError, match=f"--benchmarks={given} names .* twice.*--output"):
        command.load_benchmarks(given.split(","))


@pytest.mark.parametrize(
    ("ids", "repeated"),
    [("001", "0"), ("aab", "a"), (["a", "b", "a", "a"], "a"), ("ab", None), (["a", " a"], None)],
)
def test_ids_are_unique_or_refused(ids, repeated, tmp_path):
    """Of three problems with ids 0, 0, 1 two would be reported."""
    path = tmp_path / "test.jsonl"
    rows = [{"id": id_, "prompt": f"{i}?", "answer": "1"} for i, id_ in enumerate(ids)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if repeated is None:
        assert len(command.load_benchmarks([str(path)])["test"]) == len(ids)
        return
    says = f"--benchmarks={path}: 1 ids belong to several problems, first '{repeated}'"
    with pytest.raises(ValueError, match=re.escape(says)):
        command.load_benchmarks([str(path)])


# ---------------------------------------------------------------- what samples belong to

NOW = {
    "model": "m",
    "temperature": 1.0,
    "content": {"weights": "w", "tokenizer": "t", "template": "c", "problems of a": "p"},
}


def with_content(**changes):
    changes = {name.replace("_", " "): value for name, value in changes.items()}
    return NOW | {"content": NOW["content"] | changes}


def directory(path, before, samples=()):
    if before is not None:
        (path / "settings.json").write_text(json.dumps(before))
    (path / "results.json").write_text("{}")
    for name in samples:
        (path / f"{name}.jsonl").write_text("{}\n")


@pytest.mark.parametrize(
    ("before", "samples", "says"),
    [
        (with_content(weights="v"), "a", "of other weights: the files under these names were"),
        (with_content(tokenizer="u"), "a", "of other tokenizer: "),
        (with_content(template="d"), "a", "of other template: "),
        (with_content(problems_of_a="q"), "a", "of other problems of a: "),
        (with_content(weights="v", problems_of_a="q"), "a", "weights and other problems of a: "),
        (NOW | {"temperature": 0.5}, "a", "other settings: temperature was 0.5, is 1.0. Set"),
        ({k: v for k, v in NOW.items() if k != "content"}, "a", "of a that nothing is known of"),
        (None, "a", "of a that nothing is known of"),
        # What may go on.
        (NOW, "a", ""),
        (NOW, "", ""),
        (None, "", ""),
        (with_content(problems_of_b="other"), "ab", ""),  # another benchmark beside it
        ({**NOW, "content": {"weights": "w", "problems of b": "p"}}, "b", ""),
    ],
)
def test_samples_of_anything_else_are_refused_or_deleted_by_flag(before, samples, says, tmp_path):
    directory(tmp_path, before, samples)
    if says:
        with pytest.raises(ValueError, match=re.escape(says)) as refused:
            command.prepare(tmp_path, NOW, ["a"], overwrite=False)
        assert f"Set --output={tmp_path}_2, or --overwrite" in str(refused.value)
        assert all((tmp_path / f"{name}.jsonl").exists() for name in samples)
    command.prepare(tmp_path, NOW, ["a"], overwrite=True)
    left = {path.name for path in tmp_path.iterdir()}
    if says:
        assert left == {"settings.json"}
    else:
        assert left == {"settings.json", "results.json", *(f"{name}.jsonl" for name in samples)}
    stored = json.loads((tmp_path / "settings.json").read_text())
    assert stored["content"].items() >= NOW["content"].items()
    assert ("problems of b" in stored["content"]) == (not says and "problems of b" in str(before))
    command.prepare(tmp_path, NOW, ["a"], overwrite=False)  # it is what it says


def test_of_a_run_the_weights_are_those_of_its_checkpoint(tmp_path):
    """Another run of the same config in a workdir of the same name has other bits."""
    import jax.numpy as jnp

    from opd_jax.workdir import checkpoint

    found = []
    for scale in (1.0, 1.0, 2.0):
        workdir = tmp_path / f"{len(found)}"
        saved = checkpoint.Checkpoints(workdir / "checkpoints")
        state = {"params": {"a": jnp.full(3, scale)}, "moments": jnp.full(3, float(len(found)))}
        saved.save(4, checkpointed(state), cursor={}, config={}, metric=None)
        saved.close()
        reader = checkpoint.Checkpoints(workdir / "checkpoints", read_only=True)
        found.append(reader.params_digest())
        with pytest.raises(ValueError, match="set --step to one of them"):
            reader.params_digest(3)
    assert found[0] == found[1] != found[2]


def checkpointed(state):
    from flax import struct

    @struct.dataclass
    class State:
        params: dict
        moments: jax.Array

    return State(**state)


def test_without_answers_it_says_not_verified():
    def of(answer, correct):
        common = dict(family="f", response="", num_tokens=3, finished=True)
        return common | dict(example_id=answer, index=0, given="7", answer=answer, correct=correct)

    none = command.summarise([of("", None)])
    assert "accuracy" not in none and none["num_problems"] == 0 and none["length_mean"] == 3
    some = command.summarise([of("", None), of("7", True)])
    assert some["accuracy"] == 1.0 and some["num_problems"] == 1
    lines = command.format_table({"none": none, "some": some}).splitlines()
    assert "not verified" in lines[1] and "0.0" not in lines[1].split("not verified")[0]
    assert "100.0" in lines[2] and "not verified" not in lines[2]


@pytest.mark.slow
def test_an_evaluation_is_stored_gone_on_with_and_never_mixed(model, tmp_path):
    file = tmp_path / "aime.jsonl"
    rows = [{"problem": f"What is {i} + 1 ?", "answer": str(i + 1)} for i in range(5)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    output = tmp_path / "out"

    first = evaluate(model, output, f"aime25={file}", "--num_samples=2")
    assert first.returncode == 0, first.stderr[-3000:]
    assert re.search(r"^aime25 +5 +\d", first.stdout, re.M) and "pass_at_2" in first.stdout
    path = output / "aime25.jsonl"
    before = path.read_text().splitlines(keepends=True)
    assert len(before) == 10
    results = json.loads((output / "results.json").read_text())
    assert results["results"]["aime25"]["num_problems"] == 5 and results["temperature"] == 1.0

    path.write_text("".join(before[:7]) + before[7][:20])  # killed while writing
    again = evaluate(model, output, f"aime25={file}", "--num_samples=2")
    assert again.returncode == 0, again.stderr[-3000:]
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(before)
    assert again.stdout == first.stdout

    other = evaluate(model, output, f"aime25={file}", "--temperature=0.5")
    assert other.returncode == 1
    assert "temperature was 1.0, is 0.5" in other.stderr and "--output" in other.stderr


@pytest.mark.slow
def test_new_weights_or_a_new_file_under_the_old_path_are_not_the_old_result(tmp_path):
    model = tiny_model.save(tmp_path)
    file = write_problems(tmp_path / "data" / "test.jsonl", "1234")
    output = tmp_path / "out"
    first = evaluate(model, output, file)
    assert first.returncode == 0, first.stderr[-3000:]
    before = (output / "test.jsonl").read_text()

    write_problems(file, "1235")
    refused = evaluate(model, output, file)
    assert refused.returncode == 1 and "of other problems of test: " in refused.stderr

    config = qwen3.Qwen3Config.from_hf(model)
    hf.save(config, qwen3.init_params(config, jax.random.key(1)), model, source=model)
    refused = evaluate(model, output, file)
    assert "of other weights and other problems of test: " in refused.stderr
    assert (output / "test.jsonl").read_text() == before

    again = evaluate(model, output, file, "--overwrite")
    assert again.returncode == 0, again.stderr[-3000:]
    samples = [json.loads(line) for line in (output / "test.jsonl").read_text().splitlines()]
    assert [s["answer"] for s in samples] == ["1", "2", "3", "5"]
    assert [s["response"] for s in samples] != [
        json.loads(line)["response"] for line in before.splitlines()
    ]
