"""Methods that tune the encoder in the comparison: what is trained and when, what is shared, what is kept."""

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastfsl.errors import ConfigError
from fastfsl.fit.checkpoint import Checkpoint
from fastfsl.fit.compare import Cell, CellSpec, compare
from fastfsl.fit.config import load_config
from fastfsl.fit.evaluate import evaluate_run
from fastfsl.fit.objective import take_gradient
from fastfsl.fit.source import Source
from fastfsl.fit.train import SilentReporter, train
from fastfsl.heads import GDA

CLASSES = ("dark", "grey", "light")
METHODS = ("gda", "mps", "mps+gda", "coop", "cocoop")
BRIEF = {"epochs": 2, "batch_size": 3, "precision": "fp32"}
PARAMS: dict[str, dict[str, Any]] = {
    "mps": BRIEF,
    "mps+gda": {"mps": BRIEF},
    "coop": {**BRIEF, "epochs": 1},
    "cocoop": {**BRIEF, "epochs": 1},
}
DATA = {"backbone": "tiny-clip", "num_views": 2, "device": "cpu"}


class Listener(SilentReporter):
    def __init__(self):
        self.warnings = []

    def warn(self, message):
        self.warnings.append(message)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Writes three classes of noise, 3 a class in train/, 4 in test/; these under the name `misfiled` classes on."""

    def write(misfiled=0):
        rng = np.random.default_rng(0)
        root = tmp_path_factory.mktemp("pictures")
        for split, each in (("train", 3), ("test", 4)):
            for label in range(3):
                name = CLASSES[(label + (misfiled if split == "test" else 0)) % 3]
                for index in range(each):
                    path = root / split / name / f"{label}-{index}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(rng.integers(40 * label, 40 * label + 120, (8, 8, 3), dtype=np.uint8)).save(path)
        return root

    return write


@pytest.fixture(scope="module")
def data(pictures):
    return pictures()


@pytest.fixture
def run(data, tmp_path, tmp_path_factory):
    def run(of=None, **options):
        given = {"methods": METHODS, "shots": (2,), "seeds": 1, "params": PARAMS, "out": tmp_path / "out"}
        cache = tmp_path_factory.getbasetemp() / "cache"
        return compare(of or data, **{**given, **options}, config=load_config(flags=DATA), cache_dir=cache)

    return run


@pytest.fixture
def tunings(monkeypatch):
    """The sources that were trained, each when it was."""
    trained = []
    fit = Source.fit

    def noted(self, *arguments, **options):
        trained.append(fit(self, *arguments, **options))
        return self

    monkeypatch.setattr(Source, "fit", noted)
    return trained


@pytest.fixture
def updates(monkeypatch):
    """The batches that something was tuned on."""
    seen = []

    def noted(*arguments, **options):
        seen.append(options["seed"])
        return take_gradient(*arguments, **options)

    monkeypatch.setattr("fastfsl.fit.tuning.take_gradient", noted)
    return seen


def test_methods_that_tune_stand_beside_the_others_and_share_a_training(run, tunings, tmp_path):
    found = run()
    assert not found.failures
    rows = {row.method: row for row in found.rows}
    assert tuple(rows) == METHODS
    assert [type(source).__name__ for source in tunings] == ["MPS", "CoOpSource", "CoCoOpSource"]
    mps, coop, _ = tunings
    assert rows["mps"].num_parameters == mps.num_parameters_
    assert rows["mps+gda"].num_parameters == mps.num_parameters_ + rows["gda"].num_parameters
    assert rows["coop"].num_parameters == coop.num_parameters_
    for method in ("mps", "mps+gda"):
        assert rows[method].train_seconds >= mps.train_seconds_
    cells = {cell.spec.method: cell for cell in found.cells}
    assert cells["mps+gda"].spec.source_params["epochs"] == 2
    chosen = dict(cells["mps+gda"].selection["source"])
    assert chosen.pop("gromov_wasserstein_bound") > 0
    assert chosen == {"alpha": 0.3, "alignment_weight": 0.5}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"cells", "results.json", "results.csv"}
    again = run(params=found.settings["methods"])  # which says all parameters in the form that is taken
    assert len(tunings) == 3
    assert again.cells == found.cells


def test_a_training_is_shared_where_nothing_is_kept_but_not_by_other_options_or_seeds(run, tunings):
    other = {**PARAMS, "mps+gda": {"mps": {**BRIEF, "epochs": 1}}}
    run(methods=("mps", "mps+gda"), params=other, out=None)
    assert [source.epochs for source in tunings] == [2, 1]
    tunings.clear()
    run(methods=("coop", "coop+gda"), params={"coop": {"epochs": 1}, "coop+gda": {"epochs": 1}}, seeds=2, out=None)
    assert [source.seed for source in tunings] == [0, 1]


def test_a_cell_is_what_training_and_evaluation_find(run, data, tmp_path):
    for cell in run(methods=("mps", "mps+gda", "coop", "cocoop")).cells:
        method = cell.spec.method
        fitted = train(
            data, load_config(flags={**DATA, "method": method, "shots": 2, **PARAMS[method]}), cache_dir=tmp_path
        )
        found = evaluate_run(fitted, data, device="cpu", cache_dir=tmp_path)
        assert cell.accuracy == found.accuracy
        assert cell.calibration_error == pytest.approx(found.calibration_error, abs=1e-6)
        assert cell.num_parameters == fitted.record.num_parameters


def test_nothing_tuned_or_fitted_sees_the_labels_that_are_scored(run, pictures, tunings, monkeypatch):
    weights = []
    fit = GDA.fit

    def noted(self, *arguments, **options):
        weights.append(fit(self, *arguments, **options).form_.weight)
        return self

    monkeypatch.setattr(GDA, "fit", noted)
    methods = ("mps", "mps+gda", "cocoop")
    found = [run(of=pictures(misfiled), methods=methods, out=None).cells for misfiled in (0, 1)]
    assert len(tunings) == 4
    for before, after in zip(tunings[:2], tunings[2:], strict=True):
        poisoned = after.state()
        assert all(np.array_equal(array, poisoned[name]) for name, array in before.state().items())
    np.testing.assert_array_equal(*weights)
    assert any(
        before.negative_log_likelihood != after.negative_log_likelihood for before, after in zip(*found, strict=True)
    )


def test_an_interrupted_training_goes_on(run, tmp_path, monkeypatch, updates):
    whole = run(methods=("mps",), out=None)
    assert len(updates) == 4
    monkeypatch.setattr("fastfsl.fit.source.CHECKPOINT_SECONDS", 0.0)
    updates.clear()
    save = Checkpoint.save

    def interrupted(self, state):
        save(self, state)
        if len(updates) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(methods=("mps",))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tuning"]
    monkeypatch.setattr(Checkpoint, "save", save)
    listener = Listener()
    resumed = run(methods=("mps",), reporter=listener)
    assert len(updates) == 4
    assert [warning.partition(": going on after ")[0] for warning in listener.warnings] == ["mps, 2 shots, seed 0"]
    assert resumed.rows[0].accuracy_mean == whole.rows[0].accuracy_mean
    assert resumed.cells[0].negative_log_likelihood == whole.cells[0].negative_log_likelihood
    assert not (tmp_path / "out" / "tuning").exists()


def test_a_finished_training_is_not_repeated_for_the_next_method_after_an_interruption(
    run, tmp_path, monkeypatch, updates
):
    both, fit = ("mps", "mps+gda"), GDA.fit

    def interrupted(self, *arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(GDA, "fit", interrupted)
    for force, trained in ((False, 4), (False, 4), (True, 8)):
        with pytest.raises(KeyboardInterrupt):
            run(methods=both, force=force)
        assert len(updates) == trained
    monkeypatch.setattr(GDA, "fit", fit)
    run(methods=both)
    assert len(updates) == 8
    assert not (tmp_path / "out" / "tuning").exists()


def test_trainings_of_episodes_that_are_done_make_room(run, tmp_path, monkeypatch):
    kept = []
    fit = Source.fit

    def noted(self, *arguments, **options):
        kept.append(len(list((tmp_path / "out" / "tuning").glob("*"))))
        return fit(self, *arguments, **options)

    monkeypatch.setattr(Source, "fit", noted)
    run(methods=("coop",), seeds=2, shots=(1, 2))
    assert kept == [0] * 4


def test_a_feature_file_is_refused_before_anything_is_fitted(write_features, tmp_path):
    with pytest.raises(ConfigError, match="'mps\\+gda' tunes the encoder, and a feature file has none"):
        compare(write_features(tmp_path / "f.npz"), methods=("gda", "mps+gda"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cells_from_before_there_were_sources_are_still_read(run, tmp_path):
    spec = CellSpec(method="gda", params={"num_folds": 5}, shots=4, seed=1, device="cpu")
    assert spec.key("d") == "d93c0fe0df66acaeb6a51183e0efc8f1"
    assert spec.model_copy(update={"source_params": {"epochs": 1}}).key("d") != spec.key("d")
    (cell,) = run(methods=("gda",)).cells
    (path,) = (tmp_path / "out" / "cells").iterdir()
    document = json.loads(path.read_text())
    del document["spec"]["source_params"]
    path.write_text(json.dumps(document))
    assert Cell.load(path, cell.spec) == cell
