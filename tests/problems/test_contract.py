# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from opd_jax.problems import contract

IDS = {"a": 0, "b": 1, "<|im_end|>": 2, "<|endoftext|>": 3}
STUDENT = contract.Side(
    name="student",
    token_ids=IDS,
    vocab_size=4,
    head_rows=8,
    eos_ids=(2, 3),
    rendered=("<user>1 + 1<assistant>", "<user>2<assistant>"),
)
PLAIN = contract.Sampling()


def teacher(**changes):
    return dataclasses.replace(STUDENT, name="teacher", **changes)


def test_equal_sides_pass_whatever_their_padding():
    other = teacher(head_rows=16, eos_ids=(3, 2))
    assert contract.check_contract(STUDENT, [other], PLAIN, PLAIN) == []


MISMATCHES = [
    (
        "token_ids",
        dict(token_ids=IDS | {"a": 1, "b": 0}),
        "2 tokens have another id: 'a' is 0 and 1",
    ),
    (
        "token_ids",
        dict(token_ids={k: v for k, v in IDS.items() if k != "a"}),
        "no id in teacher: 'a'",
    ),
    ("token_ids", dict(token_ids=IDS | {"c": 9}), "no id in student: 'c' \\(9\\)"),
    ("vocab_size", dict(vocab_size=5), "student has 4 tokens, teacher 5"),
    ("padded_rows", dict(head_rows=3), "teacher's head has 3 rows for 4 tokens"),
    ("eos", dict(eos_ids=(3,)), "student ends at \\[2, 3\\], teacher at \\[3\\]"),
    (
        "template",
        dict(rendered=("<user>1 + 1<think>", STUDENT.rendered[1])),
        "differs at character 12",
    ),
    ("template", dict(rendered=("<user>1 + 1", STUDENT.rendered[1])), "differs at character 11"),
    ("thinking", dict(thinking=True), "False for student and True for teacher"),
]


@pytest.mark.parametrize("name, changes, match", MISMATCHES)
def test_each_mismatch_is_shown_and_can_be_allowed_by_name(name, changes, match):
    with pytest.raises(ValueError, match=match) as caught:
        contract.check_contract(STUDENT, [teacher(**changes)], PLAIN)
    assert f"--config.contract_allow=('{name}',)" in str(caught.value)
    allowed = contract.check_contract(STUDENT, [teacher(**changes)], PLAIN, allow=(name,))
    assert len(allowed) == 1 and allowed[0].startswith(f"{name} (allowed)")


@pytest.mark.parametrize(
    "changes", [dict(temperature=0.7), dict(top_k=50), dict(top_p=0.9), dict(min_p=0.1)]
)
def test_sampling_must_be_what_the_log_probs_assume(changes):
    sampling = contract.Sampling(**changes)
    (name, value) = next(iter(changes.items()))
    with pytest.raises(ValueError, match=f"sampling: .*{name}={value}"):
        contract.check_contract(STUDENT, [], sampling)
    assert contract.check_contract(STUDENT, [], sampling, allow=("sampling",))
    with pytest.raises(ValueError, match=f"evaluation_sampling: .*{name}={value}"):
        contract.check_contract(STUDENT, [], PLAIN, sampling)


def test_all_mismatches_come_in_one_message():
    other = teacher(eos_ids=(3,), vocab_size=5, thinking=True)
    with pytest.raises(ValueError) as caught:
        contract.check_contract(STUDENT, [other], PLAIN, allow=("thinking",))
    message = str(caught.value)
    assert "eos:" in message and "vocab_size:" in message and "thinking:" not in message
    assert "--config.contract_allow=('vocab_size', 'eos')" in message


def test_long_differences_are_cut_and_counted():
    ids = {str(i): i for i in range(100)}
    one = dataclasses.replace(STUDENT, token_ids=ids)
    other = teacher(token_ids={t: 99 - i for t, i in ids.items()})
    with pytest.raises(ValueError, match="100 tokens have another id: .* and 95 more"):
        contract.check_contract(one, [other], PLAIN)


def test_an_unknown_name_to_allow_is_refused():
    with pytest.raises(ValueError, match="no checks; the checks are token_ids, "):
        contract.check_contract(STUDENT, [], PLAIN, allow=("tokens",))
