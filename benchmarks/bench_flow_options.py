"""What the options of the flow bring: trained on 8 of each class's training samples, judged on the others.

Needs `--features FILE`, of which it reads the training split alone. The steps are fixed: no fold is trained.
"""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone

from fastfsl.data import sample_episode
from fastfsl.fit.fma import FlowMatchingAlignment

SHOTS, SEEDS, STEPS = 8, range(3), 6
TRAINED: dict[str, dict[str, Any]] = {
    "default": {},
    "two prototypes": {"num_prototypes": 2},
    "averaged weights": {"ema_decay": 0.98},
}
# Of the default's field; six steps of 0.1 and three of 0.2 reach the same time.
READ: dict[str, dict[str, Any]] = {
    "read at steps 2, 4, 6": {"read_steps": (2, 4, 6)},
    "heun, six steps": {"solver": "heun"},
    "euler, three longer steps": {"max_steps": 5, "num_steps": 3},
    "heun, three longer steps": {"solver": "heun", "max_steps": 5, "num_steps": 3},
    "exits at a margin of 0.9": {"exit_margin": 0.9},
}


def bench_flow_options(benchmark, record, request):
    file = Path(request.config.getoption("--features") or pytest.skip("needs --features FILE"))
    with np.load(file, allow_pickle=False) as arrays:  # lazily: the other splits stay on disk
        features, labels, texts = (arrays[name] for name in ("train_features", "train_labels", "class_embeddings"))
        scale = float(arrays["logit_scale"])
    accuracy: dict[str, list[float]] = {name: [] for name in (*TRAINED, *READ)}

    def all_seeds():
        for seed in SEEDS:
            chosen = np.array(sample_episode(labels, SHOTS, seed, len(texts)).indices)
            others = np.setdiff1d(np.arange(len(labels)), chosen)
            fitted = {}
            for name, params in TRAINED.items():
                flow = FlowMatchingAlignment(num_steps=STEPS, logit_scale=scale, seed=seed, **params)
                fitted[name] = flow.fit(features[chosen], labels[chosen], texts)
            default = fitted["default"]
            for name, params in READ.items():
                chosen_steps = {**default.selection_record(), "num_steps": params.get("num_steps", STEPS)}
                fitted[name] = clone(default).set_params(**params).restore(default.state(), chosen_steps)
            for name, flow in fitted.items():
                accuracy[name].append(round(flow.score(features[others], labels[others]), 4))

    benchmark.pedantic(all_seeds, rounds=1)
    rows: dict[str, Any] = {
        name: {"mean": round(statistics.mean(each), 4), "by_seed": each} for name, each in accuracy.items()
    }
    record("flow_options", {"what": "accuracy on the training samples left over", "data": file.name, "rows": rows})
    assert rows["default"]["mean"] > 1 / len(texts)
