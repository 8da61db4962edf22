# SPDX-License-Identifier: Apache-2.0
"""The example prints what opd_jax computes, and what the run that stored its rollout computed."""

import json
import re

import numpy as np
import pytest

from examples import release_rule
from opd_jax.algorithm import selectors
from opd_jax.algorithm.selector import Signals

ROW = json.loads(release_rule.ROLLOUT.read_text())


@pytest.fixture
def printed(capsys):
    release = release_rule.main([])
    return release, capsys.readouterr().out


def test_the_printed_release_point_is_the_selectors(printed):
    """Edits it catches: another rule, another sentence for a token, a print of something else."""
    release, text = printed
    signals = Signals(
        valid_bt=np.ones((1, len(ROW["ids"])), bool),
        margin_bt=np.array([ROW["margin"]]),
        spans_b=[[tuple(span) for span in ROW["spans"]]],
    )
    chosen = selectors.build("bic")(signals)
    assert re.search(r"release point: token (\d+) of (\d+)", text).groups() == (
        str(chosen.release_b[0]),
        str(len(ROW["ids"])),
    )
    assert release == chosen.release_b[0] == ROW["release"] < len(ROW["ids"])
    gain = float(re.search(r"BIC_1\(tau\*\) = ([-\d.]+) > 0", text)[1])
    assert gain == pytest.approx(chosen.gain_b[0], abs=0.01) == pytest.approx(ROW["gain"], abs=0.02)


def test_every_printed_figure_is_what_the_run_stored(printed):
    _, text = printed
    scores = [float(x) for x in re.findall(r"S_i = ([\d.]+)  '", text)]
    np.testing.assert_allclose(scores, ROW["scores"], atol=0.006)
    starts = [int(x) for x in re.findall(r"tokens +(\d+) to", text)]
    assert starts == [start for start, _ in ROW["spans"]]
    margins = [float(x) for x in re.findall(r"M_t = +([\d.]+) ", text)]
    np.testing.assert_allclose(margins, ROW["margin"][: release_rule.SHOWN], atol=0.006)
    around = slice(ROW["release"] - 3, ROW["release"] + 3)
    weights = [float(x) for x in re.findall(r"row's mean = ([\d.]+)", text)]
    np.testing.assert_allclose(weights, ROW["weight"][around], atol=1e-4)
    assert [int(x) for x in re.findall(r"q_t = (\d)", text)] == ROW["supervised"][around]


def test_the_best_bic_is_marked_and_rises_do_not_compete(printed):
    _, text = printed
    table = re.findall(r"tau=(\d+) +BIC_1 = +([-\d.]+).*?= +([-\d.]+)(.*)", text)
    marked = [int(tau) for tau, *_, mark in table if "tau*" in mark]
    best = min((float(bic), int(tau)) for tau, bic, drop, _ in table if float(drop) > 0)
    assert marked == [best[1]] == [ROW["change_point"]]
    assert [float(drop) < 0 for *_, drop, _ in table] == ["rise" in mark for *_, mark in table]


def test_the_stored_rollout_is_small():
    assert release_rule.ROLLOUT.stat().st_size < 60_000
