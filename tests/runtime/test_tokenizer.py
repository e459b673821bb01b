"""The tokenizer's file is a stranger's, and its packages may be missing."""

from pathlib import Path

import pytest

from fastfsl.errors import BundleError, ConfigError
from fastfsl.runtime.tokenizer import Tokenizer
from tests.runtime.text_bundle import TEXT, tokenizer_json


def _tokenizer(data=None, **text):
    return Tokenizer(tokenizer_json() if data is None else data, {**TEXT, **text}, Path("tokenizer.json"))


def test_texts_are_cut_and_padded():
    assert _tokenizer()(["Red KITE", "red " * 9, "&quot;"]).tolist() == [[1, 2, 0, 0], [1] * 4, [4, 0, 0, 0]]
    assert _tokenizer(strip_id=2)(["red kite"]).tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (tokenizer_json(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}), "the tokenizer fails"),
        (tokenizer_json(padding=None), "its padding is no object"),
    ],
)
def test_a_file_that_is_no_such_tokenizer_is_refused(data, words):
    with pytest.raises(BundleError, match=f"tokenizer.json: .*{words}.*export (it|the bundle) again"):
        _tokenizer(data)


def test_ids_that_the_model_does_not_have_are_refused():
    with pytest.raises(BundleError, match="expected 4 ids below 4"):
        _tokenizer(vocab_size=4)(["blue"])
    processor = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": []}
    broken = {**processor, "special_tokens": {"x": {"id": "x", "ids": [9], "tokens": ["x"]}}}
    with pytest.raises(BundleError):
        _tokenizer(tokenizer_json(post_processor=broken))(["red"])


@pytest.mark.parametrize("package", ["tokenizers", "ftfy"])
def test_a_missing_package_is_named_with_the_remedy(monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package}.*pip install 'fastfsl\[text\]'"):
        _tokenizer()
