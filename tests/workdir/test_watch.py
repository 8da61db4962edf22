# SPDX-License-Identifier: Apache-2.0
"""Each named warning speaks on its own trouble and is silent on a healthy run."""

import re

import pytest

from opd_jax.workdir import watch


def run(**trend) -> list[dict]:
    """Twelve healthy rows; a trend (first, last) moves one metric linearly."""
    healthy = {
        "response/length_mean": 100.0,
        "response/repetition_rate": 0.1,
        "response/truncation_rate": 0.1,
        "release/rate": 0.6,
        "bic/gain_mean": 10.0,
        "student/entropy": 0.5,
        "sampler_gap/mean": 1e-6,
    }
    rows = []
    for i in range(12):
        row = dict(healthy)
        for key, (a, b) in trend.items():
            row[key] = a + (b - a) * i / 11
        rows.append(row)
    return rows


def test_a_healthy_run_is_silent():
    assert watch.warnings(run()) == {}


@pytest.mark.parametrize(
    "name, key, trend",
    [
        ("length_inflation", "response/length_mean", (100, 400)),
        ("repetition_saturation", "response/repetition_rate", (0.1, 0.9)),
        ("truncation", "response/truncation_rate", (0.9, 1.0)),
        ("release_rate_stuck_at_0", "release/rate", (0.0, 0.0)),
        ("release_rate_stuck_at_1", "release/rate", (1.0, 1.0)),
        ("entropy_collapse", "student/entropy", (0.5, -0.12)),
        ("sampler_gap", "sampler_gap/mean", (1e-3, 0.3)),
    ],
)
def test_each_trouble_is_named_with_a_flag_to_try(name, key, trend):
    found = watch.warnings(run(**{key: trend}))
    assert list(found) == [name]
    assert re.search(r"--config\.\w+\.\w+", found[name])


def test_a_full_supervision_run_is_not_told_that_nothing_is_released():
    rows = run(**{"release/rate": (0.0, 0.0)})
    for row in rows:
        row["bic/gain_mean"] = None  # the selector makes no test
    assert watch.warnings(rows) == {}
