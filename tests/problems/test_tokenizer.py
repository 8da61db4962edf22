# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: bytes are exact, templates are Qwen's, and what cannot work is refused."""

import json
import shutil

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from opd_jax.model import hf
from opd_jax.problems import task, tiny_tokenizer
from opd_jax.problems.tokenizer import Tokenizer, load_tokenizer

SAMPLES = ["héllo 世界 \x00 x\n\n 12\t", "", " ", "e\u0301\u202eאב", "🙂🙂", "\\boxed{green}."]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(directory)


def test_the_embedded_pair_ships_this_very_tokenizer(directory):
    """If this fails, task or tokenizer changed: train the pair again (configs/tiny.py)."""
    for name in ("embedded:student", "embedded:teacher"):
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shipped = json.loads((hf.resolve(name) / file).read_text())
            assert shipped == json.loads((directory / file).read_text()), (name, file)


@pytest.mark.parametrize("sample", SAMPLES)
def test_any_text_comes_back(tokenizer, sample):
    assert tokenizer.decode(tokenizer.encode(sample)) == sample


@given(st.text())
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(sample):
    tokenizer = _cached()
    ids = tokenizer.encode(sample)
    joined = b"".join(tokenizer.token_bytes[i] for i in ids)
    if not any(added in sample for added in tiny_tokenizer.SPECIAL):
        assert joined == sample.encode()


def _cached(made=[]):  # noqa: B006 (hypothesis takes no fixture of module scope per example)
    if not made:
        tokenizer = Tokenizer(_wrap(tiny_tokenizer.train(num_problems=50)))
        made.append(tokenizer)
    return made[0]


def _wrap(raw, template=tiny_tokenizer.CHAT_TEMPLATE, eos="<|im_end|>"):
    import transformers

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=eos, chat_template=template
    )


def test_every_byte_is_a_token(tokenizer):
    assert {bytes([b]) for b in range(256)} <= set(tokenizer.token_bytes)


def test_special_tokens_have_no_bytes_and_the_thinking_tags_do(tokenizer):
    vocab = tokenizer.hf.get_vocab()
    assert all(tokenizer.token_bytes[vocab[t]] == b"" for t in tiny_tokenizer.SPECIAL)
    assert tokenizer.token_bytes[vocab["<think>"]] == b"<think>"
    assert tokenizer.decode([vocab["<|im_start|>"], vocab["</think>"]]) == "</think>"


def test_a_cut_character_becomes_the_replacement_character(tokenizer):
    ids = tokenizer.encode("é")
    assert len(ids) == 2 and tokenizer.decode(ids[:1]) == "\ufffd"


def test_a_response_ends_with_the_turn_or_the_text(tokenizer):
    vocab = tokenizer.hf.get_vocab()
    assert set(tokenizer.eos_ids) == {vocab["<|im_end|>"], vocab["<|endoftext|>"]}
    assert tokenizer.pad_id == vocab["<|endoftext|>"]
    assert tokenizer.vocab_size == len(vocab) == max(vocab.values()) + 1


def test_the_template_is_chatml_with_an_empty_thought(tokenizer):
    rendered = tokenizer.render("Hi")
    user = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered == user + "<think>\n\n</think>\n\n"
    assert tokenizer.render("Hi", thinking=True) == user
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    assert tokenizer.render(messages) == "<|im_start|>system\nS<|im_end|>\n" + rendered
    assert tokenizer.render((("user", "Hi"),)) == rendered


def test_one_by_one_and_all_at_once_give_the_same_prompts(tokenizer):
    prompts = [e.prompt for e in task.make_many(tuple(task.FAMILIES), "train", 0, 12)]
    one_by_one = [tokenizer.encode_prompt(p) for p in prompts]
    assert tokenizer.encode_prompts(prompts) == one_by_one
    assert tokenizer.encode_prompts([]) == []
    assert tokenizer.decode(one_by_one[0]).count(prompts[0]) == 1


def test_words_of_the_task_are_one_token_each(tokenizer):
    """So that solutions stay short; the quickstart's prompt_len and response_len rely on it."""
    examples = task.make_many(tuple(task.FAMILIES), "train", 0, 1200)
    assert max(len(tokenizer.encode(e.solution)) for e in examples) < 160
    assert max(len(tokenizer.encode_prompt(e.prompt)) for e in examples) <= 80
    for word in (*task.NUMBERS, *task.NAMES, *task.DAYS, *task.POINTS, *sum(task.ROUGH, [])):
        assert len(tokenizer.encode(f" {word}")) == 1, word


def test_a_directory_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json.*--config.student.path"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_template_or_end_is_refused():
    raw = tiny_tokenizer.train(num_problems=20)
    with pytest.raises(ValueError, match="has no chat template.*add chat_template"):
        Tokenizer(_wrap(raw, template=None))
    with pytest.raises(ValueError, match="no end-of-sequence token.*set eos_token_id"):
        Tokenizer(_wrap(raw, eos=None))


def test_a_tokenizer_that_is_not_byte_level_is_refused():
    raw = tokenizers.Tokenizer(models.WordLevel({"▁word": 0, "<|im_end|>": 1}))
    with pytest.raises(ValueError, match="'▁word'.*byte-level BPE.*--config.student.path"):
        Tokenizer(_wrap(raw))


def test_generation_config_may_name_one_end_many_or_none(directory, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    own = load_tokenizer(directory).hf.eos_token_id
    for eos, expected in ((own, (own,)), ([5, own], (5, own)), (None, (own,))):
        (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert load_tokenizer(copy).eos_ids == expected
    (copy / "generation_config.json").unlink()
    assert load_tokenizer(copy).eos_ids == (own,)
