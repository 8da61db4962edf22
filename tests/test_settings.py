# SPDX-License-Identifier: Apache-2.0
"""A settings dataclass refuses what it cannot hold, by flag; its advice is a flag that works."""

import dataclasses
import math
import shlex

import ml_collections as mlc
import pytest

from launch import config_flags
from opd_jax import settings
from opd_jax.settings import Section, choice, number


@dataclasses.dataclass(frozen=True)
class Oven(Section):
    section = "oven"

    kind: str = choice("gas", ("gas", "wood"))
    heat: float = number(200.0, above=0, most=300, why="bread burns above")
    racks: int = number(2, least=1)
    light: bool = True
    name: str = ""
    sizes: tuple = (("door", 3), ("base", -1))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(kind="coal"), "config.oven.kind='coal' must be one of gas, wood"),
        (dict(heat=0.0), "config.oven.heat=0.0 must be a number above 0 and at most 300: bread"),
        (dict(heat=300.5), "config.oven.heat=300.5"),
        (dict(heat=math.nan), "config.oven.heat=nan"),
        (dict(heat=math.inf), "config.oven.heat=inf"),
        (dict(heat="hot"), "config.oven.heat='hot' must be of type float"),
        (dict(heat=True), "config.oven.heat=True must be of type float"),
        (dict(racks=0), "config.oven.racks=0 must be a number at least 1"),
        (dict(racks=1.5), "config.oven.racks=1.5 must be of type int"),
        (dict(racks=True), "config.oven.racks=True must be of type int"),
        (dict(light=1), "config.oven.light=1 must be of type bool"),
        (dict(name=3), "config.oven.name=3 must be of type str"),
        (dict(sizes=[1]), "config.oven.sizes=[1] must be of type tuple"),
    ],
)
def test_what_a_setting_cannot_be_is_refused(given, said):
    with pytest.raises(ValueError) as refused:
        Oven(**given)
    message = str(refused.value)
    assert message.startswith(said)
    (name,) = given
    assert message.endswith(settings.flag(f"oven.{name}", getattr(Oven(), name)))


@pytest.mark.parametrize(
    "given",
    [dict(heat=300), dict(heat=1e-30), dict(racks=1), dict(kind="wood"), dict(sizes=())],
)
def test_what_lies_in_its_range_is_taken(given):
    (name,) = given
    assert getattr(Oven(**given), name) == given[name]


def test_a_number_without_a_range_is_a_programmers_error():
    @dataclasses.dataclass(frozen=True)
    class Loose(Section):
        number: int = 3

    with pytest.raises(TypeError, match="number has no range"):
        Loose()


@pytest.mark.parametrize(
    "value", ["", "a b", "it's", "$HOME", (), ("x",), (("data", 1), ("fsdp", -1)), 1e-8, -1, True]
)
def test_a_flag_survives_a_shell_and_says_the_value(value):
    """Through a shell's word splitting and the flag parser of every command."""
    (word,) = shlex.split(settings.flag("key", value))
    config = mlc.ConfigDict(dict(key=value))
    overrides = dict([word.removeprefix("--config.").split("=", 1)])
    assert config_flags.apply_overrides(config.lock(), overrides).key == value
