# SPDX-License-Identifier: Apache-2.0
"""Text <-> tokens: a tokenizer with its chat template, and the exact bytes of every token.

Sentence spans are counted in bytes of the rollout's own tokens, so `decode` is the concatenation of
`token_bytes` and nothing else: no clean-up of spaces, no re-tokenising. Only byte-level BPE is
accepted (Qwen's kind), because only there does a token have bytes of its own.

The tokenizer is read from files; no code from a model directory runs.
"""

import json
import pathlib
from collections.abc import Callable, Iterable, Sequence

from opd_jax.structs import Vocabulary

Messages = str | Sequence[dict[str, str]] | Sequence[tuple[str, str]]
# What two readings of one tokenizer.json must encode alike: spaces, digits, lines, unicode, code.
TEXTS = (
    "'Tis so: Ann has  two plums,   and  {green} she's 'won'.",
    "1234567 + 89 = 1,234,656; 3.14e-10",
    "a\n\n\tb \r\n   c\n \n",
    "Caf\u00e9 cafe\u0301 \ufb01 \u4e16\u754c \U0001f642 \u0627\u0644 \u00a0x",
    "def f(a_b):\n    return a_b[0]!=-1 or \\frac{1}{2}  # DON'T",
)


def as_messages(prompt: Messages) -> list[dict[str, str]]:
    """Chat messages of a prompt: a plain string is one message of the user."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in prompt]


def probes(prompts: Iterable[Messages]) -> list[list[dict[str, str]]]:
    """A made-up prompt for each sequence of roles that occurs in `prompts`.

    What a chat template must be able to write, and no more: a template that refuses system messages
    is right for data that have none.
    """
    found = dict.fromkeys(tuple(m["role"] for m in as_messages(prompt)) for prompt in prompts)
    return [_probe(roles, "Is") for roles in found]


def _probe(roles: Sequence[str], first: str) -> list[dict[str, str]]:
    """Contents that a template would change if it cut, quoted or retyped them."""
    content = first + " 'a' & <b> {} the same?\nYES or no, says \"{}\" of part {}."
    return [
        {"role": role, "content": content.format("{c}", role, i)} for i, role in enumerate(roles)
    ]


def _byte_of_char() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary (GPT-2's table, inverted)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


def _token_bytes(tokenizer) -> list[bytes]:
    """Bytes of every id; b"" for special tokens and for ids that nothing uses."""
    table = _byte_of_char()
    added = tokenizer.added_tokens_decoder
    out = [b""] * (max(tokenizer.get_vocab().values()) + 1)
    for token, i in tokenizer.get_vocab().items():
        if i in added:
            out[i] = b"" if added[i].special else added[i].content.encode()
        elif all(char in table for char in token):
            out[i] = bytes(table[char] for char in token)
        else:
            raise ValueError(
                f"token {i} ({token!r}) of {tokenizer.name_or_path!r} is not written in the "
                "byte-level alphabet: sentence spans need byte-level BPE, as every Qwen tokenizer "
                "is; set --config.student.path to a model with such a tokenizer"
            )
    return out


def _roles(messages: list[dict[str, str]]) -> str:
    return ", ".join(message["role"] for message in messages)


class Tokenizer:
    """A Hugging Face tokenizer with what this project asks of it.

    Attributes:
      token_bytes: bytes of every id, b"" for special tokens.
      eos_ids: ids that end a response, of the tokenizer and of generation_config.json (without it
        config.json).
      pad_id: fills the rest of a row; never read by a model as text.
      vocab_size: one more than the largest id.
    """

    def __init__(self, tokenizer, extra_eos_ids: Sequence[int] = ()):
        if tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, so a prompt "
                "cannot be written the way the model was trained; add chat_template to "
                "tokenizer_config.json"
            )
        self.hf = tokenizer
        self.token_bytes = _token_bytes(tokenizer)
        self.vocab_size = len(self.token_bytes)
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.eos_ids = tuple(sorted({*own, *extra_eos_ids}))
        if not self.eos_ids:
            raise ValueError(
                f"{tokenizer.name_or_path!r} names no end-of-sequence token, so no response could "
                "end; set eos_token_id in generation_config.json"
            )
        pad = tokenizer.pad_token_id
        self.pad_id = self.eos_ids[0] if pad is None else pad

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids that sampling must know."""
        return Vocabulary(self.vocab_size, self.eos_ids, self.pad_id)

    def render(self, prompt: Messages, thinking: bool = False) -> str:
        """The prompt as the model sees it, generation prompt included.

        Raises ValueError if the chat template refuses the prompt or cannot be read.
        """
        return self._render(as_messages(prompt), thinking)

    def _render(self, messages: list[dict[str, str]], thinking: bool, generation=True) -> str:
        try:
            return self.hf.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generation,
                enable_thinking=thinking,
            )
        except Exception as error:  # a template is a program and may raise anything
            raise ValueError(
                f"the chat template in {self._template_file} cannot write a prompt of the roles "
                f"{_roles(messages)}, which the data need ({type(error).__name__}: {error}). "
                "Correct that file, or leave such prompts out of the data (config.data.source)"
            ) from error

    @property
    def _template_file(self) -> pathlib.Path:
        """Where transformers found the chat template."""
        directory = pathlib.Path(self.hf.name_or_path)
        own = directory / "chat_template.jinja"
        return own if own.exists() else directory / "tokenizer_config.json"

    def check_template(self, prompts: Iterable[Messages], thinking: bool = False) -> None:
        """Raises ValueError unless the chat template can write what the data need.

        Args:
          prompts: of the data; the first of each sequence of roles is tried (see `probes`).
          thinking: the template's thinking mode.
        """
        for messages in probes(prompts):
            text = self._render(messages, thinking)
            if text == self._render(messages, thinking, generation=False):
                raise ValueError(
                    f"the chat template in {self._template_file} writes no generation prompt: its "
                    "text is the same with and without add_generation_prompt, so the model would "
                    "go on with the user's turn. Correct that file"
                )
            other = self._render(_probe([m["role"] for m in messages], "Are"), thinking)
            for message in messages:
                if message["content"] not in text or message["content"] in other:
                    raise ValueError(
                        f"the chat template in {self._template_file} does not write the content of "
                        f"the {message['role']} message as it is (prompts of the roles "
                        f"{_roles(messages)}): the model would see {text!r}. Correct that file"
                    )

    def encode_prompt(self, prompt: Messages, thinking: bool = False) -> list[int]:
        """Ids of the rendered prompt."""
        return self.encode(self.render(prompt, thinking))

    def encode_prompts(self, prompts: Sequence[Messages], thinking: bool = False):
        """`encode_prompt` of many, list[list[int]]; several times faster than one by one."""
        rendered = [self.render(prompt, thinking) for prompt in prompts]
        return self.hf(rendered, add_special_tokens=False)["input_ids"] if rendered else []

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it stands: no template, nothing added."""
        return self.hf.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without special tokens; bytes that are not UTF-8 become U+FFFD."""
        joined = b"".join(self.token_bytes[i] for i in ids if 0 <= i < self.vocab_size)
        return joined.decode("utf-8", "replace")


def _generation_eos(directory: pathlib.Path) -> Callable[[int], tuple[int, ...]]:
    """Reads EOS ids from generation_config.json, or, where there is none, from config.json.

    Returns a function from the vocabulary's size to the ids, which raises if one lies outside.
    """
    path = directory / "generation_config.json"
    if not path.exists():
        path = directory / "config.json"
    if not path.exists():
        return lambda vocab_size: ()
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON ({error}): it names the ids that end a response. Correct it, or "
            "download or export the model again"
        ) from error
    eos = raw.get("eos_token_id") if isinstance(raw, dict) else raw
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]

    def require(ok: bool, most: str) -> None:
        if not ok:
            shown = json.dumps(eos)
            raise ValueError(
                f"{path} must be an object whose eos_token_id is an id, a list of ids or null, "
                f"ids from 0 to {most} of the tokenizer, because a response ends at them; it holds "
                f"{shown if len(shown) <= 60 else shown[:57] + '...'}. Correct it, or download or "
                "export the model again"
            )

    def checked(vocab_size: int) -> tuple[int, ...]:
        require(all(0 <= i < vocab_size for i in ids), str(vocab_size - 1))
        return tuple(ids)

    whole = all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    require(isinstance(raw, dict) and whole, "the last")
    return checked


def load_tokenizer(directory) -> Tokenizer:
    """The tokenizer of a local model directory (resolve hub names first: `model.hf.resolve`)."""
    import transformers  # seconds to import; only runs that touch text pay for it

    directory = pathlib.Path(directory)
    if not (directory / "tokenizer.json").exists():
        raise FileNotFoundError(
            f"{directory} holds no tokenizer.json: a model directory must hold config.json, "
            "model.safetensors, tokenizer.json and tokenizer_config.json; set --config.student.path"
            " and --config.teacher.path to such directories, for example embedded:student"
        )
    _check_files(directory)
    raw = _raw(directory / "tokenizer.json")
    eos_ids = _generation_eos(directory)  # before transformers, whose own error names no file
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(directory), trust_remote_code=False, local_files_only=True
    )
    _check_ids(tokenizer, raw, directory)
    return Tokenizer(tokenizer, eos_ids(max(tokenizer.get_vocab().values()) + 1))


def _check_files(directory: pathlib.Path) -> None:
    """Raises, naming the file, unless those that transformers reads first are JSON objects."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = directory / name
        if not path.exists():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} cannot be read as JSON ({error}): it may be cut off, or a pointer of Git "
                "LFS. Copy or download the file again"
            ) from None
        if not isinstance(found, dict):
            raise ValueError(
                f"{path} must hold a JSON object, this is a {type(found).__name__}. Copy or "
                "download the file again"
            )


def _raw(path: pathlib.Path):
    """What tokenizer.json itself says, without transformers."""
    import tokenizers

    try:
        raw = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # all that the library raises
        raise ValueError(
            f"{path} is no tokenizer that the library tokenizers reads ({error}). Copy or download "
            "the file again"
        ) from None
    raw.no_padding()
    raw.no_truncation()
    return raw


def _check_ids(tokenizer, raw, directory: pathlib.Path) -> None:
    """Raises unless a few texts, and every added token, get the ids that tokenizer.json gives them.

    transformers builds some classes from the vocabulary alone, with a pre-tokenizer of its own, and
    lets tokenizer_config.json change how added tokens are cut out.
    """
    path = directory / "tokenizer.json"
    for text in TEXTS:
        ours = tokenizer.encode(text, add_special_tokens=False)
        theirs = raw.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            raise ValueError(
                f"{path} encodes {text!r} as {theirs}, but transformers "
                f"reads it as a {type(tokenizer).__name__} and gives {ours}: that class replaces "
                "the file's pre-tokenizer or normalizer. Set tokenizer_class to "
                f'"PreTrainedTokenizerFast" in {directory / "tokenizer_config.json"}'
            )
    for added in raw.get_added_tokens_decoder().values():
        text = f"a {added.content} b{added.content}\n1"
        ours = tokenizer.encode(text, add_special_tokens=False)
        theirs = raw.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            raise ValueError(
                f"{path} encodes {text!r} as {theirs}, but transformers gives {ours}: "
                f"{directory / 'tokenizer_config.json'} changes how {added.content!r} is cut out. "
                "Delete split_special_tokens there, and make added_tokens_decoder agree with the "
                "added_tokens of tokenizer.json"
            )
