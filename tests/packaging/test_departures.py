"""docs/departures.md names every method, and its options are options that there are."""

import re
from pathlib import Path

import pytest

from fastfsl.fit.methods import METHODS, SOURCES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "departures.md").read_text(encoding="utf-8")
# Methods without a choice of their own, and what others are made of.
PLAIN = {"auto", "zero-shot", "nearest-mean"}
TITLES = {
    "linear": "Linear probe",
    "gda": "GDA",
    "proker": "ProKeR",
    "tip-adapter": "Tip-Adapter",
    "tip-adapter-f": "Tip-Adapter-F",
    "lp++": "LP++",
    "lora": "CLIP-LoRA",
    "clip-adapter": "CLIP-Adapter",
    "coop": "CoOp",
    "cocoop": "CoCoOp",
}


@pytest.mark.parametrize("name", sorted({*METHODS, *SOURCES} - PLAIN))
def test_every_method_is_on_the_page(name):
    headings = "\n".join(line for line in PAGE.splitlines() if line.startswith("## "))
    assert f"`{name}`" in PAGE or re.search(rf"\b{re.escape(TITLES[name])}(?![\w-])", headings)


def test_every_option_on_the_page_is_one():
    known = {option for method in (*METHODS.values(), *SOURCES.values()) for option in method.parameters()}
    named = set(re.findall(r"`(\w+): ", PAGE)) | set(re.findall(r"\(`(\w+)`\)", PAGE))
    assert named >= {"drop_last", "schedule", "scaling", "solution", "views", "warmup"}
    assert named - known <= {"num_views"}  # of the training, not of a method


def test_the_readme_claims_no_fewer_departures():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "docs/departures.md" in readme
    assert "one point" not in readme
