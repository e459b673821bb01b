"""What tuning the encoder gives on the embedded default, part by part, with and without a flow after it; five seeds.

Handwritten digits, 16 images a class, 1000 test scans. Beside the accuracy stands how far the tuned manifold has moved
on test images: mean |S - S'| of the Gram matrices of the tuned and the frozen image features.
"""

import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from fastfsl.demo.digits import write_digits

pytestmark = pytest.mark.slow  # `make bench-all`

SEEDS = tuple(range(5))
SHOTS = 16

# Rows of the table of MPS-Tuning: method and what of it is switched off.
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cross-entropy": ("mps", {"alignment_weight": 0.0, "sculpting_weight": 0.0}),
    "+ alignment": ("mps", {"sculpting_weight": 0.0}),
    "+ sculpting": ("mps", {"alignment_weight": 0.0}),
    "both (mps)": ("mps", {}),
    "fma": ("fma", {}),
    "mps+fma": ("mps+fma", {}),
}

# Sources, by themselves and with a flow after them.
PEFT = ("lora", "clip-adapter", "coop", "cocoop")


def _run(method: str, options: dict[str, Any], seed: int, folder: str) -> dict[str, Any]:
    """Train one row with one seed and score it on the test split."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    import numpy as np

    from fastfsl.cli.demo import demo_config
    from fastfsl.data import read_folder
    from fastfsl.encoders import class_embeddings
    from fastfsl.fit.evaluate import base_encoder
    from fastfsl.fit.source import ClassTexts
    from fastfsl.fit.train import encode_plain, train

    root = Path(folder)
    data = root / "data"
    run = train(data, demo_config(SHOTS, seed, method, options), cache_dir=root / f"cache{seed}")
    test = read_folder(data).split("test")
    labels = np.array([sample.label for sample in test])
    base = base_encoder(run)
    frozen = encode_plain(base, test, cache_dir=root / f"cache{seed}")
    features = encode_plain(run.tuned(base), test, cache_dir=root / f"cache{seed}")
    names = (tuple(run.record.class_names), run.record.config.templates)
    texts = class_embeddings(base, *names)
    result = {
        "accuracy": float((run.probabilities(features, lambda: base).argmax(axis=1) == labels).mean()),
        "zero_shot": float(((frozen @ texts.T).argmax(axis=1) == labels).mean()),
        "num_parameters": run.record.num_parameters,
        "train_seconds": run.record.train_seconds,
    }
    source = run.record.config.source()
    if source is not None and "+" not in method:
        result["start"] = _start(source, base, ClassTexts(*names, texts), test, labels, seed)
    if method == "mps":
        from fastfsl.fit.evaluate import run_encoder

        tuned = encode_plain(run_encoder(run, alpha=1.0), test, cache_dir=root / f"cache{seed}")
        result["drift"] = float(np.abs(tuned @ tuned.T - frozen @ frozen.T).mean())
    return result


def _start(source: Any, base: Any, texts: Any, test: Any, labels: Any, seed: int) -> float:
    """Test accuracy before the first step: of learned prompts that are random still, for one."""
    import torch

    from fastfsl.fit.train import encode_plain

    torch.manual_seed(seed)
    objective = source.objective(base, texts)
    with tempfile.TemporaryDirectory() as cache:
        features = encode_plain(objective.tuned_encoder(), test, cache_dir=Path(cache))
    if source.conditional:
        logits = objective.conditional_logits(features)
    elif hasattr(objective, "class_embeddings") and callable(objective.class_embeddings):
        logits = features @ objective.class_embeddings().T
    else:
        logits = features @ texts.embeddings.T
    return float((logits.argmax(axis=1) == labels).mean())


def _table(rows: dict[str, tuple[str, dict[str, Any]]], folder: Path) -> list[dict[str, Any]]:
    """Every row with every seed, on all cores, one thread each; a spawned process sees the thread settings."""
    write_digits(folder / "data")
    jobs = [(name, method, options, seed) for seed in SEEDS for name, (method, options) in rows.items()]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_run, method, options, seed, str(folder)) for _, method, options, seed in jobs]
        results = [future.result() for future in futures]
    table = []
    for name, (method, _) in rows.items():
        mine = [result for (row, *_), result in zip(jobs, results, strict=True) if row == name]
        accuracies = [result["accuracy"] for result in mine]
        row = {
            "name": name,
            "method": method,
            "accuracy_mean": round(statistics.mean(accuracies), 4),
            "accuracy_sd": round(statistics.stdev(accuracies), 4),
            "accuracies": accuracies,
            "zero_shot": mine[0]["zero_shot"],
            "num_parameters": mine[0]["num_parameters"],
            "train_seconds": round(statistics.median(result["train_seconds"] for result in mine), 1),
        }
        for key in ("start", "drift"):
            if key in mine[0]:
                row[key] = round(statistics.mean(result[key] for result in mine), 4)
        table.append(row)
    return table


def bench_mps_parts(benchmark, record, tmp_path):
    table = benchmark.pedantic(_table, (PARTS, tmp_path), rounds=1)
    record("tuning_mps", {"what": f"digits, {SHOTS} images a class, {len(SEEDS)} seeds, test accuracy", "rows": table})
    row = {entry["name"]: entry for entry in table}
    accuracy = {name: entry["accuracy_mean"] for name, entry in row.items()}
    # Two standard errors of a mean over the seeds: what "not below" allows for.
    noise = 2 * max(entry["accuracy_sd"] for entry in table) / len(SEEDS) ** 0.5
    assert accuracy["both (mps)"] >= accuracy["cross-entropy"]
    assert accuracy["mps+fma"] >= max(accuracy["both (mps)"], accuracy["fma"]) - noise
    assert row["+ alignment"]["drift"] <= row["cross-entropy"]["drift"] / 2
    assert row["both (mps)"]["drift"] <= row["+ sculpting"]["drift"] / 2


@pytest.mark.parametrize("source", PEFT)
def bench_peft(benchmark, record, tmp_path, source):
    rows: dict[str, tuple[str, dict[str, Any]]] = {source: (source, {}), f"{source}+fma": (f"{source}+fma", {})}
    table = benchmark.pedantic(_table, (rows, tmp_path), rounds=1)
    record(
        f"tuning_{source}",
        {"what": f"digits, {SHOTS} images a class, {len(SEEDS)} seeds, test accuracy", "rows": table},
    )
    assert table[0]["accuracy_mean"] > table[0]["start"]
