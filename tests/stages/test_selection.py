# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import numpy as np
import pytest
import rollouts

from opd_jax import structs
from opd_jax.algorithm import margin, segments, selectors
from opd_jax.algorithm.objective import Objective
from opd_jax.algorithm.selector import Selector, Signals
from opd_jax.algorithm.selector import selection as selection_of
from opd_jax.algorithm.weights import loss_weights
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


IN_LINE = segments.Settings(num_workers=0)
WITH_SAMPLED = margin.Settings(include_sampled=True)
ON_CANDIDATES = Objective("reverse_kl", support="student_k")


def build(kind="bic", segment=IN_LINE, **given):
    return selection.build(selectors.build(kind), TOKEN_BYTES, segment=segment, **given)


def choose(rollout, scores, kind="bic", step=0, **given):
    with build(kind, **given) as stage:
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
        Signals(valid_bt=rollout.valid_bt, margin_bt=chosen.margin_bt, spans_b=chosen.spans_b)
    )
    np.testing.assert_array_equal(chosen.supervised_bt, wanted.supervised_bt)
    np.testing.assert_array_equal(chosen.gain_b, wanted.gain_b)
    weight, denominator, factor = loss_weights(
        wanted.supervised_bt, wanted.weight_bt, rollout.valid_bt
    )
    np.testing.assert_array_equal(chosen.weight_bt, weight)
    assert chosen.denominator == denominator == len(rollout.tokens_bt)
    supervised_b, length_b = chosen.supervised_bt.sum(1), rollout.valid_bt.sum(1)
    np.testing.assert_allclose(chosen.rescale_b, length_b / supervised_b)
    np.testing.assert_array_equal(chosen.rescale_b, factor)
    np.testing.assert_array_equal(chosen.num_segments_b, [len(s) for s in chosen.spans_b])
    assert chosen.stats["selection/nonfinite_tokens"] == (0, rollout.valid_bt.sum())


def test_values_that_are_not_finite_are_masked_and_counted():
    rollout, bad = rollouts.make_rollout(T=40), {}
    clean = scores_of(rollout)
    bad = scores_of(rollout)
    bad.teacher_logp_bt[0, 3] = np.nan
    bad.teacher_logp_btk[0, 5, 1] = -np.inf
    bad.teacher_logp_btk[:, :][~rollout.valid_bt] = np.nan  # what is not valid does not count
    chosen = choose(rollout, bad, "full", objective=ON_CANDIDATES, margin=WITH_SAMPLED)
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


@pytest.mark.parametrize("kind", selectors.SELECTORS)
@pytest.mark.parametrize("objective", [Objective(), ON_CANDIDATES], ids=lambda o: o.kind)
def test_what_a_log_asks_for_changes_nothing_that_is_trained(kind, objective):
    """Edits it catches: a signal handed out, or a token masked, for what only a log reads."""
    rollout = rollouts.make_rollout(T=40)
    scores = scores_of(rollout)
    with build(kind, objective=objective) as stage:
        read = stage.needs | objective.needs
    names = {"teacher_logp_bt", "teacher_logp_btk"}
    quiet = scores.replace(**dict.fromkeys(names - read))
    logged = scores.replace(teacher_entropy_bt=np.full(rollout.valid_bt.shape, np.nan))
    for name in names - read:
        getattr(logged, name)[1, 2] = np.nan
    with np.errstate(invalid="raise"):
        one = choose(rollout, quiet, kind, objective=objective)
        other = choose(rollout, logged, kind, objective=objective, want_spans=True)
    for name in ("supervised_bt", "weight_bt", "release_b", "gain_b", "rescale_b", "usable_bt"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize("want_spans", [False, True])
def test_a_selector_that_did_not_name_what_it_reads_is_refused_whatever_is_logged(want_spans):
    class HighMargins(Selector):
        def __call__(self, signals):
            return selection_of(signals, signals.margin_bt > 1.0)

    rollout = rollouts.make_rollout()
    scores = scores_of(rollout) if want_spans else structs.Scores()
    stage = selection.build(HighMargins(), TOKEN_BYTES, segment=IN_LINE, want_spans=want_spans)
    stage.start(rollout)
    with pytest.raises(AttributeError, match="add 'teacher_logp_btk' to its `needs`"):
        stage.finish(rollout, scores, 0)


def test_a_need_that_nobody_delivers_is_refused_at_the_start():
    class Typo(Selector):
        needs = frozenset({"spans", "teacher_logp"})

    with pytest.raises(ValueError, match="Typo.needs names teacher_logp; .* teacher_logp_btk"):
        selection.build(Typo(), TOKEN_BYTES)


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
    with build(segment=segments.Settings(num_workers=2)) as stage:
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
    with build(segment=segments.Settings(num_workers=1)) as stage:
        monkeypatch.setattr(stage.pool, "_call", lambda rows: (_ for _ in ()).throw(EOFError))
        stage.start(rollout)
        chosen = stage.finish(rollout, scores_of(rollout), 0)
    assert chosen.stats["selection/segmented_in_line"] == (4, 1)
    assert chosen.spans_b == choose(rollout, scores_of(rollout)).spans_b


def test_nobody_segments_what_nobody_reads():
    rollout = rollouts.make_rollout()
    with build("full", segments.Settings(num_workers=3)) as stage:
        assert stage.pool is None
        stage.start(rollout)
        assert stage.finish(rollout, structs.Scores(), 0).spans_b is None
    with build("full", want_spans=True) as stage:
        stage.start(rollout)
        assert len(stage.finish(rollout, structs.Scores(), 0).spans_b) == len(rollout.tokens_bt)


def test_include_sampled_adds_the_sampled_token_to_the_margin():
    rollout = rollouts.make_rollout()
    rollout.tokens_bt[0, 0] = next(
        i for i in range(rollouts.V) if i not in rollout.candidates_btk[0, 0]
    )
    scores = scores_of(rollout)
    scores.teacher_logp_bt[0, 0] = scores.teacher_logp_btk[0, 0].max() + 5.0
    plain, wide = choose(rollout, scores), choose(rollout, scores, margin=WITH_SAMPLED)
    assert wide.margin_bt[0, 0] == pytest.approx(5.0, rel=1e-5) and plain.margin_bt[0, 0] != 5.0
    assert build(margin=WITH_SAMPLED).needs == {"teacher_logp_bt", "teacher_logp_btk"}


def test_random_draws_follow_from_seed_and_step_alone():
    rollout = rollouts.make_rollout(B=16, T=40)
    scores = scores_of(rollout)

    def release(seed, step):
        run = selection.Run(seed=seed)
        return list(choose(rollout, scores, "shuffled_bic", step, run=run).release_b)

    assert release(seed=1, step=3) == release(seed=1, step=3)
    assert release(seed=1, step=3) != release(seed=1, step=4)
    assert release(seed=1, step=3) != release(seed=2, step=3)


def test_hosts_take_their_own_rows_of_a_batch_wide_choice():
    rollout = rollouts.make_rollout(B=8, T=40)
    scores = scores_of(rollout)
    whole = choose(rollout, scores, "shuffled_bic")
    asked = []
    asking = selection.Run(gather=lambda x: asked.append(x) or x)
    choose(rollout, scores, "shuffled_bic", run=asking)

    def cut(tree):  # rows 4 to 7
        return type(tree)(**{k: None if v is None else v[4:] for k, v in vars(tree).items()})

    replies = iter(asked)
    second = selection.Run(gather=lambda x: next(replies), host_group=1)
    half = choose(cut(rollout), cut(scores), "shuffled_bic", run=second)
    np.testing.assert_array_equal(half.release_b, whole.release_b[4:])


def test_the_worker_imports_no_jax():
    code = (
        "import sys; from opd_jax import workers; from opd_jax.algorithm import segments;"
        "assert segments.segment([b'Hi. ', b'Yes.']); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_finish_without_start_is_a_programmers_error():
    rollout = rollouts.make_rollout()
    stage = build()
    with pytest.raises(RuntimeError, match="before selection.start"):
        stage.finish(rollout, scores_of(rollout), 0)
