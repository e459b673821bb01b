"""The soak test of benchmarks/, three seconds of it; the tiny bundle of tests/runtime takes the place of a real one."""

from __future__ import annotations

import importlib

import pytest

from tests.runtime import conftest as tiny

bundles, reference, write = tiny.bundle_dir, tiny.reference, tiny.write


@pytest.fixture
def soak(checkout, monkeypatch):
    monkeypatch.syspath_prepend(str(checkout))
    return importlib.import_module("benchmarks.soak")


def test_every_request_gets_its_own_answer_from_sixteen_threads(soak, bundles):
    result = soak.soak(bundles, 16, 2.4, num_threads=1)
    phases = result["phases"]
    assert {name: (report["wrong"], report["lost"], report["balanced"]) for name, report in phases.items()} == {
        "steady": (0, 0, True),
        "overload": (0, 0, True),
        "shutdown": (0, 0, True),
    }
    assert phases["overload"]["rejected"] > 0
    assert phases["steady"]["p99_ms"] > 0


def test_somebody_elses_answer_is_seen(soak, bundles, monkeypatch):
    from fastfsl.runtime import batcher

    settle = batcher.Batcher._settle

    def swapped(self, batch, outcome):
        settle(self, batch, outcome if isinstance(outcome, BaseException) else list(outcome)[::-1])

    monkeypatch.setattr(batcher.Batcher, "_settle", swapped)
    with pytest.raises(RuntimeError, match=r"'wrong': [1-9]"):
        soak.soak(bundles, 4, 0.3, num_threads=1)
