# SPDX-License-Identifier: Apache-2.0
"""Run-directory files: what is written is what is read, whatever the tokens hold."""

import json

import numpy as np
import pytest

from opd_jax.workdir import records


def make_trajectory(token_bytes, **changes):
    T, K = len(token_bytes), 2
    fields = dict(
        step=3,
        row=1,
        example_id="sum-7",
        family="sum",
        prompt="What is 1 + 1?",
        answer="2",
        correct=True,
        finished=True,
        token_t=range(T),
        token_bytes_t=token_bytes,
        name=lambda i: f"<{i}>",
        sampler_logp_t=np.full(T, -0.5),
        candidates_tk=np.arange(T * K).reshape(T, K),
        candidate_logp_tk=np.full((T, K), -1.0),
        teacher_logp_t=np.full(T, -0.25),
        teacher_logp_tk=np.full((T, K), -2.0),
        margin_t=np.zeros(T),
        spans=[(0, T)],
        score_s=[0.5],
        change_point=1,
        release=T,
        gain=float("-inf"),
    )
    return records.Trajectory(**fields | changes).as_json()


@pytest.mark.parametrize(
    "text", ["plain words", "日本語 é 😀 end", "‮שלום‬ <script>alert(1)</script>\x00\n"]
)
def test_pieces_join_to_the_text_even_when_tokens_split_characters(text):
    one_byte_tokens = [bytes([b]) for b in text.encode()]
    assert "".join(records.token_pieces(one_byte_tokens)) == text


def test_bytes_that_are_no_character_show_as_the_decoded_text_does():
    token_bytes = [b"a", b"\xff", b"\xe2\x82", b"b", b"\xf0\x9f"]
    assert "".join(records.token_pieces(token_bytes)) == b"".join(token_bytes).decode(
        "utf-8", "replace"
    )


def test_trajectory_survives_json_and_keeps_offsets_names_and_missing_numbers(tmp_path):
    made = make_trajectory(["é".encode(), b"ab", b""], teacher_logp_t=None)
    assert made["pieces"] == ["é", "ab", "<2>"]  # a special token shows its name
    assert made["byte_start"] == [0, 2, 4]
    assert made["gain"] is None and made["teacher_logp"] is None
    assert made["candidates"][1] == [["<2>", -1.0, -2.0], ["<3>", -1.0, -2.0]]
    assert made["sampled_candidate"] == [0, -1, -1]  # tokens 0, 1, 2; candidates (0,1) (2,3) (4,5)
    records.write_rollouts(tmp_path, 3, [made])
    records.write_rollouts(tmp_path, 12, [])
    assert list(records.read_rollouts(tmp_path)) == [made]
    assert sorted(p.name for p in (tmp_path / "rollouts").iterdir()) == [
        "step_000003.jsonl",
        "step_000012.jsonl",
    ]


def test_signals_come_back_in_order_of_steps(tmp_path):
    rows = dict(
        length_b=np.array([10, 20]),
        release_b=np.array([4, 20]),
        gain_b=np.array([7.5, np.nan]),
        rescale_b=np.array([2.5, 1.0]),
        num_segments_b=np.array([3, 4]),
    )
    pair = {"margin_sum": np.arange(3.0), "margin_count": np.ones(3)}
    for step in (10, 2):
        arrays = records.signals_arrays(by_position=pair, by_sentence=pair, **rows)
        records.write_signals(tmp_path, step, arrays)
    read = list(records.read_signals(tmp_path))
    assert [s.step for s in read] == [2, 10]
    np.testing.assert_array_equal(read[0].by_position["margin"][0], [0.0, 1.0, 2.0])
    np.testing.assert_array_equal(read[0].rows["gain"], [7.5, np.nan])
    assert np.isnan(read[0].rows["correct"]).all()
    with pytest.raises(ValueError, match="NAME_sum and NAME_count"):
        records.signals_arrays(by_position={"margin": np.ones(3)}, by_sentence={}, **rows)


def test_metrics_after_a_restart_keep_the_last_row_of_a_step_and_skip_a_cut_line(tmp_path):
    rows = [{"step": 0, "loss": 3}, {"step": 1, "loss": 2}, {"step": 1, "loss": 1}]
    text = "".join(json.dumps(r) + "\n" for r in rows) + '{"step": 2, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert records.read_metrics(tmp_path) == [rows[0], rows[2]]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("", []),
        ('{"a": 1}', []),  # all but the newline was written
        ('{"a": 1}\n', [{"a": 1}]),
        ('{"a": 1}\n{"a": ', [{"a": 1}]),
        ('{"a": 1}\n\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ('{"a": "\u2028\u0085"}\n', [{"a": "\u2028\u0085"}]),  # end no line
        ('{"a": "\u00e9', []),  # and cut inside a character, below
    ],
)
def test_a_line_is_whole_with_its_newline_and_only_the_last_may_be_cut(tmp_path, text, read):
    path = tmp_path / "a.jsonl"
    path.write_bytes(text.encode()[: -1 if text.endswith("\u00e9") else None])
    assert records.read_jsonl(path) == read


@pytest.mark.parametrize("line", ["{", "NaN}", '{"a": 1} {"a": 2}', "\x00\x00"])
def test_a_damaged_line_before_the_last_is_named(tmp_path, line):
    """Rows after it would be lost in silence, and a resumed run would write the file anew."""
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 is not JSON .*Delete the line"):
        records.read_metrics(tmp_path)
