# SPDX-License-Identifier: Apache-2.0
"""Files that are no JSONL: recognised by their first bytes; the advice is run in bash."""

import bz2
import gzip
import io
import json
import lzma
import re
import shutil
import subprocess
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_jax.problems import benchmarks
from opd_jax.problems.datasets import build_dataset

ROWS = [{"prompt": "1+1?", "answer": "2"}, {"prompt": 'a "b", c\u00e9', "answer": "3"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def zipped() -> bytes:
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("p.jsonl", LINES)
        return file.getvalue()


def arrow(kind: str) -> bytes:
    """The rows as a Parquet file, an Arrow file or an Arrow stream."""
    table, sink = pa.Table.from_pylist(ROWS), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, sink)
    else:
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with new(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


CSV = '{0}id{1}prompt{1}answer\n0{1}1+1?{1}2\n1{1}"a ""b"", cé"{1}3\n'

# File name -> its content, what the message calls it. The advice makes the problems of ROWS of it.
TURNED = {
    "p.jsonl.gz": (gzip.compress(LINES.encode()), "compressed by gzip"),
    "renamed.jsonl": (gzip.compress(LINES.encode()), "compressed by gzip"),
    "p.jsonl.bz2": (bz2.compress(LINES.encode()), "compressed by bzip2"),
    "p.jsonl.xz": (lzma.compress(LINES.encode()), "compressed by xz"),
    "p.zip": (zipped(), "a zip archive"),
    "utf16.jsonl": (LINES.encode("utf-16"), "text in UTF-16"),
    "utf16le.jsonl": (LINES.encode("utf-16-le"), "text in UTF-16"),
    "utf16be.jsonl": (LINES.encode("utf-16-be"), "text in UTF-16"),
    "utf32.jsonl": (LINES.encode("utf-32"), "text in UTF-32"),
    "array.json": (json.dumps(ROWS).encode(), "one JSON array"),
    "indented.json": (json.dumps(ROWS, indent=1).encode("utf-8-sig"), "one JSON array"),
    "my file's.csv": (CSV.format("", ",").encode(), "a CSV table, parted by commas"),
    "excel.csv": (
        CSV.format("\ufeff", ",").replace("\n", "\r\n").encode(),
        "a CSV table, parted by commas",
    ),
    "p.parquet": (arrow("parquet"), "a Parquet table"),
    "p.feather": (arrow("file"), "an Arrow table"),
    "data-00000-of-00001.arrow": (arrow("stream"), "an Arrow stream"),
    "p.tsv": (CSV.format("", "\t").encode(), "a CSV table, parted by tabs"),
    "p;.csv": (CSV.format("", ";").encode(), "a CSV table, parted by semicolons"),
}


@pytest.mark.parametrize("name", TURNED)
def test_the_advice_pasted_into_bash_makes_a_file_that_is_read(tmp_path, name):
    content, kind = TURNED[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        build_dataset(str(path), on_error="skip")
    message = str(error.value)
    assert message.startswith(f"{path} is {kind}; it must be JSONL")
    assert "correct the line" not in message and "skip" not in message
    command, made = re.search(r"run `(.*)` and give (.*)$", message).groups()
    assert path.read_bytes() == content and made != str(path)
    if not shutil.which(command.split()[0]):
        assert command.split()[0] in ("unzip", "bunzip2", "unxz", "iconv", "gunzip")
        return
    subprocess.run(["bash", "-c", command], check=True, cwd="/")
    found = [(e.prompt, e.answer) for e in build_dataset(made)]
    assert found == [(row["prompt"], row["answer"]) for row in ROWS]


@pytest.mark.parametrize("number", ["0.00001", "1e-12", "1.50", "0.1234567890123456789"])
def test_the_advice_for_an_array_keeps_the_digits_of_an_answer(tmp_path, number):
    path = tmp_path / "array.json"
    path.write_text(f'[{{"prompt": "a?", "answer": {number}}}]')
    with pytest.raises(ValueError, match="one JSON array") as error:
        build_dataset(str(path))
    command, made = re.search(r"run `(.*)` and give (.*)$", str(error.value)).groups()
    subprocess.run(["bash", "-c", command], check=True, cwd="/")
    assert [e.answer for e in build_dataset(made)] == [number]


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_the_advice_for_a_table_keeps_small_numbers_and_ids(tmp_path, kind, monkeypatch):
    rows = [dict(id=7, prompt="a?", answer=1e-12), dict(id=None, prompt="b?", answer=0.25)]
    monkeypatch.setitem(globals(), "ROWS", rows)
    path = tmp_path / "table"
    path.write_bytes(arrow(kind))
    with pytest.raises(ValueError) as error:
        build_dataset(str(path))
    command, made = re.search(r"run `(.*)` and give (.*)$", str(error.value)).groups()
    subprocess.run(["bash", "-c", command], check=True, cwd="/")
    first, second = build_dataset(made)
    assert (first.id, first.answer, second.answer) == ("7", "1e-12", "0.25")


# Content -> what the message says of it, for what a shell here has no tool for.
NAMED = {
    "zstd": (b"\x28\xb5\x2f\xfd\x04", "compressed by zstd.*zstd -dc"),
    "git lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a pointer to a file in Git LFS.*run `git lfs pull`$",
    ),
    "web page": (b"\n<!DOCTYPE html>\n<html></html>", "a web page.*download the file itself$"),
    "web page, capitals": (b"<HTML><body>404</body>", "a web page"),
    "one object": (b'{\n "prompt": "p",\n "answer": "2"\n}\n', "one JSON object over several lin"),
    "array of texts": (b'["a", "b"]', "one JSON array"),
    "empty array": (b"[]", "one JSON array"),
    "array after blank lines": (b'\n\n [{"prompt": "p"}]', "one JSON array"),
    "quoted head": (b'"question","answer"\n"1","2"\n', "a CSV table"),
    "capital head": (b"Problem,Answer\n1,2\n", "a CSV table"),
}


@pytest.mark.parametrize("content, says", NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("benchmark", [False, True], ids=["data", "benchmark"])
def test_what_is_no_jsonl_is_named(tmp_path, benchmark, content, says):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        if benchmark:
            benchmarks.load(f"aime25={path}")
        else:
            build_dataset(str(path), on_error="skip")


# First lines that look like another kind and are not: one bad line of a JSONL file.
LINE_ONLY = {
    "a list": b"[1, 2]",
    "a list of lists": b'[["prompt", "answer"]]',
    "half an array": b'[{"prompt": "p"},',
    "prose with a comma": b"Hello, world",
    "prose with a column's name": b"the answer, it is 3",
    "a comment": b"# prompt",
    "a column alone": b"prompt",
    "letters of a magic number": b"PAR",
    "PK": b"PK",
    "an object cut off": b'{"prompt": "p", "answer"',
    "version": b"version 1",
    "an angle": b"<think>",
    "bytes": b"\x80\x81",
    "a carriage return": b"prompt\ra,b",
    "NUL": b"a\x00,b",
    "a field beyond csv's limit": b"a," + b"x" * 200_000,
    "an open quote": b'"a,b',
}


@pytest.mark.parametrize("line", LINE_ONLY.values(), ids=LINE_ONLY)
def test_a_first_line_that_is_bad_stays_a_line(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_bytes(line + b'\n{"prompt": "p"}\n')
    with pytest.raises(ValueError, match=r"p.jsonl:1: .*correct the line"):
        build_dataset(str(path))
    assert [e.prompt for e in build_dataset(str(path), on_error="skip")] == ["p"]


@pytest.mark.parametrize("text", ['{"prompt": "[1], PAR1, a,b"}', ' {"prompt": "<html>"}'])
def test_a_good_file_is_no_other_kind(tmp_path, text):
    path = tmp_path / "answer,prompt.jsonl"
    path.write_text(text)
    assert len(build_dataset(str(path))) == 1
