# SPDX-License-Identifier: Apache-2.0
"""A model that the config names: its directory and shape at once, its weights when asked for."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from opd_jax.model import hf, qwen3
from opd_jax.model.backend import DTYPES
from opd_jax.settings import Section, choice, flag


@dataclasses.dataclass(frozen=True)
class Source(Section):
    """A Hugging Face directory, a hub id, or an embedded model."""

    path: str = ""  # "" = this run has no such model
    param_dtype: str = choice("float32", DTYPES)  # that the parameters are held in

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.param_dtype)

    @functools.cached_property
    def directory(self) -> Path:
        """Raises ValueError, naming the flag, where there is no such model."""
        try:
            return hf.resolve(self.path)
        except FileNotFoundError as error:
            works = flag(f"{self.section}.path", f"embedded:{self.section}")
            raise ValueError(
                f"{flag(f'{self.section}.path', self.path)}: {error} For example {works}"
            ) from error

    @functools.cached_property
    def config(self) -> qwen3.Qwen3Config | None:
        """The model's shape; None where there is no model."""
        return qwen3.Qwen3Config.from_hf(self.directory) if self.path else None

    def load(self, shardings: Any) -> qwen3.Params:
        """Parameters, each device's own part; `shardings` as `qwen3.param_axes`."""
        return hf.load(self.directory, dtype=self.dtype, shardings=shardings)[1]


@dataclasses.dataclass(frozen=True)
class Student(Source):
    section = "student"
    path: str = "embedded:student"


@dataclasses.dataclass(frozen=True)
class Teacher(Source):
    section = "teacher"
    path: str = "embedded:teacher"


@dataclasses.dataclass(frozen=True)
class Reference(Source):
    """ExOPD's reference model."""

    section = "reference"
