# SPDX-License-Identifier: Apache-2.0
import math
import sys

import numpy as np
import oracle
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from opd_jax.algorithm import segments

NEWLINE = segments.Settings("nltk_newline")


def texts_of(text, spans):
    return [text[start:end] for start, end in spans]


def assert_covers(spans, length):
    """Non-empty, contiguous, from 0 to length."""
    ends = [0, *(end for _, end in spans)]
    assert [start for start, _ in spans] == ends[:-1]
    assert ends[-1] == length
    assert all(start < end for start, end in spans)


def test_mathematical_prose_is_not_split_at_abbreviations_or_decimals():
    text = "By Eq. 4, i.e. x = 3.14, we win. Dr. Hu agrees, cf. Fig. 2. Is it so? Yes! "
    assert texts_of(text, segments.sentence_spans(text)) == [
        "By Eq. 4, i.e. x = 3.14, we win. ",
        "Dr. Hu agrees, cf. Fig. 2. ",
        "Is it so? ",
        "Yes! ",
    ]


@pytest.mark.parametrize(
    "sentences",
    [
        ["It is 2:30 p.m. in Rome and 8 a.m. in Lima. ", "So we add.\n"],
        ["\\text{ p.m.} + 2 \\text{ hours}. ", "Done."],
        ["From Jan. 3 to Sept. 5, 1990. ", "Then Oct. 7."],
        ["The U.S. team beat the U.K. team. ", "It won."],
        ["Ms. Li, Ph.D. in algebra, of Acme Corp. Ltd. agrees. ", "We do, too."],
        ["Primes (2, 3, etc. and so on) vs. squares. ", "Thus done."],
        ["Multiples of 7, e.g. 14, i.e. twice it. ", "No more."],
        # These end a sentence, as words that are no abbreviation here do.
        ["Hence AO = CO. ", "Then we add."],
        ["It is 5 cm. ", "So be it."],
        ["It ends in May. ", "In June it starts."],
        ["We add 3 mg. ", "Then stir."],
        ["The sum is odd. ", "The product is even."],
    ],
    ids="".join,
)
def test_abbreviations_end_no_sentence_and_other_words_do(sentences):
    text = "".join(sentences)
    assert texts_of(text, segments.sentence_spans(text)) == sentences


def test_newlines_split_only_when_asked():
    text = "  First line\n\n  second line. Third\n"
    assert texts_of(text, segments.sentence_spans(text)) == [
        "  First line\n\n  second line. ",
        "Third\n",
    ]
    assert texts_of(text, segments.sentence_spans(text, NEWLINE)) == [
        "  First line\n\n  ",
        "second line. ",
        "Third\n",
    ]


@given(
    st.text(max_size=60) | st.text(alphabet="aA .?!\n\u3002\u0627\u2028\x00", max_size=60),
    st.sampled_from(["nltk", "nltk_newline"]),
)
@example("", "nltk")
@example("   ", "nltk")
@example("\n", "nltk_newline")
def test_sentences_cover_any_text_exactly(text, kind):
    assert_covers(segments.sentence_spans(text, segments.Settings(kind)), len(text))


@st.composite
def byte_splits(draw):
    """Any bytes, mostly UTF-8 with sentences, cut anywhere, with special tokens between."""
    alphabet = "aB. ?\n\u00e9\u20ac\U0001f600\ufffd\u0627\u3000\xa0\u2028\x00"
    text = draw(st.text(alphabet=alphabet, max_size=20))
    data = text.encode() if draw(st.booleans()) else text.encode() + draw(st.binary(max_size=8))
    if draw(st.booleans()) and len(data) > 2:  # damage in the middle
        at = draw(st.integers(0, len(data) - 1))
        data = data[:at] + data[at + 1 :]
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    bounds = [0, *cuts, len(data)]  # equal cuts make b"", a special token
    return [data[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


@given(byte_splits(), st.sampled_from(["nltk", "nltk_newline"]))
@example([b"", b"", b"a. B", b"", b". C", b""], "nltk")
@example([b"Hi. ", b"\xf0\x9f", b"\x98", b"\x80. Yes."], "nltk")
@example([b"A. B. C."], "nltk")  # sentences that no token begins
@example([b"\xff\xff\xe2\x82", b". X. ", b"\xe2", b"Y."], "nltk")
@example([b"Hi.", b"\xe3\x80", b"\x80Yes."], "nltk")  # begins inside an ideographic space
@example([b" ", b"", b"\n", b"Hi.", b" ", b"\n", b"", b"Yes."], "nltk_newline")
def test_token_spans_equal_the_loops(token_bytes, kind):
    text = b"".join(token_bytes).decode("utf-8", "replace")
    text_spans = segments.sentence_spans(text, segments.Settings(kind))
    spans = segments.token_spans(token_bytes, text_spans)
    assert_covers(spans, len(token_bytes))
    assert spans == oracle.token_spans(token_bytes, text_spans)


@pytest.mark.parametrize(
    "tokens, sentences",
    [
        # Byte-level BPE carries the leading space: " Ann" begins the second sentence.
        ("He| won|.| Ann| lost|.", ["He won.", " Ann lost."]),
        ("Hi|.|\n\n|Yes", ["Hi.\n\n", "Yes"]),  # white space alone stays behind
        ("Hi|.|\n\nYes", ["Hi.", "\n\nYes"]),
        ("Hi|.| | |Yes", ["Hi.  ", "Yes"]),
        (" |\n|Hi|.| Yes", [" \nHi.", " Yes"]),  # at the start it joins the first
        ("Hi|.| Yes|.| ", ["Hi.", " Yes. "]),
        ("Hi|.|\u3000Yes", ["Hi.", "\u3000Yes"]),  # white space is what str.isspace says
        ("Hi|.|\xa0Yes", ["Hi.", "\xa0Yes"]),
        (
            "\u0647\u0646\u0627.| \u0646\u0639\u0645.",
            ["\u0647\u0646\u0627.", " \u0646\u0639\u0645."],
        ),
        ("Hi. A|. B|.", ["Hi. A", ". B."]),  # "B." holds no token's first character
        ("x|\x00|.| \x00Y", ["x\x00.", " \x00Y"]),  # NUL is no white space
        ("One. Two. Three.", ["One. Two. Three."]),
    ],
)
def test_tokens_join_the_sentence_of_their_first_character_that_is_not_white_space(
    tokens, sentences
):
    token_bytes = [piece.encode() for piece in tokens.split("|")]
    spans = segments.segment(token_bytes)
    assert [b"".join(token_bytes[a:b]).decode() for a, b in spans] == sentences


def test_what_counts_as_white_space_is_what_python_says():
    white = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]
    assert sorted(white) == [chr(code) for code in segments.WHITE_SPACE]


def test_special_tokens_join_the_token_before():
    token_bytes = [b"", b"Hi.", b" Yes", b".", b"", b" No", b".", b"", b""]
    assert segments.segment(token_bytes) == [(0, 2), (2, 5), (5, 9)]
    assert segments.token_spans([b"", b""], []) == [(0, 2)]
    assert segments.token_spans([], []) == []


def test_a_sentence_of_sixteen_thousand_tokens_is_one_span():
    token_bytes = [b" word"] * 16_384
    assert segments.segment(token_bytes) == [(0, 16_384)]
    capped = segments.segment(token_bytes, segments.Settings(max_tokens=1000))
    assert_covers(capped, 16_384)
    assert max(end - start for start, end in capped) == 1000


@pytest.mark.parametrize("kind", segments.KINDS)
@pytest.mark.parametrize("max_tokens", [0, 2])
def test_every_kind_covers_the_tokens(kind, max_tokens):
    token_bytes = [b"One two. ", b"Three\n", b"", b"\xf0\x9f", b"\x98\x80 four. ", b"Five"]
    length = dict(fixed_tokens=4) if kind == "fixed_tokens" else {}
    settings = segments.Settings(kind, max_tokens=max_tokens, **length)
    for n in range(len(token_bytes) + 1):
        spans = segments.segment(token_bytes[:n], settings)
        assert_covers(spans, n)
        if max_tokens:
            assert all(end - start <= max_tokens for start, end in spans)
    if not max_tokens:
        counts = dict(nltk=3, nltk_newline=4, fixed_tokens=2, token=6)
        assert len(segments.segment(token_bytes, settings)) == counts[kind]


def test_rows_go_through_ids_and_unknown_ids_are_special():
    token_bytes = [b"Hi. ", b"Yes. ", b""]
    rows = [np.array([0, 1, 2], np.int32), np.array([], np.int32), np.array([1, 99, -1])]
    assert segments.segment_rows(rows, token_bytes=token_bytes, settings={}) == [
        [(0, 1), (1, 3)],
        [],
        [(0, 3)],
    ]


def test_scores_are_log1p_of_the_mean_margin():
    margins = [0.5, 2.0, 0.0, 8.0, 1.0]
    spans = [(0, 2), (2, 3), (3, 5)]
    expected = [oracle.segment_score(margins[a:b]) for a, b in spans]
    np.testing.assert_allclose(segments.segment_scores(margins, spans), expected, rtol=1e-14)
    plain = segments.segment_scores(margins, spans, transform="none")
    np.testing.assert_allclose(plain, [1.25, 0.0, 4.5])


@given(
    st.lists(st.floats(0, 30), min_size=6, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_leaving_a_token_out_equals_deleting_it(margins, usable):
    for aggregate in (*segments.AGGREGATES, "std"):
        kept = [m for m, u in zip(margins, usable, strict=True) if u]
        poisoned = [m if u else math.nan for m, u in zip(margins, usable, strict=True)]
        masked = segments.segment_scores(
            poisoned, [(0, 6)], np.array(usable), aggregate=aggregate, transform="none"
        )
        if not kept:
            assert np.isnan(masked[0])
            continue
        deleted = segments.segment_scores(
            kept, [(0, len(kept))], aggregate=aggregate, transform="none"
        )
        np.testing.assert_allclose(masked, deleted, rtol=1e-9, atol=1e-9)


def test_median_and_trimmed_mean():
    values = [0.0, 1.0, 2.0, 3.0, 100.0]

    def score(**knobs):
        return segments.segment_scores(values, [(0, 5)], transform="none", **knobs)[0]

    assert score(aggregate="median") == 2.0
    assert score(aggregate="trimmed", trim=0.2) == 2.0
    assert score(aggregate="std") == pytest.approx(np.std(values))


def test_missing_punkt_tab_says_how_to_get_it(monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    segments.load_punkt.cache_clear()
    with pytest.raises(
        ValueError, match="nltk.downloader punkt_tab.*--config.segment.punkt=embedded"
    ):
        segments.load_punkt("punkt_tab")
