"""The demo's learning rates: `python -m benchmarks.tuning_rates lora 0.0025 0.005 [--seeds 3]`.

Trains a source on 16 digits a class at each rate and judges it on the training scans that the episode left over; the
test split is not read. fastfsl/demo/digits.py keeps what was chosen, benchmarks/results/tuning_rates_SOURCE.json the
evidence.
"""

import argparse
import json
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.conftest import RESULTS, made_with

SHOTS = 16


def _run(source: str, rate: float, seed: int, folder: str) -> float:
    """Accuracy on left-over training scans after training at a rate."""
    import torch

    torch.set_num_threads(1)
    import numpy as np

    from fastfsl.cli.demo import demo_config
    from fastfsl.data import read_folder
    from fastfsl.fit.evaluate import base_encoder
    from fastfsl.fit.train import encode_plain, train

    root = Path(folder)
    run = train(root / "data", demo_config(SHOTS, seed, source, {"learning_rate": rate}), cache_dir=root / f"{seed}")
    pool = read_folder(root / "data").split("train")
    others = tuple(pool[i] for i in np.setdiff1d(np.arange(len(pool)), np.array(run.episode.indices)))
    base = base_encoder(run)
    features = encode_plain(run.tuned(base), others, cache_dir=root / f"{seed}")
    labels = np.array([sample.label for sample in others])
    return float((run.probabilities(features, lambda: base).argmax(axis=1) == labels).mean())


def main() -> None:
    """Train, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("rates", nargs="+", type=float)
    parser.add_argument("--seeds", default=3, type=int)
    options = parser.parse_args()
    from fastfsl.demo.digits import write_digits

    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [(rate, seed) for seed in range(options.seeds) for rate in options.rates]
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder) / "data")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(_run, options.source, rate, seed, folder) for rate, seed in jobs]
            found = {job: future.result() for job, future in zip(jobs, futures, strict=True)}
    rows: list[dict[str, Any]] = []
    for rate in options.rates:
        accuracies = [round(found[rate, seed], 4) for seed in range(options.seeds)]
        rows.append({"learning_rate": rate, "mean": round(statistics.mean(accuracies), 4), "by_seed": accuracies})
        print(rows[-1])
    rates = " ".join(f"{rate:g}" for rate in options.rates)
    command = f"python -m benchmarks.tuning_rates {options.source} {rates} --seeds {options.seeds}"
    document = {
        "what": f"digits, {SHOTS} images a class, accuracy on the training scans left over",
        "rows": rows,
        "made_with": made_with(command),
    }
    path = RESULTS / f"tuning_rates_{options.source}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
