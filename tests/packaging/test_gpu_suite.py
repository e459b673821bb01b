"""What of the GPU suite needs no card: its command line, its bounds, its tables, and a run in the interpreter."""

import importlib
import json
import os
import subprocess
import sys

import pytest

MADE = {"device": "a card", "versions": {"torch": "2.11.0", "onnxruntime": "1"}, "date": "2026-01-01"}
CEILINGS = {"tflops": 800.0, "gigabytes": 3000.0, "launch_us": 1.5}


@pytest.fixture
def load(checkout, monkeypatch):
    """Imports a file of benchmarks/, which is no package of the wheel."""
    monkeypatch.syspath_prepend(str(checkout))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def document(rows, **values):
    return {"rows": rows, "dry_run": False, "not_run": [], "complete": True, "made_with": MADE, **values}


def flow_row(batch, name, ms, share=0.1):
    return {"batch": batch, "name": name, "ms": ms, "roofline_ms": 0.01, "share_of_peak": share}


FLOW = document(
    [
        flow_row(1, "euler_flow", 0.5),
        flow_row(1, "module, eager", 7.0),
        flow_row(1, "tables, compiled", 0.7),
        flow_row(65536, "euler_flow", 20.0, share=0.44),
    ],
    ceilings=CEILINGS,
    size={"dim": 512, "num_blocks": 12, "num_steps": 10},
)
GRAM_ROW = {
    "shape": [8, 2304, 1024],
    "kind": "l1",
    "normalize": True,
    "name": "kernel",
    "ms": 0.5,
    "device_ms": 0.4,
    "roofline_ms": 0.3,
    "memory_share": 0.03,
}
AOT_ROW = {"name": "latency", "dtype": "fp16", "target": "sm_90", "batch": 32, "ms": 0.61, "p95_ms": 0.7}
CORRECT_ROW = {"name": "flow", "precision": "bf16", "case": [3, 512], "error": 2e-3, "times_plain": 0.7, "ok": True}


def test_sections_run_in_the_order_of_worth_whatever_the_order_they_are_named_in(load, tmp_path):
    suite = load("gpu_suite")
    assert suite.arguments(["--out", str(tmp_path), "--only", "gram,correctness"]).only == ("correctness", "gram")
    assert suite.arguments(["--out", str(tmp_path)]).only == suite.DEFAULT
    assert "sweep" not in suite.DEFAULT
    assert sum(suite.SECTIONS[name].seconds for name in suite.DEFAULT) <= 520


@pytest.mark.parametrize("given", [["--only", "gram,flows", "--out", "x"], ["--only", "gram"]])
def test_a_wrong_command_line_is_refused(load, given, capsys):
    with pytest.raises(SystemExit):
        load("gpu_suite").arguments(given)
    assert "expected names of" in capsys.readouterr().err or "--out" not in given


def test_bounds_are_met_missed_or_not_run(load):
    rows = list(load("gpu_bounds").judged({"flow": FLOW, "gram": document([GRAM_ROW])}))
    verdicts = {row["bound"]: (row["got"], row["met"]) for row in rows}
    assert verdicts["flow, batch 1: ms of euler_flow against module, eager"] == (14.0, True)
    assert verdicts["flow, batch 1: ms of euler_flow against tables, compiled"] == (pytest.approx(1.4), False)
    assert verdicts["flow, batch 65536: share_of_peak of euler_flow"] == (0.44, False)
    assert verdicts["flow, batch 4096: ms of euler_flow against module, eager"] == (None, None)
    assert verdicts["gram, shape [8, 2304, 1024]: memory_share of kernel"] == (0.03, True)


def test_a_dry_run_meets_no_bound(load):
    rows = load("gpu_bounds").judged({"flow": {**FLOW, "dry_run": True}})
    assert {row["met"] for row in rows} == {None}


def test_only_wrong_results_and_broken_judges_fail_the_suite(load, tmp_path):
    summary = load("gpu_summary").summary
    written = {"correctness": document([CORRECT_ROW]), "flow": FLOW}
    for name, content in written.items():
        (tmp_path / f"gpu_{name}.json").write_text(json.dumps(content))
    judges = {"correctness"}
    text, wrong = summary(tmp_path, {"correctness": "done", "flow": "ended with code 1"}, judges)
    assert not wrong
    assert "NOT MET  flow, batch 65536" in text
    assert "not run  flow, batch 4096" in text
    assert json.loads((tmp_path / "gpu_suite.json").read_text())["wrong"] == {"correctness": 0, "flow": 0}
    assert summary(tmp_path, {"correctness": "cut off after 9 s", "flow": "done"}, judges)[1]
    assert not summary(tmp_path, {"correctness": "not run: no card"}, judges)[1]

    written["correctness"]["rows"].append({**CORRECT_ROW, "times_plain": 2.1, "ok": False})
    (tmp_path / "gpu_correctness.json").write_text(json.dumps(written["correctness"]))
    text, wrong = summary(tmp_path, {"correctness": "done"}, judges)
    assert wrong
    assert "WRONG" in text


def test_tables_say_what_was_measured_and_before_that_nothing(load, tmp_path, monkeypatch):
    tables = load("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "not yet run on a card" in tables.gpu_table()
    written = {
        "correctness": document([CORRECT_ROW]),
        "flow": FLOW,
        "gram": document([GRAM_ROW]),
        "aot": document([AOT_ROW]),
    }
    for name, content in written.items():
        (tmp_path / f"gpu_{name}.json").write_text(json.dumps(content))
    load("gpu_summary").summary(tmp_path, dict.fromkeys(written, "done"), set())
    table = tables.gpu_table()
    assert "not yet run" not in table
    for part in (
        "| flow, bf16 | 2.0e-03 | 0.70 |  |",
        "| 1 | 0.500 | 7.000 | 0.700 | 0.010 | 10 % |",
        "| kernel, 8 x 2304 x 1024, l1 | 0.500 | 0.400 | 0.300 | 3 % |",
        "| fp16, sm_90 | 32 | 0.610 | 0.700 |",
        "| flow, batch 65536: share_of_peak of euler_flow | at least 0.45 | 0.44 | not met |",
        "a card, torch 2.11.0, 2026-01-01",
    ):
        assert part in table


def test_a_median_of_two_passes_knows_how_far_they_are_apart(load):
    clock = load("gpu_clock")
    timing = clock.Timing.of([[1.0, 1.0, 5.0], [1.2, 1.2, 1.2]])
    assert (timing.ms, timing.rounds) == (1.2, 6)
    assert timing.spread == pytest.approx(0.2 / 1.2)
    ceilings = clock.Ceilings(**CEILINGS)
    assert ceilings.roofline_ms(800e9, 1e6) == pytest.approx(1.0)
    assert ceilings.roofline_ms(1e6, 3e9) == pytest.approx(1.0)


def test_the_flow_does_as_many_operations_as_its_launches(load):
    from fastfsl.bundle.flow_launches import flow_launches

    size = load("gpu_flow").FULL
    launches = list(
        flow_launches(rows=1, dim=size.dim, num_blocks=size.num_blocks, step_size=0.1, read_steps=(size.num_steps,))
    )
    assert len(launches) == size.num_products == 251


def test_a_bundle_that_is_cut_off_or_fails_leaves_the_others_their_rows(load, tmp_path):
    options = load("gpu_record").Options(tmp_path, 5.0, interpret=True)
    record = load("gpu_record").Record("aot", "of a test", options)
    keep_rows = load("gpu_aot")._keep_rows
    for code in ("raise SystemExit('broken')", "print('[{\"ok\": true}]')", "import time; time.sleep(60)"):
        keep_rows(record, {"target": "sm_90"}, [sys.executable, "-c", code], dict(os.environ))
    assert [row["ok"] for row in record.document["rows"]] == [False, True]
    assert "broken" in record.document["rows"][0]["error"]
    assert "did not end" in record.document["not_run"][0]["reason"]


def test_the_sections_need_no_more_than_a_card_has(checkout):
    # Where cards are lent there is torch, triton and numpy, no CLIP library and no command line.
    absent = ("open_clip", "torchvision", "typer", "rich", "pydantic", "accelerate", "sklearn")
    code = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.path.insert(0, {str(checkout)!r})
for section in ("correctness", "flow", "gram", "aot", "determinism", "sanitizer", "sweep"):
    importlib.import_module(f"benchmarks.gpu_{{section}}")
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_without_a_card_nothing_is_run(checkout, tmp_path):
    command = [sys.executable, "benchmarks/gpu_suite.py", "--only", "flow", "--out", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "flow: not run: no card" in done.stdout
    assert json.loads((tmp_path / "gpu_suite.json").read_text())["made_with"] is None


@pytest.mark.slow
def test_the_suite_runs_in_the_interpreter(checkout, tmp_path):
    command = [sys.executable, "benchmarks/gpu_suite.py", "--interpret", "--quick", "--out", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    suite = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert suite["outcomes"] == {
        "correctness": "done",
        "flow": "done",
        "gram": "done",
        "aot": "not run: no card",
        "determinism": "done",
        "sanitizer": "not run: no card",
    }
    assert all(json.loads((tmp_path / f"gpu_{name}.json").read_text())["rows"] for name in ("flow", "gram"))
