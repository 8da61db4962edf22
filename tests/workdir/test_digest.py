# SPDX-License-Identifier: Apache-2.0
"""Equal content gives equal digests, and each change shows in the part that it belongs to."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd_jax import train
from opd_jax.model import hf
from opd_jax.problems import task
from opd_jax.workdir import digest
from tests import fakes


@pytest.fixture
def model(tmp_path) -> pathlib.Path:
    return shutil.copytree(hf.resolve("embedded:student"), tmp_path / "model")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensor(model, where):
    path = model / "model.safetensors"
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].size)
    tensors[name] = np.array(tensors[name])
    tensors[name].reshape(-1)[where] += 1
    save_file(tensors, path, metadata={"format": "pt"})


EDITS = {
    "another weight": (lambda m: edit_tensor(m, 5), ["weights"]),
    "the last weight": (lambda m: edit_tensor(m, -1), ["weights"]),
    "another config": (lambda m: edit_json(m / "config.json", rope_theta=5e5), ["weights"]),
    "a file more": (lambda m: (m / "more.safetensors").write_bytes(b"x"), ["weights"]),
    "another token": (
        lambda m: (m / "tokenizer.json").write_text((m / "tokenizer.json").read_text() + " "),
        ["tokenizer"],
    ),
    "another ending": (
        lambda m: edit_json(m / "generation_config.json", eos_token_id=0),
        ["tokenizer"],
    ),
    "a tokenizer setting": (
        lambda m: edit_json(m / "tokenizer_config.json", add_prefix_space=True),
        ["tokenizer"],
    ),
    "another template": (
        lambda m: edit_json(m / "tokenizer_config.json", chat_template="{{ messages }}"),
        ["template"],
    ),
    "a template file": (lambda m: (m / "chat_template.jinja").write_text("a"), ["template"]),
    # What changes nothing that a result depends on.
    "a note": (lambda m: (m / "README.md").write_text("mine"), []),
    "sampling advice": (lambda m: edit_json(m / "generation_config.json", top_p=0.5), []),
    "the order of keys": (
        lambda m: (m / "config.json").write_text(
            json.dumps(dict(reversed(json.loads((m / "config.json").read_text()).items())))
        ),
        [],
    ),
    "the time of a file": (lambda m: (m / "model.safetensors").touch(), []),
}


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "sampled"])
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_shows_in_its_part_and_nowhere_else(model, monkeypatch, name, whole):
    monkeypatch.setattr(digest, "WHOLE_BYTES", 2**30 if whole else 0)
    monkeypatch.setattr(digest, "EDGE_BYTES", 64)
    before = digest.of_model(model)
    assert set(before) == {"weights", "tokenizer", "template"}
    edit, parts = EDITS[name]
    edit(model)
    assert digest.differing(before, digest.of_model(model)) == parts


def test_of_a_large_model_the_middle_of_a_tensor_is_not_read(model, monkeypatch):
    """The price of a start in a second; the docstring says it."""
    before = digest.of_model(model)
    middle = 40_000
    edit_tensor(model, middle)
    assert digest.differing(before, digest.of_model(model)) == ["weights"]
    monkeypatch.setattr(digest, "WHOLE_BYTES", 0)
    before = digest.of_model(model)
    edit_tensor(model, middle)
    assert digest.differing(before, digest.of_model(model)) == []


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b"version http"])
def test_a_file_that_is_no_safetensors_has_a_digest_too(model, monkeypatch, content):
    """Whoever loads the weights says what is wrong; a digest says only that they differ."""
    monkeypatch.setattr(digest, "WHOLE_BYTES", 0)
    before = digest.of_model(model)
    (model / "model.safetensors").write_bytes(content)
    assert digest.differing(before, digest.of_model(model)) == ["weights"]


FIRST = task.Example(id="a", family="f", prompt="1 + 1?", answer="2", solution="so 2")


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        (dict(answer="3"), True),
        (dict(prompt="1 + 2?"), True),
        (dict(prompt=(("user", "1 + 1?"),)), True),
        (dict(id="b"), True),
        (dict(family="g"), True),
        (dict(prompt="1 + 1?2", answer=""), True),  # the same letters, cut elsewhere
        (dict(solution="otherwise"), False),
    ],
)
def test_problems_are_what_is_asked_and_what_is_right(changes, differs):
    changed = dataclasses.replace(FIRST, **changes)
    assert (digest.of_problems([FIRST]) != digest.of_problems([changed])) == differs
    second = dataclasses.replace(FIRST, id="c")
    assert digest.of_problems([FIRST, second]) != digest.of_problems([second, FIRST])
    assert digest.of_problems([FIRST, second]) != digest.of_problems([FIRST])


def test_a_run_whose_problems_or_model_were_replaced_is_refused(tmp_path, pair, on_one_device):
    """What a run reads, from the config to the checkpoint: each file under its old path."""
    data = tmp_path / "data.jsonl"

    def write(answer):
        rows = [{"prompt": f"What is {i} + 1 ?", "answer": answer} for i in range(8)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    teacher = shutil.copytree(pair.teacher, tmp_path / "teacher")
    changes = {"data.source": str(data), "evaluate.source": str(data), "num_steps": 1}
    changes |= {"evaluate.teacher": False, "teacher.path": str(teacher)}
    config = fakes.small_config(pair, **changes)
    write("1")
    train.run(config, str(tmp_path / "run"))
    train.run(config, str(tmp_path / "run"))  # the same files: nothing to refuse
    write("2")
    with pytest.raises(ValueError, match="other training problems and other held-out problems: "):
        train.run(config, str(tmp_path / "run"))
    write("1")
    edit_tensor(teacher, 5)
    with pytest.raises(ValueError, match="with other teacher weights: .*set --workdir to another"):
        train.run(config, str(tmp_path / "run"))
