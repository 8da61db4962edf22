# SPDX-License-Identifier: Apache-2.0
"""The diagnosis: drops are found where they were put, controls stay clean, it runs on a pair."""

import numpy as np
import pytest
import tiny_model

from launch import config_flags, diagnose

B, S, TOKENS = 40, 12, 5  # rollouts, sentences, tokens of a sentence
SPANS = [[(s * TOKENS, (s + 1) * TOKENS) for s in range(S)]] * B


@pytest.fixture(scope="module")
def collapsed():
    """Margins of 8 nats in the first quarter of the sentences, 1 nat after, with noise."""
    rng = np.random.default_rng(0)
    level_s = np.where(np.arange(S) < S // 4, 8.0, 1.0)
    margin_bt = np.repeat(level_s, TOKENS) * rng.uniform(0.8, 1.2, (B, S * TOKENS))
    valid_bt = np.ones(margin_bt.shape, bool)
    return diagnose.rollout_figures(margin_bt, valid_bt, SPANS, valid_bt)


def test_a_drop_is_found_where_it_was_put_and_not_in_shuffled_sentences(collapsed):
    for side in diagnose.SIDES:
        np.testing.assert_allclose(collapsed[f"position_{side}"], 0.25)
        assert (collapsed[f"gain_{side}"] > 6).all()
        assert (collapsed[f"shuffled_gain_{side}"] > 6).mean() < 0.3
    assert (collapsed["length"] == S * TOKENS).all() and (collapsed["num_segments"] == S).all()


def test_sentences_without_a_usable_token_are_left_out():
    margin_bt = np.full((1, S * TOKENS), 4.0)
    margin_bt[:, :TOKENS] = np.nan
    margin_bt[:, 6 * TOKENS :] = 0.5
    usable_bt = np.isfinite(margin_bt)
    found = diagnose.rollout_figures(margin_bt, usable_bt, SPANS[:1], np.ones_like(usable_bt))
    assert found["position_1"][0] == 0.5


def test_groups_split_the_rollouts_and_the_table_stands_beside_the_papers(collapsed):
    student = collapsed | {"correct": np.arange(B) % 4 == 0, "truncated": np.zeros(B)}
    teacher = {k: v[:10] for k, v in student.items()} | {"gain_1": np.full(10, -np.inf)}
    found = {"groups": diagnose.groups(student, teacher), "profiles": {}}
    sizes = {name.strip(): f["rollouts"] for name, f in found["groups"].items()}
    assert sizes["student's rollouts"] == 40
    assert (sizes["of these, wrong"], sizes["of these, correct (control)"]) == (30, 10)
    own = found["groups"]["teacher's own rollouts (control)"]
    assert own["above_6_min_side_1"] == 0.0 and own["gain_mean_min_side_1"] is None
    text = diagnose.as_text(found)
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "79 %" in lines["the paper, Qwen3-1.7B"] and "13 %" in lines["the paper, Qwen3-1.7B"]
    assert "100 %" in lines["student's rollouts"] and "25 %" in lines["student's rollouts"]


def test_profiles_divide_sums_once_and_leave_empty_bins_out():
    sums = {"margin_sum": np.array([6.0, 0.0]), "margin_count": np.array([3.0, 0.0])}
    both = {"all": sums, "correct": sums}
    assert diagnose.merge(both, both)["student"] == {"margin": [2.0, None]}


def test_a_runs_own_workdir_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds a run.*--config.student.path=.*launch.export"):
        diagnose.diagnose(config_flags.load("configs/quickstart.py"), str(tmp_path), 1)


@pytest.mark.slow
def test_the_diagnosis_of_a_random_pair(tmp_path):
    model = tiny_model.save(tmp_path)
    overrides = {"student.path": str(model), "teacher.path": str(model), "data.batch_size": 8}
    overrides |= {"rollout.response_len": 24, "mesh": '(("data",1),("fsdp",8))'}
    overrides |= {"data.prompt_len": 160}
    run_config = config_flags.apply_overrides(config_flags.load("configs/base.py"), overrides)
    found = diagnose.diagnose(run_config, str(tmp_path / "run"), num_batches=2)
    student, teacher = (
        found["groups"][name] for name in ("student's rollouts", "teacher's own rollouts (control)")
    )
    assert student["rollouts"] == teacher["rollouts"] == 16
    # Teacher and student are one model and answer the same prompts with the same keys.
    assert student == teacher
    profile = found["profiles"]["student"]
    assert len(profile["margin"]) == 20 and np.allclose(profile["abs_advantage"], 0, atol=1e-4)
