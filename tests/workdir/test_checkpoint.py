# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: exact round trip, every damage found, the newest good one used, none deleted."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from configs import base
from opd_jax.workdir import checkpoint

LAST = checkpoint.Settings(keep_last=1, keep_best=0)


@struct.dataclass
class State:
    params: dict
    opt_state: tuple
    step: jax.Array


def make_state(scale: float = 1.0) -> State:
    params = {
        "a": scale * jnp.linspace(-1.0, 1.0, 5000).reshape(50, 100),
        "b": {"c": scale * jnp.ones((7,), jnp.bfloat16)},
    }
    return State(params, optax.adamw(1e-3).init(params), jnp.asarray(3, jnp.int32))


def shapes(state: State):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


@pytest.fixture
def two_saved(tmp_path) -> pathlib.Path:
    """A directory with good checkpoints of steps 2 and 4, state scaled by the step."""
    saved = checkpoint.Checkpoints(tmp_path / "checkpoints")
    for step in (2, 4):
        cursor, config = {"epoch": step}, {"seed": 0}
        saved.save(step, make_state(step), cursor=cursor, config=config, metric=step / 10)
    saved.close()
    return tmp_path / "checkpoints"


def restore(directory) -> checkpoint.Restored:
    return checkpoint.Checkpoints(directory).restore(shapes(make_state()))


def test_a_restore_gives_the_same_bits_and_the_cursor(two_saved):
    restored = restore(two_saved)
    assert (restored.step, restored.cursor, restored.config) == (4, {"epoch": 4}, {"seed": 0})
    assert restored.skipped == ()
    for a, b in zip(jax.tree.leaves(restored.state), jax.tree.leaves(make_state(4.0)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_relative_directory_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = checkpoint.Checkpoints("run/checkpoints")
    saved.save(1, make_state(), cursor={}, config={}, metric=None)
    saved.close()
    assert checkpoint.Checkpoints("run/checkpoints").read_params()[0] == 1


def test_no_checkpoint_is_none_not_an_error(tmp_path):
    assert restore(tmp_path / "checkpoints") is None


def largest_file(directory: pathlib.Path) -> pathlib.Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(step: pathlib.Path):
    path = largest_file(step / "state")
    os.truncate(path, path.stat().st_size // 2)


def delete_data(step: pathlib.Path):
    largest_file(step / "state").unlink()


def empty_meta(step: pathlib.Path):
    (step / "meta" / "metadata").write_text("")


def delete_state(step: pathlib.Path):
    for path in sorted((step / "state").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


def empty_array_metadata(step: pathlib.Path):
    (step / "state" / "_METADATA").write_text("")


def flip_a_digest(step: pathlib.Path):  # stands for a changed array that still reads
    path = step / "meta" / "metadata"
    meta = json.loads(path.read_text())
    name = sorted(meta["digests"])[0]
    meta["digests"][name] += 1
    path.write_text(json.dumps(meta))


@pytest.mark.parametrize(
    "damage",
    [truncate, delete_data, empty_meta, delete_state, empty_array_metadata, flip_a_digest],
)
def test_a_damaged_checkpoint_falls_back_says_why_and_stays(two_saved, damage):
    damage(two_saved / "4")
    restored = restore(two_saved)
    assert restored.step == 2
    assert len(restored.skipped) == 1 and restored.skipped[0].startswith("step 4: ")
    np.testing.assert_array_equal(restored.state.params["a"], make_state(2.0).params["a"])
    assert (two_saved.parent / "checkpoints_unusable" / "4").is_dir()  # kept for the user
    again = checkpoint.Checkpoints(two_saved)
    again.save(4, make_state(4.0), cursor={}, config={}, metric=None)  # the step can be redone
    again.close()
    assert restore(two_saved).step == 4


# A save that succeeds, then one on a full disk: files longer than 3 kB cannot be written (Python
# ignores SIGXFSZ, so that the write fails instead of the process).
FULL_DISK = """
import resource, sys
from opd_jax.workdir import checkpoint
from tests.workdir import test_checkpoint

checkpoint.quiet_orbax()
saved = checkpoint.Checkpoints(sys.argv[1], test_checkpoint.LAST)
for step in (2, 4):
    state = test_checkpoint.make_state(step)
    try:
        saved.save(step, state, cursor={}, config={}, metric=None)
        saved.wait()
    except OSError as error:
        sys.exit(f"step {step}: {error}")
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
"""


def test_a_full_disk_leaves_the_last_good_checkpoint_and_one_message(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "checkpoints")]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    message = ended.stderr.splitlines()[-1]
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
    assert message.startswith(f"step 4: could not write a checkpoint under {tmp_path}")
    for part in (
        "File too large",
        "Whole are those of steps [2]",
        "goes on from step 2",
        "--workd",
    ):
        assert part in message
    assert len(message) < 1000
    restored = restore(tmp_path / "checkpoints")
    assert (restored.step, restored.skipped) == (2, ())
    again = checkpoint.Checkpoints(tmp_path / "checkpoints", LAST)  # with room on the disk
    again.save(4, make_state(4.0), cursor={}, config={}, metric=None)
    again.close()
    assert restore(tmp_path / "checkpoints").step == 4


def test_when_all_are_damaged_it_stops_and_names_each(two_saved):
    truncate(two_saved / "4")
    empty_meta(two_saved / "2")
    with pytest.raises(ValueError, match=r"step 4: (.|\n)*step 2: (.|\n)*--workdir"):
        restore(two_saved)
    assert (two_saved / "4").is_dir() and (two_saved / "2").is_dir()


def test_the_policy_keeps_last_periodic_and_best(tmp_path):
    settings = checkpoint.Settings(keep_last=2, keep_every_steps=4, keep_best=1)
    saved = checkpoint.Checkpoints(tmp_path / "c", settings)
    for step, metric in enumerate([0.1, 0.9, 0.2, None, 0.3, 0.4, 0.5], start=1):
        saved.save(step, make_state(step), cursor={}, config={}, metric=metric)
    saved.close()
    assert saved.steps() == [2, 4, 6, 7]  # best 2, periodic 4, last 6 and 7


def test_the_best_stays_the_best_after_a_restart(tmp_path):
    """Its metric is on disk: a new process knows it too."""
    for steps in ((1, 2), (3, 4)):
        saved = checkpoint.Checkpoints(
            tmp_path / "c", checkpoint.Settings(keep_last=1, keep_best=1)
        )
        for step in steps:
            metric = {1: 0.9}.get(step, 0.1 * step)
            saved.save(step, make_state(step), cursor={}, config={}, metric=metric)
        saved.close()
    assert saved.steps() == [1, 4]
    assert restore(tmp_path / "c").step == 4


def test_export_reads_parameters_alone(two_saved):
    step, params = checkpoint.Checkpoints(two_saved).read_params()
    assert step == 4
    np.testing.assert_array_equal(params["a"], make_state(4.0).params["a"])
    assert checkpoint.Checkpoints(two_saved).read_params(2)[0] == 2
    with pytest.raises(ValueError, match="set --step"):
        checkpoint.Checkpoints(two_saved).read_params(3)


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        ({"training problems": "a"}, {"training problems": "b"}, "with other training problems: "),
        (
            {"student weights": "a", "student tokenizer": "a", "teacher weights": "a"},
            {"student weights": "b", "student tokenizer": "b", "teacher weights": "a"},
            "with other student weights and other student tokenizer: ",
        ),
        ({"training problems": "a"}, {"training problems": "a"}, ""),
        ({}, {"training problems": "a"}, ""),  # saved by a version that kept none
        ({"training problems": "a"}, {}, ""),  # read by somebody who trains nothing
    ],
)
def test_a_run_whose_files_were_replaced_does_not_go_on(tmp_path, before, now, says):
    saved = checkpoint.Checkpoints(tmp_path / "checkpoints", content=before)
    saved.save(2, make_state(), cursor={}, config={}, metric=None)
    saved.close()
    reader = checkpoint.Checkpoints(tmp_path / "checkpoints", content=now)
    if says:
        with pytest.raises(ValueError, match=f"{says}.*Put the old files back, or set --workdir"):
            reader.restore(shapes(make_state()))
        assert (tmp_path / "checkpoints" / "2").is_dir()
    else:
        assert reader.restore(shapes(make_state())).content == before


def test_the_page_that_users_read_shows_the_defaults_of_the_settings():
    assert base.get_config().checkpoint.to_dict() == dataclasses.asdict(checkpoint.Settings())
