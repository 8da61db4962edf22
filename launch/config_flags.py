# SPDX-License-Identifier: Apache-2.0
"""The config flag that every launcher shares: `--config=FILE[:VARIANT] --config.KEY=VALUE ...`.

A launcher:

    CONFIG = config_flags.define()

    def main(_):
        train.run(CONFIG.value, ...)

    if __name__ == "__main__":
        config_flags.run(main)

ml_collections parses the flags; this module checks them first, so that a wrong file, variant, key
or value is refused with a flag and a value that work. Without a command line:

    config = config_flags.load("configs/quickstart.py:tiny")
    config = config_flags.apply_overrides(config, {"selector.kind": "full", "seed": 3})
    elements = config_flags.load_sweep("configs/quickstart.py")  # [{"seed": 0}, ...]
    config = config_flags.config_of(["--config=configs/quickstart.py", "--config.seed=1"])

Each raises ConfigError (a ValueError).
"""

import difflib
import functools
import importlib.util
import inspect
import os
import pathlib
import re
import shlex
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections as mlc
from absl import app, flags
from ml_collections import config_flags as mlc_flags

from opd_jax.settings import flatten
from opd_jax.workdir import preemption

flags.disclaim_key_flags()  # --config belongs to the launcher that calls define(): --help shows it

EXAMPLE = "--config=configs/quickstart.py"

_OVERRIDE = re.compile(r"--?(no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)
_WANTED = {bool: "true or false", int: "a whole number", float: "a number", tuple: "a tuple"}


class ConfigError(flags.Error, ValueError):
    """A config file, key or value that cannot be used; the message says what can."""


def define(
    required: bool = True,
    flag_values: flags.FlagValues = flags.FLAGS,
    argv: Sequence[str] | None = None,
) -> flags.FlagHolder:
    """Defines `--config`; the holder's `.value` is the locked ConfigDict, overrides applied.

    Args:
      required: whether a command line without it is refused.
      flag_values: where the flag is registered.
      argv: where ml_collections looks for overrides; None = sys.argv.
    """
    holder = mlc_flags.DEFINE_config_file(
        "config",
        help_string=f"FILE[:VARIANT], as {EXAMPLE}; --config.KEY=VALUE overrides one of its keys",
        flag_values=flag_values,
        sys_argv=argv,
    )
    if required:
        flags.register_validator(
            "config",
            lambda config: config is not None,
            message=f"no config was given; add {EXAMPLE}",
            flag_values=flag_values,
        )
    return holder


def run(main: Callable[[list[str]], Any], takes_arguments: bool = False) -> None:
    """absl's app.run; bad flags end with one message and status 1, libraries' INFO is not shown.

    Ctrl-C ends the command with one line and status 75.

    Args:
      takes_arguments: whether arguments that are no flags, or follow `--`, go to `main`; otherwise
        they are refused.
    """
    parser = functools.partial(_parse_or_exit, takes_arguments=takes_arguments)
    with preemption.stoppable():
        app.run(main, flags_parser=parser)


def _parse_or_exit(argv: list[str], takes_arguments: bool) -> list[str]:
    try:
        left = parse(argv)
        if len(left) > 1 and not takes_arguments:
            raise ConfigError(
                f"{shlex.join(left[1:])} is no flag: flags are written --NAME=VALUE, in quotes "
                "where the value holds spaces"
            )
    except flags.Error as error:
        sys.exit(f"ERROR: {error}\nSee --help for the flags.")
    # absl would go on to show every library's INFO lines; --verbosity=0 still does.
    flags.FLAGS["verbosity"].using_default_value = False
    return left


def config_of(arguments: Sequence[str]) -> mlc.ConfigDict:
    """The config that the flags of another command give; its other flags are left alone."""
    argv = ["", *arguments]
    flag_values = flags.FlagValues()
    holder = define(flag_values=flag_values, argv=argv)
    parse(argv, flag_values, known_only=True)
    return holder.value


def parse(
    argv: list[str], flag_values: flags.FlagValues = flags.FLAGS, known_only: bool = False
) -> list[str]:
    """Parses argv (with the program's name first) and returns what is left of it.

    Args:
      known_only: leave flags that are not defined, as positional arguments are.

    Raises:
      ConfigError: a config file, variant, key or value that cannot be used.
      flags.Error: any other flag that cannot be used.
    """
    argv = expand_home(argv)
    path, keys = _config_arguments(argv)
    if path is None:
        if keys:
            raise ConfigError(f"--config.{keys[0]} is given but --config is not; add {EXAMPLE}")
        return flag_values(argv, known_only=known_only)
    config = load(path)
    for key in keys:
        check_key(config, key)
        if keys.count(key) > 1 and isinstance(flatten(config)[key], tuple):
            raise ConfigError(
                f"--config.{key} is given twice, and ml_collections would join the two tuples; "
                "give it once"
            )
    try:
        return flag_values(argv, known_only=known_only)
    except flags.IllegalFlagValueError as error:
        raise _wrong_value(config, error) from None


def expand_home(argv: Sequence[str]) -> list[str]:
    """--FLAG=~/DIR with the home directory in place of ~, which a shell leaves after a "="."""
    end = argv.index("--") if "--" in argv else len(argv)  # what follows is another command's
    home = re.compile(r"(--?[^=]+=)(~.*)", re.DOTALL)
    return [
        match[1] + os.path.expanduser(match[2]) if i < end and (match := home.fullmatch(x)) else x
        for i, x in enumerate(argv)
    ]


def load(path: str) -> mlc.ConfigDict:
    """Runs get_config of "FILE" or "FILE:VARIANT" and returns its config, locked."""
    file, _, variant = path.partition(":")
    module = _load_module(file)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={file} has no function get_config(); see configs/base.py")
    takes_variant = bool(inspect.signature(module.get_config).parameters)
    if variant and not takes_variant:
        raise ConfigError(f"--config={path}: {file} has no variants; use --config={file}")
    try:
        config = module.get_config(*([variant] if variant else []))
    except ValueError as error:  # how a config file refuses a variant
        raise ConfigError(f"--config={path}: {error}") from error
    return config.lock()


def load_sweep(path: str) -> list[dict[str, Any]]:
    """The elements that sweep() of a config file yields, dotted key to value; [] = no sweep().

    A sweep with a parameter is given the variant, as get_config is.
    """
    file, _, variant = path.partition(":")
    module = _load_module(file)
    if not hasattr(module, "sweep"):
        return []
    takes_variant = variant and inspect.signature(module.sweep).parameters
    return [
        dict(element) for element in (module.sweep(variant) if takes_variant else module.sweep())
    ]


def apply_overrides(config: mlc.ConfigDict, overrides: Mapping[str, Any]) -> mlc.ConfigDict:
    """A locked copy of `config` with dotted keys set, as `--config.KEY=VALUE` would set them.

    Values are what a flag takes (text) or Python values of the key's type.
    """
    argv = ["config_flags", *as_flags(overrides)]
    copy = mlc.ConfigDict(config.to_dict())
    for key in overrides:
        check_key(copy, key)
    flag_values = flags.FlagValues()
    try:
        mlc_flags.DEFINE_config_dict("config", copy, flag_values=flag_values, sys_argv=argv)
        flag_values(argv)
    except flags.IllegalFlagValueError as error:
        raise _wrong_value(config, error) from None
    return copy.lock()


def as_flags(overrides: Mapping[str, Any]) -> list[str]:
    """["--config.KEY=VALUE", ...] of dotted keys and values."""
    return [f"--config.{key}={as_text(value)}" for key, value in overrides.items()]


def as_line(overrides: Mapping[str, Any]) -> str:
    """The same as one line for a shell, quoted where it needs that."""
    quoted = {key: shlex.quote(as_text(value)) for key, value in overrides.items()}
    return " ".join(f"--config.{key}={text}" for key, text in quoted.items())


def as_text(value: Any) -> str:
    """What a flag takes for this value; apply_overrides gives the same value back."""
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    if isinstance(value, tuple) and '"' not in text:
        return text.replace("'", '"')  # a shell's single quotes can then go around it
    return text


def check_key(config: mlc.ConfigDict, key: str) -> None:
    """Raises ConfigError unless the dotted key names one value that a flag can set."""
    names = flatten(config)
    if key not in names:
        raise ConfigError(f"config has no key {key!r}; {_nearest(key, names)}")
    if type(names[key]) not in (*_WANTED, str):
        raise ConfigError(
            f"--config.{key} cannot be set by a flag: its value is {names[key]!r}, of type "
            f"{type(names[key]).__name__}; set it in a config file"
        )


def _nearest(key: str, names: Mapping[str, Any]) -> str:
    """What to write instead of an unknown key: a section's keys, or the nearest ones."""
    inside = [name for name in names if name.startswith(key + ".")]
    if inside:
        return f"it is a section: set one of {', '.join('--config.' + name for name in inside)}"
    last = key.rpartition(".")[2]
    same_end = [name for name in names if name.rpartition(".")[2] == last]
    close = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
    guesses = list(dict.fromkeys(same_end + close))[:3]
    if not guesses:
        return "see configs/base.py for every key"
    example = as_line({guesses[0]: names[guesses[0]]})
    return f"did you mean {' or '.join(guesses)}? For example {example}"


def _wrong_value(config: mlc.ConfigDict, error: flags.IllegalFlagValueError) -> flags.Error:
    """The error to raise instead of ml_collections' when a value does not fit its key."""
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
    if match is None:
        return error
    key, given = match.groups()
    value = flatten(config)[key]
    return ConfigError(
        f"--config.{key}={given} must be {_WANTED[type(value)]}, as in the config file: "
        f"{as_line({key: value})}"
    )


def _config_arguments(argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config in argv (None if absent) and the dotted keys it overrides."""
    path, keys = None, []
    for index, argument in enumerate(argv):
        if argument == "--":
            break
        if re.fullmatch(r"--?config", argument):
            path = argv[index + 1] if index + 1 < len(argv) else None
        elif match := re.fullmatch(r"--?config=(.*)", argument):
            path = match[1]
        elif match := _OVERRIDE.fullmatch(argument):
            keys.append(match[2])
    return path, keys


def _load_module(file: str) -> types.ModuleType:
    """Runs a config file as a module of its own."""
    path = pathlib.Path(file)
    if not path.is_file():
        there = sorted(str(other) for other in pathlib.Path("configs").glob("[!_]*.py"))
        close = difflib.get_close_matches(file, there, n=1, cutoff=0.3)
        example = f"--config={close[0]}" if close else EXAMPLE
        raise ConfigError(f"--config={file}: no such file; use one that exists, as {example}")
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={file} is not a Python file; use one like {EXAMPLE}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
