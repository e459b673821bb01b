"""Computing a cell: a method fitted on one episode and scored on the test split."""

import base64
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from fastfsl.data.scoring import calibration_error, negative_log_likelihood, score
from fastfsl.errors import DataError
from fastfsl.fit.compare.cell import Cell, CellSpec
from fastfsl.fit.compare.pool import Pool
from fastfsl.fit.compare.tunings import Tunings
from fastfsl.fit.estimator import Estimator
from fastfsl.fit.methods import make_estimator
from fastfsl.fit.run import installed_versions, now
from fastfsl.fit.text_readout import TextReadout
from fastfsl.fit.train import Reporter, SilentReporter

# Features classified at a time, when scoring and when timing.
BATCH_SIZE = 256
_TIMED_CALLS = 5


def run_cell(spec: CellSpec, pool: Pool, *, tunings: Tunings | None = None, reporter: Reporter | None = None) -> Cell:
    """Train the method's source on the episode, if it has one, fit its estimator, then score it.

    Args:
        spec: the cell.
        pool: the data.
        tunings: trains sources; None where no method has one.
        reporter: hears of progress and warnings.

    Raises:
        FastFSLError: the method cannot be fitted on this episode.
    """
    estimator = make_estimator(
        spec.method, spec.params, logit_scale=pool.logit_scale, seed=spec.seed, device=spec.device
    )
    reporter = reporter or SilentReporter()
    source = None if tunings is None else tunings.source(spec, reporter)
    if tunings is not None and source is not None:
        pool = tunings.tuned_pool(spec, source, estimator, reporter)
    support = pool.support(spec.shots, spec.seed)
    estimator.fit(
        support.features,
        support.labels,
        pool.class_embeddings,
        plain_features=support.plain,
        on_stage=reporter.stage,
    )
    test = pool.test
    if tunings is not None and source is not None and source.conditional and isinstance(estimator, TextReadout):
        probabilities = tunings.conditional_probabilities(source, test.features)
    else:
        batches = range(0, len(test.features), BATCH_SIZE)
        probabilities = np.concatenate(
            [estimator.predict_proba(test.features[start : start + BATCH_SIZE]) for start in batches]
        )
    if not np.isfinite(probabilities).all():
        raise DataError("expected finite probabilities, got NaN: the training diverged; try a lower learning rate")
    predicted = probabilities.argmax(axis=1)
    evaluation = score(predicted, test.labels, pool.class_names)
    selection = estimator.selection_record()
    if source is not None:
        chosen = {name: value for name, value in source.selection_record().items() if name != "history"}
        selection = {**selection, "source": chosen}
    return Cell(
        spec=spec,
        accuracy=evaluation.accuracy,
        macro_accuracy=evaluation.macro_accuracy,
        class_accuracy=evaluation.class_accuracy,
        calibration_error=calibration_error(probabilities, test.labels),
        negative_log_likelihood=negative_log_likelihood(probabilities, test.labels),
        train_seconds=estimator.train_seconds_ + (0.0 if source is None else source.train_seconds_),
        num_parameters=estimator.num_parameters_ + (0 if source is None else source.num_parameters_),
        microseconds_per_feature=_microseconds(_on_cpu(estimator, spec, pool).predict_proba, test.features),
        batch_size=BATCH_SIZE,
        selection=selection,
        num_test=len(test.labels),
        right=base64.b64encode(np.packbits(predicted == test.labels).tobytes()).decode(),
        threads=torch.get_num_threads(),
        versions=installed_versions(),
        created=now(),
    )


def _on_cpu(estimator: Estimator, spec: CellSpec, pool: Pool) -> Estimator:
    """The fitted estimator where it is timed."""
    if spec.device == "cpu":
        return estimator
    copy = make_estimator(spec.method, spec.params, logit_scale=pool.logit_scale, seed=spec.seed, device="cpu")
    return copy.restore(estimator.state(), estimator.selection_record())


def _microseconds(classify: Callable[[NDArray[np.float32]], object], features: NDArray[np.float32]) -> float:
    batch = features[np.arange(BATCH_SIZE) % len(features)]
    times = []
    for _ in range(1 + _TIMED_CALLS):  # the first one warms up
        start = time.perf_counter()
        classify(batch)
        times.append(time.perf_counter() - start)
    return 1e6 * median(times[1:]) / BATCH_SIZE
