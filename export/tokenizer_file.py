"""An open_clip tokenizer as a `tokenizers` file, for a runtime that has no torch."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import regex
from open_clip import tokenizer as open_clip_tokenizer

from fastfsl.bundle.tokenizer_file import check_tokenizer_file
from fastfsl.bundle.untrusted import AGAIN
from fastfsl.errors import BundleError, ConfigError

_SUFFIX = "</w>"  # open_clip's end of a word
_CLEANING = ("lower", "whitespace", "canonicalize")


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer to be written into a bundle.

    Attributes:
        data: the file, in the format of the package tokenizers, cutting and padding to the context included.
        context_length: ids of one text.
        clean: what is done to a text first: "lower", "whitespace" or "canonicalize", as open_clip names them.
        strip_id: an id that is replaced by 0 in the end; None: there is none.
    """

    data: bytes
    context_length: int
    clean: str
    strip_id: int | None = None


def tokenizer_file(tokenizer: Callable[..., Any]) -> TokenizerFile:
    """Convert the tokenizer of an encoder.

    Raises:
        BundleError: it is of a kind that cannot be converted, the package transformers holds it in a slow form, or the
            runtime would refuse it.
        ConfigError: the package tokenizers is not installed.
    """
    try:
        import tokenizers  # noqa: F401 - asked for here, with a remedy
    except ImportError as error:
        raise ConfigError(f"--text needs the package tokenizers ({error}); pip install 'fastfsl[text]'") from error
    if isinstance(tokenizer, open_clip_tokenizer.SimpleTokenizer):
        file = _from_simple(tokenizer)
    elif isinstance(tokenizer, open_clip_tokenizer.HFTokenizer | open_clip_tokenizer.SigLipTokenizer):
        file = _from_transformers(tokenizer)
    else:
        raise BundleError(f"expected a tokenizer of open_clip, got {type(tokenizer).__name__}: export without --text")
    try:
        check_tokenizer_file(file.data, "the tokenizer", file.context_length)
    except BundleError as error:  # its remedy, to export again, is for readers of a bundle
        raise BundleError(f"{str(error).removesuffix(f'; {AGAIN}')}: export without --text") from error
    return file


def _from_simple(simple: open_clip_tokenizer.SimpleTokenizer) -> TokenizerFile:
    """open_clip's own BPE: bytes as visible characters, `</w>` after a word's last one, start and end tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    if simple.reduction_fn is not None:
        raise BundleError("the tokenizer shortens texts at random (reduction_mask): export without --text")
    names = {token: index for token, index in simple.encoder.items() if index in simple.all_special_ids}
    vocabulary = {token: index for token, index in simple.encoder.items() if token not in names}
    merges = sorted(simple.bpe_ranks, key=simple.bpe_ranks.__getitem__)
    plain = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix=_SUFFIX))
    # A special token in a text is one id, but only where the pattern finds it: not after other punctuation. So it is no
    # `added_token`, which would be found anywhere. It is merged from what is left of it when all other merges are done,
    # and of the pieces that the pattern finds no other one has letters and these signs in it.
    for name, index in names.items():
        first, *rest = plain.encode(name).tokens
        for part in rest:
            merges.append((first, part))
            first += part
            vocabulary[first] = index if first == name + _SUFFIX else len(simple.encoder) + len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix=_SUFFIX))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_pattern(tuple(names))), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    start, end = simple.sot_token_id, simple.eot_token_id
    by_id = {index: name for name, index in names.items()}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{by_id[start]} $A {by_id[end]}", special_tokens=[(by_id[start], start), (by_id[end], end)]
    )
    length = int(simple.context_length or open_clip_tokenizer.DEFAULT_CONTEXT_LENGTH)
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=0, pad_token=simple.decoder[0])
    return TokenizerFile(tokenizer.to_str().encode(), length, _cleaning(simple.clean_fn))


def _from_transformers(wrapped: Any) -> TokenizerFile:  # noqa: ANN401  # open_clip's classes are untyped
    """What transformers runs in Rust, with the padding and cutting that open_clip asks of it at every call."""
    from tokenizers import Tokenizer

    inner = wrapped.tokenizer
    if getattr(wrapped, "tokenizer_mode", ""):
        raise BundleError(f"the tokenizer's mode {wrapped.tokenizer_mode!r} cannot be exported: export without --text")
    backend = getattr(inner, "backend_tokenizer", None)
    if backend is None:
        raise BundleError(
            f"{type(inner).__name__} has no fast form in the package tokenizers: install what transformers converts "
            "it with (pip install sentencepiece protobuf), or export without --text"
        )
    tokenizer = Tokenizer.from_str(backend.to_str())
    length = int(wrapped.context_length)
    tokenizer.enable_truncation(length, direction=inner.truncation_side)
    tokenizer.enable_padding(
        length=length, pad_id=inner.pad_token_id, pad_token=inner.pad_token, direction=inner.padding_side
    )
    strip_id = inner.sep_token_id if getattr(wrapped, "strip_sep_token", False) else None
    clean = _cleaning(wrapped.clean_fn) if hasattr(wrapped, "clean_fn") else "canonicalize"
    return TokenizerFile(tokenizer.to_str().encode(), length, clean, strip_id)


def _cleaning(function: object) -> str:
    for name in _CLEANING:
        if function is open_clip_tokenizer.get_clean_fn(name):
            return name
    raise BundleError("the tokenizer cleans texts in a way that is not open_clip's own: export without --text")


@lru_cache
def _pattern(specials: tuple[str, ...]) -> str:
    r"""open_clip's pattern, character by character.

    `\p{L}`, `\p{N}` and the ignored case mean what they mean to the package `regex`, which open_clip uses. The one that
    tokenizers uses knows another version of Unicode, and so would cut some scripts otherwise.
    """

    def literally(text: str) -> str:
        return "".join(_characters(regex.escape(sign)) for sign in text)

    words = [*specials, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d"]
    letters, number, others = map(_characters, (r"[\p{L}]", r"[\p{N}]", r"[^\s\p{L}\p{N}]"))
    return "|".join([*map(literally, words), f"{letters}+", number, f"{others}+"])


@lru_cache
def _characters(pattern: str) -> str:
    """The characters that a pattern of one character matches, in either case, as a class of their ranges."""
    ranges: list[list[int]] = []
    for match in regex.finditer(pattern, _every_character(), regex.IGNORECASE):
        code = ord(match[0])
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    signs = [[re.escape(chr(code)) for code in dict.fromkeys(bounds)] for bounds in ranges]
    return f"[{''.join(map('-'.join, signs))}]"


@lru_cache
def _every_character() -> str:
    """Of Unicode, but for the surrogates, which no text has."""
    return "".join(map(chr, (*range(0xD800), *range(0xE000, sys.maxunicode + 1))))
