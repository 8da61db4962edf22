# SPDX-License-Identifier: Apache-2.0
"""docs/method.md names flags that exist and functions that are where it says."""

import importlib
import pathlib
import re

import pytest

from launch import config_flags
from opd_jax.config import read

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "docs/method.md").read_text()
FLAGS = sorted(set(re.findall(r"--config\.([\w.]+)(?:=([\w.]+))?", TEXT)))
# "`file.py`, `name`" and "`file.py`: `name` ..., `name` ...", up to the end of the paragraph.
CODE = re.findall(r"(opd_jax/\w+/\w+)\.py`[,:] ((?:.|\n(?!\n))*?)(?=`opd_jax/|\n\n)", TEXT)


@pytest.mark.parametrize("key, value", FLAGS)
def test_each_flag_is_a_key_and_takes_the_value(key, value):
    config = config_flags.load(str(ROOT / "configs/base.py"))
    section, name = key.split(".")
    assert name in config[section]
    if value:
        given = {"True": True, "False": False}.get(value, type(config[section][name])(value))
        config = config_flags.apply_overrides(config, {key: given})
        read(config)


def test_the_code_is_where_it_says():
    found = {(file, name) for file, rest in CODE for name in re.findall(r"`([A-Za-z]\w+)`", rest)}
    assert len(found) >= 9
    for file, name in found:
        assert hasattr(importlib.import_module(file.replace("/", ".")), name), (file, name)
