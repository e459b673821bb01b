"""The comparison: what is fitted and when, what is kept, what is told."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastfsl.data import FeatureDataset, sample_episode, write_feature_file
from fastfsl.errors import ConfigError, DataError, ResourceError
from fastfsl.fit import compare as package
from fastfsl.fit.compare import compare, fitting
from fastfsl.fit.compare import comparison as comparison_module
from fastfsl.fit.compare.cell import CellSpec
from fastfsl.fit.compare.pool import Pool, ScoredSplit, Support
from fastfsl.fit.config import TrainConfig
from fastfsl.fit.methods import METHODS, make_estimator
from fastfsl.heads import GDA, NearestMean

CLASSES, DIM, COMPARED = 4, 16, ("zero-shot", "nearest-mean", "gda")
CPU = TrainConfig(device="cpu")


class Listener:
    def __init__(self):
        self.stages, self.warnings = [], []

    def stage(self, name, done, total):
        self.stages.append((name, done, total))

    def warn(self, message):
        self.warnings.append(message)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    means, texts = rng.normal(size=(2, CLASSES, DIM))
    labels = {"train": np.repeat(np.arange(CLASSES), 6), "test": np.arange(300) % CLASSES}
    splits = {
        name: ((means[of] + 1.2 * rng.normal(size=(len(of), DIM))).astype(np.float32), of)
        for name, of in labels.items()
    }
    return splits, texts.astype(np.float32)


@pytest.fixture
def write(tmp_path, arrays):
    def write(splits=None, name="data.npz"):
        names = tuple(f"kind {label}" for label in range(CLASSES))
        write_feature_file(tmp_path / name, FeatureDataset(names, splits or arrays[0], arrays[1]))
        return tmp_path / name

    return write


@pytest.fixture
def run(write, tmp_path):
    def run(**options):
        given = {"methods": COMPARED, "shots": (1, 4), "seeds": 2, "out": tmp_path / "out", "config": CPU}
        data = options.pop("data", None) or write()
        return compare(data, **{**given, **options})

    return run


@pytest.fixture
def fits(monkeypatch):
    """The cells that were computed, not read."""
    computed = []
    original = fitting.run_cell

    def counted(spec, *arguments, **options):
        cell = original(spec, *arguments, **options)
        computed.append(spec)
        return cell

    monkeypatch.setattr(comparison_module, "run_cell", counted)
    return computed


def test_rows_are_means_over_the_seeds_of_cells(run):
    found = run()
    assert [(row.method, row.shots) for row in found.rows] == [
        (method, shots) for shots in (1, 4, "mean") for method in COMPARED
    ]
    accuracy = {(cell.spec.method, cell.spec.shots, cell.spec.seed): cell.accuracy for cell in found.cells}
    assert len(accuracy) == 12
    for row in found.rows:
        shots = (1, 4) if row.shots == "mean" else (row.shots,)
        by_seed = [np.mean([accuracy[row.method, number, seed] for number in shots]) for seed in (0, 1)]
        assert row.accuracy_mean == pytest.approx(np.mean(by_seed))
        assert row.accuracy_sd == pytest.approx(np.std(by_seed, ddof=1))
        assert row.num_parameters >= CLASSES * DIM
        assert row.train_seconds > 0
        assert row.microseconds_per_feature > 0
        assert set(row.class_accuracy) == {f"kind {label}" for label in range(CLASSES)}
        assert row.macro_accuracy_mean == pytest.approx(np.mean(list(row.class_accuracy.values())))


def test_the_best_has_no_difference_and_the_others_are_paired_with_it(run):
    found = run()
    for shots in (1, 4, "mean"):
        rows = [row for row in found.rows if row.shots == shots]
        (best,) = [row for row in rows if row.best]
        assert best.accuracy_mean == max(row.accuracy_mean for row in rows)
        assert best.vs_best is None
        for row in rows:
            if not row.best:
                assert row.vs_best.mean == pytest.approx(row.accuracy_mean - best.accuracy_mean)
                assert row.within_noise == (row.vs_best.low <= 0 <= row.vs_best.high)
    zero_shot = next(row for row in found.rows if (row.method, row.shots) == ("zero-shot", 4))
    assert not zero_shot.within_noise  # the class texts know nothing here


def test_a_twin_of_the_best_is_within_noise(run, monkeypatch):
    monkeypatch.setitem(METHODS, "twin", replace(METHODS["gda"], name="twin"))
    best, twin = run(methods=("gda", "twin"), shots=(4,)).rows
    assert (best.best, twin.best) == (True, False)
    assert (twin.vs_best.mean, twin.vs_best.low, twin.vs_best.high) == (0, 0, 0)
    assert twin.within_noise


def test_a_cell_is_what_the_estimator_says(run, arrays):
    *_, cell = run(methods=("gda",), shots=(4,), seeds=2, out=None).cells
    (features, labels), (test, test_labels) = arrays[0]["train"], arrays[0]["test"]
    rows = np.array(sample_episode(labels, 4, 1, CLASSES).indices)
    fitted = GDA(logit_scale=100.0, seed=1).fit(features[rows], labels[rows], arrays[1])
    np.testing.assert_array_equal(cell.right_bits(), fitted.predict(test) == test_labels)
    assert cell.accuracy == fitted.score(test, test_labels)
    assert cell.selection == fitted.selection_record()
    assert cell.num_test == 300


def test_the_same_again_computes_nothing(run, fits):
    first = run()
    assert len(fits) == 12
    again = run()
    assert len(fits) == 12
    assert [row.accuracy_mean for row in again.rows] == [row.accuracy_mean for row in first.rows]
    assert [row.vs_best for row in again.rows] == [row.vs_best for row in first.rows]


def test_only_what_is_missing_is_computed(run, fits):
    run(methods=("gda",), shots=(1,), seeds=1)
    fits.clear()
    run(methods=("gda", "nearest-mean"), shots=(1, None), seeds=2)
    assert len(fits) == 7
    fits.clear()
    run(methods=("gda",), shots=(1,), seeds=1, params={"gda": {"num_folds": 3}})
    assert [spec.params["num_folds"] for spec in fits] == [3]


def test_kept_cells_can_be_renewed_and_are_told_when_they_are_of_other_versions(run, fits, monkeypatch):
    options = {"methods": ("gda",), "shots": (1,), "seeds": 1}
    run(**options)
    run(**options, force=True)
    assert len(fits) == 2
    monkeypatch.setattr(comparison_module, "installed_versions", lambda: {"fastfsl": "9.9"})
    listener = Listener()
    run(**options, reporter=listener)
    assert len(fits) == 2
    (warning,) = listener.warnings
    assert "1 of 1 cells" in warning


def test_other_data_are_other_cells(run, write, arrays, fits):
    run(methods=("gda",), shots=(1,), seeds=1)
    arrays[0]["test"][0][0] *= -1
    run(methods=("gda",), shots=(1,), seeds=1, data=write(name="other.npz"))
    assert len(fits) == 2


def test_an_interruption_loses_the_running_cell_alone(run, fits, monkeypatch, tmp_path):
    original = NearestMean.fit

    def interrupted(self, *arguments, **options):
        if self.seed == 1:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    monkeypatch.setattr(NearestMean, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    kept = sorted(path.name for path in (tmp_path / "out" / "cells").iterdir())
    assert len(kept) == len(fits) == 7  # six of the first seed, zero-shot of the second
    assert all(name.endswith(".json") and not name.startswith(".") for name in kept)
    monkeypatch.setattr(NearestMean, "fit", original)
    fits.clear()
    run()
    assert len(fits) == 5


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-40],
        lambda text: "",
        lambda text: text.replace('"gda"', '"linear"'),
        lambda text: json.dumps(json.loads(text) | {"accuracy": 0.999}),
        lambda text: json.dumps(json.loads(text) | {"right": "AAAA"}),
        lambda text: json.dumps(json.loads(text) | {"version": 2}),
    ],
    ids=["cut", "empty", "another method", "another accuracy", "few bits", "version"],
)
def test_a_damaged_cell_is_computed_again_with_a_warning(run, fits, tmp_path, damage):
    whole = run(methods=("gda",), shots=(4,), seeds=1)
    (file,) = (tmp_path / "out" / "cells").iterdir()
    file.write_text(damage(file.read_text()))
    listener = Listener()
    again = run(methods=("gda",), shots=(4,), seeds=1, reporter=listener)
    assert len(fits) == 2
    (warning,) = listener.warnings
    assert file.name in warning
    assert again.rows[0].accuracy_mean == whole.rows[0].accuracy_mean
    assert len(run(methods=("gda",), shots=(4,), seeds=1).cells) == 1
    assert len(fits) == 2


@pytest.mark.parametrize("error", [DataError, torch.OutOfMemoryError])
def test_a_method_that_fails_does_not_lose_the_others(run, monkeypatch, tmp_path, error):
    def fails(self, *arguments, **options):
        raise error("no")

    monkeypatch.setattr(NearestMean, "fit", fails)
    listener = Listener()
    found = run(reporter=listener)
    assert len(found.cells) == 8
    assert {failure.spec.method for failure in found.failures} == {"nearest-mean"}
    assert len(listener.warnings) == 4
    row = next(row for row in found.rows if row.method == "nearest-mean")
    assert (row.num_seeds, row.accuracy_mean, row.best) == (0, None, False)
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [cell["error"] for cell in document["cells"] if cell["method"] == "nearest-mean"] == ["no"] * 4


def test_a_fault_of_the_machine_is_no_method_s_failure(run, monkeypatch, tmp_path):
    fit, calls = NearestMean.fit, []

    def fails(self, *arguments, **options):
        calls.append(self)
        if len(calls) == 3:
            raise ResourceError("cannot read the image a.png: too many open files")
        return fit(self, *arguments, **options)

    monkeypatch.setattr(NearestMean, "fit", fails)
    with pytest.raises(ResourceError):
        run(methods=("nearest-mean",))
    assert not (tmp_path / "out" / "results.json").exists()
    found = run(methods=("nearest-mean",))  # goes on after the two that were finished
    assert (len(found.cells), found.failures, len(calls)) == (4, (), 5)


def test_a_method_that_lost_a_seed_is_compared_on_the_others_and_is_not_the_best(run, monkeypatch):
    original = GDA.fit

    def fails(self, *arguments, **options):
        if self.seed == 1:
            raise np.linalg.LinAlgError("singular")
        return original(self, *arguments, **options)

    monkeypatch.setattr(GDA, "fit", fails)
    rows = {row.method: row for row in run(shots=(4,), seeds=3).rows}
    assert (rows["gda"].num_seeds, rows["gda"].best) == (2, False)
    assert rows["nearest-mean"].best
    cells = {(cell.spec.method, cell.spec.seed): cell for cell in run(shots=(4,), seeds=3).cells}
    expected = np.mean([cells["gda", seed].accuracy - cells["nearest-mean", seed].accuracy for seed in (0, 2)])
    assert rows["gda"].vs_best.mean == pytest.approx(expected)


def test_a_training_that_diverged_is_a_failure(run, monkeypatch):
    monkeypatch.setattr(GDA, "predict_proba", lambda self, features: np.full((len(features), CLASSES), np.nan))
    (failure,) = run(methods=("gda",), shots=(4,), seeds=1).failures
    assert "diverged" in failure.error


def _pool():
    rng = np.random.default_rng(0)
    support = Support(rng.normal(size=(8, DIM)).astype(np.float32), np.arange(8) % CLASSES)
    texts = rng.normal(size=(CLASSES, DIM)).astype(np.float32)
    scored = ScoredSplit(support.features, support.labels)
    return Pool(("a", "b", "c", "d"), texts, 50.0, support, {(2, 0): np.arange(8)}, scored)


def test_all_that_a_method_is_given_decides_the_digest():
    pool = _pool()
    support, scored = pool.train, pool.test
    others = [
        replace(pool, class_names=("a", "b", "c", "e")),
        replace(pool, class_embeddings=2 * pool.class_embeddings),
        replace(pool, logit_scale=51.0),
        replace(pool, train=replace(support, features=2 * support.features)),
        replace(pool, train=replace(support, labels=support.labels[::-1].copy())),
        replace(pool, train=replace(support, plain=support.features)),
        replace(pool, train=replace(support, plain=2 * support.features)),
        replace(pool, episodes={(2, 0): np.arange(7)}),
        replace(pool, test=replace(scored, features=2 * scored.features)),
        replace(pool, test=replace(scored, labels=scored.labels[::-1].copy())),
    ]
    assert len({other.digest(2, 0) for other in [pool, *others]}) == 11
    unused = replace(support, features=np.vstack([support.features, support.features]))
    assert replace(pool, train=unused).digest(2, 0) == pool.digest(2, 0)


@pytest.mark.parametrize("method", ["gda", "proker", "fma"])
def test_what_is_timed_on_the_cpu_is_what_was_fitted(method):
    pool = _pool()
    support, texts = pool.train, pool.class_embeddings
    params = {"epochs": 2, "num_folds": 2} if method == "fma" else {}
    spec = CellSpec(method=method, params=params, shots=2, seed=0, device="another")
    fitted = make_estimator(method, params, logit_scale=50.0, seed=0, device="cpu")
    fitted.fit(support.features, support.labels, texts)
    copy = fitting._on_cpu(fitted, spec, pool)
    assert copy is not fitted
    np.testing.assert_allclose(copy.predict_proba(support.features), fitted.predict_proba(support.features))


def test_results_as_json_and_csv(run, tmp_path):
    found = run()
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document == json.loads(json.dumps(found.document()))
    assert {"data", "versions", "settings", "rows", "cells"} <= set(document)
    expected = {"method", "shots", "accuracy_mean", "accuracy_sd", "train_seconds", "num_parameters", "vs_best"}
    assert all(expected <= set(row) for row in document["rows"])
    assert document["data"]["num_test"] == 300
    assert document["settings"]["methods"]["gda"]["num_folds"] == GDA().num_folds
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 9
    for line, row in zip(lines, found.rows, strict=True):
        assert (line["method"], line["shots"]) == (row.method, str(row.shots))
        assert float(line["accuracy_mean"]) == row.accuracy_mean
        assert float(line["vs_best"] or "nan") == pytest.approx(
            row.vs_best.mean if row.vs_best else float("nan"), nan_ok=True
        )


def test_progress_names_the_cell_and_counts_cells(run):
    listener = Listener()
    run(methods=("fma",), shots=(4,), seeds=2, params={"fma": {"epochs": 2, "num_folds": 2}}, reporter=listener)
    assert [(done, total) for name, done, total in listener.stages if name == "cells"] == [(0, 2), (1, 2), (2, 2)]
    assert any(name == "fma, 4 shots, seed 1: training" for name, *_ in listener.stages)


def test_nothing_fitted_sees_the_labels_that_are_scored(run, write, arrays, monkeypatch):
    seen = []
    original = GDA.fit

    def noted(self, features, labels, class_embeddings, **options):
        result = original(self, features, labels, class_embeddings, **options)
        seen.append(result.form_.weight)
        return result

    monkeypatch.setattr(GDA, "fit", noted)
    run(methods=("gda",), out=None)
    splits = dict(arrays[0])
    splits["test"] = (splits["test"][0], (splits["test"][1] + 1) % CLASSES)
    run(methods=("gda",), out=None, data=write(splits, "poisoned.npz"))
    np.testing.assert_array_equal(seen[:4], seen[4:])


def test_planted_duplicates_are_warned_of(run, write, arrays):
    splits = dict(arrays[0])
    splits["test"][0][3] = splits["train"][0][0]
    listener = Listener()
    found = run(data=write(splits), reporter=listener)
    assert found.warnings == tuple(listener.warnings)
    (warning,) = listener.warnings
    assert "train 0 = test 3" in warning


def test_by_default_all_methods_on_frozen_features_but_the_slow_ones():
    assert set(METHODS) - set(package.default_methods()) == {"fma-paper", "fma-bridge", "fma-released"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("gdaa",)}, "'gdaa'.*gda"),
        ({"methods": ("lorra",)}, "'lorra'.*lora"),
        ({"methods": ("mps+gdaa",)}, r"'mps\+gdaa'.*mps\+gda"),
        ({"methods": ("?",)}, r"zero-shot.*coop.*such as mps\+fma"),
        ({"methods": ("mps",)}, "'mps' tunes the encoder, and a feature file has none"),
        ({"methods": ()}, "at least one method"),
        ({"methods": ("gda", "gda")}, "each once"),
        ({"shots": ()}, "at least one number of shots"),
        ({"shots": (4, 4)}, "each once"),
        ({"shots": (0,)}, "at least 1"),
        ({"seeds": 0}, "at least one seed"),
        ({"split": "train"}, "no episode is drawn from"),
        ({"params": {"gda": {"num_fold": 3}}}, "num_folds"),
        ({"params": {"gda": {"num_folds": "many"}}}, "'gda.num_folds'"),
        ({"methods": ("mps+fma",), "params": {"mps+fma": {"epochs": 3}}}, "'epochs' is one of mps and of fma"),
        ({"methods": ("mps+fma",), "params": {"mps+fma": {"mps": {"epochs": "many"}}}}, r"'mps\+fma.mps.epochs'"),
        ({"methods": ("mps",), "params": {"mps": {"alpha": 2}}}, "alpha"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_fitted(run, fits, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run(**options)
    assert not fits
    assert not (tmp_path / "out").exists()


def test_more_shots_than_a_class_has(run, fits):
    with pytest.raises(DataError, match="at most 6"):
        run(shots=(1, 7), config=TrainConfig(exact_shots=True))
    assert not fits
    assert {cell.spec.shots for cell in run(shots=(1, 7)).cells} == {1, 7}


def test_a_split_that_is_not_there(run, fits):
    with pytest.raises(DataError, match="'val'"):
        run(split="val")


def test_a_folder_that_is_not_a_comparison_is_not_touched(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not touched"):
        run()
