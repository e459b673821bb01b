"""Accuracy of a fitted run on a split of a data set, in torch."""

from pathlib import Path

import numpy as np

from fastfsl.data import FeatureDataset, load_dataset
from fastfsl.data.scoring import Evaluation, features_to_score, images_to_score, score
from fastfsl.encoders import Encoder, load_encoder
from fastfsl.errors import BundleError, DataError
from fastfsl.fit.run import Run
from fastfsl.fit.train import Reporter, SilentReporter, encode_plain


def evaluate_run(
    run: Run,
    data: Path,
    *,
    split: str = "test",
    device: str = "auto",
    image_root: Path | None = None,
    reporter: Reporter | None = None,
    cache_dir: Path | None = None,
) -> Evaluation:
    """Score a run on a split.

    Raises:
        DataError: if the data are of another kind than the run's or have a class it does not know.
        BundleError: if the run's encoder can no longer be found as it was.
    """
    reporter = reporter or SilentReporter()
    dataset = load_dataset(data, image_root)
    if isinstance(dataset, FeatureDataset):
        features, labels = features_to_score(dataset, split, run.record.class_names, run.record.embed_dim)
        return score(run.estimator.predict(features), labels, run.record.class_names)
    images = images_to_score(dataset, split, run.record.class_names, set(run.record.support_digests), reporter.warn)
    features = encode_plain(
        run_encoder(run, device=device),
        images.samples,
        cache_dir=cache_dir,
        progress=lambda done, total: reporter.stage("encoding", done, total),
    )
    labels = np.array([sample.label for sample in images.samples], dtype=np.int64)
    return score(
        run.estimator.predict(features),
        labels,
        run.record.class_names,
        num_unreadable=images.num_unreadable,
        num_excluded=images.num_excluded,
    )


def run_encoder(run: Run, *, device: str = "cpu") -> Encoder:
    """The encoder a run was trained with.

    Raises:
        DataError: if the run was trained on features.
        BundleError: if the weights found now, or what they want done to an image, are not those of the training.
    """
    record = run.record.encoder
    if record is None:
        raise DataError("this run was trained on a feature file and knows no encoder: give it features, not images")
    encoder = load_encoder(record.backbone, record.pretrained, device)
    if encoder.digest != record.digest:
        raise BundleError(
            f"the weights of {record.backbone} ({record.pretrained}) are not those this run was trained with "
            f"(expected digest {record.digest[:12]}, got {encoder.digest[:12]}): restore the checkpoint or train again"
        )
    if encoder.preprocessing.to_dict() != record.preprocessing:
        raise BundleError(
            f"{record.backbone} ({record.pretrained}) prepares images differently than when this run was trained "
            f"(expected {record.preprocessing}, got {encoder.preprocessing.to_dict()}): restore its "
            "open_clip_config.json or train again"
        )
    return encoder
