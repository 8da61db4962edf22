# SPDX-License-Identifier: Apache-2.0
"""An exported checkpoint is the student's parameters, in a directory that loads by itself."""

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


def test_exporting_leaves_what_the_run_is_writing(run, tmp_path):
    """A reader that cleaned up would delete the checkpoint that the run is writing beside it."""
    workdir, _, _ = run
    half = tmp_path / "run" / "checkpoints" / "6.orbax-checkpoint-tmp"
    half.mkdir()
    assert export.export(workdir, str(tmp_path / "exported")) == 4
    assert half.exists()
