"""The run folder: what a training leaves behind, written whole or not at all.

run.json            the resolved configuration, data, encoder, selection with its curve, times, versions
episode.json        which images or features were the support
model.safetensors   the fitted arrays
source.safetensors  what was tuned of the encoder, where the method has a source
texts.safetensors   the class embeddings before any training, which zero-shot is judged by
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from scipy.special import softmax

from fastfsl.data import Episode, class_prompts
from fastfsl.encoders import Encoder
from fastfsl.errors import (
    BundleError,
    ConfigError,
    DeviceError,
    FastFSLError,
    ResourceError,
    ShapeError,
    resource_error,
)
from fastfsl.files import staged_directory
from fastfsl.fit.config import TrainConfig, typed_params
from fastfsl.fit.deployment import Deployment, deployment
from fastfsl.fit.estimator import Estimator
from fastfsl.fit.fma import FlowMatchingAlignment
from fastfsl.fit.methods import Method, find_method, find_source, make_estimator, make_source, own_params
from fastfsl.fit.mps import MPS
from fastfsl.fit.source import ClassTexts, Source
from fastfsl.fit.text_readout import TextReadout

RUN_FILE, EPISODE_FILE, MODEL_FILE = "run.json", "episode.json", "model.safetensors"
SOURCE_FILE, TEXTS_FILE = "source.safetensors", "texts.safetensors"


# Far beyond any encoder: a damaged record must not fill the memory.
_MAX_WIDTH = 2**20


class EncoderRecord(BaseModel):
    """Which encoder made the features; `digest` is over its weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: str
    pretrained: str | None
    digest: str
    preprocessing: dict[str, Any]


class SourceRecord(BaseModel):
    """How the encoder was tuned.

    Attributes:
        params: the source's parameters, all of them.
        selection: what was chosen on the support, and the losses by epoch.
        num_parameters: trained numbers.
        train_seconds: time of its training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    params: dict[str, Any]
    selection: dict[str, Any]
    num_parameters: int
    train_seconds: float


class RunRecord(BaseModel):
    """Contents of run.json.

    Attributes:
        config: the resolved configuration.
        data_kind: `folder`, `split-file`, `table` or `features`.
        data_path: where the data were read from.
        class_names: by label.
        embed_dim: width of the features, d.
        encoder: None for a run on features; of a tuned encoder what it was before.
        source: None where the encoder was not tuned.
        templates: prompts behind the class embeddings; empty for a run on features.
        logit_scale: factor on the cosine similarities.
        num_support: samples trained on.
        class_counts: of them, by label; empty for runs of versions that did not say.
        files: what became of every file of the data; None for a run on features.
        support_digests: SHA-256 of the support images; empty for a run on features.
        selection: what was chosen on the support and on what evidence, as the estimator's `selection_record` has it.
        params: the estimator's parameters, all of them.
        num_parameters: numbers that the fit determined.
        feature_seconds: time spent encoding images.
        train_seconds: time of the estimator's fit, and of the source's, selection included.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["fastfsl-run"] = "fastfsl-run"
    version: Literal[1] = 1
    config: TrainConfig
    data_kind: Literal["folder", "split-file", "table", "features"]
    data_path: str
    class_names: list[str]
    embed_dim: int = Field(ge=1, le=_MAX_WIDTH)
    encoder: EncoderRecord | None = None
    source: SourceRecord | None = None
    templates: list[str] = Field(default_factory=list)
    logit_scale: float
    num_support: int
    class_counts: list[int] = Field(default_factory=list)
    files: dict[str, Any] | None = None
    support_digests: list[str] = Field(default_factory=list)
    selection: dict[str, Any]
    params: dict[str, Any]
    num_parameters: int
    feature_seconds: float
    train_seconds: float
    versions: dict[str, str]
    created: str


@dataclass(frozen=True)
class SupportFeatures:
    """Features of the support as they are classified, (n, d), and their class indices, (n,).

    Attributes:
        zero_shot_accuracy: of the class texts alone on these samples, which they have not seen.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    zero_shot_accuracy: float | None = None


@dataclass(frozen=True)
class Run:
    """A fitted estimator with its record, its episode, and the source of its features where there is one.

    Of a run that was just trained `support` is what it was trained on; a run folder does not keep it. `texts` are the
    class embeddings of the encoder before any training, (C, d); a run folder of an older version has none.
    """

    record: RunRecord
    episode: Episode
    estimator: Estimator
    source: Source | None = None
    support: SupportFeatures | None = field(default=None, repr=False, compare=False)
    texts: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)

    def tuned(self, encoder: Encoder, alpha: float | None = None) -> Encoder:
        """The encoder whose features the estimator takes.

        Args:
            encoder: as it was before the training.
            alpha: another weight of the tuned branch in a blend than that of the training.

        Raises:
            DataError: what was trained does not fit it.
        """
        if self.source is None:
            return encoder
        return tuned_for(self.estimator, self.source, encoder, self._texts(self.source), alpha)

    def logits(self, features: NDArray[np.float32], encoder: Callable[[], Encoder]) -> NDArray[Any]:
        """Logits of the classes, (n, C).

        Args:
            features: of the tuned encoder, (n, d).
            encoder: called for the encoder as it was before the training, if the classes depend on the image.
        """
        if self.source is None or not self.is_conditional:
            return self.estimator.logits(features)
        return self.source.conditional_logits(encoder(), self._texts(self.source), features)

    def probabilities(self, features: NDArray[np.float32], encoder: Callable[[], Encoder]) -> NDArray[Any]:
        """Class probabilities, (n, C); see `logits`."""
        probabilities: NDArray[Any] = softmax(self.logits(features, encoder), axis=1)
        return probabilities

    def deployment(self) -> Deployment:
        """What there is to deploy on the tuned encoder's features.

        Raises:
            ConfigError: the classifier is another one for every image.
        """
        if self.is_conditional:
            name = self.record.config.method
            raise ConfigError(
                f"{name} cannot be exported: every image has prompts of its own, so the text tower would have to read "
                f"all classes anew for each image; train {name}+fma (or another estimator after it), which takes the "
                "class embeddings averaged over the support, or coop"
            )
        return deployment(self.estimator)

    def prompts(self) -> list[str]:
        """Every class in every template of the run, class by class; errors as for `fastfsl.data.class_prompts`."""
        return class_prompts(self.record.class_names, self.record.config.templates)

    @property
    def is_conditional(self) -> bool:
        """Whether every image has class embeddings of its own."""
        return self.source is not None and self.source.conditional and isinstance(self.estimator, TextReadout)

    def _texts(self, source: Source) -> ClassTexts:
        config = self.record.config
        return ClassTexts(tuple(self.record.class_names), config.templates, source.class_embeddings_)

    @property
    def num_steps(self) -> int | None:
        """Steps of the flow; None where no flow has a part in the logits."""
        if isinstance(self.estimator, FlowMatchingAlignment):  # by any solver, of which Euler's alone is deployed
            return self.estimator.num_steps_
        deployed = deployment(self.estimator)  # not `self.deployment()`, which may refuse
        return max(deployed.read_steps) if deployed.flow_weight else None

    @property
    def threshold(self) -> float | None:
        """Probability of the best class below which the answer is "none of these"; None: there always is one."""
        threshold: float | None = self.record.selection.get("threshold")
        return threshold

    @property
    def held_out_accuracy(self) -> float | None:
        """Accuracy on held-out support under what was chosen; None where nothing was held out."""
        selection = self.record.selection
        curve = selection.get("accuracy_by_step")
        accuracy: float | None = curve[selection["num_steps"]] if curve else selection.get("accuracy")
        return accuracy

    def save(self, folder: Path, *, force: bool = False) -> None:
        """Write the run folder.

        Raises:
            ConfigError: if `folder` exists and `force` is not set, or it cannot be written.
        """
        with staged_directory(folder, marker=RUN_FILE, force=force) as staging:
            # Of an array in another order safetensors would write the bytes as they lie.
            state = {name: np.asarray(array, order="C") for name, array in self.estimator.state().items()}
            (staging / MODEL_FILE).write_bytes(save(state))  # its save_file would make the file private
            if self.source is not None:
                (staging / SOURCE_FILE).write_bytes(save(self.source.state()))
            if self.texts is not None:
                (staging / TEXTS_FILE).write_bytes(save({"texts": np.ascontiguousarray(self.texts)}))
            self.episode.save(staging / EPISODE_FILE)
            (staging / RUN_FILE).write_text(self.record.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, *, device: str = "cpu") -> "Run":
        """Read a run folder.

        Raises:
            BundleError: if a file is missing, damaged, of another version or at odds with the others.
            DeviceError: if `device` cannot be used.
        """
        for name in (RUN_FILE, EPISODE_FILE, MODEL_FILE):
            if not (folder / name).is_file():
                raise BundleError(f"expected a run folder, but {folder / name} is missing: train it again")
        try:
            record = RunRecord.model_validate_json((folder / RUN_FILE).read_text(encoding="utf-8-sig"))
            estimator = _unfitted(record, device).restore(load_file(folder / MODEL_FILE), record.selection)
            _check_consistent(record, estimator)
            episode, source = Episode.load(folder / EPISODE_FILE), _source(record, folder)
            return cls(record, episode, estimator, source, texts=_texts(record, folder))
        except ValidationError as error:
            first = error.errors()[0]
            raise BundleError(
                f"{folder / RUN_FILE}: {'.'.join(map(str, first['loc']))}: {first['msg']}; train it again"
            ) from error
        except (DeviceError, ResourceError):
            raise
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, FastFSLError) as error:
            raise resource_error(error, f"read {folder}") or BundleError(
                f"{folder} is not a readable run ({error}): train it again"
            ) from error


def _texts(record: RunRecord, folder: Path) -> NDArray[np.float32] | None:
    """The class embeddings kept with a run; None for one of an older version."""
    if not (folder / TEXTS_FILE).is_file():
        return None
    texts = np.asarray(load_file(folder / TEXTS_FILE)["texts"], np.float32)
    if texts.shape != (len(record.class_names), record.embed_dim):
        raise BundleError(f"{RUN_FILE} and {TEXTS_FILE} disagree on the classes")
    return texts


def tuned_for(
    estimator: Estimator, source: Source, encoder: Encoder, texts: ClassTexts, alpha: float | None = None
) -> Encoder:
    """The tuned encoder; its features keep their length only where the class embeddings alone read them."""
    if isinstance(source, MPS):
        tuned = source.tuned(encoder, texts, alpha)
    else:
        tuned = source.tuned(encoder, texts)
    if tuned.normalized or isinstance(estimator, TextReadout):
        return tuned
    # Other features, so another name in the cache.
    digest = hashlib.sha256(f"{tuned.digest} normalized".encode()).hexdigest()
    return replace(tuned, normalized=True, digest=digest)


def _unfitted(record: RunRecord, device: str) -> Estimator:
    """The run's estimator as it was before its fit."""
    method = record.config.method
    own = _recorded(find_method(method), record.params)
    return make_estimator(method, own, logit_scale=record.logit_scale, seed=record.config.seed, device=device)


def _source(record: RunRecord, folder: Path) -> Source | None:
    """The run's source, trained."""
    method = find_source(record.config.method)
    if method is None or record.source is None:
        if method is not None or record.source is not None:
            raise BundleError(f"{RUN_FILE} and its method {record.config.method!r} disagree on a tuned encoder")
        return None
    own = _recorded(method, record.source.params)
    source = make_source(record.config.method, own, seed=record.config.seed)
    if source is not None:
        source.restore(load_file(folder / SOURCE_FILE), record.source.selection)
        source.train_seconds_ = record.source.train_seconds
    return source


def _recorded(method: Method, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that a run was trained with: the recorded ones, and what the others stood for in its time."""
    return typed_params(method, {**method.before, **own_params(params)})


def _check_consistent(record: RunRecord, estimator: Estimator) -> None:
    """Refuse a record that does not describe the arrays beside it."""
    try:
        num_classes = estimator.logits(np.ones((1, record.embed_dim))).shape[1]
    except ShapeError as error:
        raise BundleError(f"{RUN_FILE} and {MODEL_FILE} disagree on embed_dim: {error}") from error
    for what, expected, found in (
        ("class_names", num_classes, len(record.class_names)),
        ("logit_scale", record.params.get("logit_scale", record.logit_scale), record.logit_scale),
    ):
        if found != expected:
            raise BundleError(f"{RUN_FILE} and {MODEL_FILE} disagree on {what}: expected {expected}, got {found}")


def installed_versions() -> dict[str, str]:
    """Versions of the packages a result depends on, those that are installed."""
    versions = {}
    for name in ("fastfsl", "torch", "open_clip_torch", "numpy", "scikit-learn", "onnx", "onnxscript", "onnxruntime"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
