# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import oracle
import pytest

from opd_jax.algorithm import profiles

B, T, K = 3, 50, 4
LENGTH = np.array([50, 7, 0])


def batch():
    rng = np.random.default_rng(0)
    valid = np.arange(T) < LENGTH[:, None]
    logp, logq = (np.log(rng.dirichlet(np.ones(8), (B, T))) for _ in range(2))
    usable = valid.copy()
    usable[0, 3] = False
    inputs = dict(
        usable_bt=usable,
        supervised_bt=valid & (np.arange(T) < 9),
        margin_bt=rng.random((B, T)),
        teacher_logp_bt=logq[..., 5],
        sampler_logp_bt=logp[..., 5],
        teacher_logp_btk=logq[..., :K],
        candidate_logp_btk=logp[..., :K],
        student_entropy_bt=rng.random((B, T)),
        teacher_entropy_bt=rng.random((B, T)),
    )
    for value in inputs.values():
        if value.dtype == float:
            value[0, 3] = np.nan  # an unusable token may hold anything
            value[1, 8:] = np.inf  # and so may what is not valid
    return valid, inputs


def per_token(**x):
    names = ("margin", "student_entropy", "teacher_entropy")
    measured = {name: x.pop(f"{name}_bt") for name in names if f"{name}_bt" in x}
    return profiles.per_token(measured=measured, **x)


def expected_value(name, x, b, t):
    advantage = x["teacher_logp_bt"][b, t] - x["sampler_logp_bt"][b, t]
    teacher, student = list(x["teacher_logp_btk"][b, t]), list(x["candidate_logp_btk"][b, t])
    return {
        "margin": lambda: x["margin_bt"][b, t],
        "advantage_variance": lambda: oracle.advantage_variance(teacher, student),
        "advantage": lambda: advantage,
        "abs_advantage": lambda: abs(advantage),
        "student_entropy": lambda: x["student_entropy_bt"][b, t],
        "teacher_entropy": lambda: x["teacher_entropy_bt"][b, t],
        "teacher_mass": lambda: sum(math.exp(q) for q in teacher),
        "log_ratio_supervised": lambda: advantage if x["supervised_bt"][b, t] else None,
        "log_ratio_released": lambda: None if x["supervised_bt"][b, t] else advantage,
    }[name]()


def check(table, place, size, x, valid):
    for name in profiles.NAMES:
        total, count = np.zeros(size), np.zeros(size)
        for b, t in np.argwhere(valid & x["usable_bt"]):
            value = expected_value(name, x, b, t)
            if value is not None:
                total[place(b, t)] += value
                count[place(b, t)] += 1
        np.testing.assert_allclose(table[name + "_sum"], total, atol=1e-9, err_msg=name)
        np.testing.assert_array_equal(table[name + "_count"], count, err_msg=name)
    assert set(table) == {n + s for n in profiles.NAMES for s in ("_sum", "_count")}


def test_by_relative_position():
    valid, x = batch()
    table = profiles.by_position(per_token(**x), valid)
    check(table, lambda b, t: int(20 * t / LENGTH[b]), 20, x, valid)


def test_by_sentence_and_the_last_entry_takes_the_rest():
    valid, x = batch()
    spans = [[(i, i + 5) for i in range(0, 50, 5)], [(0, 7)], []]
    table = profiles.by_sentence(per_token(**x), spans, valid, num_sentences=4)
    check(table, lambda b, t: min(t // 5, 3) if b == 0 else 0, 4, x, valid)


def test_what_is_not_there_is_left_out():
    valid, x = batch()
    found = per_token(
        usable_bt=x["usable_bt"], supervised_bt=x["supervised_bt"], margin_bt=x["margin_bt"]
    )
    assert set(found) == {"margin"}
    assert set(profiles.by_position(found, valid)) == {"margin_sum", "margin_count"}


@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 3)])
def test_sums_of_parts_add_up(rows):
    valid, x = batch()
    whole = profiles.by_position(per_token(**x), valid)
    part = {k: v[rows] for k, v in x.items()}
    rest = {k: np.delete(v, np.arange(B)[rows], axis=0) for k, v in x.items()}
    a = profiles.by_position(per_token(**part), valid[rows])
    b = profiles.by_position(per_token(**rest), np.delete(valid, np.arange(B)[rows], axis=0))
    for key, value in whole.items():
        np.testing.assert_allclose(value, a[key] + b[key], atol=1e-12)
