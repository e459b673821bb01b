"""What the noise on FMA's path brings: `python -m benchmarks.flow_noise FILE... [--shots 4,16] [--seeds 2]`.

The paper's flow (6 blocks, the class texts as targets, no other loss) with the paper's bridge, with the released
code's interpolant and without noise, in a training of `UPDATES` updates: the published 200 epochs take hours on a CPU.
The step count is chosen by two folds of the support; the test split is only reported. The interpolant's gamma is about
as large as the bridge's noise on CLIP's features. benchmarks/results/flow_noise_FILE.json gets the rows.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.by_file import measure_files
from fastfsl.data import read_feature_file, sample_episode
from fastfsl.fit.methods import make_estimator

UPDATES = 160
SHORT = {"epochs": None, "updates": UPDATES, "batch_size": 128, "learning_rate": 5e-4, "times_per_batch": 16}
NOISES: dict[str, dict[str, Any]] = {
    "none": {"noise": "none"},
    "bridge": {"noise": "bridge"},
    "interpolant, gamma 0.03": {"noise": "interpolant", "noise_scale": 0.03},
}


def main() -> None:
    """Train, judge, write."""
    torch.set_num_threads(2)
    measure_files("flow_noise", __doc__, _measured, shots="4,16", seeds=2)


def _measured(file: Path, shots: list[int], seeds: int) -> dict[str, Any]:
    return {
        "what": f"fma-paper and fma-bridge in {UPDATES} updates, accuracy on the test split",
        "changed": {name: value for name, value in SHORT.items() if value is not None},
        "rows": _rows(file, shots, seeds),
    }


def _rows(file: Path, shots: list[int], seeds: int) -> list[dict[str, Any]]:
    """By shots and noise the accuracy of every seed."""
    data = read_feature_file(file)
    (features, labels), (test_features, test_labels) = data.split("train"), data.split("test")
    most = min((labels == label).sum() for label in range(len(data.class_names)))
    rows = []
    for number in (number for number in shots if number <= most):
        for name, noise in NOISES.items():
            start = time.perf_counter()
            accuracies, steps, held_out = [], [], []
            for seed in range(seeds):
                index = list(sample_episode(labels, number, seed, len(data.class_names)).indices)
                params = {**SHORT, **noise}
                flow: Any = make_estimator(
                    "fma-paper", params, logit_scale=data.logit_scale, seed=seed, device="cpu"
                ).fit(features[index], labels[index], data.class_embeddings)
                accuracies.append(round(flow.score(test_features, test_labels), 4))
                steps.append(flow.num_steps_)
                held_out.append(round(flow.selection_.accuracy_by_step[flow.num_steps_], 4))
            row = {
                "shots": number,
                "noise": name,
                "accuracy_mean": round(statistics.mean(accuracies), 4),
                "accuracies": accuracies,
                "num_steps": steps,
                "held_out_accuracies": held_out,
                "seconds": round(time.perf_counter() - start, 1),
            }
            print(file.stem, row, flush=True)
            rows.append(row)
    return rows


if __name__ == "__main__":
    main()
