# SPDX-License-Identifier: Apache-2.0
"""A config flag sets what it says, and a wrong one says what would have worked."""

import re
import subprocess
import sys
import textwrap

import pytest
from absl import flags

from launch import config_flags
from tests import advice

CONFIG = """
import ml_collections as mlc

def get_config(variant="full"):
    if variant not in ("full", "tiny"):
        raise ValueError(f"variant {variant!r} is unknown; use 'full' or 'tiny'")
    c = mlc.ConfigDict(dict(seed=0, tensorboard=True, names=("a", "b")))
    c.mesh = (("data", 1), ("fsdp", -1))
    c.rollout = dict(batch_size=256 if variant == "full" else 8, temperature=1.0, kind="plain")
    c.hidden = None
    return c

def sweep():
    yield from ({"seed": seed} for seed in range(2))
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "some_config.py"
    path.write_text(CONFIG)
    return str(path)


def parse(*argv, monkeypatch):
    """The config that a command line gives, by the same calls as a launcher's."""
    argv = ["prog", *argv]
    monkeypatch.setattr(sys, "argv", argv)
    flag_values = flags.FlagValues()
    holder = config_flags.define(flag_values=flag_values)
    config_flags.parse(argv, flag_values)
    return holder.value


def test_flags_override_keys_of_every_type(config_file, monkeypatch):
    config = parse(
        f"--config={config_file}:tiny",
        "--config.seed=3",
        "--config.rollout.temperature",
        "0.5",
        "--noconfig.tensorboard",
        "--config.names=('c',)",
        "--config.rollout.kind=",
        monkeypatch=monkeypatch,
    )
    assert config.seed == 3 and config.rollout.batch_size == 8
    assert config.rollout.temperature == 0.5 and config.tensorboard is False
    assert config.names == ("c",) and config.rollout.kind == ""
    with pytest.raises(AttributeError):
        config.new_key = 1  # locked


@pytest.mark.parametrize(
    ("given", "expanded"),
    [
        ("--workdir=~/runs", "--workdir=/home/me/runs"),
        ("--config=~/mine.py:tiny", "--config=/home/me/mine.py:tiny"),
        ("--config.student.path=~/model", "--config.student.path=/home/me/model"),
        ("-output=~", "-output=/home/me"),
        ("--workdir=runs/~/x", "--workdir=runs/~/x"),
        ("--workdir=gs://BUCKET/~", "--workdir=gs://BUCKET/~"),
        ("--title=a=~/b", "--title=a=~/b"),
        ("~/x", "~/x"),  # a shell has seen to this one
    ],
)
def test_a_tilde_at_the_start_of_a_value_is_the_home_directory(given, expanded, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert config_flags.expand_home(["prog", given]) == ["prog", expanded]
    assert config_flags.expand_home(["prog", "--", given]) == ["prog", "--", given]


def test_a_tilde_is_expanded_in_the_config_and_its_keys(config_file, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse(
        "--config=~/some_config.py:tiny", "--config.rollout.kind=~/x", monkeypatch=monkeypatch
    )
    assert config.rollout.batch_size == 8 and config.rollout.kind == str(tmp_path / "x")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.rollout.batchsize=8", "--config.rollout.batch_size=256"),
        ("--config.batch_size=8", "did you mean rollout.batch_size?"),
        ("--noconfig.tensorbord", "did you mean tensorboard?"),
        ("--config.sed=1", "--config.seed=0"),
        ("--config.msh=1", """--config.mesh='(("data", 1), ("fsdp", -1))'"""),
        ("--config.rollout=3", "set one of --config.rollout.batch_size"),
        ("--config.seed.x=3", "config has no key 'seed.x'; did you mean seed?"),
        ("--config.qqqqqq=3", "see configs/base.py"),
        ("--config.hidden=3", "--config.hidden cannot be set by a flag: its value is None"),
        (
            "--config.seed=1e3",
            "--config.seed=1e3 must be a whole number, as in the config file: --config.seed=0",
        ),
        (
            "--config.rollout.temperature=hot",
            "must be a number, as in the config file: --config.rollout.temperature=1.0",
        ),
        (
            "--config.tensorboard=perhaps",
            "must be true or false, as in the config file: --config.tensorboard=true",
        ),
        (
            "--config.mesh=(1, (",
            'must be a tuple, as in the config file: --config.mesh=\'(("data", 1), ("fsdp", -1))\'',
        ),
    ],
)
def test_a_wrong_key_or_value_names_one_that_works(argument, message, config_file, monkeypatch):
    with pytest.raises(config_flags.ConfigError, match=re.escape(message)) as error:
        parse(f"--config={config_file}", argument, monkeypatch=monkeypatch)
    advice.check(error.value, config_file)


def test_a_tuple_given_twice_is_refused_and_a_number_given_twice_is_the_last(
    config_file, monkeypatch
):
    with pytest.raises(config_flags.ConfigError, match="--config.names is given twice"):
        parse(
            f"--config={config_file}",
            "--config.names=('c',)",
            "--config.names=('d',)",
            monkeypatch=monkeypatch,
        )
    twice = ("--config.seed=3", "--config.seed=4")
    assert parse(f"--config={config_file}", *twice, monkeypatch=monkeypatch).seed == 4


def test_a_wrong_file_or_variant_names_one_that_works(config_file, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "study.py").write_text("get_config = 1")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "plain.py").write_text("def get_config():\n    return None")
    monkeypatch.chdir(tmp_path)
    for path, message in [
        ("configs/stdy.py", "no such file; use one that exists, as --config=configs/study.py"),
        ("", "--config=: no such file; use one that exists, as --config=configs/quickstart.py"),
        (f"{config_file}:tny", "variant 'tny' is unknown; use 'full' or 'tiny'"),
        ("empty.py", "--config=empty.py has no function get_config()"),
        ("plain.py:x", "plain.py has no variants; use --config=plain.py"),
    ]:
        with pytest.raises(config_flags.ConfigError, match=re.escape(message)):
            config_flags.load(path)


def test_an_absent_config_names_one(monkeypatch):
    with pytest.raises(flags.Error, match="add --config=configs/quickstart.py"):
        parse(monkeypatch=monkeypatch)
    with pytest.raises(flags.Error, match="--config.seed is given but --config is not"):
        parse("--config.seed=1", monkeypatch=monkeypatch)


def test_apply_overrides_sets_what_the_flag_would_and_leaves_its_input(config_file):
    config = config_flags.load(config_file)
    values = {"seed": 4, "rollout.temperature": 1e-7, "tensorboard": False, "names": ("x", "y")}
    overrides = config_flags.flatten(config_flags.apply_overrides(config, values))
    assert {key: overrides[key] for key in values} == values
    texts = {key: config_flags.as_text(value) for key, value in values.items()}
    assert config_flags.flatten(config_flags.apply_overrides(config, texts)) == overrides
    assert config.seed == 0 and config.names == ("a", "b")
    with pytest.raises(config_flags.ConfigError, match="did you mean seed"):
        config_flags.apply_overrides(config, {"sead": 1})
    with pytest.raises(config_flags.ConfigError, match="must be a whole number"):
        config_flags.apply_overrides(config, {"seed": 0.5})


def test_sweep_elements_come_from_the_config_file(config_file, tmp_path):
    assert config_flags.load_sweep(config_file + ":tiny") == [{"seed": 0}, {"seed": 1}]
    (tmp_path / "none.py").write_text("")
    assert config_flags.load_sweep(str(tmp_path / "none.py")) == []


def test_a_launcher_ends_with_one_message_and_no_traceback(config_file, tmp_path):
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        textwrap.dedent("""
        from absl import logging
        from launch import config_flags
        CONFIG = config_flags.define()
        def main(argv):
            logging.info("a library speaks")
            logging.warning("a library warns")
            print(CONFIG.value.seed, argv[1:])
        config_flags.run(main)
        """)
    )

    def start(*argv):
        command = [sys.executable, str(launcher), f"--config={config_file}", *argv]
        return subprocess.run(
            command, capture_output=True, text=True, env={"PYTHONPATH": ".", "PATH": ""}, timeout=60
        )

    good, bad = start("--config.seed=7"), start("--config.sead=7")
    assert good.returncode == 0 and good.stdout == "7 []\n"
    assert "a library warns" in good.stderr and "a library speaks" not in good.stderr
    assert "a library speaks" in start("--verbosity=0").stderr
    assert bad.returncode == 1 and "did you mean seed?" in bad.stderr
    assert "Traceback" not in bad.stderr
    stray = start("--config.seed=7", "config.names=(1, 2)")
    assert stray.returncode == 1 and "Traceback" not in stray.stderr
    assert "'config.names=(1, 2)' is no flag: flags are written --NAME=VALUE" in stray.stderr
