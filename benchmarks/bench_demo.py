"""The demo: zero-shot, FMA in torch, the same bundle in the runtime, and in int8; five seeds in `make bench-all`."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastfsl.cli.demo import demo_config, latency, run_demo
from fastfsl.data import read_folder
from fastfsl.export.bundle_writer import export_run
from fastfsl.fit.run import Run
from fastfsl.fit.train import SilentReporter
from fastfsl.images import open_image
from fastfsl.runtime import Classifier

SEEDS = range(5)
NAMES = ("zero-shot CLIP, torch", "FMA, torch", "the bundle, runtime", "the bundle in int8, runtime")
# Of accuracy, that int8 may lose to float32.
LOST_AT_MOST = 0.005


def bench_demo_precision(benchmark, demo):
    """One seed: float32 gives torch's classes, and int8 loses next to nothing."""
    int8 = benchmark.pedantic(_int8, (demo.folder,), rounds=1)
    benchmark.extra_info.update(int8=int8)
    _check(demo.document, int8)


@pytest.mark.slow  # `make bench-all`
def bench_demo(benchmark, record, tmp_path):
    documents: list[dict[str, Any]] = []

    def all_seeds():
        documents.extend(
            run_demo(tmp_path / f"seed{seed}", demo_config(16, seed), reporter=SilentReporter()) for seed in SEEDS
        )

    benchmark.pedantic(all_seeds, rounds=1)
    int8 = [_int8(tmp_path / f"seed{seed}") for seed in SEEDS]
    columns = [*zip(*(document["rows"] for document in documents), strict=True), int8]
    rows = []
    for name, seeds in zip(NAMES, columns, strict=True):
        accuracies = [row["accuracy"] for row in seeds]
        rows.append(
            {
                "name": name,
                "accuracy_mean": round(statistics.mean(accuracies), 4),
                "accuracy_sd": round(statistics.stdev(accuracies), 4),
                "accuracies": accuracies,
                **{
                    key: round(statistics.median(row[key] for row in seeds), 3)
                    for key in ("ms_per_image_batch_1", "ms_per_image_batch_32", "size_bytes")
                },
            }
        )
    zero_shot, trained, deployed, reduced = rows
    lost = [before - after for before, after in zip(deployed["accuracies"], reduced["accuracies"], strict=True)]
    record(
        "demo",
        {
            "what": "handwritten digits, 16 images a class, 1000 test scans, five seeds",
            "rows": rows,
            "num_steps": [document["num_steps"] for document in documents],
            "num_samples": documents[0]["num_samples"],
            "same_class": [document["same_class"] for document in documents],
            "max_probability_error": max(document["max_probability_error"] for document in documents),
            "int8_loses_at_most": round(max(lost), 4),
            "int8_agreement_on_support": [row["agreement_on_support"] for row in int8],
            "int8_layers_kept_in_fp32": [row["fp32_layers"] for row in int8],
            "train_seconds": [round(document["train_seconds"], 2) for document in documents],
        },
    )
    assert zero_shot["accuracy_mean"] >= 0.30
    assert trained["accuracy_mean"] >= 0.75
    assert trained["accuracy_mean"] >= zero_shot["accuracy_mean"] + 0.10
    assert deployed["accuracies"] == trained["accuracies"]
    for document, row in zip(documents, int8, strict=True):
        _check(document, row)


def _check(document: dict[str, Any], int8: dict[str, Any]) -> None:
    assert document["same_class"] == document["num_samples"]
    assert document["max_probability_error"] <= 1e-4
    assert int8["accuracy"] >= document["rows"][2]["accuracy"] - LOST_AT_MOST


def _int8(folder: Path) -> dict[str, Any]:
    """The same run exported in int8, on the test scans, which its calibration and its gate have not seen."""
    run = Run.load(folder / "run")
    report = export_run(run, folder / "int8", precision="int8").parity["precision"]
    data = read_folder(folder / "data")
    samples = data.split("test")
    labels = np.array([run.record.class_names.index(data.class_names[sample.label]) for sample in samples])
    with Classifier.load(folder / "int8") as classifier:
        found = classifier.probabilities([sample.path for sample in samples]).argmax(axis=1)
        speed = latency(classifier.probabilities, [open_image(sample.path) for sample in samples[:32]])
    return {
        "accuracy": float((found == labels).mean()),
        **speed,
        "agreement_on_support": report["agreement"],
        "fp32_layers": len(report["fp32_layers"]),
        "size_bytes": sum(file.stat().st_size for file in (folder / "int8").rglob("*") if file.is_file()),
    }
