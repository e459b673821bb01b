"""Which of several equally good steps to deploy: the earliest, or the latest as `best_step` does?

Judged on the demo's training pool: the step is chosen on folds of the support set, the accuracy read on the pool's
other scans. The test split plays no part.
"""

import statistics

import numpy as np
import pytest
import torch

from fastfsl.cli.demo import demo_config
from fastfsl.data import draw_episode, read_folder
from fastfsl.demo.digits import AUGMENTATION, TEMPLATES, write_digits
from fastfsl.encoders import Augmentation, class_embeddings, extract_features, load_encoder
from fastfsl.fit.fma import FlowMatchingAlignment
from fastfsl.flow import euler_states

pytestmark = pytest.mark.slow  # `make bench-all`

SEEDS = range(8)


@pytest.mark.parametrize("shots", [4, 16])
def bench_step_selection(benchmark, record, tmp_path, shots):
    write_digits(tmp_path / "digits")
    dataset = read_folder(tmp_path / "digits")
    encoder = load_encoder("tiny-clip")
    embeddings = class_embeddings(encoder, dataset.class_names, TEMPLATES)
    paths, labels = [sample.path for sample in dataset.split("train")], dataset.labels("train")
    plain = extract_features(encoder, paths, cache_dir=tmp_path / "cache")[:, 0]
    gains, steps = [], []

    def all_seeds():
        for seed in SEEDS:
            support = np.array(draw_episode(dataset, shots, seed).indices)
            views = extract_features(
                encoder, [paths[index] for index in support], 8, Augmentation(**AUGMENTATION), seed, tmp_path / "cache"
            )
            params = demo_config(shots, seed).params
            estimator = FlowMatchingAlignment(**params, logit_scale=encoder.logit_scale, seed=seed)
            estimator.fit(views, labels[support], embeddings, plain_features=plain[support])
            curve = np.array(estimator.selection_.accuracy_by_step)
            others = np.setdiff1d(np.arange(len(labels)), support)
            with torch.inference_mode():
                states = euler_states(estimator.velocity_field_, torch.from_numpy(plain[others]), 10, 0.1)
                accuracy = [
                    float(((state @ estimator.class_targets_.T).argmax(dim=1).numpy() == labels[others]).mean())
                    for state in states
                ]
            steps.append(estimator.num_steps_)
            gains.append(accuracy[estimator.num_steps_] - accuracy[int(curve.argmax())])

    benchmark.pedantic(all_seeds, rounds=1)
    record(
        f"step_selection_{shots}_shots",
        {
            "what": "accuracy with the latest of equally good steps minus that with the earliest, training pool",
            "gain_mean": round(statistics.mean(gains), 4),
            "gains": [round(gain, 4) for gain in gains],
            "num_steps": steps,
        },
    )
    assert statistics.mean(gains) >= 0
