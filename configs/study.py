# SPDX-License-Identifier: Apache-2.0
"""The controlled study: does the release rule beat full OPD and the best fixed prefix, on our pair?

  python -m launch.sweep --config=configs/study.py --workdir=runs/study --jobs=2
  python -m launch.study --workdir=runs/study            # tables; also in the report
  python -m launch.report --workdir=runs/study

Every arm starts from the same student. Per seed it sees the same prompts and, at its first update,
the same rollouts; `launch.study` checks their hash. One run per arm and seed serves the comparisons
at equal updates, equal supervised tokens and equal seconds. The comparisons were fixed before the
first run: learning rate and length are those of quickstart.py, chosen with full OPD alone.

`--config=configs/study.py:more` runs the arms of MORE into the same workdir. `:collapse` runs the
core arms on the pair that was built to collapse (configs/tiny.py), in a workdir of its own; another
pair: --config.student.path=DIR --config.teacher.path=DIR.
"""

import ml_collections as mlc

from configs import quickstart

SEEDS = range(5)
FULL, RULE = "full OPD", "release rule"
PREFIXES = (20, 40, 60)  # tokens: a quarter, half and three quarters of a median solution
CORE = {  # arm -> what it changes
    FULL: {"selector.kind": "full"},
    RULE: {"selector.kind": "bic", "selector.min_side": 1},
    "release rule, min_side 3": {"selector.kind": "bic", "selector.min_side": 3},
    **{
        f"first {n} tokens": {"selector.kind": "fixed_prefix", "selector.length": n}
        for n in PREFIXES
    },
    "shuffled release points": {"selector.kind": "shuffled_bic"},
    "last 30 % only": {"selector.kind": "suffix_only", "selector.fraction": 0.3},
}
SFT = {"rollout.by": "teacher", "objective.kind": "cross_entropy", "selector.kind": "full"}
TOP_K = {"objective.kind": "reverse_kl", "objective.support": "student_k"}
MORE = {
    "random release points": {"selector.kind": "random_bic"},
    "release by std of advantage": {"selector.kind": "advantage_std_bic"},
    "SFT on teacher samples": SFT,
    "IW-OPD": {"selector.kind": "iw_opd"},
    "top-K reverse KL, full": {"selector.kind": "full", **TOP_K},
    "top-K reverse KL, release rule": {"selector.kind": "bic", "selector.min_side": 1, **TOP_K},
}
ARMS = CORE | MORE
VARIANTS = {"core": CORE, "more": MORE, "collapse": CORE}


def get_config(variant: str = "core") -> mlc.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"config variant {variant!r} is unknown; use one of {', '.join(VARIANTS)}")
    c = quickstart.get_config()
    if variant == "collapse":
        c.student.path = "embedded:collapse_student"
    c.num_steps = 40
    c.evaluate.every_steps = 10  # the comparisons at equal tokens and seconds read between these
    c.evaluate.num_ood_problems = 100
    c.evaluate.teacher = False
    c.checkpoint.update(every_steps=0, keep_last=1, keep_best=0)
    c.log.tensorboard = False
    return c


def sweep(variant: str = "core"):
    arms = VARIANTS[variant].values()
    yield from ({**changes, "seed": seed} for seed in SEEDS for changes in arms)


def arm_of(config: dict) -> str | None:
    """The arm that a flat resolved config belongs to; None = none of the study."""
    keys = {key for changes in ARMS.values() for key in changes}
    plain = get_config()
    for name, changes in ARMS.items():
        wanted = {key: changes.get(key, _lookup(plain, key)) for key in keys}
        if all(config.get(key) == value for key, value in wanted.items()):
            return name
    return None


def _lookup(config: mlc.ConfigDict, key: str):
    for part in key.split("."):
        config = config[part]
    return config
