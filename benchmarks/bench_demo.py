"""The demo over five seeds: zero-shot, FMA in torch, the same bundle in the runtime."""

import statistics
from typing import Any

from fastfsl.cli.demo import demo_config, run_demo
from fastfsl.fit.train import SilentReporter

SEEDS = range(5)


def bench_demo(benchmark, record, tmp_path):
    documents: list[dict[str, Any]] = []

    def all_seeds():
        documents.extend(
            run_demo(tmp_path / f"seed{seed}", demo_config(16, seed), reporter=SilentReporter()) for seed in SEEDS
        )

    benchmark.pedantic(all_seeds, rounds=1)
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
            "same_class": [document["same_class"] for document in documents],
            "max_probability_error": max(document["max_probability_error"] for document in documents),
            "train_seconds": [round(document["train_seconds"], 2) for document in documents],
        },
    )
    assert zero_shot >= 0.30
    assert trained >= 0.75
    assert trained >= zero_shot + 0.10
    assert deployed == trained
    for document in documents:
        assert document["same_class"] == document["num_samples"]
        assert document["max_probability_error"] <= 1e-4
