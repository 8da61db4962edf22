# SPDX-License-Identifier: Apache-2.0
"""Sentences of a response as spans of the rollout's own tokens, and their scores. Eq. (2). Host.

Boundaries are found on the decoded text and carried to tokens through byte offsets. Nothing is
tokenised again: byte-level BPE does not round-trip in the middle of a character.
"""

import codecs
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from opd_jax.settings import Section, choice, number

Spans = list[tuple[int, int]]  # half-open (start, end), contiguous, none of them empty
KINDS = ("nltk", "nltk_newline", "fixed_tokens", "token")
PUNKT = ("embedded", "punkt_tab")
AGGREGATES = ("mean", "median", "trimmed")
TRANSFORMS = ("log1p", "none")

# Abbreviations of mathematical prose: Punkt does not end a sentence after them. Lower case, no
# final period. Left out, although NLTK's trained model has them: words that end sentences here, as
# "co" ("AO = CO."), and words that start a sentence after any abbreviation: on 400 answers of a
# Qwen2.5-Math model they would split where the trained model does not ("91, etc. The multiples").
ABBREVIATIONS = """
a.m al approx art assoc aug ca cf ch chap col coroll cor corp dec def defn deg dept dim dr ed eds
e.g eg eq eqn eqns eqs est etc ex exs feb fig figs ft hr hrs i.e ie inc incl jan jr lem ln ltd max
min mr mrs ms nos nov obs oct oz p.m pg ph.d pp prob prof prop props ref refs rem resp rhs lhs sec
secs sept sol sq sr st suppl thm thms tr u.k u.s viz vol vols vs w.l.o.g wlog w.r.t wrt
""".split()
# Code points of the characters that are white space to str.isspace.
WHITE_SPACE = np.array([code for code in range(0x3001) if chr(code).isspace()])
# A lone surrogate never comes out of UTF-8: it marks replaced bytes, unlike a genuine U+FFFD.
_MARK = 0xDC80


@dataclasses.dataclass(frozen=True)
class Settings(Section):
    """config.segment."""

    section = "segment"

    # "nltk" (the paper), "nltk_newline" (line ends split too), "fixed_tokens", or "token".
    kind: str = choice("nltk", KINDS)
    punkt: str = choice("embedded", PUNKT)  # of the nltk kinds, see `load_punkt`
    fixed_tokens: int = number(32, least=1)  # length of a segment of kind "fixed_tokens"
    # Longer segments are cut into pieces of this many tokens; 0 = no cap (the paper).
    max_tokens: int = number(0, least=0)
    num_workers: int = number(1, least=0)  # processes that segment; 0 = in line

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, ok in (
            ("fixed_tokens", self.kind == "fixed_tokens"),
            ("punkt", self.kind.startswith("nltk")),
        ):
            default = getattr(type(self), name)
            must = f"{default!r} with kind={self.kind}, which does not read it"
            self.require(ok or getattr(self, name) == default, name, must, default)


DEFAULT = Settings()


@functools.cache
def load_punkt(punkt: str = "embedded") -> Any:
    """The sentence splitter: an object with `span_tokenize(text)`.

    Args:
      punkt: "embedded" = Punkt with this module's abbreviations, the same everywhere; "punkt_tab" =
        NLTK's trained English resource, which has to be there. Never chosen by what happens to be
        installed.

    Raises:
      ValueError: `punkt_tab` is not installed; says how to get it.
    """
    from nltk.tokenize import punkt as nltk_punkt

    if punkt == "embedded":
        params = nltk_punkt.PunktParameters()
        params.abbrev_types = set(ABBREVIATIONS)
        return nltk_punkt.PunktSentenceTokenizer(params)
    try:
        return nltk_punkt.PunktTokenizer("english")
    except LookupError as error:
        raise ValueError(
            "punkt 'punkt_tab' needs NLTK's trained model, which is not on this machine: "
            "run `python -m nltk.downloader punkt_tab`, or set --config.segment.punkt=embedded"
        ) from error


def sentence_spans(text: str, settings: Settings = DEFAULT) -> Spans:
    """Sentences of `text` as half-open character spans; `settings` of an nltk kind.

    Returns:
      list of (start, end): non-empty, contiguous, from 0 to len(text). White space between two
      sentences belongs to the one before, white space at the start to the first. Empty text -> [].
    """
    if not text:
        return []
    starts = {start for start, _ in load_punkt(settings.punkt).span_tokenize(text)}
    if settings.kind == "nltk_newline":  # Punkt does not see line ends
        pos = text.find("\n")
        while pos >= 0:
            end = pos + 1
            while end < len(text) and text[end].isspace():
                end += 1
            starts.add(end)
            pos = text.find("\n", end)
    # White space before the first sentence, and text that is nothing else, still belong to a span.
    starts = sorted(starts - {min(starts, default=0), len(text)} | {0})
    return list(zip(starts, [*starts[1:], len(text)], strict=True))


def token_spans(token_bytes: Sequence[bytes], text_spans: Spans) -> Spans:
    """Carries sentences over to tokens.

    A token belongs to the sentence that holds its first character that is not white space: " Ann"
    begins Ann's sentence. A token of white space alone goes with the sentence before it (at the
    start, with the first). A token that begins inside a character counts from that character.

    Args:
      token_bytes: bytes of each response token; b"" for a special token, which goes with the token
        before it (so EOS joins the last sentence; leading ones join the first).
      text_spans: of `sentence_spans`, on `b"".join(token_bytes).decode("utf-8", "replace")`.

    Returns:
      list of (start, end) token spans: non-empty, contiguous, covering all tokens. A sentence that
      gets no token has no span. No tokens -> [].
    """
    num_tokens = len(token_bytes)
    if not num_tokens:
        return []
    size_t = np.fromiter(map(len, token_bytes), np.int64, num_tokens)
    real_n = np.flatnonzero(size_t)
    if not len(real_n) or len(text_spans) < 2:
        return [(0, num_tokens)]
    byte_of_char, is_white = _characters(b"".join(token_bytes))
    end_n = np.cumsum(size_t)[real_n]
    first_char_n = np.searchsorted(byte_of_char, end_n - size_t[real_n], side="right") - 1
    last_char_n = np.searchsorted(byte_of_char, end_n, side="left") - 1
    solid = np.append(
        np.flatnonzero(~is_white), len(is_white)
    )  # characters that are no white space
    solid_n = solid[np.searchsorted(solid, first_char_n)]
    # White space between two sentences lies in the span of the one before: so it says for itself.
    char_n = np.where(solid_n <= last_char_n, solid_n, first_char_n)
    sentence_n = np.searchsorted([start for start, _ in text_spans], char_n, side="right")
    cuts = real_n[1:][sentence_n[1:] != sentence_n[:-1]].tolist()
    return list(zip([0, *cuts], [*cuts, num_tokens], strict=True))


def segment(token_bytes: Sequence[bytes], settings: Settings = DEFAULT) -> Spans:
    """Segments of one response as token spans. Paper, eq. (2), and variants.

    Args:
      token_bytes: bytes of each valid response token, b"" for special tokens.
      settings: its kind says which segments.

    Returns:
      list of (start, end): non-empty, contiguous, covering all tokens; [] for no tokens.
    """
    num_tokens = len(token_bytes)
    if settings.kind == "token":
        return [(t, t + 1) for t in range(num_tokens)]
    if settings.kind == "fixed_tokens":
        spans = cap_spans([(0, num_tokens)] if num_tokens else [], settings.fixed_tokens)
    else:
        text = b"".join(token_bytes).decode("utf-8", "replace")
        spans = token_spans(token_bytes, sentence_spans(text, settings))
    return cap_spans(spans, settings.max_tokens) if settings.max_tokens else spans


def segment_rows(
    tokens_b: Sequence[np.ndarray], *, token_bytes: Sequence[bytes], settings: Mapping[str, Any]
) -> list[Spans]:
    """`segment` of many responses; what worker processes call.

    Args:
      tokens_b: the valid tokens of each row, int[T'].
      token_bytes: bytes of every id, b"" for special ones; ids beyond it count as special.
      settings: fields of `Settings`: a worker's message holds no objects.

    Returns:
      list of spans, one per row.
    """
    known, chosen = len(token_bytes), Settings(**settings)
    out = []
    for token_t in tokens_b:
        ids = np.asarray(token_t).tolist()
        out.append(segment([token_bytes[i] if 0 <= i < known else b"" for i in ids], chosen))
    return out


def cap_spans(spans: Spans, max_tokens: int) -> Spans:
    """Cuts spans longer than `max_tokens` into pieces of that many; the last holds the rest."""
    return [
        (start, min(start + max_tokens, end))
        for first, end in spans
        for start in range(first, end, max_tokens)
    ]


def segment_scores(
    value_t: ArrayLike,
    spans: Spans,
    usable_t: np.ndarray | None = None,
    *,
    aggregate: str = "mean",
    trim: float = 0.1,
    transform: str = "log1p",
) -> np.ndarray:
    r"""The score of every segment. Paper, eq. (2).

    .. math::
      S_i = \log(1 + \frac{1}{|B_i|} \sum_{t \in B_i} M_t)

    Args:
      value_t: float[T'], margin per token (or any value >= 0), T' >= the last span's end.
      spans: token spans of `segment`.
      usable_t: bool[T'], True = the value counts (valid and finite). None = all do.
      aggregate: "mean" (the paper), "median", "trimmed" (mean without the `trim` share at either
        end), or "std" (release.AdvantageStdRelease).
      trim: share cut off at either end by "trimmed", in [0, 0.5).
      transform: "log1p" (the paper) or "none", applied to the aggregate.

    Returns:
      float64[S]; NaN for a segment that holds no usable token: leave it out of the change-point
      search.
    """
    value_t = np.asarray(value_t, np.float64)
    if not spans:
        return np.zeros(0)
    usable_t = np.isfinite(value_t) if usable_t is None else usable_t & np.isfinite(value_t)
    if aggregate == "mean":
        starts = np.array([start for start, _ in spans])
        end = spans[-1][1]
        total_s = np.add.reduceat(np.where(usable_t, value_t, 0.0)[:end], starts)
        count_s = np.add.reduceat(usable_t[:end].astype(np.int64), starts)
        score_s = np.where(count_s > 0, total_s / np.maximum(count_s, 1), np.nan)
    else:
        parts = (value_t[start:end][usable_t[start:end]] for start, end in spans)
        score_s = np.array([_aggregate(part, aggregate, trim) for part in parts])
    return np.log1p(score_s) if transform == "log1p" else score_s


def _aggregate(value_t: np.ndarray, aggregate: str, trim: float) -> float:
    """Median, trimmed mean or standard deviation of a segment's values; NaN if it has none."""
    if not len(value_t):
        return np.nan
    if aggregate == "median":
        return np.median(value_t)
    if aggregate == "std":
        return np.std(value_t)
    cut = int(trim * len(value_t))
    return np.mean(np.sort(value_t)[cut : len(value_t) - cut])


def _mark_replaced(error: UnicodeError) -> tuple[str, int]:
    """Decoding error handler: a lone surrogate that says how many ill-formed bytes it replaces."""
    return chr(_MARK + error.end - error.start), error.end


codecs.register_error("opd_jax_mark_replaced", _mark_replaced)


def _characters(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Of data.decode("utf-8", "replace"): the byte at which each character starts, and is it white?

    A replacement character stands for one to three bytes: how many is known only while decoding.

    Returns:
      int64[n], and bool[n].
    """
    text = data.decode("utf-8", "opd_jax_mark_replaced")
    code_n = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    size_n = 1 + (code_n >= 0x80) + (code_n >= 0x800) + (code_n >= 0x10000)
    size_n = np.where((code_n > _MARK) & (code_n <= _MARK + 3), code_n - _MARK, size_n)
    return np.cumsum(size_n) - size_n, np.isin(code_n, WHITE_SPACE)
