# SPDX-License-Identifier: Apache-2.0
"""Data: the embedded set on disk, JSONL with its errors, and prompts that resumes exactly."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from opd_jax.model import hf
from opd_jax.problems import datasets, task
from opd_jax.problems.datasets import SPLITS, build_dataset, embedded_examples
from opd_jax.problems.tokenizer import load_tokenizer
from opd_jax.stages import evaluate
from opd_jax.stages.prompts import PromptStream, Settings
from tests import advice


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
    (b"{", "is no JSON: Expecting property name"),
    (b"\xff\xfe", "is not UTF-8 text"),
    (b"[1]", "must be an object, this is a list: ['1']"),
    (b"{}", 'needs either "prompt" or "messages"'),
    (b'{"prompt": "p", "messages": []}', 'needs either "prompt" or "messages"'),
    (b'{"prompt": null, "messages": null}', 'needs either "prompt" or "messages"'),
    (b'{"prompt": 3}', '"prompt" must be non-empty text, this is the number 3'),
    (b'{"prompt": " "}', '"prompt" must be non-empty text'),
    (b'{"prompt": "p", "answer": null}', '"answer" must be text or a number, this is null'),
    (b'{"prompt": "p", "answer": true}', '"answer" must be text or a number, this is a truth'),
    (b'{"prompt": "p", "answer": [1]}', '"answer" must be text or a number, this is a list'),
    (b'{"prompt": "p", "answer": {"a": 1}}', '"answer" must be text or a number, this is an obj'),
    (b'{"prompt": "p", "answer": NaN}', '"answer" is NaN, which is no number'),
    (b'{"prompt": "p", "answer": Infinity}', '"answer" is Infinity, which is no number'),
    (b'{"prompt": "p", "answer": -Infinity}', '"answer" is -Infinity, which is no number'),
    (b'{"prompt": "p", "id": true}', '"id" must be text, this is a truth value: True'),
    (b'{"prompt": "p", "id": 1.0}', '"id" must be text, this is the number 1.0'),
    (b'{"prompt": "p", "id": [1]}', '"id" must be text, this is a list'),
    (b'{"prompt": "p", "family": 1}', '"family" must be text, this is the number 1'),
    (b'{"prompt": "\\ud800"}', r'"prompt" holds \ud800, half of a surrogate pair'),
    (b'{"prompt": "p", "answer": "\\udfff"}', r'"answer" holds \udfff, half of a surrogate pair'),
    (b'{"prompt": "p", "id": "\\ud800"}', r'"id" holds \ud800, half of a surrogate pair'),
    (b'{"prompt": "p", "family": "\\ud800"}', r'"family" holds \ud800, half of a surrogate'),
    (
        b'{"messages": [{"role": "user", "content": "a \\udc00"}]}',
        r'"messages" holds \udc00, half of a surrogate pair',
    ),
    (b'{"messages": "p"}', '"messages" must be a list'),
    (b'{"messages": [{"role": "user"}]}', "a message must be"),
    (b'{"messages": [{"role": "user", "content": 3}]}', "a message must be"),
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
    advice.check(error.value)
    kept = build_dataset(path, on_error="skip")
    assert [e.prompt for e in kept] == ["good", "too"]


@pytest.mark.parametrize("line, message", BAD_LINES[3:6], ids=range(3))
def test_where_every_line_is_bad_nobody_is_told_to_skip(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", line, "", line)
    for on_error in ("raise", "skip"):
        with pytest.raises(ValueError) as error:
            build_dataset(path, on_error=on_error)
        assert f"{path}:1: " in str(error.value) and message in str(error.value)
        assert "2 of 2 lines are bad: set --config.data.source to a JSONL file" in str(error.value)
        assert "skip" not in str(error.value)


def test_skipped_lines_are_counted(tmp_path, caplog):
    path = write(tmp_path / "some.jsonl", "{", '{"prompt": "p"}', "", '{"prompt": 1}')
    with caplog.at_level("WARNING"):
        assert [e.id for e in build_dataset(path, on_error="skip")] == ["some-2"]
    assert f"{path}: 2 lines skipped, 1 read" in caplog.text
    with pytest.raises(ValueError, match=r"some.jsonl:1: .* correct the line \(2 of 3 lines are"):
        build_dataset(path)


@pytest.mark.parametrize("lines", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_a_file_without_problems_is_refused(tmp_path, lines):
    path = write(tmp_path / "empty.jsonl", lines)
    with pytest.raises(ValueError, match="holds no problem: set --config.data.source to a JSONL"):
        build_dataset(path)


NUMBERS = """0 2 -3 007x 0.00001 1e-05 1E+5 4.5e33 0.10 1.0 -0.0 1e999 12345678901234567890
    0.1234567890123456789""".split()


@pytest.mark.parametrize("number", [*NUMBERS, "9" * 5000])
def test_a_number_is_kept_as_it_is_written(tmp_path, number):
    """The edit this would catch: floats of Python, which write 0.00001 as 1e-05 and drop digits."""
    line = f'{{"prompt": "p", "answer": {number}, "score": NaN, "n": [{number}, true, null]}}'
    path = write(tmp_path / "n.jsonl", line, '{"prompt": "q", "answer": "0.10"}')
    if number == "007x":
        with pytest.raises(ValueError, match="n.jsonl:1: is no JSON"):
            build_dataset(path)
        return
    answers = [e.answer for e in build_dataset(path)]
    assert answers == [number, "0.10"] and {type(a) for a in answers} == {str}


PROBLEM = b'{"prompt": "p", "id": "a"}'
READ = {
    "LF": PROBLEM + b"\n",
    "no end of line": PROBLEM,
    "CRLF": PROBLEM + b"\r\n",
    "byte order mark": b"\xef\xbb\xbf" + PROBLEM + b"\n",
    "byte order mark, CRLF": b"\xef\xbb\xbf" + PROBLEM + b"\r\n",
    "joined files with marks": b"\xef\xbb\xbf\r\n\xef\xbb\xbf" + PROBLEM,
    "indented": b"  " + PROBLEM + b"  \n",
    "null for what is missing": b'{"prompt": "p", "id": "a", "messages": null, "family": null}',
    "messages": b'{"messages": [{"role": "user", "content": "p"}], "id": "a", "prompt": null}',
    "other fields of any kind": b'{"prompt": "p", "id": "a", "x": [NaN, 1, {"y": "\\ud800"}]}',
    "blank lines": b"\n\r\n \n" + PROBLEM + b"\n\n",
}


@pytest.mark.parametrize("given", READ.values(), ids=READ)
def test_usual_writings_of_a_file_are_read(tmp_path, given):
    path = write(tmp_path / "p.jsonl", given)
    (example,) = build_dataset(path)
    prompt = example.prompt if isinstance(example.prompt, str) else example.prompt[0][1]
    assert (example.id, example.family, prompt) == ("a", "jsonl", "p")


def test_a_surrogate_pair_a_line_separator_and_a_mark_inside_are_text(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"prompt": "\\ud83d\\ude00 \u2028 \ufeff \\u0000 \x85 é"}')
    assert build_dataset(path)[0].prompt == "\U0001f600 \u2028 \ufeff \x00 \x85 é"


IDS = [
    ("0 1 2", None),
    ('"0" "1" "x"', None),
    ("-1 1 0", None),
    ('"a" "A" "a "', None),
    ("null null null", None),
    ("12345678901234567890 12345678901234567891 1", None),
    ("0 0 1", "'0' (lines 1 and 2)"),
    ('0 1 "0"', "'0' (lines 1 and 3)"),
    ('"a" "b" "b"', "'b' (lines 2 and 3)"),
    ("7 7 7", "'7' (lines 1 and 2 and 1 more)"),
    ('null "p-1" 2', "'p-1' (lines 1 and 2)"),  # the first is named by its line
]


@pytest.mark.parametrize("ids, repeated", IDS, ids=[ids for ids, _ in IDS])
def test_ids_are_text_or_integers_of_one_problem_each(tmp_path, ids, repeated):
    lines = [f'{{"prompt": "p", "id": {id_}}}' for id_ in re.findall(r'"[^"]*"|\S+', ids)]
    path = write(tmp_path / "p.jsonl", *lines)
    if repeated is None:
        assert len({e.id for e in build_dataset(path)}) == 3
        return
    for option in (datasets.SOURCE, "--config.evaluate.source", datasets.BENCHMARKS):
        with pytest.raises(ValueError) as error:
            build_dataset(path, option=option, on_error="skip")
        assert f"{option}={path}: 1 ids belong" in str(error.value)
        assert f"first {repeated}" in str(error.value)


@pytest.mark.parametrize(
    "option", [datasets.SOURCE, "--config.evaluate.source", datasets.BENCHMARKS]
)
def test_messages_blame_the_flag_that_named_the_file(tmp_path, option):
    empty, bad = (
        write(tmp_path / "none.jsonl", ""),
        write(tmp_path / "bad.jsonl", "{", '{"prompt": "p"}'),
    )
    others = {datasets.SOURCE, "--config.evaluate.source", datasets.BENCHMARKS} - {option}
    for path in (str(tmp_path / "nowhere.jsonl"), empty, bad):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            build_dataset(path, option=option)
        message = str(error.value)
        assert path in message and not any(other in message for other in others)
        assert ("on_error" in message) == (path == bad and option == datasets.SOURCE)
        assert option in message or path == bad
        assert ("embedded" in message) == (path != bad and option != datasets.BENCHMARKS)


def test_the_evaluations_file_is_blamed_by_its_own_flag(tmp_path):
    with pytest.raises(FileNotFoundError, match="^--config.evaluate.source=.*nowhere.* is no file"):
        evaluate.held_out(evaluate.Settings(source=str(tmp_path / "nowhere.jsonl")))


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
