# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of the embedded pair: byte-level BPE on the embedded task's own prose.

Qwen3's layout: bytes and merges first, then its 26 added tokens, ChatML template, <|im_end|> ends
a turn. Nearly every word of the task is one token, so that solutions stay short. Unlike Qwen's, a
word takes only a space in front of it, never another sign: `{green` would otherwise need a token
per answer. Deterministic: the same task gives the same files.
"""

import json
import pathlib

from opd_jax.problems import task

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>"
    " <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|>"
    " <|image_pad|> <|video_pad|>"
).split()
# Added, but part of the text when decoded, as in Qwen3.
PLAIN = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|>"
    " <|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think>"
).split()
WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
ROLES = "system user assistant tool"  # words of the template that the task does not say


def train(max_vocab: int = 1024, num_problems: int = 12_000):
    """A `tokenizers.Tokenizer`. Stops below `max_vocab` once every frequent word is one token."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max_vocab,
        min_frequency=40,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    style = task.Style(slip=0.1, rough=2)  # the rough words are words too
    problems = task.make_many(tuple(task.FAMILIES), "train", 0, num_problems, style)
    texts = [f"{e.prompt}\n\n{e.solution}" for e in problems] + [ROLES.replace(" ", "\n")] * 50
    tokenizer.train_from_iterator(texts, trainer)
    added = [tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIAL]
    added += [tokenizers.AddedToken(t, special=False, normalized=False) for t in PLAIN]
    tokenizer.add_tokens(added)
    return tokenizer


def save(directory) -> None:
    """Writes the tokenizer's files, generation_config.json and config.json's end-of-turn ids."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train()
    tokenizer.save(str(directory / "tokenizer.json"))
    ids = {t: tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>")}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1024,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
    }
    # What a model directory adds to these when it is saved with this one as its source.
    model = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    files = {"tokenizer_config": config, "generation_config": generation, "config": model}
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
