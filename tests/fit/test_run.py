"""The run folder: what it refuses to read, and who may read it."""

import json

import pytest

from fastfsl.errors import BundleError, DeviceError
from fastfsl.fit.config import load_config
from fastfsl.fit.run import MODEL_FILE, RUN_FILE, Run
from fastfsl.fit.train import train


@pytest.fixture
def folder(make_problem, tmp_path):
    import numpy as np

    problem = make_problem(shots=3)
    np.savez(
        tmp_path / "features.npz",
        train_features=problem.features,
        train_labels=problem.labels,
        class_embeddings=problem.class_embeddings,
    )
    config = load_config(flags={"num_blocks": 1, "epochs": 1, "num_folds": 2, "device": "cpu"})
    train(tmp_path / "features.npz", config).save(tmp_path / "run")
    return tmp_path / "run"


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
