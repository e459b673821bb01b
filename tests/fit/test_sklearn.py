"""Every estimator inside scikit-learn: splits, searches, calibration, stacking, labels of any kind."""

import json
import pickle
from typing import Any

import numpy as np
import pytest
import sklearn
import torch
from sklearn.base import clone, is_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import StackingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.utils.validation import check_is_fitted

import fastfsl
from fastfsl import FlowMatchingAlignment
from fastfsl.arrays import LogitScaleWarning, logit_scale_of
from fastfsl.errors import ConfigError, DataError, ShapeError
from fastfsl.fit.methods import METHODS
from fastfsl.heads.classes import match_classes

BRIEF: dict[str, Any] = {"num_blocks": 1, "updates": 6, "batch_size": 32, "learning_rate": 3e-3, "num_folds": 2}
NAMES = np.array(["yak", "ant", "owl", "bee"])  # not in ascending order: rows of the problem's embeddings
SORTED = np.sort(NAMES)


@pytest.fixture(autouse=True)
def short_flow(monkeypatch):
    for name, value in BRIEF.items():
        monkeypatch.setitem(FlowMatchingAlignment.__init__.__kwdefaults__, name, value)


def _estimator(name):
    cheap: dict[str, dict[str, Any]] = {
        "Auto": {"components": ("gda", "fma")},
        "FlowMatchingAlignment": {**BRIEF, "num_steps": 2},
        "TipAdapterF": {"epochs": 2, "betas": (5.5,)},
        "LinearProbe": {"Cs": (10.0,)},
        "LPPlusPlus": {"iterations": (10, 20)},
        "ProKeR": {"betas": (1.0,), "ridges": (0.1, 0.3)},
        "TipAdapter": {"betas": (5.5,)},
    }
    return getattr(fastfsl, name)(**cheap.get(name, {}))


ALL = sorted(
    {method.path.split(":")[1] for method in METHODS.values()} | {"TextReadout"},
)
every = pytest.mark.parametrize("estimator", [_estimator(name) for name in ALL], ids=ALL)
few = pytest.mark.parametrize("estimator", [_estimator(name) for name in ("GDA", "TipAdapter", "ZeroShot")], ids=str)


class Texts:
    """Features sorted by class, text labels, and the embeddings of the names in ascending order."""

    def __init__(self, problem, shots):
        self.X = problem.features
        self.codes = problem.labels
        self.y = SORTED[problem.labels]
        means = problem.features.reshape(len(NAMES), shots, -1).mean(axis=1)
        self.E = means + 0.8 * problem.class_embeddings
        self.test_X = problem.test_features
        self.test_y = SORTED[problem.test_labels]


@pytest.fixture(scope="module")
def texts(make_problem):
    return Texts(make_problem(shots=6), 6)


def test_every_method_is_a_public_name():
    assert set(ALL) <= set(fastfsl.__all__)
    assert all(getattr(fastfsl, name).__doc__ for name in ALL)


@every
def test_it_is_a_classifier(estimator, texts):
    assert is_classifier(estimator)
    assert estimator.__sklearn_tags__().estimator_type == "classifier"
    with pytest.raises(NotFittedError):
        check_is_fitted(estimator)
    with pytest.raises(NotFittedError, match="call fit first"):
        estimator.predict(texts.X)
    fitted = clone(estimator).fit(texts.X, texts.y, texts.E)
    check_is_fitted(fitted)
    assert fitted.n_features_in_ == texts.X.shape[1]
    assert fitted.classes_.tolist() == SORTED.tolist()
    assert set(fitted.predict(texts.test_X)) <= set(NAMES.tolist())
    with pytest.raises(ConfigError, match="call fit first"):
        clone(fitted).predict(texts.X)


@every
def test_cross_validation_is_stratified(estimator, texts):
    params = {"class_embeddings": texts.E}
    found = cross_val_score(estimator, texts.X, texts.y, cv=3, params=params)
    expected = []
    for train, test in StratifiedKFold(3).split(texts.X, texts.y):
        fold = clone(estimator).fit(texts.X[train], texts.codes[train], texts.E)
        expected.append(np.mean(fold.predict(texts.X[test]) == texts.codes[test]))
    np.testing.assert_allclose(found, expected)
    assert found.min() > 0.5


@every
def test_searches_calibration_and_stacking(estimator, texts):
    given = clone(estimator).set_params(class_embeddings=texts.E)
    grid = {"logit_scale": [20.0, 50.0]} if "logit_scale" in estimator.get_params() else {"num_folds": [2, 3]}
    search = GridSearchCV(estimator, grid, cv=2, error_score="raise").fit(texts.X, texts.y, class_embeddings=texts.E)
    assert search.score(texts.test_X, texts.test_y) > 0.7
    calibrated = CalibratedClassifierCV(estimator, cv=2).fit(texts.X, texts.y, class_embeddings=texts.E)
    assert calibrated.score(texts.test_X, texts.test_y) > 0.7
    assert calibrated.classes_.tolist() == SORTED.tolist()
    # It would hand what its `fit` is given to its last estimator too: hence the embeddings of the constructor.
    stack = StackingClassifier([("one", given), ("other", LogisticRegression())], LogisticRegression(C=100.0), cv=2)
    assert stack.fit(texts.X, texts.y).score(texts.test_X, texts.test_y) > 0.7


@few
def test_routers_hand_the_embeddings_on(estimator, texts):
    with sklearn.config_context(enable_metadata_routing=True):
        params = {"class_embeddings": texts.E}
        found = cross_val_score(estimator, texts.X, texts.y, cv=3, params=params, error_score="raise")
        calibrated = CalibratedClassifierCV(estimator, cv=2).fit(texts.X, texts.y, class_embeddings=texts.E)
        search = GridSearchCV(estimator.set_fit_request(class_embeddings=True), {}, cv=2, error_score="raise")
        assert search.fit(texts.X, texts.y, class_embeddings=texts.E).score(texts.test_X, texts.test_y) > 0.7
    np.testing.assert_allclose(found, cross_val_score(estimator, texts.X, texts.y, cv=3, params=params))
    assert calibrated.score(texts.test_X, texts.test_y) > 0.7


@every
@pytest.mark.parametrize("binary", ["texts", "indices", "bools"])
def test_two_classes_have_one_decision(estimator, texts, binary):
    rows, test = texts.codes < 2, np.isin(texts.test_y, SORTED[:2])
    labels = {"texts": texts.y, "indices": texts.codes, "bools": texts.codes == 1}[binary][rows]
    fitted = clone(estimator).fit(texts.X[rows], labels, texts.E[:2])
    decision = fitted.decision_function(texts.test_X[test])
    assert decision.shape == (50,)
    assert ((decision > 0) == (fitted.predict(texts.test_X[test]) == fitted.classes_[1])).all()
    assert fitted.logits(texts.test_X[test]).shape == (50, 2)
    assert roc_auc_score(texts.test_y[test], decision) > 0.8
    if binary == "texts":
        calibrated = CalibratedClassifierCV(estimator, cv=2).fit(texts.X[rows], labels, class_embeddings=texts.E[:2])
        assert calibrated.score(texts.test_X[test], texts.test_y[test]) > 0.7


@few
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("texts", SORTED),
        ("objects", SORTED.astype(object)),
        ("from one on", np.arange(1, 5)),
        ("any integers", np.array([-7, 3, 40, 1000])),
        ("small unsigned", np.array([1, 2, 3, 250], np.uint8)),
        ("whole floats", np.array([1.0, 2.0, 5.0, 6.0])),
    ],
)
def test_labels_of_any_kind(estimator, texts, name, values):
    plain = clone(estimator).fit(texts.X, texts.codes, texts.E)
    fitted = clone(estimator).fit(texts.X, values[texts.codes], texts.E)
    np.testing.assert_array_equal(fitted.classes_, values)
    np.testing.assert_array_equal(fitted.predict(texts.test_X), values[plain.predict(texts.test_X)])
    np.testing.assert_array_equal(fitted.predict_proba(texts.test_X), plain.predict_proba(texts.test_X))
    assert fitted.score(texts.X, values[texts.codes]) == plain.score(texts.X, texts.codes)


@every
def test_names_put_the_rows_in_any_order(estimator, texts):
    order = np.array([2, 0, 3, 1])
    expected = clone(estimator).fit(texts.X, texts.y, texts.E).predict_proba(texts.test_X)
    for fitted in (
        clone(estimator).fit(texts.X, texts.y, texts.E[order], class_names=SORTED[order]),
        clone(estimator).fit(texts.X, texts.y, {SORTED[row]: texts.E[row] for row in order}),
        clone(estimator).set_params(class_embeddings=dict(zip(SORTED, texts.E, strict=True))).fit(texts.X, texts.y),
    ):
        np.testing.assert_array_equal(fitted.predict_proba(texts.test_X), expected)
        assert fitted.classes_.tolist() == SORTED.tolist()


@every
@pytest.mark.parametrize("missing", [0, 3])
def test_a_named_class_may_be_missing_from_the_support(estimator, texts, missing):
    rows = texts.codes != missing
    for fitted in (
        clone(estimator).fit(texts.X[rows], texts.y[rows], texts.E, class_names=SORTED),
        clone(estimator).fit(texts.X[rows], texts.y[rows], dict(zip(SORTED, texts.E, strict=True))),
        clone(estimator).fit(texts.X[rows], texts.codes[rows], texts.E, class_names=range(4)),
    ):
        assert len(fitted.classes_) == 4
        predicted = np.searchsorted(fitted.classes_, fitted.predict(texts.test_X))
        seen = texts.test_y != SORTED[missing]
        assert np.mean(SORTED[predicted[seen]] == texts.test_y[seen]) > 0.7
        assert np.mean(SORTED[predicted[~seen]] == texts.test_y[~seen]) > 0.3  # its text says where it is
    with pytest.raises(DataError, match=r"3 distinct ones.*pass class_names"):
        clone(estimator).fit(texts.X[rows], texts.y[rows], texts.E)


def test_folds_without_a_class_score_it_as_wrong_or_by_its_text(texts):
    few_rows = np.concatenate([np.arange(18), [18]])  # the last class has one sample
    params = {"class_embeddings": texts.E, "class_names": SORTED}
    with pytest.warns(UserWarning, match="least populated class"):
        found = cross_val_score(
            fastfsl.GDA(), texts.X[few_rows], texts.y[few_rows], cv=3, params=params, error_score="raise"
        )
    assert found.min() > 0.5
    with pytest.warns(UserWarning, match="least populated class"):
        found = cross_val_score(fastfsl.GDA(), texts.X[few_rows], texts.y[few_rows], cv=3, error_score="raise")
    assert np.isfinite(found).all()


@every
def test_without_embeddings_the_support_alone_decides(estimator, texts):
    fitted = clone(estimator).fit(texts.X, texts.y)
    assert fitted.score(texts.test_X, texts.test_y) > 0.8
    assert cross_val_score(estimator, texts.X, texts.y, cv=2, error_score="raise").min() > 0.7


@pytest.mark.parametrize(
    ("labels", "rows", "names", "words"),
    [
        (["a", "b", "c"], 4, None, "4 rows: pass class_names"),
        ([0, 1, 7], 4, None, r"labels in 0\.\.3.*0\.\.7, for 4 rows"),
        ([0.5, 1.0, 2.0], 3, None, "Unknown label type: continuous"),
        ([0.0, np.nan, 2.0], 3, None, "contains NaN"),
        (["a", None, "c"], 3, None, "one kind, none of them missing, got NoneType, str"),
        (["a", "b", "c"], 3, ["a", "b"], "one class name per row"),
        (["a", "b", "c"], 3, ["a", "b", "b"], "distinct, got b more than once"),
        (["a", "b", "d"], 3, ["a", "b", "c"], "named classes, got 'd'"),
        ([0, 1, 2], 3, ["c", "a", "b"], "pass labels as names"),
    ],
)
def test_labels_that_cannot_be_matched(labels, rows, names, words):
    with pytest.raises(DataError, match=words):
        match_classes(np.array(labels), 3, np.eye(rows), names)


def test_labels_counted_from_one_without_the_last_class_are_warned_of(texts):
    rows = texts.codes < 3
    with pytest.warns(UserWarning, match=r"class_names=range\(1, 5\)"):
        FlowMatchingAlignment().fit(texts.X[rows], texts.codes[rows] + 1, texts.E)
    fitted = FlowMatchingAlignment().fit(texts.X[rows], texts.codes[rows] + 1, texts.E, class_names=range(1, 5))
    assert fitted.score(texts.test_X, np.searchsorted(SORTED, texts.test_y) + 1) > 0.7


def test_a_meta_estimator_that_counts_labels_finds_the_rows_of_a_mapping(texts):
    by_number = {number + 1: row for number, row in enumerate(texts.E)}
    for mapping in (dict(zip(SORTED, texts.E, strict=True)), by_number):
        fitted = fastfsl.GDA(class_embeddings=mapping).fit(texts.X, texts.codes)
        assert fitted.classes_.tolist() == [0, 1, 2, 3]
        expected = fastfsl.GDA().fit(texts.X, texts.codes, texts.E).decision_function(texts.test_X)
        np.testing.assert_array_equal(fitted.decision_function(texts.test_X), expected)


@few
def test_samples_have_weights_in_a_score(estimator, texts):
    fitted = clone(estimator).fit(texts.X, texts.y, texts.E)
    labels = texts.test_y.copy()
    labels[:25] = SORTED[3]
    right = fitted.predict(texts.test_X) == labels
    weights = np.random.default_rng(0).random(100)
    assert fitted.score(texts.test_X, labels, sample_weight=weights) == pytest.approx(
        np.average(right, weights=weights)
    )
    assert fitted.score(texts.test_X, labels, torch.from_numpy(weights)) == pytest.approx(
        np.average(right, weights=weights)
    )
    assert fitted.score(texts.test_X, np.where(right, labels, "gnu")) == right.mean()  # an unknown class is wrong
    for bad, error in ((weights[:5], ShapeError), (0 * weights, DataError), (np.nan * weights, DataError)):
        with pytest.raises(error, match="sample_weight"):
            fitted.score(texts.test_X, labels, bad)
    with pytest.raises(DataError, match="expected labels in 'ant'"):
        fitted.score(texts.test_X, np.zeros(100, int))


@every
def test_classes_outlive_state_and_pickle(estimator, texts, tmp_path):
    for labels in (texts.y, texts.codes + 1, texts.codes):
        fitted = clone(estimator).fit(texts.X, labels, texts.E)
        state, record = fitted.state(), json.loads(json.dumps(fitted.selection_record()))
        assert {array.dtype.kind for array in state.values()} <= set("fiu")  # what safetensors holds
        for same in (clone(estimator).restore(state, record), pickle.loads(pickle.dumps(fitted))):
            np.testing.assert_array_equal(same.predict(texts.test_X), fitted.predict(texts.test_X))
            assert same.n_features_in_ == fitted.n_features_in_
    assert not {"classes", "class_names"} & state.keys()  # indices: as in runs before


@every
def test_arguments_have_both_names(estimator, texts):
    fitted = clone(estimator).fit(features=texts.X, labels=texts.y, class_embeddings=texts.E)
    assert fitted.score(features=texts.test_X, labels=texts.test_y) == fitted.score(X=texts.test_X, y=texts.test_y)
    assert (fitted.predict(features=texts.test_X) == fitted.predict(X=texts.test_X)).all()
    with pytest.raises(TypeError, match="got both"):
        fitted.predict(X=texts.test_X, features=texts.test_X)


@every
def test_a_stored_logarithm_is_warned_of(estimator, texts):
    if "logit_scale" not in estimator.get_params():
        return
    with pytest.warns(LogitScaleWarning, match=r"4\.605, .*did you mean exp of it, 99\.98"):
        clone(estimator).set_params(logit_scale=4.605).fit(texts.X, texts.y, texts.E)
    clone(estimator).set_params(logit_scale=15.6).fit(texts.X, texts.y, texts.E)


def _grad(array):
    return torch.tensor(array, requires_grad=True)


KINDS = {
    "bfloat16": lambda array: torch.tensor(array).bfloat16(),
    "float16": lambda array: torch.tensor(array).half(),
    "gradient": _grad,
    "not a leaf": lambda array: _grad(array) * 1,
    "bfloat16 with a gradient": lambda array: _grad(array).bfloat16(),
    "list of tensors": lambda array: list(_grad(array)),
    "nested lists": lambda array: array.tolist(),
    "longdouble": lambda array: array.astype(np.longdouble),
    "numpy float16": lambda array: array.astype(np.float16),
}


@every
def test_tensors_are_taken_by_every_estimator(estimator, texts):
    _check_kind(estimator, texts, "bfloat16 with a gradient")


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_any_kind(texts, kind):
    _check_kind(fastfsl.GDA(), texts, kind)


def _check_kind(estimator, texts, kind):
    def convert(array):
        return KINDS[kind](array.astype(np.float32))

    labels = torch.from_numpy(texts.codes).to(torch.uint8)
    fitted = clone(estimator).fit(convert(texts.X), labels, convert(texts.E), plain_features=convert(texts.X))
    by_constructor = clone(clone(estimator).set_params(class_embeddings=convert(texts.E)))
    by_constructor.fit(convert(texts.X), labels, plain_features=convert(texts.X))
    expected = clone(estimator).fit(
        np.asarray(_plain(convert(texts.X))),
        texts.codes,
        _plain(convert(texts.E)),
        plain_features=_plain(convert(texts.X)),
    )
    for found in (fitted, by_constructor):
        np.testing.assert_allclose(
            found.logits(convert(texts.test_X)), expected.logits(_plain(convert(texts.test_X))), rtol=1e-6, atol=1e-5
        )
        assert found.predict_proba(convert(texts.test_X)).shape == (100, 4)
        codes = torch.from_numpy(np.searchsorted(SORTED, texts.test_y))
        assert found.score(convert(texts.test_X), codes) > 0.8


def _plain(values):
    if isinstance(values, list):
        values = torch.stack(values) if isinstance(values[0], torch.Tensor) else np.array(values)
    return values.detach().double().numpy() if isinstance(values, torch.Tensor) else values


def test_a_flow_moves_tensors_too(texts):
    flow = FlowMatchingAlignment().fit(texts.X, texts.y, texts.E)
    expected = flow.transport(texts.test_X)
    np.testing.assert_allclose(flow.transport(_grad(texts.test_X)), expected, atol=1e-6)
    np.testing.assert_allclose(flow.transport(torch.tensor(texts.test_X).bfloat16()), expected, atol=0.05)
    np.testing.assert_allclose(flow.targets_of(_grad(texts.E)), flow.targets_of(texts.E), atol=1e-6)


class _Frame:
    """What is used of a data frame."""

    def __init__(self, rows, index):
        self.rows, self.index, self.iloc = np.asarray(rows), list(index), None

    def __array__(self, dtype=None, copy=None):
        return np.array(self.rows, dtype=dtype)


def test_the_texts_in_the_index_of_a_frame_say_whose_rows_they_are():
    rows = np.arange(8.0).reshape(4, 2) + 1
    labels = NAMES[[0, 1, 2, 3, 1]]
    found = match_classes(labels, 5, _Frame(rows, NAMES), None)
    np.testing.assert_array_equal(found.class_embeddings, rows[np.argsort(NAMES)])
    assert found.names.tolist() == SORTED.tolist()
    partial = match_classes(labels[1:], 4, _Frame(rows, NAMES), None)  # as in a fold
    np.testing.assert_array_equal(partial.class_embeddings, rows[np.argsort(NAMES)])
    plain = match_classes([0, 1, 2, 3, 1], 5, _Frame(rows, range(4)), None)
    np.testing.assert_array_equal(plain.class_embeddings, rows)
    ascending = match_classes([0, 1, 2, 3, 1], 5, _Frame(rows, SORTED), None)
    np.testing.assert_array_equal(ascending.class_embeddings, rows)
    with pytest.raises(DataError, match="got no row for 'cow'"):
        match_classes(np.array(["cow", *labels[1:]]), 5, _Frame(rows, NAMES), None)
    with pytest.raises(DataError, match=r"to_numpy\(\) if labels are numbers of its rows"):
        match_classes([0, 1, 2, 3, 1], 5, _Frame(rows, NAMES), None)


@pytest.mark.parametrize("name", ["GDA", "FlowMatchingAlignment"])
def test_a_models_own_logit_scale_is_taken_with_its_gradient(name):
    rng = np.random.default_rng(0)
    features, labels, texts = rng.normal(size=(8, 5)), np.repeat([0, 1], 4), rng.normal(size=(2, 5))
    stored = torch.nn.Parameter(torch.tensor(np.log(50.0)))
    for scale in (stored.exp(), stored.exp().bfloat16(), np.array([50.0]), np.float32(50.0)):
        assert logit_scale_of(scale) == pytest.approx(50.0, rel=1e-6)
        estimator = clone(_estimator(name).set_params(logit_scale=scale)).fit(features, labels, texts)
        expected = _estimator(name).set_params(logit_scale=logit_scale_of(scale)).fit(features, labels, texts)
        np.testing.assert_allclose(estimator.predict_proba(features), expected.predict_proba(features), rtol=1e-9)
    for wrong in ("100", [50.0, 60.0], True, float("nan"), object()):
        with pytest.raises(ConfigError, match="logit_scale"):
            _estimator(name).set_params(logit_scale=wrong).fit(features, labels, texts)
