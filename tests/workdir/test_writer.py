# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl: one row per step, in order, whatever a kill left behind."""

import json

from opd_jax.workdir import records, writer


def open_writer(workdir, keep_through, **kwargs):
    return writer.Writer(workdir, keep_through=keep_through, num_steps=5, **kwargs)


def test_rows_after_the_checkpoint_are_dropped_and_written_again(tmp_path):
    first = open_writer(tmp_path, -1)
    for step in range(4):
        first.write({"step": step, "loss": 0.5 * step})
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "lo')  # killed in the middle of a write

    second = open_writer(tmp_path, 2)
    second.write({"step": 3, "loss": 1.5})
    second.close()
    assert records.read_metrics(tmp_path) == [{"step": s, "loss": 0.5 * s} for s in range(4)]


def test_nan_is_null_so_that_every_reader_takes_the_file(tmp_path):
    out = open_writer(tmp_path, -1)
    out.write({"step": 1, "loss": float("nan")})
    out.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None}


def test_other_processes_write_nothing(tmp_path):
    out = open_writer(tmp_path, -1, enabled=False)
    out.write({"step": 1, "loss": 0.0})
    out.say("hello")
    out.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_events_and_plain_lines(tmp_path, capsys):
    out = open_writer(tmp_path, -1)
    nothing = {"release/rate": 0.0, "release/position_median": float("nan")}
    out.write({"step": 1, "loss": 0.25, "eval/accuracy": 0.5} | nothing)
    out.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert "loss 0.250  released 0%  at -  accuracy 50.0%" in capsys.readouterr().err


def test_without_lines_only_evaluations_are_shown(tmp_path, capsys):
    out = open_writer(tmp_path, -1, every_steps=0)
    out.write({"step": 1, "loss": 0.25})
    out.write({"step": 2, "eval/accuracy": 0.5})
    out.close()
    assert [line.split()[:2] for line in capsys.readouterr().err.splitlines()] == [["step", "2/5"]]
