"""What class texts alone tell, in three frames, and what few images add: `python -m benchmarks.text_frames FILE...`.

Episodes of a few shots are drawn from the train split, and judged on what they leave over of it: neither val nor test
is read. Three ways to classify by the texts t_c alone, m the mean of the images, t of the texts, P what lies across m:

- as they are: cos(x, t_c), which is zero-shot;
- moved: cos(x, t_c + m - t);
- centred: cos(x, P (t_c - t)), which is what the targets of `fma` and the heads in `auto` start from.

Then `fma` by steps, whose targets blend centred texts and support, LP++ on centred texts, and the two together.
benchmarks/results/text_frames_FILE.json gets the means over the episodes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax

from benchmarks.conftest import RESULTS, made_with
from fastfsl.arrays import unit
from fastfsl.data import read_feature_file, sample_episode
from fastfsl.fit.fma import FlowMatchingAlignment
from fastfsl.flow import class_logits, solver_states
from fastfsl.heads import LPPlusPlus
from fastfsl.heads.support import check_support, with_centred_texts

STEPS = 10


def main() -> None:
    """Train, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--shots", default="1,2,4", help="with commas; fewer than the file has")
    parser.add_argument("--seeds", default=3, type=int)
    options = parser.parse_args()
    for file in options.files:
        data = read_feature_file(file)
        rows = []
        for shots in map(int, options.shots.split(",")):
            if shots < min(np.bincount(data.split("train")[1])):
                episodes = [_episode(data, shots, seed) for seed in range(options.seeds)]
                rows.append({"shots": shots, **{key: _mean([one[key] for one in episodes]) for key in episodes[0]}})
                print(file.stem, rows[-1], flush=True)
        command = f"python -m benchmarks.text_frames {file.stem} --shots {options.shots} --seeds {options.seeds}"
        document = {
            "what": "accuracy on train samples that the episodes left over",
            "rows": rows,
            "made_with": made_with(command),
        }
        path = RESULTS / f"text_frames_{file.stem}.json"
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _episode(data: Any, shots: int, seed: int) -> dict[str, Any]:
    features, labels = data.split("train")
    index = np.array(sample_episode(labels, shots, seed, len(data.class_names)).indices)
    left = np.setdiff1d(np.arange(len(labels)), index)
    rows, right = unit(features[left].astype(np.float64), "features"), labels[left]
    support = check_support(features[index], labels[index], data.class_embeddings, None)
    centred = with_centred_texts(support)
    texts = support.class_embeddings
    moved = texts + support.features.mean(axis=0) - texts.mean(axis=0)
    probe = LPPlusPlus(seed=seed).fit_support(centred).logits(rows)
    flow = FlowMatchingAlignment(num_steps=STEPS, seed=seed).fit(features[index], labels[index], data.class_embeddings)
    with torch.inference_mode():
        states = solver_states(flow.velocity_field_, torch.from_numpy(rows).float(), STEPS, 1 / STEPS, flow.solver)
        logits = [class_logits(state, flow.class_targets_, flow.logit_scale_).double().numpy() for state in states]
    both = [log_softmax(one, axis=1) + log_softmax(probe, axis=1) for one in logits]
    return {
        "texts": _accuracy(rows @ texts.T, right),
        "moved_texts": _accuracy(rows @ unit(moved, "texts").T, right),
        "centred_texts": _accuracy(rows @ centred.class_embeddings.T, right),
        "lp++": _accuracy(probe, right),
        "fma_by_step": [_accuracy(one, right) for one in logits],
        "lp++_and_fma_by_step": [_accuracy(one, right) for one in both],
    }


def _accuracy(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    return float((logits.argmax(axis=1) == labels).mean())


def _mean(values: list[Any]) -> Any:
    return np.round(np.mean(values, axis=0), 4).tolist()


if __name__ == "__main__":
    main()
