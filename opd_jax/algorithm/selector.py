# SPDX-License-Identifier: Apache-2.0
"""What every selector reads and returns. Host, numpy."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from opd_jax.algorithm.segments import Spans
from opd_jax.settings import Section

# What Selector.needs may name: two fields of the teacher's scores, and the segments.
NEEDS = ("teacher_logp_bt", "teacher_logp_btk", "spans")
# Field of Signals -> what a selector names in `needs` to read it.
NEEDED_FOR = {
    "advantage_bt": "teacher_logp_bt",
    "margin_bt": "teacher_logp_btk",
    "teacher_logp_btk": "teacher_logp_btk",
    "spans_b": "spans",
}


def local_rows(rows: np.ndarray) -> np.ndarray:
    """The gather of a single host: this host's rows are all rows."""
    return rows


@dataclasses.dataclass(frozen=True)
class Signals:
    """What a selector may look at; index t is response token t.

    Arrays hold this host's rows, equally many on each host. The fields of `NEEDED_FOR` are handed
    out only to a selector that names them in `needs`: what is there by chance, because a log asks
    for it, must not change what is trained. Reading another raises AttributeError.
    """

    valid_bt: np.ndarray  # bool[B, T], True = sampled token, EOS included
    usable_bt: np.ndarray | None = None  # bool[B, T], valid and finite teacher; None = valid_bt
    finished_b: np.ndarray | None = None  # bool[B], True = the last valid token is EOS
    student_entropy_bt: np.ndarray | None = None  # float[B, T], nats
    candidate_logp_btk: np.ndarray | None = None  # float[B, T, K], nats, student, not renormalised
    margin_bt: np.ndarray | None = None  # float[B, T], >= 0, see margin.py
    advantage_bt: np.ndarray | None = None  # float[B, T], nats, log p_T - log p_S, sampled token
    teacher_logp_btk: np.ndarray | None = None  # float[B, T, K], nats, on the student's candidates
    spans_b: list[Spans] | None = None  # per row, token spans of its segments
    step: int = 0
    num_steps: int = 1
    rng: np.random.Generator | None = None  # from run seed and step: the same on every host
    gather: Callable[[np.ndarray], np.ndarray] = local_rows  # this host's rows -> all, in order
    first_row: int = 0  # where this host's rows start in what `gather` returns

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if value is None and name in NEEDED_FOR:
            raise AttributeError(
                f"a selector reads signals.{name}, which it did not ask for: add "
                f"{NEEDED_FOR[name]!r} to its `needs`, as "
                f"needs: ClassVar[frozenset[str]] = frozenset({{{NEEDED_FOR[name]!r}}})"
            )
        return value

    @property
    def length_b(self) -> np.ndarray:
        """int[B], number of valid tokens."""
        return self.valid_bt.sum(axis=1)

    @property
    def usable(self) -> np.ndarray:
        """bool[B, T], usable_bt or valid_bt."""
        return self.valid_bt if self.usable_bt is None else self.usable_bt

    @property
    def position_1t(self) -> np.ndarray:
        """int[1, T], the index of each token."""
        return np.arange(self.valid_bt.shape[1])[None]

    def local(self, rows: np.ndarray) -> np.ndarray:
        """This host's rows of what `gather` returned."""
        return rows[self.first_row : self.first_row + len(self.valid_bt)]


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which tokens a selector supervises, and how much; none that is not usable."""

    supervised_bt: np.ndarray  # bool[B, T], True = takes part in the update at full strength
    weight_bt: np.ndarray  # float32[B, T], 1 = plain; outside supervised 0, or a soft tail's weight
    release_b: np.ndarray  # int[B], first token no longer supervised; = length: nothing released
    gain_b: np.ndarray  # float[B], nats, of the best drop; -inf = no drop, NaN = not sought


@dataclasses.dataclass(frozen=True)
class Selector(Section):
    """Base of all selectors: called with `Signals`, returns a `Selection`.

    Subclasses are frozen dataclasses; their fields are settings of config.selector.
    """

    section: ClassVar[str] = "selector"
    needs: ClassVar[frozenset[str]] = frozenset()  # of NEEDS
    scope: ClassVar[str] = "row"  # "batch": calls signals.gather, so every host has to take part

    def __call__(self, signals: Signals) -> Selection:
        raise NotImplementedError


def selection(
    signals: Signals,
    supervised_bt: np.ndarray,
    weight_bt: np.ndarray | None = None,
    release_b: np.ndarray | None = None,
    gain_b: np.ndarray | None = None,
) -> Selection:
    """`Selection` with defaults filled in; tokens that are not usable take part in nothing."""
    supervised_bt = supervised_bt & signals.usable
    weight_bt = supervised_bt if weight_bt is None else np.where(signals.usable, weight_bt, 0)
    return Selection(
        supervised_bt=supervised_bt,
        weight_bt=weight_bt.astype(np.float32),
        release_b=signals.length_b if release_b is None else release_b,
        gain_b=np.full(len(supervised_bt), np.nan) if gain_b is None else gain_b,
    )
