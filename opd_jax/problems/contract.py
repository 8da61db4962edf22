# SPDX-License-Identifier: Apache-2.0
"""What student, teacher and reference must agree on, checked before the first step.

On-policy distillation scores the student's own tokens with the teacher. That means something only
if both read the same ids the same way, see the same prompt, stop at the same tokens, and if
log-probs are of the distribution that was sampled. Pure functions over plain values.

One difference of the prompts is none: Qwen3's hybrid models, in non-thinking mode, end the prompt
with an empty think block, and the 2507 Instruct models do not. The teacher scores the rollout's
own tokens, so it reads the student's prompt, block or no block, as in the public implementations of
the method.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from opd_jax.settings import flag

NAMES = {
    "token_ids": "the same string has the same id in both vocabularies",
    "vocab_size": "the models have the same true vocabulary, padded rows left out",
    "padded_rows": "no head has fewer rows than its vocabulary",
    "eos": "responses end at the same ids (151643 and 151645 differ between base and instruct)",
    "template": "the rendered prompts are equal but for an empty think block at their end",
    "sampling": "temperature 1 and no filter, as the log-probs in the loss assume",
}
EMPTY_THINK = "<think>\n\n</think>\n\n"
NO_FILTER = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@dataclasses.dataclass(frozen=True)
class Side:
    """What the check looks at of one model: student, teacher or reference."""

    name: str
    token_ids: Mapping[str, int]  # token string -> id, special ones included
    vocab_size: int  # ids that mean something
    head_rows: int  # rows of the model's head: >= vocab_size; the rest is padding
    eos_ids: Sequence[int]  # that end a response
    rendered: Sequence[str]  # a few prompts after the chat template, generation prompt included


class Sampling(Protocol):
    """How responses are drawn (`stages.sampling.Knobs`)."""

    @property
    def temperature(self) -> float: ...

    @property
    def top_k(self) -> int: ...

    @property
    def top_p(self) -> float: ...

    @property
    def min_p(self) -> float: ...


def check_contract(
    student: Side, others: Iterable[Side], sampling: Sampling, allow: Sequence[str] = ()
) -> list[str]:
    """Compares every other side with the student.

    Args:
      student: the reference point.
      others: teacher, reference model.
      sampling: how rollouts are drawn.
      allow: names of NAMES whose mismatches are deliberate.

    Returns:
      Lines for the log: the mismatches that were allowed, and a prompt that ends with an empty
      think block on one side only.

    Raises:
      ValueError: lists every mismatch that is not allowed, with both values and the flag that
        allows it; or an unknown name in `allow`.
    """
    known = tuple(name for name in allow if name in NAMES)
    unknown = sorted(set(allow) - set(NAMES))
    if unknown:
        raise ValueError(
            f"contract_allow names {unknown}, which are no checks; the checks are "
            f"{', '.join(NAMES)}. Set {flag('contract_allow', known)}"
        )
    found, notes = [*_sampling(sampling), *_rows(student)], []
    for other in others:
        found += [*_rows(other), *_token_ids(student, other), *_vocab_size(student, other)]
        found += [*_eos(student, other), *_template(student, other)]
        notes += _think_block(student, other)
    refused = [(name, text) for name, text in found if name not in known]
    if refused:
        lines = "\n".join(f"  {name}: {text}" for name, text in refused)
        names = tuple(dict.fromkeys((*known, *(name for name, _ in refused))))
        raise ValueError(
            f"student and the others do not fit together:\n{lines}\n"
            f"Make them equal, or, where it is meant, set {flag('contract_allow', names)}"
        )
    return [f"{name}, allowed by config.contract_allow: {text}" for name, text in found] + notes


def _sampling(sampling):
    off = [name for name, neutral in NO_FILTER.items() if getattr(sampling, name) != neutral]
    if off:
        given = ", ".join(f"{name}={getattr(sampling, name)}" for name in off)
        flags = " ".join(flag(f"rollout.{name}", NO_FILTER[name]) for name in off)
        yield (
            "sampling",
            f"rollouts are sampled with {given}, but the loss takes log-probs at temperature 1 "
            f"over the whole vocabulary; set {flags}",
        )


def _rows(side):
    if side.head_rows < side.vocab_size:
        yield (
            "padded_rows",
            f"{side.name}'s head has {side.head_rows} rows for {side.vocab_size} tokens",
        )


def _vocab_size(student, other):
    if student.vocab_size != other.vocab_size:
        yield (
            "vocab_size",
            f"student has {student.vocab_size} tokens, {other.name} {other.vocab_size}",
        )


def _token_ids(student, other):
    ours, theirs = student.token_ids, other.token_ids
    moved = [t for t in ours if t in theirs and ours[t] != theirs[t]]
    missing = [t for t in ours if t not in theirs]
    extra = [t for t in theirs if t not in ours]
    kinds = (
        (moved, "another id", lambda t: f"{t!r} is {ours[t]} and {theirs[t]}"),
        (missing, f"no id in {other.name}", lambda t: f"{t!r} ({ours[t]})"),
        (extra, "no id in student", lambda t: f"{t!r} ({theirs[t]})"),
    )
    for tokens, what, show in kinds:
        if tokens:
            some = ", ".join(show(t) for t in tokens[:5])
            more = f", and {len(tokens) - 5} more" if len(tokens) > 5 else ""
            yield (
                "token_ids",
                f"student and {other.name}: {len(tokens)} tokens have {what}: {some}{more}",
            )


def _eos(student, other):
    if set(student.eos_ids) != set(other.eos_ids):
        ours, theirs = sorted(student.eos_ids), sorted(other.eos_ids)
        yield "eos", f"student ends at {ours}, {other.name} at {theirs}"


def _template(student, other):
    for i, pair in enumerate(zip(student.rendered, other.rendered, strict=True)):
        ours, theirs = (text.removesuffix(EMPTY_THINK) for text in pair)
        if ours != theirs:
            at = next(
                (k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                min(len(ours), len(theirs)),
            )
            start = max(0, at - 20)
            yield (
                "template",
                f"prompt {i} differs at character {at}: student ...{ours[start : at + 30]!r}, "
                f"{other.name} ...{theirs[start : at + 30]!r}",
            )
            return


def _think_block(student, other):
    """Says it once if, of two prompts that are else equal, one ends with an empty think block."""
    for ours, theirs in zip(student.rendered, other.rendered, strict=True):
        if theirs + EMPTY_THINK == ours:
            yield (
                "the student's prompts end with an empty think block (its chat template's "
                f"non-thinking mode), {other.name}'s would not: {other.name} scores the student's "
                "own tokens, block included"
            )
            return
        if ours + EMPTY_THINK == theirs:
            yield (
                f"{other.name}'s prompts would end with an empty think block (its chat template's "
                f"non-thinking mode), the student's do not: {other.name} scores the student's own "
                "tokens, without the block"
            )
            return
