# SPDX-License-Identifier: Apache-2.0
"""The whole config as one object; each section is a dataclass beside the code that uses it.

configs/base.py is the page a user reads: every key with its unit and meaning. This is what the code
reads, and nothing but this module sees a ConfigDict.
"""

import dataclasses
from typing import Any

import ml_collections as mlc

from opd_jax import parallel
from opd_jax.algorithm import selectors
from opd_jax.algorithm.margin import Settings as Margin
from opd_jax.algorithm.objective import Objective
from opd_jax.algorithm.segments import Settings as Segment
from opd_jax.algorithm.selector import Selector
from opd_jax.model.backend import Settings as Model
from opd_jax.model.source import Reference, Student, Teacher
from opd_jax.recorder import Settings as Log
from opd_jax.settings import Section, number
from opd_jax.stages.evaluate import Settings as Evaluate
from opd_jax.stages.optimizer import Settings as Optim
from opd_jax.stages.packing import Settings as Pack
from opd_jax.stages.prompts import Settings as Data
from opd_jax.stages.rollout import Settings as Rollout
from opd_jax.workdir.checkpoint import Settings as Checkpoint


@dataclasses.dataclass(frozen=True)
class Settings(Section):
    """The sections, and the keys that stand outside of them."""

    student: Student = Student()
    teacher: Teacher = Teacher()
    reference: Reference = Reference()
    model: Model = Model()
    data: Data = Data()
    rollout: Rollout = Rollout()
    pack: Pack = Pack()
    margin: Margin = Margin()
    segment: Segment = Segment()
    selector: Selector = selectors.build("bic")
    objective: Objective = Objective()
    optim: Optim = Optim()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    log: Log = Log()
    seed: int = number(0, least=0, below=2**32)  # everything random follows from it and the step
    num_steps: int = number(100, least=1)  # updates
    contract_allow: tuple = ()  # student-teacher mismatches accepted by name
    mesh: tuple = parallel.DEFAULT_MESH  # (axis, size) pairs; -1 takes the devices that are left

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs = all(isinstance(p, tuple) and [*map(type, p)] == [str, int] for p in self.mesh)
        self.require(pairs, "mesh", "pairs of an axis and a size", parallel.DEFAULT_MESH)
        names = all(isinstance(name, str) for name in self.contract_allow)
        self.require(names, "contract_allow", "a tuple of names", ())

    @property
    def needs(self) -> frozenset[str]:
        """Fields of structs.Scores that somebody reads."""
        sampled = {"teacher_logp_bt"} if self.margin.include_sampled else frozenset()
        return (self.objective.needs | (self.selector.needs - {"spans"}) | sampled) | self.log.needs


def read(config: mlc.ConfigDict) -> Settings:
    """Reads every key once. Raises ValueError, naming the flag, at the first that cannot be."""
    found = {}
    for field in dataclasses.fields(Settings):
        value = config[field.name]
        if field.name == "selector":
            value = selectors.of(value.to_dict())
        elif issubclass(field.type, Section):
            value = field.type(**value.to_dict())
        found[field.name] = _tuples(value)
    return Settings(**found)


def defaults() -> dict[str, Any]:
    """Every key at its default, nested like the config."""
    values = dataclasses.asdict(Settings())
    return values | {"selector": {"kind": "bic"} | selectors.DEFAULTS}


def _tuples(value):
    """A stored config comes from JSON, which has no tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
