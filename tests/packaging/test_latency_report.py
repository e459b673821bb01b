"""The page of the benchmarks' figures, from results made up here."""

import importlib
import json

import pytest

from tests.report.test_page import check

MADE = {
    "command": "pytest benchmarks --save-results",
    "device": "a processor <2 cores>",
    "python": "3.11.0",
    "versions": {"torch": "2.0", "onnxruntime": "1.0"},
    "commit": "0abc123",
    "date": "2026-01-02",
}


def _timed(batch, **name):
    return {**name, "batch": batch, "p50_ms": 1.5, "p95_ms": 2.5, "p99_ms": 3.5, "images_per_second": 7.25, "rounds": 9}


def _image(batch):
    times = {"torch fp32": 90.25 * batch, "int8": 10.5 * batch}
    return {"what": "pixels to class", "batch": batch, "ms": times, "speed_up_over_torch_fp32": {"int8": 8.6}}


def _flow(batch):
    return {"what": "the flow", "batch": batch, "plain_ms": 4.0, "exported_ms": 1.125, "speed_up": 3.56}


RESULTS = {
    "bundle": {
        "what": "fastfsl bench",
        "rows": [_timed(1), _timed(32)],
        "stages": [_timed(1, stage="encoder"), _timed(32, stage="encoder")],
        "cold_start": {"beyond_onnxruntime_s": 0.375},
    },
    **{f"image_to_class_batch_{batch}": _image(batch) for batch in (1, 8, 32)},
    **{f"flow_graph_batch_{batch}": _flow(batch) for batch in (1, 32, 256)},
    "soak": {"threads": 16, "phases": {"steady": {"p99_ms": 147.5, "close_ms": None}}},
    "demo": {"what": "digits", "rows": [{"name": "<b>torch</b>", "accuracies": [0.5, 0.75]}, {"name": "int8"}]},
    "tuning_lora": {"what": "a training", "rows": []},
    "gpu_suite": {"what": "a card"},
}


@pytest.fixture
def page(checkout, monkeypatch, tmp_path):
    """Writes results, and returns the words of the page that is made from them."""
    monkeypatch.syspath_prepend(str(checkout))
    module = importlib.import_module("benchmarks.latency_report")

    def write(results):
        folder = tmp_path / "results"
        folder.mkdir(exist_ok=True)
        for name, result in results.items():
            (folder / f"{name}.json").write_text(json.dumps({**result, "made_with": MADE}), encoding="utf-8")
        module.write_page(tmp_path / "report.html", folder)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results"]
        return check((tmp_path / "report.html").read_text(encoding="utf-8")).words

    return write


def test_all_that_was_measured_is_on_the_page(page):
    words = page(RESULTS)
    titles = ["The demo's bundle", "From pixels to a class", "The flow alone", "demo", "soak"]
    assert [word for word in words if word in titles] == titles
    for figure in ("7.25", "0.375", "722", "84", "1.125", "147.5", "[0.5, 0.75]", "<b>torch</b>"):
        assert figure in words, figure
    assert [word for word in words if word in ("1", "8", "32", "256")].count("8") >= 2  # on an axis and in a table
    assert sum("a processor <2 cores>, Python 3.11.0, torch 2.0" in word for word in words) == 5
    assert not any("a training" in word or "a card" in word for word in words)


@pytest.mark.parametrize("missing", [*RESULTS, None])
def test_what_was_not_measured_is_left_out(page, missing):
    words = page({name: result for name, result in RESULTS.items() if missing not in (name, None)})
    assert ("soak" in words) == (missing not in ("soak", None))
    assert ("The flow alone" in words) == (missing is not None)
