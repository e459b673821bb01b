"""GDA fitted to augmented views or to the mean of each image's: `python -m benchmarks.gda_views [--seeds 20]`.

Handwritten digits, 8 views an image, judged on the training scans that each episode left over; the test split is not
read. benchmarks/results/gda_views.json gets accuracy and log-likelihood by shots.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.conftest import RESULTS, made_with
from fastfsl.data import read_folder, sample_episode
from fastfsl.demo.digits import AUGMENTATION, TEMPLATES, write_digits
from fastfsl.encoders import Augmentation, class_embeddings, extract_features, load_encoder
from fastfsl.heads import GDA
from fastfsl.heads.gda import Views

SHOTS = (1, 2, 4, 16)
VIEWS: tuple[Views, ...] = ("mean", "always")


def main() -> None:
    """Encode, fit, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default=20, type=int)
    seeds = parser.parse_args().seeds
    encoder = load_encoder("tiny-clip")
    with tempfile.TemporaryDirectory() as folder:
        dataset = read_folder(write_digits(Path(folder) / "data"))
        samples = dataset.split("train")
        paths = [sample.path for sample in samples]
        cache = Path(folder) / "cache"
        plain = extract_features(encoder, paths, num_views=0, cache_dir=cache)[:, 0]
        augmentation = Augmentation(**AUGMENTATION)
        views = extract_features(encoder, paths, num_views=8, augmentation=augmentation, seed=0, cache_dir=cache)
    labels = np.array([sample.label for sample in samples])
    texts = class_embeddings(encoder, dataset.class_names, TEMPLATES)
    rows: list[dict[str, Any]] = []
    for shots in SHOTS:
        accuracy: dict[str, list[float]] = {name: [] for name in VIEWS}
        likelihood: dict[str, list[float]] = {name: [] for name in VIEWS}
        for seed in range(seeds):
            index = np.array(sample_episode(labels, shots, seed, len(texts)).indices)
            others = np.setdiff1d(np.arange(len(labels)), index)
            for name in VIEWS:
                head = GDA(views=name, logit_scale=encoder.logit_scale, seed=seed)
                head.fit(views[index], labels[index], texts, plain_features=plain[index])
                right = head.predict_proba(plain[others])[np.arange(len(others)), labels[others]]
                accuracy[name].append(head.score(plain[others], labels[others]))
                likelihood[name].append(float(np.log(right).mean()))
        difference = np.array(accuracy["always"]) - np.array(accuracy["mean"])
        row: dict[str, Any] = {"shots": shots}
        for name in VIEWS:
            row[f"{name}_accuracy"] = round(float(np.mean(accuracy[name])), 4)
            row[f"{name}_log_likelihood"] = round(float(np.mean(likelihood[name])), 3)
        row["gain"] = round(float(difference.mean()), 4)
        row["gain_standard_error"] = round(float(difference.std(ddof=1) / seeds**0.5), 4)
        print(row)
        rows.append(row)
    document = {
        "what": f"GDA on digits, {seeds} seeds, accuracy on the training scans left over",
        "zero_shot_accuracy": round(float(((plain @ texts.T).argmax(axis=1) == labels).mean()), 4),
        "rows": rows,
        "made_with": made_with(f"python -m benchmarks.gda_views --seeds {seeds}"),
    }
    (RESULTS / "gda_views.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
