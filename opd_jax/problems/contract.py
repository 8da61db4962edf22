# SPDX-License-Identifier: Apache-2.0
"""What student, teacher and evaluation must agree on, checked before the first step.

On-policy distillation scores the student's own tokens with the teacher. That means something only
if both read the same ids the same way, see the same prompt, stop at the same tokens, and if
log-probs are of the distribution that was sampled. Pure functions over plain values.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

NAMES = {
    "token_ids": "the same string has the same id in both vocabularies",
    "vocab_size": "the models have the same true vocabulary, padded rows left out",
    "padded_rows": "no head has fewer rows than its vocabulary",
    "eos": "responses end at the same ids (151643 and 151645 differ between base and instruct)",
    "template": "the rendered prompts are equal, character by character",
    "thinking": "thinking mode is the same in training and evaluation",
    "sampling": "temperature 1 and no filter, as the log-probs in the loss assume",
    "evaluation_sampling": "evaluation samples as training does",
}


@dataclasses.dataclass(frozen=True)
class Side:
    """What the check looks at of one party: student, teacher, reference or evaluation."""

    name: str
    token_ids: Mapping[str, int]  # token string -> id, special ones included
    vocab_size: int  # ids that mean something
    head_rows: int  # rows of the model's head: >= vocab_size; the rest is padding
    eos_ids: Sequence[int]  # that end a response
    rendered: Sequence[str]  # a few prompts after the chat template, generation prompt included
    thinking: bool = False


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How responses are drawn; top_k = 0, top_p = 1 and min_p = 0 mean no filter."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def check_contract(
    student: Side,
    others: Iterable[Side],
    training: Sampling,
    evaluation: Sampling | None = None,
    allow: Iterable[str] = (),
) -> list[str]:
    """Compares every other side with the student.

    Args:
      student: the reference point.
      others: teacher, reference model, evaluation.
      training, evaluation: how each samples; None = no evaluation.
      allow: names of NAMES whose mismatches are deliberate.

    Returns:
      The mismatches that were allowed, one line each, for the log.

    Raises:
      ValueError: lists every mismatch that is not allowed, with both values and the name that
        allows it; or an unknown name in `allow`.
    """
    allow = tuple(allow)
    unknown = sorted(set(allow) - set(NAMES))
    if unknown:
        raise ValueError(
            f"contract_allow names {unknown}, which are no checks; the checks are "
            f"{', '.join(NAMES)}. Set --config.contract_allow=\"('eos',)\" to allow one"
        )
    found = [*_sampling(training, evaluation), *_rows(student)]
    for other in others:
        found += [*_rows(other), *_token_ids(student, other), *_vocab_size(student, other)]
        found += [*_eos(student, other), *_template(student, other), *_thinking(student, other)]
    refused = [(name, text) for name, text in found if name not in allow]
    if refused:
        lines = "\n".join(f"  {name}: {text}" for name, text in refused)
        names = tuple(dict.fromkeys(name for name, _ in refused))
        raise ValueError(
            f"student and the others do not fit together:\n{lines}\n"
            f"Make them equal, or, where it is meant, set --config.contract_allow={names!r}"
        )
    return [f"{name} (allowed): {text}" for name, text in found]


def _sampling(training, evaluation):
    if training != Sampling():
        given = _differences(training, Sampling())
        yield (
            "sampling",
            f"rollouts are sampled with {given}, but the loss takes log-probs at temperature 1 "
            "over the whole vocabulary; set --config.rollout.temperature=1.0 and no filter",
        )
    if evaluation is not None and evaluation != training:
        given = _differences(evaluation, training)
        yield "evaluation_sampling", f"evaluation differs from training in {given}"


def _differences(ours, theirs):
    fields = (field.name for field in dataclasses.fields(Sampling))
    pairs = ((name, getattr(ours, name), getattr(theirs, name)) for name in fields)
    return ", ".join(f"{name}={a} (not {b})" for name, a, b in pairs if a != b)


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
    for i, (ours, theirs) in enumerate(zip(student.rendered, other.rendered, strict=True)):
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


def _thinking(student, other):
    if student.thinking != other.thinking:
        yield (
            "thinking",
            f"thinking is {student.thinking} for student and {other.thinking} for {other.name}",
        )
