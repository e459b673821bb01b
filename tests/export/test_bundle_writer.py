"""From an estimator through its deployment to a bundle: the classifier answers as the estimator does."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from fastfsl import bundle
from fastfsl.errors import BundleError
from fastfsl.export.bundle_writer import export_run
from fastfsl.export.parity import logit_parity
from fastfsl.export.readout import deployed_readout, has_flow
from fastfsl.fit.config import load_config
from fastfsl.fit.deployment import Deployment, deployment
from fastfsl.fit.methods import METHODS
from fastfsl.fit.run import Run
from fastfsl.fit.train import train
from fastfsl.flow import VelocityField, build_plan, euler, normalize
from fastfsl.heads import GDA, KernelForm, LinearForm
from fastfsl.runtime import Classifier

CLASSES, DIM, SCALE = 4, 16, 40.0
# Parameters of the flow: trained briefly, but for steps that move the features.
BRIEF = {"num_blocks": 1, "epochs": 5, "batch_size": 8, "learning_rate": 1e-2, "num_steps": 3}


def _unit(rows: np.ndarray) -> Any:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def feature_file(tmp_path_factory):
    rng = np.random.default_rng(0)
    means, labels = _unit(rng.normal(size=(CLASSES, DIM))), np.repeat(np.arange(CLASSES), 4)
    path = tmp_path_factory.mktemp("data") / "features.npz"
    np.savez(
        path,
        train_features=_unit(means[labels] + 0.1 * rng.normal(size=(len(labels), DIM))).astype(np.float32),
        train_labels=labels,
        class_embeddings=_unit(means + 0.4 * rng.normal(size=means.shape)).astype(np.float32),
        logit_scale=np.float32(SCALE),
    )
    return path


@pytest.fixture(scope="module")
def fit(feature_file):
    def run(method: str, **flags: Any) -> Run:
        known = METHODS[method].parameters()
        params = {name: value for name, value in BRIEF.items() if name in known}
        return train(feature_file, load_config(flags={"method": method, "device": "cpu", **params, **flags}))

    return run


def _features(rows: int = 300) -> Any:
    return _unit(np.random.default_rng(3).normal(size=(rows, DIM))).astype(np.float32)


def _classifier(path) -> Classifier:
    return Classifier.load(path, device="cpu", num_threads=1)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_exports_and_its_bundle_predicts_the_same(fit, tmp_path, method):
    run = fit(method)
    manifest = export_run(run, tmp_path / "bundle")
    features = _features()
    classifier = _classifier(tmp_path / "bundle")
    expected = run.estimator.predict_proba(features)
    np.testing.assert_allclose(classifier.feature_probabilities(features), expected, atol=2e-5)
    labels = [classifier.class_names.index(p.label) for p in classifier.classify_features(features)]
    np.testing.assert_array_equal(labels, run.estimator.predict(features))
    assert manifest.parity["logits"]["max_probability_error"] <= 1e-4
    assert manifest.parity["logits"]["batches"][:3] == [1, 2, 5]
    assert manifest.method == method
    flow = has_flow(deployment(run.estimator))
    assert ("flow/model.onnx" in manifest.files) == flow
    if not flow:
        assert sorted(manifest.files) == ["heads/readout.safetensors"]
        assert (manifest.num_steps, manifest.step_size) == (0, None)


def test_a_flow_with_early_exits_exports_with_all_its_steps(fit, tmp_path):
    run = fit("fma", exit_margin=0.2)
    export_run(run, tmp_path / "bundle")
    found = _classifier(tmp_path / "bundle").feature_probabilities(_features())
    assert np.abs(found - run.estimator.predict_proba(_features())).max() > 1e-3  # some did leave early
    expected = fit("fma").estimator.predict_proba(_features())
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("flags", [{}, {"read_steps": [0, 3], "num_steps": None}])
def test_a_flow_of_several_prototypes_exports(fit, tmp_path, flags):
    run = fit("fma", num_prototypes=2, **flags)
    manifest = export_run(run, tmp_path / "bundle")
    classes = deployment(run.estimator).class_embeddings
    assert classes is not None
    assert classes.shape == (CLASSES, 2, DIM)
    assert len(manifest.class_names) == CLASSES
    expected = run.estimator.predict_proba(_features())
    np.testing.assert_allclose(_classifier(tmp_path / "bundle").feature_probabilities(_features()), expected, atol=2e-5)
    assert np.abs(expected - fit("fma", **flags).estimator.predict_proba(_features())).max() > 1e-3


# ------------------------------------------------------------------------------------------- deployments of any parts


def _forms(rng: np.random.Generator) -> tuple[LinearForm, KernelForm, KernelForm]:
    def linear() -> LinearForm:
        return LinearForm(2 * rng.normal(size=(CLASSES, DIM)), rng.normal(size=CLASSES))

    def kernel(keys: int, beta: float) -> KernelForm:
        return KernelForm(linear(), _unit(rng.normal(size=(keys, DIM))), 3 * rng.normal(size=(keys, CLASSES)), beta)

    return linear(), kernel(9, 5.5), kernel(6, 1.0)


@dataclass
class _Parts:
    """An estimator of any parts, written out: Euler steps of the field itself, the sum of the forms."""

    forms: tuple[LinearForm | KernelForm, ...] = ()
    read_steps: tuple[int, ...] = ()
    flow_weight: float = 0.0
    temperature: float = 1.0
    threshold: float | None = None
    num_prototypes: int = 1
    velocity_field: VelocityField = field(init=False)
    embeddings: Any = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.velocity_field = VelocityField(DIM, 2)
        with torch.no_grad():
            for parameter in self.velocity_field.parameters():  # zero-initialised layers would make v = 0
                parameter.add_(0.1 * torch.randn_like(parameter))
        self.embeddings = normalize(torch.randn(self.num_prototypes * CLASSES, DIM))

    def deployment(self) -> Deployment:
        return Deployment(
            forms=self.forms,
            plan=build_plan(self.velocity_field, self.read_steps[-1], 0.1) if self.read_steps else None,
            class_embeddings=self._classes().numpy() if self.read_steps else None,
            logit_scale=SCALE,
            read_steps=self.read_steps,
            flow_weight=self.flow_weight,
            temperature=self.temperature,
            threshold=self.threshold,
        )

    def _classes(self) -> Any:
        apart = self.embeddings.reshape(CLASSES, self.num_prototypes, DIM)
        return self.embeddings if self.num_prototypes == 1 else apart

    def decision_function(self, features: Any) -> Any:
        logits = np.zeros((len(features), CLASSES))
        if self.read_steps:
            with torch.no_grad():
                x_0 = torch.from_numpy(features)
                states = [normalize(euler(self.velocity_field, x_0, step, 0.1)) for step in self.read_steps]
                cosines = [state @ self.embeddings.T for state in states]
                each = [SCALE * rows.reshape(-1, CLASSES, self.num_prototypes).amax(dim=2) for rows in cosines]
                mean = torch.stack([logit.softmax(dim=1) for logit in each]).mean(dim=0).log()
            logits += self.flow_weight * (each[0] if len(each) == 1 else mean).numpy()
        for form in self.forms:
            logits += form.apply(np.asarray(features, np.float64))
        return logits / self.temperature


@pytest.fixture
def export(fit, tmp_path, monkeypatch):
    """Exports an estimator of any parts; gives the manifest and the classifier."""
    run = fit("nearest-mean")
    monkeypatch.setattr("fastfsl.fit.run.deployment", lambda estimator: estimator.deployment())

    def write(parts: Any) -> tuple[bundle.Manifest, Classifier]:
        manifest = export_run(replace(run, estimator=parts), tmp_path / "bundle")
        return manifest, _classifier(tmp_path / "bundle")

    return write


LINEAR, KERNEL, OTHER = _forms(np.random.default_rng(1))


@pytest.mark.parametrize(
    ("parts", "files"),
    [
        ({"forms": (LINEAR,)}, "heads"),
        ({"forms": (KERNEL,)}, "heads"),
        ({"read_steps": (3,), "flow_weight": 1.0}, "flow"),
        ({"read_steps": (0, 2, 4), "flow_weight": 1.0}, "flow"),
        ({"read_steps": (3,), "flow_weight": 0.4, "forms": (LINEAR, KERNEL, OTHER)}, "flow heads"),
        ({"read_steps": (0, 3), "flow_weight": 2.0, "forms": (LINEAR, LINEAR), "temperature": 3.0}, "flow heads"),
        ({"read_steps": (2,), "flow_weight": 1.0, "temperature": 0.5}, "flow heads"),
        ({"read_steps": (2,), "flow_weight": 1.0, "threshold": 0.6}, "flow heads"),
        ({"read_steps": (0,), "flow_weight": 1.0}, "flow"),
        ({"read_steps": (0, 3), "flow_weight": 1.0, "num_prototypes": 3, "temperature": 2.0}, "flow heads"),
        ({"read_steps": (3,), "flow_weight": 0.0, "forms": (KERNEL, OTHER), "threshold": 0.6}, "heads"),
    ],
    ids=[
        "linear",
        "kernel",
        "flow",
        "averaged flow",
        "flow, linear, two kernels",
        "averaged flow, two linear, temperature",
        "flow, temperature",
        "flow, threshold",
        "flow of no step",
        "averaged flow of three prototypes, temperature",
        "flow without weight, two kernels, threshold",
    ],
)
def test_any_parts_go_into_a_bundle(export, tmp_path, parts, files):
    estimator = _Parts(**parts)
    manifest, classifier = export(estimator)
    features = _features()
    expected = torch.from_numpy(estimator.decision_function(features)).softmax(dim=1).numpy()
    probabilities = classifier.feature_probabilities(features)
    np.testing.assert_allclose(probabilities, expected, atol=2e-5)
    assert {name.split("/")[0] for name in manifest.files} == set(files.split())
    assert manifest == bundle.check_bundle(tmp_path / "bundle")
    if "flow" in files:
        steps = parts["read_steps"]
        assert (manifest.num_steps, manifest.step_size, manifest.logit_scale) == (steps[-1], 0.1, SCALE)
        assert manifest.read_steps == (steps if len(steps) > 1 else ())
        assert manifest.parity["flow"]["max_probability_error"] < 1e-4
    known = [prediction.known for prediction in classifier.classify_features(features)]
    if estimator.threshold is None:
        assert set(known) == {None}
    else:
        assert known == list(probabilities.max(axis=1) >= estimator.threshold)
        assert {True, False} == set(known)


def test_linear_parts_become_one_and_empty_kernels_are_dropped():
    silent = KernelForm(LINEAR, KERNEL.keys, np.zeros_like(KERNEL.values), 2.0)
    readout = deployed_readout(Deployment(forms=(LINEAR, silent, KERNEL)))
    assert readout is not None
    assert [kernel.beta for kernel in readout.kernels] == [5.5]
    np.testing.assert_allclose(readout.linear_weight, 2 * LINEAR.weight + KERNEL.linear.weight, rtol=1e-6)
    np.testing.assert_allclose(readout.linear_bias, 2 * LINEAR.bias + KERNEL.linear.bias, rtol=1e-6)


def test_a_deployment_of_nothing_is_refused(export):
    with pytest.raises(BundleError, match="with neither"):
        export(_Parts())
    with pytest.raises(BundleError, match="with neither"):
        export(_Parts(read_steps=(2,), flow_weight=0.0))


def test_a_deployment_that_computes_something_else_is_not_written(export, tmp_path):
    @dataclass
    class Other(_Parts):
        def decision_function(self, features: Any) -> Any:
            return 1.01 * super().decision_function(features)

    with pytest.raises(BundleError, match="not the estimator's"):
        export(Other(forms=(LINEAR, KERNEL)))
    assert list(tmp_path.iterdir()) == []


def test_two_classes_are_compared_by_their_one_decision():
    rng = np.random.default_rng(0)
    estimator = GDA().fit(_unit(rng.normal(size=(8, DIM))), np.arange(8) % 2, _unit(rng.normal(size=(2, DIM))))
    assert estimator.decision_function(_features()).ndim == 1
    deployed = deployment(estimator)
    report = logit_parity(estimator, deployed, None, deployed_readout(deployed))
    assert report["max_probability_error"] < 1e-5


def test_values_that_cancel_survive_the_export(export):
    """As ProKeR's do: large, of both signs, between keys that are close to each other."""
    rng = np.random.default_rng(2)
    values = 300 * rng.normal(size=(400, CLASSES))
    keys = _unit(rng.normal(size=(400, DIM)))
    nearby = _unit(keys + 1e-3 * rng.normal(size=keys.shape))
    kernel = KernelForm(LINEAR, np.concatenate([keys, nearby]), np.concatenate([values, -values]), 1.0)
    estimator = _Parts(forms=(kernel,))
    _, classifier = export(estimator)
    expected = torch.from_numpy(estimator.decision_function(_features())).softmax(dim=1).numpy()
    np.testing.assert_allclose(classifier.feature_probabilities(_features()), expected, atol=1e-4)


def test_equal_runs_give_equal_parts(export, tmp_path):
    first, _ = export(_Parts(read_steps=(3,), flow_weight=0.4, forms=(LINEAR, KERNEL)))
    (tmp_path / "bundle").rename(tmp_path / "first")
    second, _ = export(_Parts(read_steps=(3,), flow_weight=0.4, forms=(LINEAR, KERNEL)))
    assert first.files == second.files


def test_the_model_card_says_what_it_is_made_of(export, tmp_path):
    export(_Parts(read_steps=(0, 2, 4), flow_weight=0.4, forms=(LINEAR, KERNEL), temperature=1.25, threshold=0.625))
    card = (tmp_path / "bundle" / "README.md").read_text()
    for words in (
        "a flow of 4 Euler steps of 0.1, read at steps 0, 2, 4, a linear head, a kernel of 9 keys (beta 5.5)",
        "temperature 1.25",
        'below 0.625 the classifier answers "none of these"',
    ):
        assert words in card
    assert "whatever it is shown" not in card
    (tmp_path / "bundle").rename(tmp_path / "other")
    export(_Parts(forms=(LINEAR,)))
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "Parts: a linear head\n" in card
    assert "one of its classes whatever it is shown" in card
    assert "Euler" not in card
