"""What may stand in a bundle's tokenizer file, checked before the package tokenizers parses it. Standard library only.

Such a file is a small program as well: rules that rewrite a text, cut it with regular expressions and put tokens around
it. The package bounds neither how much the rules make of a text nor how far rows are padded, and where memory runs out
it ends the process. So the file holds known parts only, and their product is bounded here. How long a regular
expression may search is bounded by the package.
"""

from __future__ import annotations

import base64
import math
import re
from typing import Any

from fastfsl.bundle.untrusted import AGAIN, strict_json
from fastfsl.errors import BundleError

# The largest tokenizers in open_clip: 256 000 tokens and their merges have 34 MB and two million signs of structure,
# 901 629 tokens without merges have three million.
MAX_TOKENIZER_BYTES = 64 * 2**20
MAX_STRUCTURE = 2**22

# Of one part: rules in it, signs of one of its texts, and characters that they all make of one.
MAX_PARTS = 64
MAX_TEXT = 64
MAX_PATTERN = 2**16
MAX_GROWTH = 1024
MAX_WORD = 1000

_KEYS = {
    "version",
    "truncation",
    "padding",
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
}
_MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
# The kinds of each part's rules, and bytes that one makes of a byte at most, where its file does not say so.
_RULES: dict[str, dict[str, int]] = {
    "normalizer": {
        "BertNormalizer": 9, "ByteLevel": 4, "Lowercase": 2, "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Nmt": 1,
        "Precompiled": 1, "Prepend": 1, "Replace": 1, "Strip": 1, "StripAccents": 1,
    },
    "pre_tokenizer": {
        "BertPreTokenizer": 1, "ByteLevel": 4, "CharDelimiterSplit": 1, "Digits": 1, "Metaspace": 4, "Punctuation": 1,
        "Split": 1, "UnicodeScripts": 1, "Whitespace": 1, "WhitespaceSplit": 1,
    },
    "post_processor": dict.fromkeys(
        ("BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"), 1
    ),
    "decoder": dict.fromkeys(
        ("BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"), 1
    ),
}  # fmt: skip
_LISTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}

_ESCAPED = re.compile(r"\\[pPxo]\{[^{}]*\}|\\.", re.DOTALL)
_CLASS = re.compile(r"\[[^\[\]]*\]")
# What makes a search exponential, or one that runs over itself: repeated groups, and references to what was found.
_REPEATED = re.compile(r"[)}][*+{]")
_REFERENCE = re.compile(r"\\[1-9gk]")


def check_tokenizer_file(data: bytes, name: str, context_length: int) -> None:
    """Refuse a tokenizer file that holds anything but known, bounded parts.

    Args:
        data: the file's bytes.
        name: what messages call it.
        context_length: ids that each text is cut and padded to.

    Raises:
        BundleError: it is no such file, or a part of it is unknown, too large, or makes too much of a text.
    """
    structure = sum(data.count(sign) for sign in b",:[{")
    if len(data) > MAX_TOKENIZER_BYTES or structure > MAX_STRUCTURE:
        raise BundleError(
            f"{name}: {len(data)} bytes with {structure} values, more than the {MAX_TOKENIZER_BYTES} and "
            f"{MAX_STRUCTURE} of a tokenizer; {AGAIN}"
        )
    file = strict_json(data, name, max_depth=None, max_values=MAX_STRUCTURE)
    try:
        _check_file(file, context_length)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name}: not a tokenizer that fastfsl runs ({error}); {AGAIN}") from error


def _check_file(file: dict[str, Any], context_length: int) -> None:
    for key in file:
        if key not in _KEYS:
            raise ValueError(f"unknown key {key!r:.40}")
    cut, padding = _object(file.get("truncation"), "truncation"), _object(file.get("padding"), "padding")
    expected = {"max_length": context_length, "stride": 0, "strategy": {"Fixed": context_length}}
    found = {**cut, "strategy": padding.get("strategy")}
    found = {key: found.get(key) for key in expected}
    if found != expected or padding.get("pad_to_multiple_of") is not None:
        raise ValueError(
            f"expected texts to be cut and padded to {context_length} ids and no others, got {found!r:.200} and "
            f"pad_to_multiple_of {padding.get('pad_to_multiple_of')!r:.40}"
        )
    _check_model(_object(file.get("model"), "model"))
    growth = 1
    for part in _RULES:
        rules = _rules(part, file.get(part))
        if len(rules) > MAX_PARTS:
            raise ValueError(f"its {part} has more than {MAX_PARTS} rules")
        growth *= math.prod(_growth(part, rule) for rule in rules)
    if growth > MAX_GROWTH:
        raise ValueError(f"its rules make up to {growth if growth < 10**9 else 'very many'} bytes of one")


def _rules(part: str, value: object) -> list[dict[str, Any]]:
    """The rules of a part in their order, of sequences inside sequences as well."""
    if value is None:
        return []
    rule = _object(value, part)
    kind = rule.get("type")
    if kind != "Sequence":
        if not isinstance(kind, str) or kind not in _RULES[part]:
            raise ValueError(f"the {part} {kind!r:.40} is none that it may hold")
        return [rule]
    inner = rule.get(_LISTS[part])
    if set(rule) != {"type", _LISTS[part]} or not isinstance(inner, list) or len(inner) > MAX_PARTS:
        raise ValueError(f"a sequence in its {part} has no list of at most {MAX_PARTS} {_LISTS[part]}")
    return [found for one in inner for found in _rules(part, one)]


def _growth(part: str, rule: dict[str, Any]) -> int:
    """Bytes that a rule makes of one."""
    kind = rule["type"]
    if kind == "Precompiled":
        return _longest_replacement(rule.get("precompiled_charsmap"))
    if kind == "TemplateProcessing":
        _check_template(rule)
    for key, value in rule.items():
        if key == "pattern":
            _check_pattern(value)
        elif isinstance(value, str) and len(value) > MAX_TEXT:
            raise ValueError(f"the {key!r:.40} of its {kind} has more than {MAX_TEXT} characters")
    added = rule.get({"Replace": "content", "Prepend": "prepend"}.get(kind, ""), "") if part == "normalizer" else ""
    # A pattern may match before every character, and what it matches may stay.
    return _RULES[part][kind] + len(added.encode(errors="replace") if isinstance(added, str) else b"")


def _check_pattern(value: object) -> None:
    pattern = _object(value, "pattern")
    text = next(iter(pattern.values()), None)
    if len(pattern) != 1 or set(pattern) > {"String", "Regex"} or not isinstance(text, str) or len(text) > MAX_PATTERN:
        raise ValueError(f"a pattern is no String or Regex of at most {MAX_PATTERN} characters")
    if "Regex" not in pattern:
        return
    if _REFERENCE.search(text.replace("\\\\", "")):
        raise ValueError("a pattern refers to its own groups")
    bare, found = _ESCAPED.sub(".", text), 1
    while found:
        bare, found = _CLASS.subn(".", bare)
    if _REPEATED.search(bare):
        raise ValueError("a pattern repeats a group or a repetition")


def _check_template(rule: dict[str, Any]) -> None:
    """It holds the text once, and few tokens around it."""
    single, specials = rule.get("single"), _object(rule.get("special_tokens"), "special_tokens")
    if not isinstance(single, list) or len(single) > MAX_PARTS or len(specials) > MAX_PARTS:
        raise ValueError(f"a template has no list of at most {MAX_PARTS} pieces and special tokens")
    if sum("Sequence" in piece if isinstance(piece, dict) else "$" in str(piece) for piece in single) > 1:
        raise ValueError("a template repeats the text")
    for special in specials.values():
        ids = _object(special, "special token").get("ids")
        if not isinstance(ids, list) or len(ids) > MAX_PARTS:
            raise ValueError(f"a special token has no list of at most {MAX_PARTS} ids")


def _longest_replacement(charsmap: object) -> int:
    """Of a table that SentencePiece compiled: the bytes of a search tree, the tree, and texts that end with a zero."""
    data = base64.b64decode(charsmap, validate=True) if isinstance(charsmap, str) else b""
    return max(map(len, data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")), default=0) + 1


def _check_model(model: dict[str, Any]) -> None:
    kind, word = model.get("type"), model.get("max_input_chars_per_word", 0)
    if kind not in _MODELS:
        raise ValueError(f"the model {kind!r:.40} is none of {', '.join(_MODELS)}")
    if model.get("dropout") not in (None, 0):
        raise ValueError("it drops merges at random")
    if not isinstance(word, int) or word > MAX_WORD:
        raise ValueError(f"words of up to {word!r:.40} characters, more than {MAX_WORD}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if len(str(model.get(key))) > MAX_TEXT:
            raise ValueError(f"the model's {key} has more than {MAX_TEXT} characters")


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"its {what} is no object")  # noqa: TRY004 - a file's content, not an argument
    return value
