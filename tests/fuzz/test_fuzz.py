"""A few hundred mutants of the many that `python -m tests.fuzz` makes: refused with an error of ours, or answered."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastfsl import bundle
from fastfsl.bundle.protobuf import fields
from fastfsl.bundle.tokenizer_file import check_tokenizer_file
from fastfsl.errors import BundleError
from tests.fuzz import bundles, pictures
from tests.fuzz.campaign import Campaign
from tests.fuzz.mutation import ONNX, mutated_message
from tests.fuzz.tokenizers import mutated_tokenizer


@pytest.mark.parametrize(("kind", "count"), [("bundles", 150), ("images", 400)])
def test_mutants_are_refused_or_answered(kind, count):
    campaign = Campaign(kind, seed=1)
    assert campaign.run(range(count), bundles.BASES if kind == "bundles" else ()) == count
    assert campaign.findings == []
    # Neither may be rare: mutants that are all refused at the door test nothing behind it.
    assert count * 0.1 < campaign.outcomes["valid"] < count * 0.9


def test_what_must_not_happen_is_noticed(monkeypatch, tmp_path):
    """A worker without a folder of bombs ends; one without a bundle fails; no time or memory is too little for any."""
    (crash,) = _findings(Campaign("bombs", seed=1), [tmp_path / "none"])
    assert [one["error"] for one in _findings(Campaign("bundles", seed=1), [tmp_path])] == ["KeyError"]
    assert (crash["error"], "ended with code" in crash["message"]) == ("crash", True)
    monkeypatch.setattr("tests.fuzz.campaign.MAX_SECONDS", 0)
    assert [one["error"] for one in _findings(Campaign("images", seed=1))] == ["hang"]
    monkeypatch.setattr("tests.fuzz.campaign.MAX_BYTES", 10)
    assert [one["error"] for one in _findings(Campaign("images", seed=1))] == ["memory"]


def _findings(campaign, folders=()):
    campaign.run([0], folders)
    return campaign.findings


def test_a_mutant_is_made_of_its_numbers():
    bases = tuple(bundles.read_folder(folder) for folder in bundles.BASES)
    first, again, other = (bundles.mutant(bases, 1, index) for index in (5, 5, 6))
    assert first == again != other
    assert pictures.mutant(1, 5) == pictures.mutant(1, 5) != pictures.mutant(1, 6)


def test_hashes_of_a_mutant_fit():
    """Otherwise every mutant would be refused for its hash."""
    bases, fitting = tuple(bundles.read_folder(folder) for folder in bundles.BASES), 0
    for index in range(100):
        files = bundles.mutant(bases, 1, index)
        try:
            listed = json.loads(files[bundle.MANIFEST_NAME])["files"]
            fitting += all(listed[name]["size"] == len(data) for name, data in files.items() if name in listed)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
    assert fitting > 75


def test_mutants_of_a_tokenizer_reach_the_package_that_parses_it():
    data, passed = (bundles.GOLDEN / "text" / bundle.TOKENIZER).read_bytes(), 0
    for seed in range(200):
        try:
            check_tokenizer_file(mutated_tokenizer(data, random.Random(seed)), "tokenizer.json", 12)
        except BundleError:
            continue
        passed += 1
    assert 40 < passed < 160
    bases = tuple(bundles.read_folder(folder) for folder in bundles.BASES)
    altered = [bundles.altered_file(bases, 1, index) for index in range(400)]
    assert altered.count(bundle.TOKENIZER) > 40
    original, index = bases[-1], altered.index(bundle.TOKENIZER)
    files = bundles.mutant(bases, 1, index)
    assert {name for name in original if files[name] != original[name]} == {bundle.TOKENIZER, bundle.MANIFEST_NAME}


@settings(max_examples=30, deadline=None)
@given(st.integers())
def test_an_altered_message_is_still_one(seed):
    data = (bundles.GOLDEN / "images" / bundle.FLOW_GRAPH).read_bytes()
    assert list(fields(memoryview(mutated_message(data, random.Random(seed), ONNX)))) or data
