# SPDX-License-Identifier: Apache-2.0
"""An exported checkpoint is the student's parameters, in a directory that loads by itself."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from launch import export
from opd_jax.model import hf
from opd_jax.problems.tokenizer import load_tokenizer
from opd_jax.workdir import checkpoint, records


@struct.dataclass
class State:
    params: dict
    moments: dict


@pytest.fixture
def run(tmp_path):
    """A run directory whose checkpoint n holds the embedded student's parameters plus n."""
    config, params = hf.load(hf.resolve("embedded:student"))
    workdir = tmp_path / "run"
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
    resolved = {"student": {"path": "embedded:student"}, "checkpoint": {"every_steps": 2}}
    records.write_json(workdir, "config.json", resolved)
    for step in (2, 4):
        moved = jax.tree.map(lambda x, step=step: x + step, params)
        state = State(moved, jax.tree.map(jnp.zeros_like, params))
        checkpoints.save(step, state, cursor={}, config=resolved, metric=None)
    checkpoints.close()
    return str(workdir), config, params


@pytest.mark.parametrize(("step", "expected"), [(None, 4), (2, 2)])
def test_the_export_is_the_checkpoint(run, tmp_path, step, expected):
    workdir, config, params = run
    output = tmp_path / "exported"
    assert export.export(workdir, str(output), step) == expected
    found_config, found = hf.load(output)
    assert found_config == config
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b) + expected),
        found,
        params,
    )
    ours, theirs = load_tokenizer(output), load_tokenizer(hf.resolve("embedded:student"))
    assert ours.token_bytes == theirs.token_bytes and ours.eos_ids == theirs.eos_ids
    assert ours.render("Ann has two plums.") == theirs.render("Ann has two plums.")


def test_a_dtype_is_what_the_files_hold(run, tmp_path):
    workdir, _, params = run
    export.export(workdir, str(tmp_path / "exported"), 2, "bfloat16")
    _, found = hf.load(tmp_path / "exported")
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(
            np.asarray(a), np.asarray(b + 2).astype(jnp.bfloat16)
        ),
        found,
        params,
    )


def test_what_cannot_be_exported_says_what_can(run, tmp_path):
    workdir, _, _ = run
    with pytest.raises(ValueError, match=r"steps \[2, 4\], not 3; set --step to one of them"):
        export.export(workdir, str(tmp_path / "a"), 3)
    with pytest.raises(ValueError, match="holds no run.*--workdir=runs/quickstart"):
        export.export(str(tmp_path), str(tmp_path / "a"))
    records.write_json(tmp_path / "new", "config.json", records.read_json(workdir, "config.json"))
    with pytest.raises(ValueError, match="no checkpoint yet.*every_steps=2"):
        export.export(str(tmp_path / "new"), str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_an_export_is_replaced_by_the_next_one(run, tmp_path):
    workdir, _, params = run
    for step in (2, 4):
        export.export(workdir, str(tmp_path / "exported"), step)
        made = records.read_json(tmp_path / "exported", export.MARK)
        assert (made["workdir"], made["step"]) == (workdir, step)
    (tmp_path / "empty").mkdir()
    assert export.export(workdir, str(tmp_path / "empty")) == 4


@pytest.fixture
def own_model(run, tmp_path):
    """The run's student as a directory of the user's, beside the run."""
    workdir, *_ = run
    model = shutil.copytree(hf.resolve("embedded:student"), tmp_path / "models" / "student")
    records.write_json(
        workdir, "config.json", {"student": {"path": str(model)}, "checkpoint": {"every_steps": 2}}
    )
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "models" / "other").mkdir()
    (tmp_path / "models" / "other" / "config.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("three years")
    (tmp_path / "file").write_text("mine")
    return workdir


def everything(root) -> dict:
    return {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "output",
    ["models/student", "models/student/", "models", "link", "run", "run/checkpoints/..", "."],
)
def test_what_is_being_read_is_never_replaced(own_model, tmp_path, monkeypatch, output, overwrite):
    """It deleted the source model, and said that it "is now the model"."""
    monkeypatch.chdir(tmp_path)
    before = everything(tmp_path)
    with pytest.raises(ValueError, match="what the export reads .*Set --output to a new direct"):
        export.export(own_model, output, overwrite=overwrite)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("output", "flag_helps"), [("models/other", True), ("notes", False), ("file", False)]
)
def test_what_is_no_export_is_replaced_by_flag_alone(
    own_model, tmp_path, monkeypatch, output, flag_helps
):
    monkeypatch.chdir(tmp_path)
    before = everything(tmp_path)
    says = f"--output={output} exists and is no export .*--output={output}-exported; or .*--overw"
    with pytest.raises(ValueError, match=says):
        export.export(own_model, output)
    assert everything(tmp_path) == before
    if flag_helps:
        assert export.export(own_model, output, overwrite=True) == 4
        hf.load(tmp_path / output)
    else:  # a folder of anything but a model is not replaced at all
        with pytest.raises(OSError):
            export.export(own_model, output, overwrite=True)
        assert everything(tmp_path) == before


def test_a_new_directory_beside_or_below_the_model_is_taken(own_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for output in ("models/student-exported", "models/student/step4", "run/exported"):
        assert export.export(own_model, output) == 4


def test_exporting_leaves_what_the_run_is_writing(run, tmp_path):
    """A reader that cleaned up would delete the checkpoint that the run is writing beside it."""
    workdir, _, _ = run
    half = tmp_path / "run" / "checkpoints" / "6.orbax-checkpoint-tmp"
    half.mkdir()
    assert export.export(workdir, str(tmp_path / "exported")) == 4
    assert half.exists()
