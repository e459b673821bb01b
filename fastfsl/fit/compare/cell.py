"""One cell of the comparison, a method on one episode: what decides it, what it found, and its JSON file."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastfsl.errors import DataError, resource_error
from fastfsl.files import staged_file
from fastfsl.fit.comparison_plan import shots_label

_FORMAT: Literal["fastfsl-compare-cell"] = "fastfsl-compare-cell"


class CellSpec(BaseModel):
    """Everything that decides a cell but the data.

    Attributes:
        method: a key of `METHODS`, of `SOURCES`, or one of each (`mps+fma`).
        params: all of the estimator's own parameters.
        source_params: all of the source's; {} without one.
        shots: samples a class; None: all there are.
        seed: of the episode and of the training.
        device: torch device of the training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    params: dict[str, Any]
    source_params: dict[str, Any] = Field(default_factory=dict)
    shots: int | None
    seed: int
    device: str

    def key(self, data_digest: str) -> str:
        """Name of the cell's file: a hash of this and of the data."""
        # Files from before there were sources keep their names.
        decided = self.model_dump(exclude=None if self.source_params else {"source_params"})
        text = json.dumps([_FORMAT, 1, data_digest, decided], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def __str__(self) -> str:
        """The cell as messages name it."""
        return f"{self.method}, {shots_label(self.shots)} {'shot' if self.shots == 1 else 'shots'}, seed {self.seed}"


class Cell(BaseModel):
    """What one cell found.

    Attributes:
        spec: what was fitted.
        accuracy: fraction of the test samples.
        macro_accuracy: mean over the classes that have test samples.
        class_accuracy: by class name.
        calibration_error: expected calibration error, 15 equal-width bins of the top probability.
        negative_log_likelihood: of the right class, mean, nats.
        train_seconds: wall-clock time of the estimator's `fit`, selection included, and of the source's, though methods
            share it; encoding between the two is not in it.
        num_parameters: numbers that the fit determined, the source's among them.
        microseconds_per_feature: median time of the estimator's `predict_proba` on the CPU, by feature of a batch.
            Encoding is not in it, neither of images nor, for `cocoop`, of the texts of every image.
        batch_size: features in that batch.
        selection: how settings, weights and steps were chosen on the support; under `source` what the source chose.
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
            cell = cls.model_validate_json(path.read_text(encoding="utf-8-sig"))
            bits = cell.right_bits()
        except (OSError, ValidationError, ValueError) as error:
            raise resource_error(error, f"read {path}") or DataError(
                f"{path} is damaged ({str(error).splitlines()[0]})"
            ) from error
        # As JSON: what was a tuple among the parameters comes back as a list.
        if cell.spec.model_dump_json() != spec.model_dump_json():
            raise DataError(f"{path} is of another cell ({cell.spec})")
        if abs(float(bits.mean()) - cell.accuracy) > 1e-9:
            raise DataError(f"{path} is damaged (its accuracy is not that of its samples)")
        return cell
