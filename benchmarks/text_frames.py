"""The evidence for the defaults that depend on the class texts: `python -m benchmarks.text_frames FILE...`.

Episodes of a few shots are drawn from the train split, and judged on what they leave over of it: neither val nor test
is read. Three ways to classify by the texts t_c alone, m the mean of the images, t of the texts, P what lies across m:

- as they are: cos(x, t_c), which is zero-shot;
- moved: cos(x, t_c + m - t);
- centred: cos(x, P (t_c - t)), which is what the targets of `fma` and the heads in `auto` start from.

Then `fma` by the radius of its targets (`RADIUS`) and by steps; and at one shot `auto` by the flow's share, the rest
being LP++ (`ONE_SHOT_SHARES`), with the expected calibration error. benchmarks/results/text_frames_FILE.json gets the
means over the episodes.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax

from benchmarks.by_file import measure_files
from fastfsl.arrays import unit
from fastfsl.data import FeatureDataset, read_feature_file, sample_episode
from fastfsl.data.scoring import calibration_error
from fastfsl.fit.auto import ONE_SHOT_SHARES, Auto
from fastfsl.fit.fma import FlowMatchingAlignment
from fastfsl.flow import class_logits, solver_states, targets
from fastfsl.heads.support import check_support, with_centred_texts

STEPS = 10
RADII = (0.35, targets.RADIUS, 1.0)
SHARES = (0.0, 0.3, 0.5, 0.7, 1.0)


def main() -> None:
    """Train, judge, write."""
    measure_files("text_frames", __doc__, _measured, shots="1,2,4", seeds=3)


def _measured(file: Path, shots: list[int], seeds: int) -> dict[str, Any]:
    data = read_feature_file(file)
    rows = []
    for number in shots:
        if number < min(np.bincount(data.split("train")[1])):  # some are left over
            episodes = [_episode(data, number, seed) for seed in range(seeds)]
            rows.append({"shots": number} | {key: _mean([one[key] for one in episodes]) for key in episodes[0]})
            print(file.stem, rows[-1], flush=True)
    return {"what": "accuracy on train samples that the episodes left over", "rows": rows}


def _episode(data: FeatureDataset, shots: int, seed: int) -> dict[str, Any]:
    features, labels = data.split("train")
    index = np.array(sample_episode(labels, shots, seed, len(data.class_names)).indices)
    left = np.setdiff1d(np.arange(len(labels)), index)
    rows, right = unit(features[left].astype(np.float64), "features"), labels[left]
    support = check_support(features[index], labels[index], data.class_embeddings, None)
    texts = support.class_embeddings
    moved = texts + support.features.mean(axis=0) - texts.mean(axis=0)
    found: dict[str, Any] = {
        "texts": _accuracy(rows @ texts.T, right),
        "moved_texts": _accuracy(rows @ unit(moved, "texts").T, right),
        "centred_texts": _accuracy(rows @ with_centred_texts(support).class_embeddings.T, right),
    }
    given = (features[index], labels[index], data.class_embeddings)
    for radius in RADII:
        with mock.patch.object(targets, "RADIUS", radius):
            flow = FlowMatchingAlignment(num_steps=STEPS, seed=seed).fit(*given)
        with torch.inference_mode():
            states = solver_states(flow.velocity_field_, torch.from_numpy(rows).float(), STEPS, 1 / STEPS, flow.solver)
            logits = [class_logits(state, flow.class_targets_, 1.0).double().numpy() for state in states]
        found[f"fma_of_radius_{radius:g}_by_step"] = [_accuracy(one, right) for one in logits]
    if shots == 1:
        auto = Auto(seed=seed).fit(*given)
        # Of a share of 1 each.
        whole = {
            name: weight / ONE_SHOT_SHARES[name] * auto.components_[name].logits(rows).astype(np.float64)
            for name, weight in auto.selection_.weights.items()
        }
        for share in SHARES:
            mixed = share * whole["fma"] + (1 - share) * whole["lp++"]
            error = calibration_error(softmax(mixed, axis=1), right)
            found[f"auto_of_share_{share:g}"] = [_accuracy(mixed, right), error]
    return found


def _accuracy(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    return float((logits.argmax(axis=1) == labels).mean())


def _mean(values: list[Any]) -> Any:
    return np.round(np.mean(values, axis=0), 4).tolist()


if __name__ == "__main__":
    main()
