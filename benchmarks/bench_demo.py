"""The demo over five seeds: zero-shot, FMA in torch, the same bundle in the runtime, and in int8."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np

from fastfsl.cli.demo import demo_config, run_demo
from fastfsl.data import read_folder
from fastfsl.export.bundle_writer import export_run
from fastfsl.fit.run import Run
from fastfsl.fit.train import SilentReporter
from fastfsl.runtime import Classifier

SEEDS = range(5)


def bench_demo(benchmark, record, tmp_path):
    documents: list[dict[str, Any]] = []

    def all_seeds():
        documents.extend(
            run_demo(tmp_path / f"seed{seed}", demo_config(16, seed), reporter=SilentReporter()) for seed in SEEDS
        )

    benchmark.pedantic(all_seeds, rounds=1)
    int8 = [_int8(tmp_path / f"seed{seed}") for seed in SEEDS]
    rows = []
    for index in range(3):
        accuracies = [document["rows"][index]["accuracy"] for document in documents]
        rows.append(
            {
                "name": ("zero-shot CLIP, torch", "FMA, torch", "the bundle, runtime")[index],
                "accuracy_mean": round(statistics.mean(accuracies), 4),
                "accuracy_sd": round(statistics.stdev(accuracies), 4),
                "accuracies": accuracies,
                **{
                    key: round(statistics.median(document["rows"][index][key] for document in documents), 3)
                    for key in ("ms_per_image_batch_1", "ms_per_image_batch_32", "size_bytes")
                },
            }
        )
    zero_shot, trained, deployed = (row["accuracy_mean"] for row in rows)
    record(
        "demo",
        {
            "what": "handwritten digits, 16 images a class, 1000 test scans, five seeds",
            "rows": rows,
            "num_steps": [document["num_steps"] for document in documents],
            "num_samples": documents[0]["num_samples"],
            "int8": int8,
            "same_class": [document["same_class"] for document in documents],
            "max_probability_error": max(document["max_probability_error"] for document in documents),
            "train_seconds": [round(document["train_seconds"], 2) for document in documents],
        },
    )
    assert zero_shot >= 0.30
    assert trained >= 0.75
    assert trained >= zero_shot + 0.10
    assert deployed == trained
    for document, reduced in zip(documents, int8, strict=True):
        assert reduced["accuracy"] >= document["rows"][2]["accuracy"] - 0.005
        assert document["same_class"] == document["num_samples"]
        assert document["max_probability_error"] <= 1e-4


def _int8(folder: Path) -> dict[str, Any]:
    """The same run exported in int8, on the test scans, which its calibration and its gate have not seen."""
    run = Run.load(folder / "run")
    manifest = export_run(run, folder / "int8", precision="int8")
    data = read_folder(folder / "data")
    samples = data.split("test")
    labels = np.array([run.record.class_names.index(data.class_names[sample.label]) for sample in samples])
    found = Classifier.load(folder / "int8").probabilities([sample.path for sample in samples]).argmax(axis=1)
    report = manifest.parity["precision"]
    return {
        "accuracy": float((found == labels).mean()),
        "agreement_on_support": report["agreement"],
        "fp32_layers": len(report["fp32_layers"]),
        "size_bytes": sum(entry["size"] for entry in manifest.files.values()),
    }
