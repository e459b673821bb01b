"""The tokenizer's file is a stranger's, and its packages may be missing."""

import json
from pathlib import Path

import pytest

from fastfsl.errors import BundleError, ConfigError
from fastfsl.runtime.tokenizer import Tokenizer

TEXT = {"context_length": 4, "vocab_size": 5, "clean": "lower", "strip_id": None}


def _data(**changes):
    padding = {"strategy": {"Fixed": 4}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    file = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {**padding, "pad_type_id": 0, "pad_token": "[pad]"},
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"[pad]": 0, "red": 1, "kite": 2, "?": 4}, "unk_token": "?"},
    }
    return json.dumps({**file, **changes}).encode()


def _tokenizer(data=None, **text):
    return Tokenizer(_data() if data is None else data, {**TEXT, **text}, Path("tokenizer.json"))


def test_texts_are_cut_and_padded():
    assert _tokenizer()(["Red KITE", "red " * 9, "&quot;"]).tolist() == [[1, 2, 0, 0], [1] * 4, [4, 0, 0, 0]]
    assert _tokenizer(strip_id=2)(["red kite"]).tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the tokenizer fails"),
        (b"\xff", "the tokenizer fails"),
        (b"[" * 100_000, "the tokenizer fails"),
        (_data(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}), "the tokenizer fails"),
        (_data(padding=None), "expected texts to be cut and padded to 4 ids, got 4 and None"),
        (_data(truncation=None), "got None and 4"),
    ],
)
def test_a_file_that_is_no_such_tokenizer_is_refused(data, words):
    with pytest.raises(BundleError, match=f"tokenizer.json: .*{words}.*export the bundle again"):
        _tokenizer(data)


def test_ids_that_the_model_does_not_have_are_refused():
    with pytest.raises(BundleError, match="expected 4 ids below 4"):
        _tokenizer(vocab_size=4)(["blue"])
    processor = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": []}
    broken = {**processor, "special_tokens": {"x": {"id": "x", "ids": [9], "tokens": ["x"]}}}
    with pytest.raises(BundleError):
        _tokenizer(_data(post_processor=broken))(["red"])


@pytest.mark.parametrize("package", ["tokenizers", "ftfy"])
def test_a_missing_package_is_named_with_the_remedy(monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package}.*pip install 'fastfsl\[text\]'"):
        _tokenizer()
