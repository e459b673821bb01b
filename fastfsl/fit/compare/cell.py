"""One cell of the comparison: a method fitted on one episode and scored on the test split; kept as a JSON file."""

import base64
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastfsl.data.scoring import calibration_error, negative_log_likelihood, score
from fastfsl.errors import DataError
from fastfsl.files import staged_file
from fastfsl.fit.compare.pool import Pool, shots_label
from fastfsl.fit.estimator import Estimator, StageCallback
from fastfsl.fit.methods import make_estimator
from fastfsl.fit.run import installed_versions, now

# Features classified at a time, when scoring and when timing.
BATCH_SIZE = 256
_TIMED_CALLS = 5

_FORMAT: Literal["fastfsl-compare-cell"] = "fastfsl-compare-cell"


class CellSpec(BaseModel):
    """Everything that decides a cell but the data.

    Attributes:
        method: a key of `METHODS`.
        params: all of the estimator's own parameters.
        shots: samples a class; None: all there are.
        seed: of the episode and of the training.
        device: torch device of the training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    params: dict[str, Any]
    shots: int | None
    seed: int
    device: str

    def key(self, data_digest: str) -> str:
        """Name of the cell's file: a hash of this and of the data."""
        text = json.dumps([_FORMAT, 1, data_digest, self.model_dump()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def __str__(self) -> str:
        """The cell as messages name it."""
        return f"{self.method}, {shots_label(self.shots)} shots, seed {self.seed}"


class Cell(BaseModel):
    """What one cell found.

    Attributes:
        spec: what was fitted.
        accuracy: fraction of the test samples.
        macro_accuracy: mean over the classes that have test samples.
        class_accuracy: by class name.
        calibration_error: expected calibration error, 15 equal-width bins of the top probability.
        negative_log_likelihood: of the right class, mean, nats.
        train_seconds: wall-clock time of the estimator's `fit`, selection included.
        num_parameters: numbers that the fit determined.
        microseconds_per_feature: median time of `predict_proba` on the CPU, by feature of a batch.
        batch_size: features in that batch.
        selection: how settings, weights and steps were chosen on the support.
        num_test: test samples.
        right: whether each of them was classified right, bits in their order, base64.
        threads: of torch, at training.
        versions: packages at work.
        created: when, UTC.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["fastfsl-compare-cell"] = _FORMAT
    version: Literal[1] = 1
    spec: CellSpec
    accuracy: float = Field(ge=0, le=1)
    macro_accuracy: float = Field(ge=0, le=1)
    class_accuracy: dict[str, float]
    calibration_error: float
    negative_log_likelihood: float
    train_seconds: float
    num_parameters: int
    microseconds_per_feature: float
    batch_size: int
    selection: dict[str, Any]
    num_test: int = Field(ge=1)
    right: str
    threads: int
    versions: dict[str, str]
    created: str

    def right_bits(self) -> NDArray[np.bool_]:
        """Whether each test sample was classified right, (num_test,)."""
        packed = np.frombuffer(base64.b64decode(self.right), dtype=np.uint8)
        return np.unpackbits(packed, count=self.num_test).astype(bool)

    def save(self, path: Path) -> None:
        """Write the cell, whole or not at all."""
        with staged_file(path) as staging:
            staging.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path, spec: CellSpec) -> "Cell":
        """Read a cell's file.

        Raises:
            DataError: it is damaged, or not the cell of `spec`.
        """
        try:
            cell = cls.model_validate_json(path.read_text(encoding="utf-8"))
            bits = cell.right_bits()
        except (OSError, ValidationError, ValueError) as error:
            raise DataError(f"{path} is damaged ({str(error).splitlines()[0]})") from error
        # As JSON: what was a tuple among the parameters comes back as a list.
        if cell.spec.model_dump_json() != spec.model_dump_json():
            raise DataError(f"{path} is of another cell ({cell.spec})")
        if abs(float(bits.mean()) - cell.accuracy) > 1e-9:
            raise DataError(f"{path} is damaged (its accuracy is not that of its samples)")
        return cell


def run_cell(spec: CellSpec, pool: Pool, *, on_stage: StageCallback | None = None) -> Cell:
    """Fit a method on its episode, then score it.

    Raises:
        FastFSLError: the method cannot be fitted on this episode.
    """
    estimator = make_estimator(
        spec.method, spec.params, logit_scale=pool.logit_scale, seed=spec.seed, device=spec.device
    )
    support = pool.support(spec.shots, spec.seed)
    estimator.fit(
        support.features,
        support.labels,
        pool.class_embeddings,
        plain_features=support.plain,
        on_stage=on_stage,
    )
    test = pool.test
    batches = range(0, len(test.features), BATCH_SIZE)
    probabilities = np.concatenate(
        [estimator.predict_proba(test.features[start : start + BATCH_SIZE]) for start in batches]
    )
    if not np.isfinite(probabilities).all():
        raise DataError("expected finite probabilities, got NaN: the training diverged; try a lower learning rate")
    predicted = probabilities.argmax(axis=1)
    evaluation = score(predicted, test.labels, pool.class_names)
    return Cell(
        spec=spec,
        accuracy=evaluation.accuracy,
        macro_accuracy=evaluation.macro_accuracy,
        class_accuracy=evaluation.class_accuracy,
        calibration_error=calibration_error(probabilities, test.labels),
        negative_log_likelihood=negative_log_likelihood(probabilities, test.labels),
        train_seconds=estimator.train_seconds_,
        num_parameters=estimator.num_parameters_,
        microseconds_per_feature=_microseconds(_on_cpu(estimator, spec, pool).predict_proba, test.features),
        batch_size=BATCH_SIZE,
        selection=estimator.selection_record(),
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
