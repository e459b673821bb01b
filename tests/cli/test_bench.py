"""`fastfsl bench`: what it measures, and what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from PIL import Image

from fastfsl import bundle
from fastfsl.cli.bench import make_images, parse_batches
from fastfsl.cli.fresh_process import start_up
from fastfsl.cli.stopwatch import MIN_ROUNDS, Timed, measure
from fastfsl.errors import ConfigError, FastFSLError

ROW = {"batch", "p50_ms", "p95_ms", "p99_ms", "images_per_second", "provider", "rounds"}


@pytest.fixture(scope="module")
def benched(run_fastfsl, image_bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "out"
    result = run_fastfsl("bench", image_bundle, "--batch", "4,1", "--seconds", 0.02, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    return out, result.document


def test_json_has_a_row_for_each_batch(benched, image_bundle):
    _, document = benched
    assert [row["batch"] for row in document["rows"]] == [1, 4]
    for row in document["rows"]:
        assert set(row) == ROW
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["rounds"] >= MIN_ROUNDS
        assert row["provider"] == "CPUExecutionProvider"
    assert document["digest"] == bundle.bundle_digest(image_bundle)
    stages = [(stage["stage"], stage["batch"]) for stage in document["stages"]]
    assert stages == [(name, n) for n in (1, 4) for name in ("decode and prepare", "encoder", "flow and heads")]


def test_start_and_memory_are_those_of_fresh_processes(benched):
    _, document = benched
    start = document["cold_start"]
    parts = start["import_runtime_s"] + start["load_s"] + start["first_prediction_s"]
    assert 0 < start["beyond_onnxruntime_s"] <= 3 * parts
    memory = document["memory"]
    # Far less than this process holds, which has torch loaded.
    assert 10e6 < memory["loaded_bytes"] <= memory["peak_bytes"] < 300e6


def test_out_holds_the_document_and_the_report(benched):
    out, document = benched
    assert sorted(file.name for file in out.iterdir()) == ["bench.json", "report.html"]
    assert json.loads((out / "bench.json").read_text(encoding="utf-8")) == document
    page = (out / "report.html").read_text(encoding="utf-8")
    for words in ("Latency", "Throughput", "Stages", "Start and memory", "CPUExecutionProvider", "onnxruntime"):
        assert words in page


def test_results_are_replaced_by_force_alone(run_fastfsl, benched, image_bundle):
    out, _ = benched
    arguments = ("bench", image_bundle, "--batch", 1, "--seconds", 0.01, "--out", out)
    refused = run_fastfsl(*arguments)
    assert refused.exit_code == 2
    assert "--force" in refused.stderr


def test_a_bundle_on_features(run_fastfsl, write_bundle, tmp_path):
    path = write_bundle(tmp_path / "bundle", with_encoder=False)
    # Features of 300 KB: what one argument of a process may have at most is 128.
    result = run_fastfsl("bench", path, "--batch", "1,6000", "--seconds", 0.02, "--json")
    assert result.exit_code == 0, result.stderr
    assert [row["batch"] for row in result.document["rows"]] == [1, 6000]
    assert (result.document["inputs"], result.document["stages"]) == ("features", [])
    refused = run_fastfsl("bench", path, "--images", tmp_path)
    assert refused.exit_code == 2
    assert "trained on features" in refused.stderr


def test_a_bundle_without_graphs_runs_on_numpy(run_fastfsl, write_bundle, make_readout, tmp_path):
    path = write_bundle(tmp_path / "[bold]a[/x]", with_encoder=False, readout=make_readout())
    result = run_fastfsl("bench", path, "--batch", 2, "--seconds", 0.02, "--out", tmp_path / "[/out]")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "on numpy" in result.stdout
    assert "Cold start" in result.stdout


def test_the_users_images_are_taken_in_turn(run_fastfsl, image_bundle, photos, tmp_path):
    result = run_fastfsl("bench", image_bundle, "--images", photos, "--batch", 2, "--seconds", 0.01, "--json")
    assert (result.document["inputs"], result.document["num_inputs"]) == ("files", 3)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:30])
    broken = run_fastfsl("bench", image_bundle, "--images", tmp_path, "--batch", 1)
    assert broken.exit_code == 2
    assert "a.png" in broken.stderr.replace("\n", "")


@pytest.mark.parametrize("batch", ["", "0", "1,", "a", "-1", "1.5", "99999999999999999999", "١"])
def test_batches_that_are_none(run_fastfsl, image_bundle, batch):
    result = run_fastfsl("bench", image_bundle, f"--batch={batch}")
    assert result.exit_code == 2
    assert "such as 1,8,32" in result.stderr.replace("\n", "")
    with pytest.raises(ConfigError):
        parse_batches(batch)


def test_cuda_where_there_is_none_is_refused(run_fastfsl, image_bundle):
    result = run_fastfsl("bench", image_bundle, "--device", "cuda", "--seconds", 0.01)
    assert result.exit_code == 2
    assert "device='cuda'" in result.stderr


def test_rounds_take_turns_and_are_enough():
    order: list[str] = []
    calls = [Timed(name, 2, partial(order.append, name), 1e-9) for name in ("a", "b")]
    told: list[int] = []
    measure(calls, on_progress=lambda done, total: told.append(done))
    assert [len(call.times) for call in calls] == [MIN_ROUNDS, MIN_ROUNDS]
    timed = order[-2 * MIN_ROUNDS :]
    assert timed == ["a", "b"] * MIN_ROUNDS
    assert told == sorted(told)
    assert told[-1] == 1000


def test_percentiles_are_those_of_the_raw_rounds():
    call = Timed("whole", 4, lambda: None, 1.0, times=[0.001 * value for value in range(1, 101)], used=5.05)
    found = call.figures()
    assert (found["p50_ms"], found["p95_ms"], found["p99_ms"]) == (50.5, 95.05, 99.01)
    assert found["images_per_second"] == round(400 / 5.05, 2)


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(FastFSLError, match="no such bundle folder"):
        start_up(tmp_path / "none", {}, ["a.jpg"], 1)


def test_a_process_that_takes_too_long_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("fastfsl.cli.fresh_process._LIMIT_SECONDS", 0.001)
    with pytest.raises(FastFSLError, match="a smaller --batch"):
        start_up(tmp_path, {}, ["a.jpg"], 1)


def test_made_up_images_are_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first, second = (make_images(tmp_path / name, 2) for name in ("one", "two"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert first[0].read_bytes() != first[1].read_bytes()
    with Image.open(first[0]) as image:
        assert image.size == (500, 375)


def test_it_needs_neither_torch_nor_matplotlib(image_bundle, tmp_path):
    code = f"""
import sys
for name in ("torch", "matplotlib", "onnx", "sklearn", "scipy", "open_clip"):
    sys.modules[name] = None
from fastfsl.cli import app
app(["bench", {str(image_bundle)!r}, "--batch", "1", "--seconds", "0.01", "--out", {str(tmp_path / "out")!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
