"""What the report of a training shows, method by method, and the demo's page."""

import re

import numpy as np
import pytest

from fastfsl.cli.demo import _write_report
from fastfsl.cli.run_report import prediction_parts, training_sections
from fastfsl.fit.config import load_config
from fastfsl.fit.train import train
from fastfsl.report import Figure, write_report

CLASSES, SHOTS, DIM = 3, 6, 8


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    rng = np.random.default_rng(0)
    texts = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0][:CLASSES]
    labels = np.repeat(np.arange(CLASSES), SHOTS)
    path = tmp_path_factory.mktemp("features") / "f.npz"
    np.savez(
        path,
        train_features=texts[labels] + 0.3 * rng.normal(size=(len(labels), DIM)),
        train_labels=labels,
        class_embeddings=texts,
        class_names=np.array(["<b>", "b", "c"]),
    )
    return path


def trained(features, method, **params):
    quick = {"num_blocks": 1, "epochs": 3, "num_folds": 2} if method == "fma" else {}
    return train(features, load_config(flags={"method": method, **quick, **params}))


def sections(run):
    return {section.title: list(section.parts) for section in training_sections(run)}


def on_diagonal(matrix):
    return sum(int(str(row[1 + index])) for index, row in enumerate(matrix.table.rows))


def test_a_flow_shows_its_choice_its_held_out_samples_and_its_ways(features, tmp_path):
    run = trained(features, "fma")
    found = sections(run)
    (steps,) = found["Accuracy against steps"]
    assert isinstance(steps, Figure)
    assert [row[1] for row in steps.table.rows] == [100 * value for value in run.record.selection["accuracy_by_step"]]
    assert 'class="marked"' in steps.drawing.to_svg("d")
    matrix = found["Held-out training samples"][1]
    assert isinstance(matrix, Figure)
    right = on_diagonal(matrix)
    assert right / (CLASSES * SHOTS) == pytest.approx(run.held_out_accuracy)
    if run.num_steps:
        ways = found["Features along the flow"][1]
        assert isinstance(ways, Figure)
        assert len(ways.table.rows) == run.num_steps + 1
    write_report(tmp_path / "a.html", "t", training_sections(run))
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<b>" not in page
    assert "&lt;b&gt;" in page


def test_the_flow_is_drawn_in_the_space_of_its_unit_features(features):
    run = trained(features, "fma", num_steps=4)
    assert run.support is not None
    assert np.linalg.norm(run.support.features, axis=1) == pytest.approx(1.0, abs=1e-5)
    found = sections(run)
    assert found["Accuracy against steps"] == found["Held-out training samples"] == []  # the steps were given
    rows = found["Features along the flow"][1].table.rows
    # Before any step the mean cosine is that of the features themselves.
    targets = run.estimator.class_targets_.numpy()
    expected = (run.support.features * targets[run.support.labels]).sum(axis=1).mean()
    assert rows[0][1] == pytest.approx(expected, abs=1e-5)
    assert len(rows) == 5


def test_of_many_samples_some_of_every_class_are_moved(features, monkeypatch):
    run = trained(features, "fma", num_steps=2)
    monkeypatch.setattr("fastfsl.cli.run_report._MAX_SAMPLES", 4)
    figure = sections(run)["Features along the flow"][1]
    assert figure.description.startswith("4 features of 3 classes")


@pytest.mark.parametrize(("method", "params"), [("gda", {}), ("zero-shot", {}), ("fma", {"solver": "heun"})])
def test_what_there_is_not_is_left_out(features, method, params):
    found = sections(trained(features, method, **params))
    assert found["Features along the flow"] == []
    assert found["Result"]
    assert found["Configuration"]


def test_auto_shows_the_samples_its_weights_were_judged_by(features):
    run = trained(features, "auto", components=["gda", "proker"])
    parts = sections(run)["Held-out training samples"]
    assert isinstance(parts[1], Figure)
    right = on_diagonal(parts[1])
    assert right / (CLASSES * SHOTS) == pytest.approx(run.record.selection["accuracy"])
    assert "held_out_" not in run.record.model_dump_json()


def test_the_page_of_the_demo(features, tmp_path):
    run = trained(features, "fma")
    labels = np.array([0, 1, 2])
    row = {
        "name": "it",
        "accuracy": 0.5,
        "ms_per_image_batch_1": 1.0,
        "ms_per_image_batch_32": 0.1,
        "size_bytes": 10**6,
    }
    document = {"rows": [row], "shots": 6, "num_samples": 3, "same_class": 3, "max_probability_error": 1e-6}
    _write_report(tmp_path, run, document, prediction_parts(np.eye(3), labels, run.record.class_names))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles[:3] == ["On the test scans", "The bundle&#x27;s predictions for the test scans", "The training"]
    assert "Runtime and torch agree on 3 of 3 scans" in page
    assert "3 of 3 samples on the diagonal" in page
