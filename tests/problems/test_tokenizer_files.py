# SPDX-License-Identifier: Apache-2.0
"""Tokenizer files that are damaged, or that transformers reads otherwise than they say."""

import json
import re
import shutil

import pytest

from opd_jax.model import hf
from opd_jax.problems.tokenizer import load_tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json")
END = "<|im_end|>"


@pytest.fixture
def directory(tmp_path):
    for name in (*FILES, "generation_config.json"):
        shutil.copy(hf.resolve("embedded:student") / name, tmp_path / name)
    return tmp_path


def change(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BROKEN = {
    "empty": lambda text: "",
    "cut off": lambda text: text[: len(text) // 2],
    "a pointer": lambda text: "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a list": lambda text: f"[{text}]",
    "null": lambda text: "null",
    "a number": lambda text: "7",
    "text": lambda text: '"tokenizer"',
    "a web page": lambda text: "<!doctype html><title>404</title>",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_file_that_cannot_be_read_is_named(directory, name, broken):
    """Edit it catches: handing the directory to transformers unread."""
    path = directory / name
    path.write_text(broken(path.read_text()))
    with pytest.raises(ValueError, match=re.escape(str(path))) as refused:
        load_tokenizer(directory)
    assert "download the file again" in str(refused.value)


def test_an_object_that_is_no_tokenizer_is_named(directory):
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=re.escape(str(directory / "tokenizer.json"))):
        load_tokenizer(directory)


def entry(directory, **flags) -> dict:
    """added_tokens_decoder with other flags for the end of a turn."""
    tokens = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    (found,) = (token for token in tokens if token["content"] == END)
    kept = {key: value for key, value in found.items() if key != "id"}
    return {str(found["id"]): kept | flags}


CHANGED = {
    "split": lambda directory: dict(split_special_tokens=True),
    "rstrip": lambda directory: dict(added_tokens_decoder=entry(directory, rstrip=True)),
    "lstrip": lambda directory: dict(added_tokens_decoder=entry(directory, lstrip=True)),
    "whole words": lambda directory: dict(added_tokens_decoder=entry(directory, single_word=True)),
}
SAME = {
    "as it is": lambda directory: {},
    "not split": lambda directory: dict(split_special_tokens=False),
    "the same flags": lambda directory: dict(added_tokens_decoder=entry(directory)),
    "a length": lambda directory: dict(model_max_length=7),
}


@pytest.mark.parametrize("changes", CHANGED.values(), ids=CHANGED)
def test_added_tokens_that_are_cut_out_otherwise_are_refused(directory, changes):
    """Edit it catches: comparing ordinary texts alone."""
    change(directory / "tokenizer_config.json", **changes(directory))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json changes how .* is cut out"):
        load_tokenizer(directory)


@pytest.mark.parametrize("changes", SAME.values(), ids=SAME)
def test_settings_that_change_no_id_are_taken(directory, changes):
    change(directory / "tokenizer_config.json", **changes(directory))
    assert load_tokenizer(directory).encode(END) != []
