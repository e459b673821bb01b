"""Tokenizers from strangers: what would end the process, or never end, does not reach the package tokenizers."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastfsl.bundle.text_record import TEXT_GRAPH, TOKENIZER, check_text_files, is_text
from fastfsl.bundle.tokenizer_file import MAX_STRUCTURE, check_tokenizer_file
from fastfsl.errors import BundleError
from tests.runtime.text_bundle import LENGTH, tokenizer_json
from tests.runtime.text_bundle import TEXT as MANIFEST_TEXT

FILE = json.loads(tokenizer_json())
WORD_PIECE = {"type": "WordPiece", "vocab": {"?": 0}, "unk_token": "?", "max_input_chars_per_word": 100}


def _replace(content, pattern="a"):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def _sequence(*rules, key="normalizers"):
    return {"type": "Sequence", key: list(rules)}


def _split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": False}


def _precompiled(*texts):
    return {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(b"\4\0\0\0tree" + b"\0".join(texts)).decode(),
    }


def _template(pieces, ids=(1,)):
    special = {"x": {"id": "x", "ids": list(ids), "tokens": ["x"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": special}


TEXT, TOKEN = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "x", "type_id": 0}}


def _check(**changes):
    check_tokenizer_file(tokenizer_json(**changes), "tokenizer.json", LENGTH)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"more": 1}, "unknown key 'more'"),
        ({"truncation": None}, "its truncation is no object"),
        ({"truncation": {**FILE["truncation"], "stride": 3}}, "'stride': 3"),
        ({"truncation": {**FILE["truncation"], "max_length": 5}}, "padded to 4 ids .*'max_length': 5"),
        ({"padding": {**FILE["padding"], "strategy": "BatchLongest"}}, "BatchLongest"),
        ({"padding": {**FILE["padding"], "pad_to_multiple_of": 2**34}}, "pad_to_multiple_of 17179869184"),
        ({"normalizer": _sequence(*[_replace("a" * 30)] * 6)}, "up to 887503681 bytes of one"),
        ({"normalizer": _sequence(_sequence(_replace("a" * 40)), _replace("é" * 20, ""))}, "up to 1681 bytes"),
        ({"normalizer": _replace("a" * 65)}, "'content' of its Replace has more than 64"),
        ({"normalizer": _sequence(*[{"type": "Prepend", "prepend": "a" * 60}] * 65)}, "at most 64 normalizers"),
        ({"normalizer": _sequence(*[_sequence(*[{"type": "NFC"}] * 40)] * 2)}, "more than 64 rules"),
        ({"normalizer": _precompiled(b"a", b"b" * 2000)}, "up to 2001 bytes"),
        ({"normalizer": {**_precompiled(), "precompiled_charsmap": "?"}}, "not a tokenizer"),
        ({"normalizer": {"type": "Python"}}, "the normalizer 'Python' is none"),
        ({"normalizer": {"pattern": {"String": "a"}, "content": "b"}}, "the normalizer None is none"),
        ({"normalizer": [_replace("a")]}, "its normalizer is no object"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "the pre_tokenizer 'FixedLength' is none"),
        ({"pre_tokenizer": _sequence(*[{"type": "ByteLevel"}] * 6, key="pretokenizers")}, "up to 4096 bytes"),
        ({"pre_tokenizer": _sequence({"type": "Digits"})}, "has no list of at most 64 pretokenizers"),
        ({"pre_tokenizer": _split("(a+)+$")}, "repeats a group"),
        ({"pre_tokenizer": _split("(?:a|b[)]){2,}")}, "repeats a group"),
        ({"pre_tokenizer": _split("a{9}{9}")}, "repeats a group"),
        ({"pre_tokenizer": _split(r"(?<n>a|b\g<n>c)")}, "refers to its own"),
        ({"pre_tokenizer": _split(r"(a*)\\\1")}, "refers to its own"),
        ({"pre_tokenizer": _split("a" * 2**17)}, "at most 65536 characters"),
        ({"pre_tokenizer": {**_split("a"), "pattern": {"String": "a", "Regex": "a"}}}, "no String or Regex"),
        ({"post_processor": _template([TEXT, TOKEN, TEXT])}, "repeats the text"),
        ({"post_processor": _template(["$A", "x", "$0"])}, "repeats the text"),
        ({"post_processor": _template([TOKEN] * 65)}, "at most 64 pieces"),
        ({"post_processor": _template([TEXT, TOKEN], [1] * 65)}, "at most 64 ids"),
        ({"model": {**FILE["model"], "type": "Ours"}}, "the model 'Ours' is none"),
        ({"model": {**WORD_PIECE, "max_input_chars_per_word": 2**40}}, "words of up to 1099511627776"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [], "dropout": 0.5}}, "at random"),
        ({"model": {**FILE["model"], "unk_token": "x" * 65}}, "unk_token has more than"),
    ],
)
def test_what_could_grow_or_hang_is_refused(changes, words):
    with pytest.raises(BundleError, match=f"tokenizer.json: .*{words}.*export it again"):
        _check(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": _sequence(_precompiled(b"a", b"b" * 33), {"type": "Strip", "strip_left": True})},
        {"normalizer": _sequence({"type": "NFKC"}, {"type": "Lowercase"}, _replace("\u2581", " "))},
        {"pre_tokenizer": _split(r"'s|\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}()]+|\s+(?!\S)|\s+|(?i:'ll|\(\[)?")},
        {"post_processor": _template([TOKEN, TEXT, TOKEN])},
        {"model": WORD_PIECE},
    ],
)
def test_the_parts_of_real_tokenizers_pass(changes):
    _check(**changes)


def test_a_file_of_endless_structure_is_refused_before_it_is_parsed():
    with pytest.raises(BundleError, match=f"{MAX_STRUCTURE + 1} values"):
        check_tokenizer_file(b"[" * (MAX_STRUCTURE + 1), "tokenizer.json", LENGTH)
    with pytest.raises(BundleError, match="a key appears twice"):
        check_tokenizer_file(b'{"model": 1, "model": {}}', "tokenizer.json", LENGTH)


_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.sampled_from(["Replace", "Sequence"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["type", "pattern", "content", "normalizers", "single", "Regex"]), inner),
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(FILE)), _JSON)
def test_any_json_is_taken_or_refused(key, value):
    try:
        _check(**{key: value})
    except BundleError:
        return


@pytest.mark.parametrize(
    ("template", "holds"), [("{}" + "a" * 1022, True), ("{}" + "a" * 1023, False), ("{}{}", False), ("", False)]
)
def test_templates_of_a_manifest_are_short_and_name_the_class_once(template, holds):
    assert is_text({**MANIFEST_TEXT, "templates": ["{}", template]}) is holds


def test_a_tokenizer_file_of_unreasonable_size_is_refused_by_the_manifest():
    files = {name: {"sha256": "0" * 64, "size": 2**27} for name in (TEXT_GRAPH, TOKENIZER)}
    with pytest.raises(BundleError, match=r"tokenizer\.json has 134217728 bytes, more than the 67108864 allowed"):
        check_text_files({"text": MANIFEST_TEXT, "encoder": {}, "files": files}, "manifest.json", with_flow=False)
    files[TOKENIZER]["size"] = 2**26
    check_text_files({"text": MANIFEST_TEXT, "encoder": {}, "files": files}, "manifest.json", with_flow=False)
