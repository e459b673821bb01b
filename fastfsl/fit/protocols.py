"""What a fitted run is worth beyond its own test split: on classes it has not seen, and on other data.

Base to new: train on the first half of the classes, then tell apart the base classes and, by themselves, the new ones.
Cross-dataset transfer: a run on another data set with its own classes. Domain shift: the same classes, other data.

Source: Zhou et al., "Conditional Prompt Learning for Vision-Language Models", sections 4.1 to 4.3.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

from fastfsl.arrays import check_width, numbers, unit_rows
from fastfsl.data import ClassSelection, Columns, FeatureDataset, ImageDataset, load_dataset, select_classes
from fastfsl.data.baselines import Predicted, text_accuracy
from fastfsl.data.scoring import Evaluation
from fastfsl.encoders import class_embeddings as embed_classes
from fastfsl.errors import ConfigError
from fastfsl.fit.config import TrainConfig
from fastfsl.fit.deployment import deployment
from fastfsl.fit.estimator import Estimator
from fastfsl.fit.evaluate import Samples, base_encoder, evaluate_run, run_encoder, samples_to_score
from fastfsl.fit.fma import FlowMatchingAlignment
from fastfsl.fit.run import Run
from fastfsl.fit.source import ClassTexts, Source
from fastfsl.fit.text_readout import TextReadout
from fastfsl.fit.train import Reporter, SilentReporter, train
from fastfsl.flow import plan_states, read_out
from fastfsl.heads import ZeroShot


@dataclass(frozen=True)
class BaseToNew:
    """A base-to-new experiment.

    Attributes:
        run: trained on the base classes.
        base: on the base classes' samples of the split.
        new: on the new classes' samples, told apart among the new classes.
    """

    run: Run
    base: Evaluation
    new: Evaluation

    @property
    def harmonic_mean(self) -> float:
        """2 b n / (b + n) of the two accuracies, fraction."""
        return harmonic_mean(self.base.accuracy, self.new.accuracy)


def base_to_new(
    data: Path,
    config: TrainConfig,
    *,
    split: str = "test",
    reporter: Reporter | None = None,
    cache_dir: Path | None = None,
) -> BaseToNew:
    """Train on the base classes of a data set and evaluate on both halves.

    Raises:
        ConfigError: if the method has nothing to say about unseen classes, or an option cannot be used.
        DataError: if the data cannot be used.
    """
    _check_transferable(config.estimator(logit_scale=1.0), config.source())  # before anything is trained
    run = train(data, config.model_copy(update={"classes": "base"}), reporter=reporter, cache_dir=cache_dir)
    root = None if config.image_root is None else Path(config.image_root)
    base = evaluate_run(
        run,
        data,
        split=split,
        classes="base",
        device=config.device,
        image_root=root,
        reporter=reporter,
        cache_dir=cache_dir,
    )
    new = evaluate_transfer(
        run,
        data,
        split=split,
        classes="new",
        device=config.device,
        image_root=root,
        reporter=reporter,
        cache_dir=cache_dir,
    )
    return BaseToNew(run, base, new)


def evaluate_transfer(
    run: Run,
    data: Path,
    *,
    split: str = "test",
    classes: ClassSelection = "all",
    templates: str | Sequence[str] | None = None,
    device: str = "auto",
    image_root: Path | None = None,
    columns: Columns | None = None,
    strict: bool = False,
    reporter: Reporter | None = None,
    cache_dir: Path | None = None,
    dataset: ImageDataset | FeatureDataset | None = None,
    on_predicted: Callable[[Predicted], None] | None = None,
) -> Evaluation:
    """Score a run on classes of which it knows nothing but their texts: the data set's own classes.

    Args:
        run: of a flow, zero-shot, or a tuned encoder by itself or with a flow.
        data: images, or where the encoder was not tuned features of it.
        split: which split.
        classes: which classes of the data.
        templates: prompts for the classes of images; by default those of the run.
        device: device of the encoder.
        image_root: folder that the paths of a split file or table are relative to.
        columns: names of a table's columns.
        strict: refuse data of which files would be skipped that may have been meant.
        reporter: hears of progress and warnings.
        cache_dir: where features are kept between runs.
        dataset: what `data` holds of these classes, if it was read already.
        on_predicted: hears what the score is made of.

    Raises:
        ConfigError: if the run's method has nothing to say about unseen classes.
        DataError: if the data cannot be used.
        BundleError: if the run's encoder can no longer be found as it was.
    """
    _check_transferable(run.estimator, run.source)  # before anything is encoded
    if dataset is None:
        dataset = select_classes(load_dataset(data, image_root, columns), classes)
    if run.source is not None and isinstance(dataset, FeatureDataset):
        raise ConfigError("a feature file's class embeddings are not those of the tuned encoder: give it images")
    base = functools.cache(lambda: base_encoder(run, device=device))
    encoder = functools.cache(lambda: run.tuned(base()))
    names = dataset.class_names
    hears = reporter or SilentReporter()
    samples = samples_to_score(run, dataset, names, split, encoder, hears, cache_dir, strict=strict)
    zero_shot: float | None
    if isinstance(dataset, FeatureDataset):
        if templates is not None:
            raise ConfigError("prompts go with images: a feature file has its class embeddings already")
        embeddings = dataset.class_embeddings
        zero_shot = text_accuracy(samples.features, embeddings, samples.labels)
    else:
        prompts = run.record.config.templates if templates is None else templates
        embeddings = embed_classes(base(), names, prompts)
        zero_shot = text_accuracy(samples.features, embeddings, samples.labels) if run.source is None else None
        if run.source is not None:
            texts = ClassTexts(names, prompts, embeddings)
            if run.is_conditional:
                logits = run.source.conditional_logits(base(), texts, samples.features)
                return _transferred(samples, names, logits, zero_shot, on_predicted)
            embeddings = run.source.embeddings_for(base(), texts)
    logits = transfer_logits(run.estimator, samples.features, embeddings, run.record.logit_scale)
    return _transferred(samples, names, logits, zero_shot, on_predicted)


def _transferred(
    samples: Samples,
    names: Sequence[str],
    logits: NDArray[Any],
    zero_shot: float | None,
    on_predicted: Callable[[Predicted], None] | None,
) -> Evaluation:
    if on_predicted is not None:
        on_predicted(Predicted(names, softmax(logits, axis=1), samples.labels, samples.paths, zero_shot))
    return samples.score(logits.argmax(axis=1), names)


def evaluate_domain_shift(
    run: Run,
    data: Path,
    *,
    split: str = "test",
    device: str = "auto",
    image_root: Path | None = None,
    reporter: Reporter | None = None,
    cache_dir: Path | None = None,
) -> Evaluation:
    """Score a run of any method on other data with its classes, matched by name, or with some of them.

    Where the data have some of the run's classes only, it chooses among those.

    Raises:
        DataError: if the data have a class that the run does not know.
    """
    dataset = load_dataset(data, image_root)
    known = run.record.class_names
    samples = samples_to_score(
        run, dataset, known, split, lambda: run_encoder(run, device=device), reporter or SilentReporter(), cache_dir
    )
    there = np.flatnonzero(np.isin(known, dataset.class_names))
    logits = run.logits(samples.features, lambda: base_encoder(run, device=device))
    predicted = there[logits[:, there].argmax(axis=1)]
    return samples.score(predicted, known)


def transfer_logits(
    estimator: Estimator, features: ArrayLike, class_embeddings: ArrayLike, logit_scale: float
) -> NDArray[np.float32]:
    """Logits of classes that were not trained on: the transported features, read out with their texts.

    A flow that aims elsewhere than at the texts says where it would send these classes (`targets_of`). It takes its
    fixed Euler steps, as when it is deployed.

    Args:
        estimator: a fitted flow, zero-shot, or the read-out of a tuned encoder.
        features: image features, (n, d); any length.
        class_embeddings: text features of other classes, (C, d); any length.
        logit_scale: factor on the cosine similarities.

    Returns:
        (n, C).

    Raises:
        ConfigError: if the method has nothing to say about unseen classes.
        ShapeError: if the widths differ.
    """
    flow = _transferable(estimator)
    keeps_length = isinstance(estimator, TextReadout) and not estimator.normalized
    rows = (numbers if keeps_length else unit_rows)(features, "features", np.float32)
    embeddings = unit_rows(class_embeddings, "class_embeddings", np.float32)
    check_width(rows.shape[1], embeddings.shape[1])
    if keeps_length:
        blended: NDArray[np.float32] = logit_scale * rows @ embeddings.T
        return blended
    states = [torch.from_numpy(rows)]
    if flow is not None:
        deployed = deployment(flow)
        embeddings = flow.targets_of(embeddings)
        if deployed.plan is not None:
            states = plan_states(deployed.plan, states[0], deployed.read_steps)
    with torch.inference_mode():
        logits: NDArray[np.float32] = read_out(states, torch.from_numpy(embeddings), logit_scale).numpy()
    return logits


def harmonic_mean(base: float, new: float) -> float:
    """2 b n / (b + n) of two accuracies; 0 where both are."""
    return 0.0 if base + new == 0 else 2 * base * new / (base + new)


def _check_transferable(estimator: Estimator, source: Source | None) -> None:
    """Refuse a method that has nothing to say about unseen classes.

    Raises:
        ConfigError: it holds something about its own classes that others do not have.
    """
    _transferable(estimator)
    if source is not None and source.conditional and not isinstance(estimator, TextReadout):
        raise ConfigError(
            "the class embeddings of cocoop depend on the image, and what follows it was fitted to their mean over the "
            "support: for unseen classes take cocoop alone"
        )


def _transferable(estimator: Estimator) -> FlowMatchingAlignment | None:
    """The flow; None for zero-shot and for a tuned encoder by itself, which move nothing.

    Raises:
        ConfigError: if the estimator holds anything about its own classes that others do not have.
    """
    if isinstance(estimator, ZeroShot | TextReadout):
        return None
    if isinstance(estimator, FlowMatchingAlignment):
        return estimator
    raise ConfigError(
        f"{type(estimator).__name__} has fitted weights for the classes it was trained on and none for others: unseen "
        "classes need a method that knows classes by their texts alone; train one of the fma methods or zero-shot"
    )
