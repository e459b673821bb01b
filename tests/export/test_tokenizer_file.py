"""Token ids without torch are open_clip's, whatever the text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, SimpleTokenizer, get_clean_fn

from fastfsl.errors import BundleError
from fastfsl.export.tokenizer_file import TokenizerFile, tokenizer_file
from fastfsl.runtime.tokenizer import Tokenizer

AWKWARD = [
    "",
    " \t\n",
    "a photo of a Red Kite.",
    "schÃ¶n â€œhiâ€\x9d \u00e2\u0080\u0099",  # mojibake
    "&amp;lt; &eacute; &#233; &amp;amp;amp; <b>&nbsp;</b> <&#xFB06;art_of_text>",
    "‘curly’ “quotes” — don’t we’ll I'M he'D",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b\u200d\ufeff zero\u200bwidth \u00ad",
    "日本語テキスト 한국어 中文 ภาษาไทย عربى עברית हिन्दी",
    "\x00\x07\x1b[31m control \x85 \u2028 \u2029 \x1c",
    "<|endoftext|> <|startoftext|> <start_of_text>a<end_of_text> !<start_of_text> <START_of_TEXT><end_of_text>",
    "'ſ <ſtart_of_text> ﬁ ﬆ ß ẞ İstanbul ISPARTA ıİ KELVIN Å ǅ",
    "12345 3.14 ½ Ⅷ ４２ १२३ 1st x2y",
    "a_b-c/d\\e {} {{}} %s ___ ...!!!???",
    "word " * 200,
    "x" * 3000,
    "\u0345\u0334 \u088f \u0c5c \ua7ce \U000323af \U0001e5d0",  # letters of several versions of Unicode
]


def reading(tokenizer: Any, vocab_size: int = 49408) -> Tokenizer:
    """The runtime's, of what the exporter writes."""
    written: TokenizerFile = tokenizer_file(tokenizer)
    text = {name: getattr(written, name) for name in ("context_length", "clean", "strip_id")}
    return Tokenizer(written.data, {**text, "vocab_size": vocab_size}, Path("tokenizer.json"))


@pytest.fixture(scope="module")
def simple() -> SimpleTokenizer:
    return SimpleTokenizer(context_length=77)


@pytest.fixture(scope="module")
def ours(simple) -> Tokenizer:
    return reading(simple)


@pytest.mark.parametrize("text", AWKWARD, ids=lambda text: ascii(text)[:20])
def test_awkward_texts_give_open_clips_ids(ours, text):
    np.testing.assert_array_equal(ours([text]), open_clip.tokenize([text]).numpy())


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(), min_size=1, max_size=4))
@example(["\u0345", "ﬆ"])
def test_any_text_gives_open_clips_ids(simple, ours, texts):
    np.testing.assert_array_equal(ours(texts), simple(texts).numpy())


FRAGMENTS = [
    "<start_of_text>",
    "<end_of_text>",
    "<start_of",
    "_text>",
    "'s",
    "'ſ",
    "'LL",
    "&amp;",
    "&#39;",
    "é",
    "Ã©",
    " ",
    "9",
    "!",
    "_",
]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=2)), max_size=12).map("".join))
def test_texts_full_of_signs_with_a_meaning_give_open_clips_ids(simple, ours, text):
    np.testing.assert_array_equal(ours([text]), simple([text]).numpy())


@pytest.mark.slow
def test_every_character_gives_open_clips_ids(simple, ours):
    every = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(every), 4096):
        texts = ["".join(every[at : at + 16]) for at in range(start, start + 4096, 16)]
        np.testing.assert_array_equal(ours(texts), simple(texts).numpy())


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_each_kind_of_cleaning_is_open_clips(clean):
    tokenizer = reading(SimpleTokenizer(context_length=11, clean=clean))
    for text in AWKWARD:
        assert tokenizer.clean(text) == get_clean_fn(clean)(text)
    short = SimpleTokenizer(context_length=11, clean=clean)
    np.testing.assert_array_equal(tokenizer(AWKWARD[2:9]), short(AWKWARD[2:9]).numpy())


class _Fast:
    """What open_clip uses of a fast tokenizer of transformers: the sides, the special ids, the call."""

    pad_token_id, pad_token, sep_token_id, truncation_side = 1, "<pad>", 2, "right"

    def __init__(self, padding_side: str) -> None:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

        pieces = [("<unk>", 0.0), ("<pad>", 0.0), ("</s>", 0.0)]
        pieces += [(piece, -2.0 - index) for index, piece in enumerate(["▁", "▁red", "▁k", "ite", "a", "e", "i", "日"])]
        self.backend_tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
        self.backend_tokenizer.normalizer = normalizers.NFKC()
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        self.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 2)]
        )
        self.padding_side = padding_side

    def __call__(self, texts: list[str], *, max_length: int, **_: Any) -> Any:
        import torch

        rows = []
        for text in texts:
            ids = [*self.backend_tokenizer.encode(text, add_special_tokens=False).ids[: max_length - 1], 2]
            fill = [1] * (max_length - len(ids))
            rows.append(ids + fill if self.padding_side == "right" else fill + ids)
        return type("Encoding", (), {"input_ids": torch.tensor(rows)})


def _hugging(kind: Any, padding_side: str = "right", **attributes: Any) -> Any:
    tokenizer = kind.__new__(kind)  # their constructors would fetch a vocabulary
    vars(tokenizer).update({"tokenizer": _Fast(padding_side), "context_length": 7, **attributes})
    return tokenizer


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("clean", ["whitespace", "canonicalize"])
@pytest.mark.parametrize("strip", [False, True])
def test_tokenizers_of_transformers_give_the_ids_that_open_clip_makes_of_them(padding_side, clean, strip):
    tokenizer = _hugging(
        HFTokenizer, padding_side, clean_fn=get_clean_fn(clean), strip_sep_token=strip, tokenizer_mode=""
    )
    texts = ["red kite", "Red  KITE!", "", "日本 &amp; red", "red kite " * 20]
    np.testing.assert_array_equal(reading(tokenizer, 11)(texts), tokenizer(texts).numpy())


def test_siglips_own_tokenizer_is_read_as_it_reads():
    tokenizer = _hugging(SigLipTokenizer)
    texts = ["a_Red, kite!", "日"]
    np.testing.assert_array_equal(reading(tokenizer, 11)(texts), tokenizer(texts).numpy())


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (SimpleTokenizer(reduction_mask="random"), "at random"),
        (_hugging(HFTokenizer, clean_fn=get_clean_fn("lower"), tokenizer_mode="clips"), "'clips' cannot be exported"),
        (_hugging(HFTokenizer, clean_fn=str.lower, tokenizer_mode=""), "not open_clip's own"),
        (_hugging(HFTokenizer, tokenizer=object(), tokenizer_mode=""), "object has no fast form.*sentencepiece"),
        (str.split, "expected a tokenizer of open_clip"),
    ],
)
def test_tokenizers_that_a_file_cannot_hold_are_refused(tokenizer, words):
    with pytest.raises(BundleError, match=words):
        tokenizer_file(tokenizer)


def test_a_tokenizer_that_the_runtime_would_refuse_is_not_written():
    """Whoever exports is not told to export again."""
    from tokenizers import normalizers

    tokenizer = _hugging(SigLipTokenizer)
    tokenizer.tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.NFKC()])
    with pytest.raises(BundleError, match=r"the tokenizer: .* up to 1296 bytes of one\): export without --text$"):
        tokenizer_file(tokenizer)
