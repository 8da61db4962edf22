# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import numpy as np
import pytest
import rollouts

from opd_jax import structs
from opd_jax.algorithm import margin, segments, selectors
from opd_jax.stages import selection

TOKEN_BYTES = [b". " if i % 7 == 0 else bytes([65 + i % 26]) for i in range(rollouts.V - 2)] + [
    b""
] * 2


def scores_of(rollout, seed=0):
    rng = np.random.default_rng(seed)
    shape = rollout.candidate_logp_btk.shape
    return structs.Scores(
        teacher_logp_bt=(rollout.sampler_logp_bt - rng.random(shape[:2])).astype(np.float32),
        teacher_logp_btk=(rollout.candidate_logp_btk - rng.exponential(size=shape)).astype(
            np.float32
        ),
    )


def choose(rollout, scores, kind="bic", step=0, **knobs):
    with selection.build(selectors.build(kind), TOKEN_BYTES, **knobs) as stage:
        stage.start(rollout)
        return stage.finish(rollout, scores, step)


def test_finish_is_the_algorithms_functions_in_a_row():
    rollout = rollouts.make_rollout(T=40)
    scores = scores_of(rollout)
    chosen = choose(rollout, scores)
    np.testing.assert_array_equal(
        chosen.margin_bt[rollout.valid_bt],
        margin.teacher_margin(scores.teacher_logp_btk)[rollout.valid_bt],
    )
    assert np.all(np.isnan(chosen.margin_bt[~rollout.valid_bt]))
    for b, spans in enumerate(chosen.spans_b):
        tokens = rollout.tokens_bt[b][rollout.valid_bt[b]]
        assert spans == segments.segment([TOKEN_BYTES[i] for i in tokens])
    wanted = selectors.build("bic")(
        selectors.Signals(
            valid_bt=rollout.valid_bt, margin_bt=chosen.margin_bt, spans_b=chosen.spans_b
        )
    )
    np.testing.assert_array_equal(chosen.supervised_bt, wanted.supervised_bt)
    np.testing.assert_array_equal(chosen.gain_b, wanted.gain_b)
    weight, denominator = selectors.loss_weights(
        wanted.supervised_bt, wanted.weight_bt, rollout.valid_bt
    )
    np.testing.assert_array_equal(chosen.weight_bt, weight)
    assert chosen.denominator == denominator == len(rollout.tokens_bt)
    supervised_b, length_b = chosen.supervised_bt.sum(1), rollout.valid_bt.sum(1)
    np.testing.assert_allclose(chosen.rescale_b, length_b / supervised_b, rtol=1e-6)
    assert chosen.stats["selection/nonfinite_tokens"] == (0, rollout.valid_bt.sum())


def test_values_that_are_not_finite_are_masked_and_counted():
    rollout, bad = rollouts.make_rollout(T=40), {}
    clean = scores_of(rollout)
    bad = scores_of(rollout)
    bad.teacher_logp_bt[0, 3] = np.nan
    bad.teacher_logp_btk[0, 5, 1] = -np.inf
    bad.teacher_logp_btk[:, :][~rollout.valid_bt] = np.nan  # what is not valid does not count
    chosen = choose(rollout, bad, "full", want_spans=True)
    usable = rollout.valid_bt.copy()
    usable[0, [3, 5]] = False
    np.testing.assert_array_equal(chosen.supervised_bt, usable)
    np.testing.assert_array_equal(chosen.weight_bt > 0, usable)
    np.testing.assert_array_equal(np.isfinite(chosen.margin_bt), usable)
    assert chosen.stats["selection/nonfinite_tokens"] == (2, rollout.valid_bt.sum())
    np.testing.assert_allclose(chosen.weight_bt.sum(1), 1.0, rtol=1e-6)  # l leaves them out, too
    other = choose(rollout, clean, "full")
    np.testing.assert_array_equal(chosen.weight_bt[1:], other.weight_bt[1:])  # never spread
    for kind in selectors.SELECTORS:
        assert np.all(np.isfinite(choose(rollout, bad, kind).weight_bt))


def test_a_row_without_a_single_usable_token_leaves_the_denominator():
    rollout = rollouts.make_rollout(T=40)
    scores = scores_of(rollout)
    scores.teacher_logp_bt[2] = np.nan
    chosen = choose(rollout, scores)
    assert chosen.denominator == len(rollout.tokens_bt) - 1
    assert not chosen.weight_bt[2].any() and chosen.gain_b[2] == -np.inf


def test_worker_processes_find_what_this_process_finds():
    rollout = rollouts.make_rollout(B=9, T=40)
    scores = scores_of(rollout)
    here = choose(rollout, scores)
    with selection.build(selectors.build("bic"), TOKEN_BYTES, num_workers=2) as stage:
        for _ in range(2):
            stage.start(rollout)
            there = stage.finish(rollout, scores, 0)
            assert there.spans_b == here.spans_b
            np.testing.assert_array_equal(there.weight_bt, here.weight_bt)
        for worker in stage.pool._idle.queue:  # killed between steps: replaced, nothing lost
            worker.kill()
        stage.start(rollout)
        assert stage.finish(rollout, scores, 0).spans_b == here.spans_b
        assert there.stats["selection/segmented_in_line"] == (0, 1)


def test_a_lost_chunk_is_segmented_in_line_and_counted(monkeypatch):
    rollout = rollouts.make_rollout(T=40)
    with selection.build(selectors.build("bic"), TOKEN_BYTES, num_workers=1) as stage:
        monkeypatch.setattr(stage.pool, "_call", lambda rows: (_ for _ in ()).throw(EOFError))
        stage.start(rollout)
        chosen = stage.finish(rollout, scores_of(rollout), 0)
    assert chosen.stats["selection/segmented_in_line"] == (4, 1)
    assert chosen.spans_b == choose(rollout, scores_of(rollout)).spans_b


def test_nobody_segments_what_nobody_reads():
    rollout = rollouts.make_rollout()
    with selection.build(selectors.build("full"), TOKEN_BYTES, num_workers=3) as stage:
        assert stage.pool is None
        stage.start(rollout)
        assert stage.finish(rollout, structs.Scores(), 0).spans_b is None
    with selection.build(selectors.build("full"), TOKEN_BYTES, want_spans=True) as stage:
        stage.start(rollout)
        assert len(stage.finish(rollout, structs.Scores(), 0).spans_b) == len(rollout.tokens_bt)


def test_include_sampled_adds_the_sampled_token_to_the_margin():
    rollout = rollouts.make_rollout()
    rollout.tokens_bt[0, 0] = next(
        i for i in range(rollouts.V) if i not in rollout.candidates_btk[0, 0]
    )
    scores = scores_of(rollout)
    scores.teacher_logp_bt[0, 0] = scores.teacher_logp_btk[0, 0].max() + 5.0
    plain, wide = (choose(rollout, scores, include_sampled=flag) for flag in (False, True))
    assert wide.margin_bt[0, 0] == pytest.approx(5.0, rel=1e-5) and plain.margin_bt[0, 0] != 5.0
    stage = selection.build(selectors.build("bic"), TOKEN_BYTES, include_sampled=True)
    assert stage.needs == {"teacher_logp_bt", "teacher_logp_btk"}


def test_random_draws_follow_from_seed_and_step_alone():
    rollout = rollouts.make_rollout(B=16, T=40)
    scores = scores_of(rollout)

    def release(**knobs):
        return list(choose(rollout, scores, "shuffled_bic", **knobs).release_b)

    assert release(seed=1, step=3) == release(seed=1, step=3)
    assert release(seed=1, step=3) != release(seed=1, step=4)
    assert release(seed=1, step=3) != release(seed=2, step=3)


def test_hosts_take_their_own_rows_of_a_batch_wide_choice():
    rollout = rollouts.make_rollout(B=8, T=40)
    scores = scores_of(rollout)
    whole = choose(rollout, scores, "shuffled_bic")
    asked = []
    choose(rollout, scores, "shuffled_bic", gather=lambda x: asked.append(x) or x)

    def cut(tree):  # rows 4 to 7
        return type(tree)(**{k: None if v is None else v[4:] for k, v in vars(tree).items()})

    replies = iter(asked)
    half = choose(
        cut(rollout), cut(scores), "shuffled_bic", gather=lambda x: next(replies), feed_index=1
    )
    np.testing.assert_array_equal(half.release_b, whole.release_b[4:])


def test_the_worker_imports_no_jax():
    code = (
        "import sys; from opd_jax import workers; from opd_jax.algorithm import segments;"
        "assert segments.segment([b'Hi. ', b'Yes.']); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_finish_without_start_is_a_programmers_error():
    rollout = rollouts.make_rollout()
    stage = selection.build(selectors.build("bic"), TOKEN_BYTES)
    with pytest.raises(RuntimeError, match="before selection.start"):
        stage.finish(rollout, scores_of(rollout), 0)
