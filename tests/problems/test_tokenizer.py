# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: bytes are exact, templates are Qwen's, and what cannot work is refused."""

import json
import shutil

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from opd_jax.model import hf
from opd_jax.problems import task, tiny_tokenizer
from opd_jax.problems.tokenizer import TEXTS, Tokenizer, load_tokenizer, probes
from tests import advice

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


# ---- chat templates ----

TURNS = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
)
OPEN = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
NO_SYSTEM = (
    "{%- if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{%- endif %}"
)
ALTERNATE = (
    "{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{%- endif %}{%- endfor %}"
)
GEMMA = "{{- '<bos>' }}" + NO_SYSTEM + ALTERNATE + TURNS.replace("m.content", "m.content|trim")
USER = ("user", "Hi")
SYSTEM, ANSWER = ("system", "Be brief."), ("assistant", "Hello")
ONE, WITH_SYSTEM, THREE = "Hi", [SYSTEM, USER], [USER, ANSWER, USER]


def templated(template, path=None):
    hf = _wrap(_raw(), template=template)
    hf.name_or_path = str(path or "model")
    return Tokenizer(hf)


def _raw(made=[]):  # noqa: B006 (one for all rows; a template does not change it)
    if not made:
        made.append(tiny_tokenizer.train(num_problems=20))
    return made[0]


ACCEPTED = {
    "ChatML": (TURNS + OPEN, [ONE, WITH_SYSTEM, THREE]),
    "the embedded one": (tiny_tokenizer.CHAT_TEMPLATE, [ONE, WITH_SYSTEM, THREE]),
    "no system message, none needed": (NO_SYSTEM + TURNS + OPEN, [ONE, THREE]),
    "alternating roles, as the data have": (ALTERNATE + TURNS + OPEN, [ONE, THREE]),
    "Gemma's kind": (GEMMA + OPEN, [ONE, THREE]),
    "a system message demanded and there": (
        "{%- if messages[0].role != 'system' %}{{ raise_exception('system first') }}{%- endif %}"
        + TURNS
        + OPEN,
        [WITH_SYSTEM],
    ),
    "a system message of its own": ("{{- 'Be kind.\\n' }}" + TURNS + OPEN, [ONE, WITH_SYSTEM]),
    "one turn only": ("{{ messages[0].content }}" + OPEN, [ONE]),
    "the last turn twice": ("{{ messages[-1].content }}" + TURNS + OPEN, [ONE, THREE]),
    "today's date": ("{{ strftime_now('%Y') }}" + TURNS + OPEN, [ONE]),
    "a think block": (TURNS + OPEN + "{%- if add_generation_prompt %}<think>{%- endif %}", [ONE]),
    "system told as user": (
        TURNS.replace("m.role", "m.role|replace('system', 'user')") + OPEN,
        [WITH_SYSTEM],
    ),
    "nothing is asked": ("{% if %}", []),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_template_that_can_write_the_data_is_accepted(case):
    template, prompts = ACCEPTED[case]
    templated(template).check_template(prompts)


NO_PROMPT, NO_CONTENT, CANNOT = "no generation prompt", "not write the content", "cannot write"
REFUSED = {
    "no generation prompt": (TURNS, [ONE], NO_PROMPT),
    "a generation prompt always": (TURNS + "<|im_start|>assistant\n", [ONE], NO_PROMPT),
    "another name for the flag": (TURNS + OPEN.replace("_prompt", ""), [ONE], NO_PROMPT),
    "an empty generation prompt": (
        TURNS + "{%- if add_generation_prompt %}{{- '' }}{%- endif %}",
        [ONE],
        NO_PROMPT,
    ),
    "a generation prompt for one turn only": (
        TURNS + "{%- if messages|length == 1 %}" + OPEN + "{%- endif %}",
        [ONE, THREE],
        NO_PROMPT,
    ),
    "no content": (TURNS.replace("m.content", "''") + OPEN, [ONE], "of the user message"),
    "a text of its own": ("What is 2 + 3?" + OPEN, [ONE], NO_CONTENT),
    "a fixed text that holds the probe": (
        f"{{{{ {probes([ONE])[0][0]['content']!r} }}}}" + OPEN,
        [ONE],
        NO_CONTENT,
    ),
    "another key": (TURNS.replace("m.content", "m.text|default('')") + OPEN, [ONE], NO_CONTENT),
    "content that is cut": (TURNS.replace("m.content", "m.content[:20]") + OPEN, [ONE], NO_CONTENT),
    "content quoted": (TURNS.replace("m.content", "(m.content|e)") + OPEN, [ONE], NO_CONTENT),
    "content in lower case": (
        TURNS.replace("m.content", "m.content|lower") + OPEN,
        [ONE],
        NO_CONTENT,
    ),
    "content on one line": (
        TURNS.replace("m.content", "m.content.split()|join(' ')") + OPEN,
        [ONE],
        NO_CONTENT,
    ),
    "the last turn only": ("{{ messages[-1].content }}" + OPEN, [THREE], NO_CONTENT),
    "no system message": (
        TURNS.replace("{{-", "{%- if m.role != 'system' %}{{-").replace("}}", "}}{%- endif %}")
        + OPEN,
        [ONE, WITH_SYSTEM],
        "of the system message",
    ),
    "a system message refused": (
        NO_SYSTEM + TURNS + OPEN,
        [ONE, WITH_SYSTEM],
        "roles system, user, which the data need .TemplateError: no system role",
    ),
    "roles must alternate": (
        ALTERNATE + TURNS + OPEN,
        [ONE, [USER, USER]],
        "roles user, user, .*roles must alternate",
    ),
    "everything refused": ("{{ raise_exception('no') }}", [ONE], CANNOT),
    "a syntax error": ("{% for m in messages %}", [ONE], "cannot write.*TemplateSyntaxError"),
    "an unknown tag": ("{% say %}", [ONE], CANNOT),
    "an unknown filter": ("{{ messages|chatml }}", [ONE], CANNOT),
    "an undefined name": ("{{ tools.first.name }}", [ONE], "cannot write.*UndefinedError"),
    "a sum of text and number": ("{{ messages[0].content + 1 }}", [ONE], "cannot write.*TypeError"),
    "a division by zero": ("{{ 1 // 0 }}", [ONE], CANNOT),
    "an unsafe attribute": ("{{ messages.__class__.__mro__ }}", [ONE], CANNOT),
}


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_cannot_write_the_data_is_refused_by_file(case, file, tmp_path):
    template, prompts, match = REFUSED[case]
    (tmp_path / file).write_text("")
    with pytest.raises(ValueError, match=f"(?s){match}") as caught:
        templated(template, tmp_path).check_template(prompts)
    message = str(caught.value)
    assert str(tmp_path / file) in message and "Correct that file" in message
    advice.check(message)


def test_a_prompt_that_its_template_refuses_is_refused_wherever_it_is_rendered():
    tokenizer = templated(NO_SYSTEM + TURNS + OPEN)
    assert tokenizer.render(ONE)
    for call in (
        tokenizer.render,
        tokenizer.encode_prompt,
        lambda p: tokenizer.encode_prompts([p]),
    ):
        with pytest.raises(ValueError, match="tokenizer_config.json cannot write.*no system role"):
            call(WITH_SYSTEM)


def test_each_sequence_of_roles_is_probed_once():
    found = probes(
        [ONE, WITH_SYSTEM, "Ho", [{"role": "user", "content": "x"}], THREE, [SYSTEM, USER]]
    )
    roles = [[message["role"] for message in probe] for probe in found]
    assert roles == [["user"], ["system", "user"], ["user", "assistant", "user"]]
    for probe in found:
        assert len({message["content"] for message in probe}) == len(probe)


# ---- the class that is named beside tokenizer.json ----

QWEN_WORDS = (  # of Qwen3's tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = tiny_tokenizer.WORDS
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
THREE_DIGITS = QWEN_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|")


# Merges that the patterns above part at different places; a real vocabulary has them all.
PIECES = [
    *map(str, range(1000)),
    *"'t 'tis 'T 'Tis 'really !\n :\n .\n\n \n\n \n\t \r\n }. ,".split(" "),
]
PIECES += "Ann| has| two| plums|{green|(a|_b|[0|\\frac|DON|'T|Caf|cafe|é|e\u0301|  |   ".split("|")


def model_with(path, words, normalizer, name):
    """A model directory whose tokenizer.json splits by `words`; name None = no tokenizer_class."""
    raw = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer, raw.decoder = byte_level, decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(
        PIECES, trainers.BpeTrainer(show_progress=False, initial_alphabet=alphabet)
    )
    raw.add_special_tokens(["<|im_end|>"])
    split = pre_tokenizers.Split(tokenizers.Regex(words), behavior="isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    raw.normalizer = normalizer
    raw.save(str(path / "tokenizer.json"))
    beside = {"eos_token": "<|im_end|>", "chat_template": TURNS + OPEN}
    beside |= {"tokenizer_class": name} if name else {}
    (path / "tokenizer_config.json").write_text(json.dumps(beside))
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    return path


NFC = normalizers.NFC()
QWEN, FAST = "Qwen2Tokenizer", "PreTrainedTokenizerFast"


@pytest.mark.parametrize(
    "words, normalizer, name",
    [
        (QWEN_WORDS, NFC, QWEN),  # every published Qwen3
        (QWEN_WORDS, NFC, "Qwen2TokenizerFast"),
        (QWEN_WORDS, NFC, None),  # the class of config.json's model_type
        (QWEN_WORDS, NFC, FAST),
        (QWEN_WORDS, None, FAST),
        (WORDS, None, FAST),
        (WORDS, None, "TokenizersBackend"),
        (WORDS, None, "AClassNobodyKnows"),
        (GPT2_WORDS, None, FAST),
        (THREE_DIGITS, NFC, FAST),
        (r"\s+|\S+", None, FAST),
    ],
)
def test_a_tokenizer_that_encodes_as_its_file_says_is_loaded(words, normalizer, name, tmp_path):
    loaded = load_tokenizer(model_with(tmp_path, words, normalizer, name))
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (*SAMPLES, *TEXTS):
        assert loaded.encode(text) == raw.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "words, normalizer, name",
    [
        (WORDS, None, QWEN),
        (WORDS, None, "Qwen2TokenizerFast"),
        (WORDS, None, None),
        (WORDS, NFC, QWEN),
        (QWEN_WORDS, None, QWEN),  # nothing but the normalizer
        (QWEN_WORDS, normalizers.NFKC(), QWEN),
        (QWEN_WORDS, normalizers.Lowercase(), QWEN),
        (GPT2_WORDS, NFC, QWEN),
        (THREE_DIGITS, NFC, QWEN),
        (QWEN_WORDS.replace(r"[\r\n]*|", "|"), NFC, QWEN),
        (QWEN_WORDS.replace(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|", ""), NFC, QWEN),
        (r"\s+|\S+", NFC, QWEN),
    ],
)
def test_a_class_that_encodes_otherwise_is_refused_and_the_advice_works(
    words, normalizer, name, tmp_path
):
    directory = model_with(tmp_path, words, normalizer, name)
    with pytest.raises(ValueError, match="reads it as a Qwen2Tokenizer and gives") as caught:
        load_tokenizer(directory)
    assert str(directory / "tokenizer.json") in str(caught.value)
    assert 'Set tokenizer_class to "PreTrainedTokenizerFast"' in str(caught.value)
    beside = directory / "tokenizer_config.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"tokenizer_class": FAST}))
    assert load_tokenizer(directory).vocab_size


def test_padding_and_truncation_of_the_file_are_no_difference(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "copy")
    path = str(tmp_path / "copy" / "tokenizer.json")
    raw = tokenizers.Tokenizer.from_file(path)
    raw.enable_padding(length=64)
    raw.enable_truncation(4)
    raw.save(path)
    assert load_tokenizer(tmp_path / "copy").vocab_size
