"""The run folder: what it refuses to read, and who may read it."""

import json

import numpy as np
import pytest

from fastfsl.errors import BundleError, DeviceError
from fastfsl.fit.deployment import deployment
from fastfsl.fit.methods import METHODS
from fastfsl.fit.run import MODEL_FILE, RUN_FILE, Run


@pytest.fixture
def folder(train_quickly, write_features, tmp_path):
    train_quickly(write_features(tmp_path / "features.npz"), "fma").save(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_kept_as_it_was(train_quickly, write_features, make_problem, tmp_path, method):
    run = train_quickly(write_features(tmp_path / "features.npz"), method)
    run.save(tmp_path / "run")
    loaded = Run.load(tmp_path / "run")
    features = make_problem(shots=4).test_features
    # an array that lay in another order in memory is summed in another order
    expected = run.estimator.predict_proba(features)
    np.testing.assert_allclose(loaded.estimator.predict_proba(features), expected, atol=1e-12)
    assert loaded.record == run.record.model_validate_json(run.record.model_dump_json())
    assert loaded.estimator.get_params() == run.estimator.get_params()
    assert loaded.estimator.selection_record() == run.estimator.selection_record()
    assert (loaded.num_steps, loaded.held_out_accuracy) == (run.num_steps, run.held_out_accuracy)
    assert (loaded.num_steps is None) == (deployment(run.estimator).plan is None)


def test_a_flow_that_no_plan_has_is_kept_too(train_quickly, write_features, tmp_path):
    run = train_quickly(write_features(tmp_path / "features.npz"), "fma", solver="heun", num_steps=4)
    run.save(tmp_path / "run")
    assert Run.load(tmp_path / "run").num_steps == run.num_steps == 4


@pytest.mark.parametrize(("method", "other"), [("gda", "fma"), ("fma", "gda")])
def test_a_run_is_not_restored_as_another_method(train_quickly, write_features, tmp_path, method, other):
    data = write_features(tmp_path / "features.npz")
    for name in (method, other):
        train_quickly(data, name).save(tmp_path / name)
    (tmp_path / method / MODEL_FILE).write_bytes((tmp_path / other / MODEL_FILE).read_bytes())
    with pytest.raises(BundleError, match="train it again"):
        Run.load(tmp_path / method)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_names": ["a", "b", "c"]}, "class_names: expected 4, got 3"),
        ({"embed_dim": 7}, "embed_dim: expected features .*16.*7"),
        ({"logit_scale": 3.0}, "logit_scale"),
        ({"selection": {"num_steps": 3, "rule": "folds", "accuracy_by_step": [1.0]}}, "accuracy_by_step"),
        ({"version": 2}, "version"),
        ({"params": {"epoch": 3}}, "unknown option 'epoch'"),
        ({"embed_dim": 10**12}, "embed_dim"),
    ],
)
def test_an_edited_record_is_refused(folder, changes, words):
    record = json.loads((folder / RUN_FILE).read_text())
    (folder / RUN_FILE).write_text(json.dumps(record | changes))
    with pytest.raises(BundleError, match=words):
        Run.load(folder)


def test_a_device_that_is_missing_is_no_fault_of_the_run(folder):
    with pytest.raises(DeviceError, match="banana"):
        Run.load(folder, device="banana")


def test_the_weights_are_as_readable_as_the_record(folder):
    assert (folder / MODEL_FILE).stat().st_mode == (folder / RUN_FILE).stat().st_mode
