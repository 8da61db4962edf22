# SPDX-License-Identifier: Apache-2.0
"""Configs: every key is read once, settable by flag, and says what it is."""

import collections
import dataclasses
import pathlib
import re

import ml_collections as mlc
import pytest

from launch import config_flags
from opd_jax import build
from opd_jax.algorithm import margin, segments, selectors
from opd_jax.algorithm.objective import Objective
from tests import fakes

ROOT = pathlib.Path(__file__).parent.parent


class Recorder:
    """A ConfigDict that counts how often each key is read."""

    def __init__(self, config: mlc.ConfigDict, counts: collections.Counter, prefix: str = ""):
        self._config, self._counts, self._prefix = config, counts, prefix

    def __getattr__(self, name):
        return self[name]

    def __getitem__(self, name):
        value = self._config[name]
        if isinstance(value, mlc.ConfigDict):
            return Recorder(value, self._counts, f"{self._prefix}{name}.")
        self._counts[self._prefix + name] += 1
        return value

    def to_dict(self):
        if self._prefix:  # the whole config is only written down
            self._counts.update(self._prefix + name for name in self._config)
        return self._config.to_dict()


def test_every_key_is_read_exactly_once(tmp_path, pair, on_one_device):
    config = fakes.small_config(pair)
    counts = collections.Counter()
    build.build(Recorder(config, counts), str(tmp_path / "run")).__exit__()
    expected = dict.fromkeys(config_flags.flatten(config), 1)
    assert dict(counts) == expected


def test_every_key_can_be_set_by_a_flag_to_the_value_it_has():
    config = config_flags.load(str(ROOT / "configs/base.py"))
    keys = config_flags.flatten(config)
    assert len(keys) > 80
    again = config_flags.apply_overrides(config, keys)
    assert config_flags.flatten(again) == keys


def test_every_key_of_base_has_a_comment_or_a_plain_name():
    """A unit and a meaning stand beside each key; the optimiser's are optax's own names."""
    plain = {"learning_rate", "warmup_steps", "b1", "b2", "eps", "weight_decay", "kind"}
    text = (ROOT / "configs/base.py").read_text()
    for line in text.splitlines():
        if match := re.fullmatch(r"        (\w+)=.*?,( *#.*)?", line):
            assert match[2] or match[1] in plain, line


@pytest.mark.parametrize("kind", selectors.SELECTORS)
def test_base_names_the_default_of_each_selector(kind):
    section = config_flags.load(str(ROOT / "configs/base.py")).selector.to_dict()
    assert selectors.of(section | {"kind": kind}) == selectors.SELECTORS[kind]()


@pytest.mark.parametrize("cls", [margin.Settings, segments.Settings, Objective])
def test_base_holds_every_setting_at_its_default(cls):
    section = config_flags.load(str(ROOT / "configs/base.py"))[cls.section]
    assert section.to_dict() == dataclasses.asdict(cls())


def test_base_holds_no_setting_that_no_selector_reads():
    section = config_flags.load(str(ROOT / "configs/base.py")).selector.to_dict()
    assert section == {"kind": selectors.Kind().kind, **selectors.DEFAULTS}


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/[!_]*.py")), ids=lambda p: p.stem)
def test_every_config_loads_and_its_sweep_fits_it(path):
    config = config_flags.load(str(path))
    for element in config_flags.load_sweep(str(path)):
        config_flags.apply_overrides(config, element)
