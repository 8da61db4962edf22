# SPDX-License-Identifier: Apache-2.0
"""config.selector -> a selector: the release rule, its controls, or another method's choice.

To add a selector: a frozen dataclass in baselines.py (or release.py), whose fields are its
settings, and its name in that file's `SELECTORS`; --config.selector.kind=NAME then reaches it. A
setting that configs/base.py lacks keeps its default; one that stands there can be set by flag.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from opd_jax.algorithm import baselines, release
from opd_jax.algorithm.selector import Selector
from opd_jax.settings import Section, choice, flag

SELECTORS: dict[str, type[Selector]] = release.SELECTORS | baselines.SELECTORS
# Those that look at positions alone, at nothing that a model says.
POSITIONAL = ("full", "fixed_prefix", "fixed_fraction", "suffix_only", "growing_prefix")
# Stands for the kind's own `fraction`, as the default differs between kinds.
OWN_FRACTION = 0.0


@dataclasses.dataclass(frozen=True)
class Kind(Section):
    """config.selector.kind."""

    section = "selector"

    kind: str = choice("bic", tuple(SELECTORS))


def of(section: Mapping[str, Any]) -> Selector:
    """The selector of config.selector, which holds the settings of all kinds.

    Raises:
      ValueError: an unknown kind, a value out of range, or a setting that the kind does not read
        and that is not at its default.
    """
    values = dict(section)
    kind = values.pop("kind")
    own = settings(kind)
    for name, value in values.items():
        default = DEFAULTS.get(name, value)
        if name not in own and value != default:
            readers = [other for other in SELECTORS if name in settings(other)]
            raise ValueError(
                f"config.selector.{name}={value!r} is not read by kind={kind}. Set "
                f"{flag(f'selector.{name}', default)}, or "
                f"{flag('selector.kind', readers[0])} ({', '.join(readers)})"
            )
    return build(kind, **{name: value for name, value in values.items() if name in own})


def build(kind: str, **values: Any) -> Selector:
    """The selector `kind`, a key of `SELECTORS`, and its settings; others keep their default.

    `fraction=0` stands for the kind's own default.

    Raises:
      ValueError: an unknown kind or setting, or a value out of range; names a flag that works.
    """
    own = settings(kind)
    for name in values:
        if name not in own:
            raise ValueError(
                f"selector {kind!r} has no setting {name!r}; it has: {', '.join(own) or 'none'}. "
                f"Leave --config.selector.{name} out, or set another --config.selector.kind"
            )
    if values.get("fraction") == OWN_FRACTION:
        del values["fraction"]
    return SELECTORS[kind](**values)


def settings(kind: str) -> tuple[str, ...]:
    """Names of the settings that the selector `kind` reads; ValueError for an unknown kind."""
    return tuple(field.name for field in dataclasses.fields(SELECTORS[Kind(kind).kind]))


# Name -> default of every setting of every kind.
DEFAULTS: dict[str, Any] = {
    field.name: field.default for cls in SELECTORS.values() for field in dataclasses.fields(cls)
} | {"fraction": OWN_FRACTION}


def check_positional(selector: Selector) -> None:
    """Raises ValueError unless `selector` can choose among tokens that the teacher sampled.

    Of such a token only what the teacher says is known: candidates, entropy and log-probs.
    """
    kind = next(kind for kind, cls in SELECTORS.items() if type(selector) is cls)
    if kind not in POSITIONAL:
        raise ValueError(
            f"config.selector.kind={kind!r} looks at what the student says of its own samples, but "
            "config.rollout.by='teacher'. Set "
            f"--config.selector.kind=full (or {', '.join(POSITIONAL[1:])})"
        )
