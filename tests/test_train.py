# SPDX-License-Identifier: Apache-2.0
"""The whole loop on a random pair: a golden step, exact resume, preemption, faults, no waste."""

import json
import os
import pathlib
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import build, step, structs, train
from opd_jax.model import hf
from opd_jax.stages import rollout
from opd_jax.workdir import checkpoint, faults, preemption, records
from tests import fakes

GOLDEN = pathlib.Path(__file__).parent / "golden" / "step.json"


@pytest.fixture(autouse=True)
def _one_device(on_one_device):
    """Meshes have their own tests."""


def metrics_of(workdir) -> list[dict]:
    """The rows that must be equal whenever a run is repeated."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))}
        for row in records.read_metrics(workdir)
    ]


def params_of(workdir) -> dict:
    step, params = checkpoint.Checkpoints(str(workdir / "checkpoints")).read_params()
    assert step == 4
    return params


def assert_same_run(a, b):
    assert metrics_of(a) == metrics_of(b)
    for x, y in zip(jax.tree.leaves(params_of(a)), jax.tree.leaves(params_of(b)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pair, one_device_module):
    """A run of four steps that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("run")
    train.run(fakes.small_config(pair), str(workdir))
    return workdir


def fixed_rollout(vocab_size: int) -> structs.Rollout:
    """Eight responses of fixed pseudo-random tokens: short, long, empty, one token."""
    B, P, T, K = 8, 160, 32, 4
    rng = np.random.default_rng(0)
    length_b = np.array([32, 20, 1, 0, 7, 32, 15, 28])
    valid_bt = np.arange(T) < length_b[:, None]
    prompt_valid_bp = np.arange(P) >= P - rng.integers(5, 40, (B, 1))
    logp_btk = -np.sort(rng.exponential(2.0, (B, T, K))).astype(np.float32)
    return structs.Rollout(
        prompt_bp=np.where(prompt_valid_bp, rng.integers(0, vocab_size, (B, P)), 0).astype(
            np.int32
        ),
        prompt_valid_bp=prompt_valid_bp,
        tokens_bt=np.where(valid_bt, rng.integers(0, vocab_size, (B, T)), 0).astype(np.int32),
        valid_bt=valid_bt,
        sampler_logp_bt=np.where(valid_bt, -6.0, 0.0).astype(np.float32),
        candidates_btk=rng.integers(0, vocab_size, (B, T, K)).astype(np.int32),
        candidate_logp_btk=logp_btk,
        entropy_bt=np.full((B, T), 6.0, np.float32),
        finished_b=length_b < T,
    )


def one_step(run, rolled):
    """Score, select and update on a given rollout; what the update was given, state and sums."""
    scores, chosen = run.stages.supervise(rolled, 0)
    state = jax.tree.map(jnp.copy, run.start.state)  # the update donates it
    return scores, chosen, *run.stages.learn(state, rolled, scores, chosen)


def test_golden_step(pair, tmp_path):
    """Edits it catches: any change of the numbers between a rollout and the updated parameters."""
    config = fakes.small_config(pair, **{"segment.kind": "fixed_tokens", "segment.fixed_tokens": 4})
    with build.build(config, str(tmp_path)) as run:
        rolled = fixed_rollout(run.student.config.vocab_size)
        scores, chosen, state, sums = one_step(run, rolled)
    found = {name: float(total) / float(count) for name, (total, count) in sums.items() if count}
    found = {name: found[name] for name in ("loss", "grad_norm", "sampler_gap/mean")}
    found["teacher_logp"] = float(scores.teacher_logp_bt.sum(dtype=np.float64))
    found["denominator"] = chosen.denominator
    found["release"] = chosen.release_b.tolist()
    found["weight"] = float(chosen.weight_bt.sum(dtype=np.float64))
    found["params"] = float(
        sum(np.abs(np.asarray(x), dtype=np.float64).sum() for x in jax.tree.leaves(state.params))
    )
    if os.environ.get("OPD_JAX_WRITE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(found, indent=2) + "\n")
    golden = json.loads(GOLDEN.read_text())
    for name, value in golden.items():
        np.testing.assert_allclose(
            found[name],
            value,
            rtol=2e-5,
            err_msg=(
                f"the golden step's {name} changed. If the change of the method is meant, run this "
                "test with OPD_JAX_WRITE_GOLDEN=1, and say in the commit which formula changed and "
                "why; if none was meant to, this is a bug."
            ),
        )


def test_four_steps_equal_two_a_restore_and_two_more(finished, pair, tmp_path):
    train.run(fakes.small_config(pair, num_steps=2), str(tmp_path))
    assert [row["step"] for row in metrics_of(tmp_path)] == [0, 1, 2]
    train.run(fakes.small_config(pair), str(tmp_path))
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize("stage", ["rollout", "score", "select", "evaluate"])
def test_sigterm_in_any_stage_checkpoints_and_goes_on(finished, pair, tmp_path, stage, monkeypatch):
    """In step 3 (after 2 updates), or in the last rollout of the evaluation after the second."""
    calls = {"n": 0}

    def signalling(function, at):
        def wrapped(*args, **kwargs):
            calls["n"] += 1
            if calls["n"] == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*args, **kwargs)

        return wrapped

    def disturb(sampler, at):
        object.__setattr__(sampler, "run", signalling(sampler.run, at))  # it is frozen

    real_build = build.build

    def disturbed(config, workdir):
        run = real_build(config, workdir)
        if stage == "rollout":
            disturb(run.stages.sampler, at=3)
        elif stage == "score":
            run.stages.score = signalling(run.stages.score, at=3)
        elif stage == "select":
            run.stages.select.finish = signalling(run.stages.select.finish, at=3)
        else:  # two sets of problems each time
            disturb(run.suite.evaluator.sampler, at=4)
        return run

    monkeypatch.setattr(build, "build", disturbed)
    with pytest.raises(preemption.Preempted):
        train.run(fakes.small_config(pair), str(tmp_path))
    monkeypatch.setattr(build, "build", real_build)
    assert checkpoint.Checkpoints(str(tmp_path / "checkpoints")).steps()[-1] == 2
    rows = [0, 1] if stage == "evaluate" else [0, 1, 2]  # what was not evaluated is not written
    assert [row["step"] for row in metrics_of(tmp_path)] == rows
    train.run(fakes.small_config(pair), str(tmp_path))
    assert_same_run(tmp_path, finished)


def test_what_a_run_leaves_behind(finished):
    rows = records.read_metrics(finished)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 2, 4]
    wanted = """loss grad_norm log_ratio/mean release/rate release/position_p10
        release/position_median release/position_p90 release/supervised_fraction bic/gain_mean
        margin/mean rescale/median rescale/max response/length_mean response/truncation_rate
        response/repetition_rate student/entropy sampler_gap/mean optimizer/learning_rate
        time/rollout time/score time/select time/update time/step time/rollout_tokens_per_second
        time/score_tokens_per_second time/update_tokens_per_second memory/peak_gib""".split()
    assert not set(wanted) - rows[-1].keys()
    done = json.loads((finished / "done.json").read_text())
    assert done["step"] == 4 and 0 <= done["accuracy_after"] <= 1
    for name in ("config.json", "run.json", "signals/step_000004.npz", "eval/step_000004.jsonl"):
        assert (finished / name).exists(), name
    assert (finished / "rollouts/step_000004.jsonl").exists()
    assert list((finished / "tensorboard").glob("events.*"))
    config, params = hf.load(finished / "student")
    np.testing.assert_array_equal(
        jax.tree.leaves(params)[0], jax.tree.leaves(params_of(finished))[0]
    )


def test_another_config_in_the_workdir_is_refused_by_key(finished, pair):
    config = fakes.small_config(pair, **{"optim.learning_rate": 0.5, "seed": 7})
    with pytest.raises(ValueError, match=r"optim.learning_rate: 0.001 there, 0.5 now; seed: 0 th"):
        train.run(config, str(finished))


def test_nothing_compiles_after_the_second_step_and_no_hidden_transfers(pair, tmp_path):
    with build.build(fakes.small_config(pair), str(tmp_path)) as run:
        state, compiled = run.start.state, []

        def listen(event, duration, **kwargs):
            if event == "/jax/core/compile/backend_compile_duration":
                compiled.append(kwargs)

        for step in range(4):
            if step == 2:
                jax.monitoring.register_event_duration_secs_listener(listen)
            with jax.transfer_guard("disallow"):
                state, _ = train._step(run, state, step)
        jax.monitoring.clear_event_listeners()
    assert compiled == []


# --- faults ---


def planted(place: str, run, rolled):
    """A NaN in the teacher's scores, or in a weight: what one step makes of it."""
    state = jax.tree.map(jnp.copy, run.start.state)
    if place == "weight":
        bad = jax.tree.map(lambda x: x, state.params)
        bad["final_norm"] = bad["final_norm"].at[0].set(jnp.nan)
        state = state.replace(params=bad)
    real = run.stages.score

    def score(*args):
        scores = real(*args)
        if place == "scores":
            scores.teacher_logp_bt[1, 3] = np.nan
            scores.teacher_logp_btk[5, 2, 1] = np.inf
        return scores

    run.stages.score = score
    scores, chosen = run.stages.supervise(rolled, 0)
    before = jax.tree.map(np.asarray, state)
    after, sums = run.stages.learn(state, rolled, scores, chosen)
    stats = rollout.Stats()
    return before, after, step.Step(None, rolled, stats, scores, chosen, {}, sums)


def test_a_nan_in_the_teachers_scores_is_masked_counted_and_does_no_harm(pair, tmp_path):
    with build.build(fakes.small_config(pair), str(tmp_path)) as run:
        rolled = fixed_rollout(run.student.config.vocab_size)
        _, after, taken = planted("scores", run, rolled)
    chosen = taken.supervision
    assert chosen.stats["selection/nonfinite_tokens"][0] == 2
    assert not chosen.supervised_bt[1, 3] and chosen.weight_bt[5, 2] == 0
    assert taken.sums["update/skipped"][0] == 0
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(after.params))


def test_a_step_that_is_not_finite_is_skipped_dumped_and_replayed(pair, tmp_path):
    from launch import replay

    with build.build(fakes.small_config(pair), str(tmp_path)) as run:
        rolled = fixed_rollout(run.student.config.vocab_size)
        before, after, taken = planted("weight", run, rolled)
        assert taken.sums["update/skipped"][0] == 1
        for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
            np.testing.assert_array_equal(a, b)
        run.check_skipped(2, {"update/skipped": 1.0}, taken, after)
    text = replay.replay(str(faults.folder(tmp_path, 3)))
    assert re.search(r"params\['final_norm'\].*1 of", text)
    assert "update/skipped" in text


def test_too_many_bad_steps_stop_the_run_and_name_the_checkpoint(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "dump", lambda *args: None)  # has a test of its own
    config = fakes.small_config(pair, **{"optim.max_skipped": 1})
    with build.build(config, str(tmp_path)) as run:
        run.save(2, run.start.state, {}, None, None)
        bad, good = {"update/skipped": 1.0}, {"update/skipped": 0.0}
        run.check_skipped(2, bad, None, None)
        run.check_skipped(3, good, None, None)  # in a row, not in all
        run.check_skipped(4, bad, None, None)
        with pytest.raises(FloatingPointError, match=r"(?s)Last checkpoint: 2 .*--config"):
            run.check_skipped(5, bad, None, None)


# --- supervised training, the study's baseline ---


def test_supervised_training_learns_the_teachers_samples(pair, tmp_path):
    """The teacher answers, whoever the student is, and what it answered becomes likelier."""
    supervised = {"rollout.by": "teacher", "objective.kind": "cross_entropy"}
    supervised |= {"selector.kind": "full", "optim.learning_rate": 1e-2}
    with build.build(fakes.small_config(pair, **supervised), str(tmp_path)) as run:
        state, losses, teacher = run.start.state, [], run.stages.frozen.teacher
        taken = run.stages.observe(teacher, next(run.prompts), run.fold(0, run.ROLLOUT), 0)
        rolled, scores = taken.rollout, taken.scores
        for _ in range(2):
            state, sums = run.stages.learn(state, rolled, scores, taken.supervision)
            losses.append(float(sums["loss"][0]) / float(sums["loss"][1]))
    valid_bt = rolled.valid_bt
    np.testing.assert_allclose(
        rolled.sampler_logp_bt[valid_bt], scores.teacher_logp_bt[valid_bt], atol=1e-4
    )
    assert losses[1] < losses[0] - 0.1
    assert "sampler_gap/mean" not in sums  # sampler and trainer are two models here
