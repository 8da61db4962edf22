# SPDX-License-Identifier: Apache-2.0
"""Controls without a change point, and other methods' token selections. Host, numpy."""

import dataclasses
from typing import ClassVar

import numpy as np

from opd_jax.algorithm.selector import Selection, Selector, Signals, selection
from opd_jax.settings import number


@dataclasses.dataclass(frozen=True)
class Full(Selector):
    """Every token: plain on-policy distillation. Paper, baseline OPD."""

    def __call__(self, signals: Signals) -> Selection:
        return selection(signals, signals.valid_bt)


@dataclasses.dataclass(frozen=True)
class FixedPrefix(Selector):
    """The first `length` tokens. Paper, baselines OPD-1024 to OPD-8192."""

    length: int = number(1024, least=1)  # tokens

    def __call__(self, signals: Signals) -> Selection:
        release_b = np.minimum(signals.length_b, self.length)
        return selection(signals, signals.position_1t < release_b[:, None], release_b=release_b)


@dataclasses.dataclass(frozen=True)
class FixedFraction(Selector):
    """The first `fraction` of each response, at least one token. Control; IW-OPD's Prefix-30."""

    fraction: float = number(0.3, above=0, most=1)

    def __call__(self, signals: Signals) -> Selection:
        release_b = _part(self.fraction, signals.length_b)
        return selection(signals, signals.position_1t < release_b[:, None], release_b=release_b)


@dataclasses.dataclass(frozen=True)
class SuffixOnly(Selector):
    """The last `fraction` of each response alone. Control; IW-OPD's Suffix-30."""

    fraction: float = number(0.3, above=0, most=1)

    def __call__(self, signals: Signals) -> Selection:
        first_b = signals.length_b - _part(self.fraction, signals.length_b)
        return selection(signals, signals.position_1t >= first_b[:, None])


@dataclasses.dataclass(frozen=True)
class GrowingPrefix(Selector):
    """The first L tokens, L growing linearly over the run. FastOPD, arXiv 2602.15260.

    L goes from `start_length` at step 0 to `end_length` at step grow_steps - 1 (0 = the last step)
    and stays there. FastOPD shortens the rollouts as well; here only the supervision grows.
    """

    start_length: int = number(256, least=1)  # tokens
    end_length: int = number(4096, least=1)  # tokens
    grow_steps: int = number(0, least=0)  # 0 = the run's

    def __post_init__(self) -> None:
        super().__post_init__()
        start = self.start_length
        self.require(
            self.end_length >= start, "end_length", f"at least start_length={start}", start
        )

    def __call__(self, signals: Signals) -> Selection:
        steps = max((self.grow_steps or signals.num_steps) - 1, 1)
        share = min(signals.step / steps, 1.0)
        length = self.start_length + int(share * (self.end_length - self.start_length))
        return FixedPrefix(length=length)(signals)


@dataclasses.dataclass(frozen=True)
class PositionWeights(Selector):
    """w_t = 1 + gamma (1 - sum_{k<t} |A_k| / sum_k |A_k|). IW-OPD, arXiv 2606.22600.

    Every token is supervised; early ones weigh up to 1 + gamma, late ones 1. Where all advantages
    of a row are zero, the share is taken as 0.
    """

    gamma: float = number(0.5, least=0)

    needs: ClassVar[frozenset[str]] = frozenset({"teacher_logp_bt"})

    def __call__(self, signals: Signals) -> Selection:
        size_bt = np.where(signals.usable, np.abs(signals.advantage_bt), 0.0).astype(np.float64)
        total_b1 = size_bt.sum(axis=1, keepdims=True)
        share_bt = (np.cumsum(size_bt, axis=1) - size_bt) / np.where(total_b1 > 0, total_b1, 1.0)
        weight_bt = 1.0 + self.gamma * (1.0 - share_bt)
        return selection(signals, signals.valid_bt, weight_bt)


@dataclasses.dataclass(frozen=True)
class TopFraction(Selector):
    """The `fraction` of the batch's tokens at which the student is least certain.

    arXiv 2603.25562's option (top 20 % by entropy); the base of the two below. Over the whole
    batch, at least one token; of equal scores the first in (row, position) order wins.
    """

    fraction: float = number(0.2, above=0, most=1)

    scope: ClassVar[str] = "batch"
    one_per_row: ClassVar[bool] = False  # True: each row keeps its best token in any case

    def parts(self, signals: Signals) -> list[np.ndarray]:
        """What the score is made of: float arrays [B, T], gathered over hosts before `score`."""
        return [signals.student_entropy_bt]

    def score(self, parts: list[np.ndarray]) -> np.ndarray:
        """float[N], the score of every usable token of the batch; parts are float64[N]."""
        return parts[0]

    def __call__(self, signals: Signals) -> Selection:
        parts = [signals.gather(np.asarray(p, np.float32)) for p in self.parts(signals)]
        usable_bt = signals.gather(signals.usable)
        for part_bt in parts:
            usable_bt = usable_bt & np.isfinite(part_bt)
        score_bt = np.full(usable_bt.shape, -np.inf)
        supervised_bt = np.zeros(usable_bt.shape, bool)
        if usable_bt.any():
            score_n = self.score([part_bt[usable_bt].astype(np.float64) for part_bt in parts])
            num = max(1, int(np.ceil(self.fraction * len(score_n) - 1e-9)))
            chosen_n = np.zeros(len(score_n), bool)
            chosen_n[np.argsort(-score_n, kind="stable")[:num]] = True
            score_bt[usable_bt], supervised_bt[usable_bt] = score_n, chosen_n
            if self.one_per_row:
                best_b = np.argmax(score_bt, axis=1)
                supervised_bt[np.arange(len(best_b)), best_b] |= usable_bt.any(axis=1)
        return selection(signals, signals.local(supervised_bt))


@dataclasses.dataclass(frozen=True)
class Teachability(TopFraction):
    """The batch's top tokens by divergence times compatibility. TA-OPD, arXiv 2605.26844.

    D = KL(p_T || p_S), both renormalised on the student's candidates; C = teacher mass on them;
    each mapped to [0, 1] by the batch's 5 and 95 % quantiles; score D C; at least one token per
    row. The authors take D on the union of both models' top 16; the student's values of the
    teacher's own tokens are not known before the update, so ours is on the student's set.
    """

    fraction: float = number(0.1, above=0, most=1)

    needs: ClassVar[frozenset[str]] = frozenset({"teacher_logp_btk"})
    one_per_row: ClassVar[bool] = True

    def parts(self, signals: Signals) -> list[np.ndarray]:
        teacher_btk = _usable(signals, signals.teacher_logp_btk)
        student_btk = _usable(signals, signals.candidate_logp_btk)
        mass_bt1 = np.logaddexp.reduce(teacher_btk, axis=-1, keepdims=True)
        teacher_btk = teacher_btk - mass_bt1
        student_btk = student_btk - np.logaddexp.reduce(student_btk, axis=-1, keepdims=True)
        divergence_bt = np.sum(np.exp(teacher_btk) * (teacher_btk - student_btk), axis=-1)
        return [divergence_bt, np.exp(mass_bt1[..., 0])]

    def score(self, parts: list[np.ndarray]) -> np.ndarray:
        divergence_n, mass_n = (_unit(part, *np.quantile(part, [0.05, 0.95])) for part in parts)
        return divergence_n * mass_n


@dataclasses.dataclass(frozen=True)
class Tip(TopFraction):
    """The batch's top tokens by s = h + d - h d. TIP, arXiv 2604.14084.

    h = student entropy, d = KL(p_S || p_T), both min-max scaled over the batch. The KL is the part
    that is known before the update: on the student's candidates, with all other tokens as one more
    outcome, which is a lower bound of the full one.
    """

    fraction: float = number(0.5, above=0, most=1)

    needs: ClassVar[frozenset[str]] = frozenset({"teacher_logp_btk"})

    def parts(self, signals: Signals) -> list[np.ndarray]:
        logp_btk = _usable(signals, signals.candidate_logp_btk)
        logq_btk = _usable(signals, signals.teacher_logp_btk)
        kl_bt = np.sum(np.exp(logp_btk) * (logp_btk - logq_btk), axis=-1)
        p_rest_bt, q_rest_bt = _rest(logp_btk), _rest(logq_btk)
        return [signals.student_entropy_bt, kl_bt + p_rest_bt * np.log(p_rest_bt / q_rest_bt)]

    def score(self, parts: list[np.ndarray]) -> np.ndarray:
        entropy_n, divergence_n = (_unit(part, part.min(), part.max()) for part in parts)
        return entropy_n + divergence_n - entropy_n * divergence_n


def _usable(signals: Signals, value_btk: np.ndarray) -> np.ndarray:
    """float64[B, T, K], with -1 on tokens that are not usable: those may hold anything."""
    return np.where(signals.usable[..., None], value_btk, -1.0).astype(np.float64)


def _part(fraction: float, length_b: np.ndarray) -> np.ndarray:
    """ceil(fraction * length), int[B], safe against the product's rounding."""
    return np.ceil(fraction * length_b - 1e-9).astype(np.int64)


def _rest(logp_btk: np.ndarray) -> np.ndarray:
    """Probability outside the candidates; at least float32's rounding, as it comes from float32."""
    return np.maximum(1.0 - np.exp(logp_btk).sum(axis=-1), np.finfo(np.float32).eps)


def _unit(value_n: np.ndarray, low: float, high: float) -> np.ndarray:
    """[low, high] to [0, 1], clipped; 0 where there is no spread."""
    if not high > low:
        return np.zeros_like(value_n)
    return np.clip((value_n - low) / (high - low), 0.0, 1.0)


SELECTORS: dict[str, type[Selector]] = {
    "full": Full,
    "fixed_prefix": FixedPrefix,
    "fixed_fraction": FixedFraction,
    "suffix_only": SuffixOnly,
    "growing_prefix": GrowingPrefix,
    "iw_opd": PositionWeights,
    "entropy": TopFraction,
    "ta_opd": Teachability,
    "tip": Tip,
}
