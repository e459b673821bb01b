"""Mutants of a tokenizer's file: parts of other tokenizers, rules that grow or never end, values changed."""

from __future__ import annotations

import base64
import json
import random
import struct
from typing import Any

from tests.fuzz.mutation import JSON_VALUES, NUMBERS, json_bytes, mutated_json

Rule = dict[str, Any]

PATTERNS = (
    "", "a", " ", "(a+)+$", "(a|aa|aaa)+$", "(?:(?:a?)*)*b", "(" * 5000 + "a" + ")" * 5000, "((a{1000}){1000}){1000}",
    "a{99999}", "a{99999}{99999}", "(?<n>a|b\\g<n>c)", "(?<n>(?:a|\\g<n>)\\g<n>?)", "(.*)\\1", "(?<=(?:a|ab){1,3})x",
    "[" * 3000, "[^", "[a-\\x{10ffff}]" * 300, "\\p{Nonsense}", "(?i:ſ|ﬆ)", "\\", "*", "a**", "(?!)", "(?~a)", "\\K",
    ".*.*.*.*.*.*.*.*x", "\\s+(?!\\S)", "'s|\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}]+", "(?(1)a|b)", "\\x{110000}", "\0",
)  # fmt: skip
TEXTS = ("", "a", " ", "▁", "\0", "é", "😀", "a" * 64, "a" * 10_000, "<end_of_text>", "[UNK]", "##", "Ġ", "\u0345")
_KINDS = ("BPE", "Unigram", "WordLevel", "WordPiece")


def mutated_tokenizer(data: bytes, rng: random.Random) -> bytes:
    """A tokenizer's file, altered in one to three ways; it mostly stays JSON that the package takes."""
    file = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        try:
            _change(file, rng)
        except (AttributeError, IndexError, KeyError, TypeError, RecursionError):
            break  # an earlier change took away what this one is about
    return json_bytes(file, rng)


def _change(file: dict[str, Any], rng: random.Random) -> None:
    kind = rng.randrange(10)
    if kind <= 2:
        rules = rng.choice((_normalizer, _pre_tokenizer, _post_processor, _decoder))
        key = rules.__name__.removeprefix("_")
        file[key] = _several(key, rules, rng)
    elif kind == 3:
        file["model"] = _model(file["model"], rng)
    elif kind == 4:
        file["added_tokens"] = [_added_token(rng) for _ in range(rng.choice((1, 2, 50, 2000)))]
    elif kind == 5:
        part = file[rng.choice(("truncation", "padding"))]
        part[rng.choice((*part, "pad_to_multiple_of"))] = rng.choice((*JSON_VALUES, {"Fixed": rng.choice(NUMBERS)}))
    elif kind == 6:
        file[rng.choice(list(file))] = rng.choice(JSON_VALUES)
    elif kind == 7:
        key = rng.choice(list(file))
        file[key] = mutated_json(file[key], rng)
    else:
        # Of the whole file's values nearly all are the vocabulary's: here the others.
        model = file.pop("model")
        changed = mutated_json(file, rng)
        file.clear()
        file.update({**changed, "model": model})


def _several(key: str, rule: Any, rng: random.Random) -> Any:
    lists = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}
    count = rng.choice((0, 1, 1, 1, 2, 3, 6, 40))
    rules = [rule(rng) for _ in range(count)]
    if rng.random() < 0.3:
        rules = [rules[0]] * count if rules else []
    if count == 1:
        return rules[0]
    sequence: Any = {"type": "Sequence", lists.get(key, "decoders"): rules}
    for _ in range(rng.choice((0, 0, 0, 1, 100))):
        sequence = {"type": "Sequence", lists.get(key, "decoders"): [sequence]}
    return sequence if count else None


def _pattern(rng: random.Random) -> Rule:
    return {"Regex": rng.choice(PATTERNS)} if rng.random() < 0.7 else {"String": rng.choice(TEXTS)}


def _replace(rng: random.Random) -> Rule:
    return {"type": "Replace", "pattern": _pattern(rng), "content": rng.choice(TEXTS)}


def _normalizer(rng: random.Random) -> Rule:
    tree = b"".join(struct.pack("<I", rng.choice(NUMBERS) % 2**32) for _ in range(rng.choice((1, 4, 256))))
    charsmap = struct.pack("<I", rng.choice((len(tree), *NUMBERS)) % 2**32) + tree + rng.choice((b"a\0", b"a" * 9000))
    return rng.choice(
        (
            _replace(rng),
            _replace(rng),
            {"type": rng.choice(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel", "?"))},
            {"type": "Prepend", "prepend": rng.choice(TEXTS)},
            {"type": "Strip", "strip_left": rng.choice((True, False, 1)), "strip_right": True},
            {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
             "lowercase": rng.choice((True, None))},
            {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()},
            {"pattern": _pattern(rng), "content": rng.choice(TEXTS)},
        )
    )  # fmt: skip


def _pre_tokenizer(rng: random.Random) -> Rule:
    behaviour = rng.choice(("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous", "?"))
    choose = rng.random() < 0.5
    return rng.choice(
        (
            {"type": "Split", "pattern": _pattern(rng), "behavior": behaviour, "invert": choose},
            {"type": "Split", "pattern": _pattern(rng), "behavior": behaviour, "invert": choose},
            {"type": "ByteLevel", "add_prefix_space": choose, "trim_offsets": True, "use_regex": rng.random() < 0.5},
            {"type": "Metaspace", "replacement": rng.choice(TEXTS), "prepend_scheme": "always", "split": choose},
            {"type": "CharDelimiterSplit", "delimiter": rng.choice(TEXTS)},
            {"type": "Punctuation", "behavior": behaviour},
            {"type": "Digits", "individual_digits": choose},
            {"type": "FixedLength", "length": rng.choice(NUMBERS)},
            {"type": rng.choice(("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts", "Delimiter"))},
        )
    )


def _post_processor(rng: random.Random) -> Rule:
    text = {"Sequence": {"id": rng.choice("AAAB"), "type_id": rng.choice((0, 1, 2**32))}}
    token = {"SpecialToken": {"id": rng.choice(("x", "y")), "type_id": 0}}
    pieces = [rng.choice((text, token)) for _ in range(rng.choice((0, 1, 3, 70)))]
    ids = [rng.choice((0, 1, 663, *NUMBERS)) for _ in range(rng.choice((0, 1, 2, 100)))]
    return rng.choice(
        (
            {"type": "TemplateProcessing", "single": rng.choice((pieces, [token, text, token], ["$A", "x"])),
             "pair": [], "special_tokens": {"x": {"id": "x", "ids": ids, "tokens": ["x"] * len(ids)}}},
            {"type": "BertProcessing", "sep": ["x", rng.choice(NUMBERS)], "cls": ["y", 1]},
            {"type": "RobertaProcessing", "sep": ["x", 2], "cls": ["y", rng.choice((0, 1, 663))],
             "trim_offsets": True, "add_prefix_space": True},
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        )
    )  # fmt: skip


def _decoder(rng: random.Random) -> Rule:
    return rng.choice(
        (
            _replace(rng),
            {"type": rng.choice(("ByteFallback", "Fuse", "ByteLevel", "?"))},
            {"type": "WordPiece", "prefix": rng.choice(TEXTS), "cleanup": True},
            {"type": "Strip", "content": rng.choice(TEXTS), "start": rng.choice(NUMBERS), "stop": rng.choice(NUMBERS)},
        )
    )


def _added_token(rng: random.Random) -> Rule:
    flags = {key: rng.random() < 0.5 for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return {"id": rng.choice((0, 600, 663, *NUMBERS)), "content": rng.choice((*TEXTS, f"x{rng.random()}")), **flags}


def _model(model: Rule, rng: random.Random) -> Rule:
    """The model with other options, words or merges; or one of another kind over the same words."""
    words, merges = dict(model.get("vocab") or {}), list(model.get("merges") or [])
    options = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "dropout", "fuse_unk")
    kind = rng.randrange(7)
    if kind == 2:
        for _ in range(rng.choice((1, 20))):
            words[rng.choice((*words, *TEXTS))] = rng.choice((0, 663, *NUMBERS))
    if kind == 3:
        rng.shuffle(merges)
        word = "a" * rng.choice((2, 1000, 100_000))
        words |= {word: 5, word * 2: 6}
        merges += [[word, word], *[["a", "a"]] * rng.choice((1, 5000))]
    changes: tuple[Rule, ...] = (
        {rng.choice(options): rng.choice((*TEXTS, *JSON_VALUES, True))},
        {"byte_fallback": True, "ignore_merges": True, "fuse_unk": True, "unk_token": "!"},
        {"vocab": words},
        {"vocab": words, "merges": merges},
        {"type": "Unigram", "unk_id": rng.choice((0, None, *NUMBERS)),
         "vocab": [[word, rng.choice((-1.0, 0, -1e308, 1e308, -3.5))] for word in words]},
        {"type": "WordPiece", "unk_token": rng.choice(("!", *TEXTS)), "continuing_subword_prefix": rng.choice(TEXTS),
         "max_input_chars_per_word": rng.choice((100, *NUMBERS))},
        {"type": rng.choice((*_KINDS, "?")), "unk_token": "!"},
    )  # fmt: skip
    return {**model, **changes[kind]}
