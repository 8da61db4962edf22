# SPDX-License-Identifier: Apache-2.0
"""Data: the embedded set on disk, JSONL with its errors, and prompts that resumes exactly."""

import json
import subprocess
import sys

import numpy as np
import pytest

from opd_jax.model import hf
from opd_jax.problems import datasets, task
from opd_jax.problems.datasets import SPLITS, build_dataset, embedded_examples
from opd_jax.problems.tokenizer import load_tokenizer
from opd_jax.stages.prompts import PromptStream, Settings


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(hf.resolve("embedded:student"))


@pytest.fixture(scope="module")
def source():
    return task.make_many(task.IN_DOMAIN, "train", 1, 21)


def stream(source, tokenizer, **knobs):
    knobs = {"batch_size": 4, "prompt_len": 80, "seed": 7} | knobs
    hosts = {k: knobs.pop(k) for k in ("seed", "host_index", "host_count") if k in knobs}
    return PromptStream(source, tokenizer, Settings(**knobs), **hosts)


def draw(prompts, num):
    return [next(prompts) for _ in range(num)]


def ids(batches):
    return [[e.id for e in batch.examples] for batch in batches]


# ---- the stream ----


def test_prompts_are_left_padded_and_named_by_global_row(source, tokenizer):
    batch = next(stream(source, tokenizer))
    assert batch.tokens_bp.dtype == np.int32 and batch.tokens_bp.shape == (4, 80)
    np.testing.assert_array_equal(batch.row_b, np.arange(4))
    for tokens_p, valid_p, example in zip(
        batch.tokens_bp, batch.valid_bp, batch.examples, strict=True
    ):
        assert tokens_p[valid_p].tolist() == tokenizer.encode_prompt(example.prompt)
        assert valid_p[-1] and (np.diff(valid_p.astype(int)) >= 0).all()
        assert (tokens_p[~valid_p] == tokenizer.pad_id).all()


def test_every_epoch_is_another_permutation_and_batches_run_on_across_epochs(source, tokenizer):
    flat = sum(ids(draw(stream(source, tokenizer), 21)), [])  # 84 rows: four epochs of 21
    epochs = [flat[i : i + 21] for i in range(0, 84, 21)]
    assert all(sorted(epoch) == sorted(e.id for e in source) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides_the_order(source, tokenizer):
    first = ids(draw(stream(source, tokenizer), 6))
    assert ids(draw(stream(source, tokenizer), 6)) == first
    assert ids(draw(stream(source, tokenizer, seed=8), 6)) != first


@pytest.mark.parametrize("taken", [0, 1, 5, 6, 17])  # inside and on both sides of an epoch's end
def test_the_cursor_is_exact(source, tokenizer, taken):
    whole = stream(source, tokenizer)
    draw(whole, taken)
    state = json.loads(json.dumps(whole.state()))
    rest = draw(whole, 7)
    resumed = stream(source, tokenizer)
    resumed.restore(state)
    for a, b in zip(rest, draw(resumed, 7), strict=True):
        np.testing.assert_array_equal(a.tokens_bp, b.tokens_bp)
        assert a.examples == b.examples
    assert resumed.state() == whole.state()


@pytest.mark.parametrize("host_count", [2, 4])
def test_any_number_of_hosts_draws_the_same_global_batch(source, tokenizer, host_count):
    alone = stream(source, tokenizer)
    hosts = [
        stream(source, tokenizer, host_index=i, host_count=host_count) for i in range(host_count)
    ]
    for _ in range(8):
        whole, parts = next(alone), [next(host) for host in hosts]
        for field in ("tokens_bp", "valid_bp", "row_b"):
            joined = np.concatenate([getattr(part, field) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, field))
        assert sum((part.examples for part in parts), ()) == whole.examples
    assert all(host.state() == alone.state() for host in hosts)


def test_a_prompt_that_is_too_long_is_refused_or_dropped_by_flag(source, tokenizer):
    lengths = sorted(len(tokenizer.encode_prompt(e.prompt)) for e in source)
    with pytest.raises(ValueError) as error:
        stream(source, tokenizer, prompt_len=lengths[-1] - 1)
    message = str(error.value)
    assert f"--config.data.prompt_len={lengths[-1]}" in message
    assert "--config.data.too_long=drop" in message and "never cut" in message

    short = stream(source, tokenizer, prompt_len=lengths[10], too_long="drop")
    assert short.num_dropped == sum(n > lengths[10] for n in lengths) > 0
    seen = {e.prompt for batch in draw(short, 20) for e in batch.examples}
    assert max(len(tokenizer.encode_prompt(p)) for p in seen) == lengths[10]


def test_dropping_every_prompt_is_refused(source, tokenizer):
    with pytest.raises(ValueError, match="21 of 21 prompts are longer"):
        stream(source, tokenizer, prompt_len=5, too_long="drop")


@pytest.mark.parametrize(
    "knobs, message",
    [
        (dict(batch_size=5, host_count=2), "does not split over 2 hosts.*batch_size=4"),
        (dict(batch_size=0), "--config.data.batch_size=32"),
        (
            dict(too_long="cut"),
            "too_long=.cut. must be one of raise, drop. Set --config.data.too_long=raise",
        ),
    ],
)
def test_wrong_knobs_are_refused(source, tokenizer, knobs, message):
    with pytest.raises(ValueError, match=message):
        stream(source, tokenizer, **knobs)


# ---- JSONL ----


def write(path, *lines):
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return str(path)


def test_jsonl_of_prompts_and_of_messages(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        '{"prompt": "1+1?", "answer": 2}',
        "",
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, '
        '{"role": "assistant", "content": "a"}], "answer": "x", "id": "q", "family": "f"}',
        '{"prompt": "no answer"}\r',
    )
    assert build_dataset(path) == [
        task.Example("p-1", "jsonl", "1+1?", "2"),
        task.Example("q", "f", (("system", "s"), ("user", "u")), "x", "a"),
        task.Example("p-4", "jsonl", "no answer", ""),
    ]


def test_messages_reach_the_template(tmp_path, tokenizer):
    path = write(
        tmp_path / "m.jsonl",
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}',
    )
    batch = next(stream(build_dataset(path), tokenizer, batch_size=1))
    sent = batch.tokens_bp[batch.valid_bp].tolist()
    assert tokenizer.hf.decode(sent).startswith("<|im_start|>system\ns<|im_end|>")


BAD_LINES = [
    (b"{", "Expecting property name"),
    (b"\xff\xfe", "utf-8"),
    (b"[1]", "must be an object, this is list"),
    (b"{}", 'needs either "prompt" or "messages"'),
    (b'{"prompt": "p", "messages": []}', 'needs either "prompt" or "messages"'),
    (b'{"prompt": 3}', '"prompt" must be non-empty text, this is int 3'),
    (b'{"prompt": " "}', '"prompt" must be non-empty text'),
    (b'{"prompt": "p", "answer": null}', '"answer" must be text or a number, this is NoneType'),
    (b'{"prompt": "p", "answer": true}', '"answer" must be text or a number, this is bool'),
    (b'{"messages": "p"}', '"messages" must be a list'),
    (b'{"messages": [{"role": "user"}]}', "a message must be"),
    (b'{"messages": [{"role": "assistant", "content": "a"}]}', "must end with a message of the"),
    (b"[" * 100_000, "recursion"),
]


@pytest.mark.parametrize("line, message", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_or_skipped_by_flag(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", '{"prompt": "good"}', line, '{"prompt": "too"}')
    with pytest.raises(ValueError) as error:
        build_dataset(path)
    assert f"{path}:2: " in str(error.value) and message in str(error.value)
    assert "--config.data.on_error=skip" in str(error.value)
    kept = build_dataset(path, on_error="skip")
    assert [e.prompt for e in kept] == ["good", "too"]


def test_a_file_without_problems_is_refused(tmp_path):
    path = write(tmp_path / "empty.jsonl", "", "{")
    with pytest.raises(ValueError, match=r"holds no problem \(1 lines skipped\)"):
        build_dataset(path, on_error="skip")


# ---- the embedded data set ----


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(datasets, "SIZES", {"train": 40, "heldout": 20, "ood": 8})


def test_the_embedded_set_is_what_the_task_generates(tmp_path, small):
    for split, families in (
        ("train", task.IN_DOMAIN),
        ("heldout", task.IN_DOMAIN),
        ("ood", task.OUT_OF_DOMAIN),
    ):
        source = build_dataset("embedded", split, cache_dir=str(tmp_path))
        examples = [source[i] for i in range(len(source))]
        assert sorted(examples, key=lambda e: e.id) == sorted(
            embedded_examples(split), key=lambda e: e.id
        )
        assert {e.family for e in examples} == set(families)
        with pytest.raises(IndexError):
            source[len(source)]


def test_the_embedded_splits_are_disjoint():
    prompts = {s: {e.prompt for e in embedded_examples(s)} for s in SPLITS}
    assert not prompts["train"] & prompts["heldout"]


def test_a_second_reader_builds_nothing(tmp_path, small, monkeypatch):
    build_dataset("embedded", "train", cache_dir=str(tmp_path))
    monkeypatch.setattr(datasets.tempfile, "mkdtemp", None)  # would be called to build
    build_dataset("embedded", "heldout", cache_dir=str(tmp_path))


def test_another_recipe_never_reads_these_files(tmp_path, small, monkeypatch):
    build_dataset("embedded", "train", cache_dir=str(tmp_path))
    monkeypatch.setattr(datasets, "SIZES", {"train": 5, "heldout": 5, "ood": 5})
    assert len(build_dataset("embedded", "train", cache_dir=str(tmp_path))) == 5


def test_a_failed_build_leaves_nothing_behind(tmp_path, small, monkeypatch):
    def broken(split):
        yield from ()
        raise RuntimeError("killed half-way")

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "embedded_examples", broken)
        with pytest.raises(RuntimeError, match="half-way"):
            build_dataset("embedded", "train", cache_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert len(build_dataset("embedded", "train", cache_dir=str(tmp_path))) == 40


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="set the environment variable OPD_JAX_CACHE"):
        build_dataset("embedded", "train", cache_dir=str(tmp_path / "file"))


@pytest.mark.slow
def test_processes_that_build_at_once_agree_and_tensorflow_stays_out(tmp_path):
    code = (
        "import sys; from opd_jax.problems import datasets as data;"
        "data.SIZES = dict(train=300, heldout=20, ood=20);"
        f"s = data.build_dataset('embedded', 'train', cache_dir={str(tmp_path)!r});"
        "assert 'tensorflow' not in sys.modules;"
        "print(len(s), s[0].id, s[299].id)"
    )
    start = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [process.communicate()[0] for process in start]
    assert [process.returncode for process in start] == [0] * 4
    assert len(set(said)) == 1 and said[0].startswith("300 ")
    assert len(list(tmp_path.iterdir())) == 1
