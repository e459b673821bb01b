"""What the options of the flow bring: trained on 8 of each class's training samples, judged on the others.

`--features FILE` names a feature file, of which the training split alone is used; without it the features are drawn.
The steps are fixed: no fold is trained.
"""

import statistics
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone

from benchmarks.feature_data import chosen_data
from fastfsl.data import sample_episode
from fastfsl.fit.fma import FlowMatchingAlignment

pytestmark = pytest.mark.slow  # `make bench-all`

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
    data = chosen_data(request.config)
    features, labels, texts = (array.numpy() for array in (data.features, data.labels, data.class_embeddings))
    accuracy: dict[str, list[float]] = {name: [] for name in (*TRAINED, *READ)}

    def all_seeds():
        for seed in SEEDS:
            chosen = np.array(sample_episode(labels, SHOTS, seed, len(texts)).indices)
            others = np.setdiff1d(np.arange(len(labels)), chosen)
            fitted = {}
            for name, params in TRAINED.items():
                flow = FlowMatchingAlignment(num_steps=STEPS, seed=seed, **params)
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
    record(f"flow_options_{data.name}", {"what": "accuracy on the training samples left over", "rows": rows})
    assert rows["default"]["mean"] > 1 / len(texts)
