# SPDX-License-Identifier: Apache-2.0
"""Where a response ends: ids of generation_config.json, or config.json; what is none is refused."""

import json
import pathlib
import shutil

import pytest

from opd_jax.problems import tiny_tokenizer
from opd_jax.problems.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save(path)
    (path / "generation_config.json").unlink()
    (path / "config.json").unlink(missing_ok=True)
    return path


@pytest.fixture
def directory(tokenizer_files, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(tokenizer_files, tmp_path / "model"))


def write(directory: pathlib.Path, name: str, content) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / name).write_text(text)


@pytest.mark.parametrize(
    ("generation", "model", "ids"),
    [
        (None, None, ()),
        (dict(eos_token_id=7), None, (7,)),
        (dict(eos_token_id=[7, 5, 7]), None, (5, 7)),
        (dict(eos_token_id=0), None, (0,)),
        (dict(eos_token_id=[]), None, ()),
        (dict(eos_token_id=None), None, ()),
        ({}, None, ()),
        (None, dict(eos_token_id=9), (9,)),
        (None, dict(eos_token_id=[9, 8]), (8, 9)),
        (None, dict(eos_token_id=None), ()),
        (None, {}, ()),
        # generation_config.json is what sampling follows, whatever config.json says.
        (dict(eos_token_id=7), dict(eos_token_id=9), (7,)),
        (dict(temperature=0.6), dict(eos_token_id=9), ()),
    ],
)
def test_ids_come_from_the_file_that_counts(directory, generation, model, ids):
    for name, content in (("generation_config.json", generation), ("config.json", model)):
        if content is not None:
            write(directory, name, content | dict(model_type="qwen3"))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.eos_ids == tuple(sorted({*ids, tokenizer.hf.eos_token_id}))


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(
    "eos",
    [-1, True, False, 676, 10**9, 10**400, 5.0, "7", "<|im_end|>", [7, "8"], [7, -1], [True]]
    + [[[7]], {"id": 7}, {}, [None], "x" * 500],
    ids=lambda eos: str(eos)[:12],
)
def test_what_is_no_id_is_refused_with_the_files_name(directory, file, eos):
    write(directory, file, dict(eos_token_id=eos, model_type="qwen3"))
    with pytest.raises(
        ValueError, match=f"{file} must be an object whose eos_token_id.*0 to (675|the last)"
    ) as e:
        load_tokenizer(directory)
    assert len(str(e.value)) < 500


@pytest.mark.parametrize("text", ["", "{", '{"eos_token_id": }', "\x00", "[" * 100_000, "nul"])
def test_a_malformed_file_is_refused_with_its_name(directory, text):
    write(directory, "generation_config.json", text)
    with pytest.raises(ValueError, match="generation_config.json is not JSON.*Correct it"):
        load_tokenizer(directory)


@pytest.mark.parametrize("content", ["[]", "[7]", "7", '"x"', "null", "true"])
def test_a_file_that_holds_no_object_is_refused(directory, content):
    write(directory, "generation_config.json", content)
    with pytest.raises(ValueError, match="generation_config.json must be an object"):
        load_tokenizer(directory)
