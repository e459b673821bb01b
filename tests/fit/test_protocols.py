import numpy as np
import pytest
import torch

from fastfsl.data import read_feature_file
from fastfsl.errors import ConfigError, DataError, ShapeError
from fastfsl.fit.config import load_config
from fastfsl.fit.fma import FlowMatchingAlignment
from fastfsl.fit.protocols import (
    base_to_new,
    evaluate_domain_shift,
    evaluate_transfer,
    harmonic_mean,
    transfer_logits,
)
from fastfsl.flow import class_logits, euler, normalize
from fastfsl.heads import ZeroShot

NAMES = ("ant", "bee", "cow", "dog")
BRIEF = {"num_blocks": 1, "epochs": 30, "batch_size": 8, "learning_rate": 3e-3, "num_steps": 4, "device": "cpu"}


@pytest.fixture
def data(write_features, tmp_path):
    return write_features(tmp_path / "four.npz", class_names=np.array(NAMES))


def test_base_to_new_measures_each_half_among_its_own_classes(data):
    result = base_to_new(data, load_config(flags={"method": "fma", "classes": "base", **BRIEF}))
    assert result.run.record.class_names == ["ant", "bee"]
    assert result.run.record.config.classes == "base"
    assert set(result.base.class_accuracy) == {"ant", "bee"}
    assert set(result.new.class_accuracy) == {"cow", "dog"}

    # By hand: the flow moves the features of the new classes, and where it would send their texts reads them out.
    dataset = read_feature_file(data)
    features, labels = dataset.split("test")
    of_new = labels >= 2
    flow = result.run.estimator
    assert isinstance(flow, FlowMatchingAlignment)
    texts = dataset.class_embeddings[2:]
    with torch.no_grad():
        moved = euler(flow.velocity_field_, normalize(torch.from_numpy(features[of_new])), 4, 0.1)
    logits = class_logits(moved, torch.from_numpy(flow.targets_of(texts)), 100.0)
    assert result.new.accuracy == (logits.argmax(dim=-1).numpy() == labels[of_new] - 2).mean()
    np.testing.assert_allclose(transfer_logits(flow, features[of_new], texts, 100.0), logits, atol=1e-3)

    of_base = labels < 2
    assert result.base.accuracy == flow.score(features[of_base], labels[of_base])
    assert result.harmonic_mean == pytest.approx(
        2 / (1 / result.base.accuracy + 1 / result.new.accuracy) if result.new.accuracy else 0.0
    )


def test_harmonic_mean():
    assert harmonic_mean(0.8, 0.4) == pytest.approx(2 * 0.8 * 0.4 / 1.2)
    assert harmonic_mean(0.0, 0.0) == 0.0


def test_zero_shot_transfers_as_zero_shot(data, train_quickly, write_features, tmp_path):
    rng = np.random.default_rng(3)
    embeddings = rng.normal(size=(6, 16)).astype(np.float32)
    labels = np.arange(6).repeat(4)
    other = write_features(
        tmp_path / "six.npz",
        class_embeddings=embeddings,
        test_features=(embeddings[labels] + 2.0 * rng.normal(size=(24, 16))).astype(np.float32),
        test_labels=labels,
    )
    run = train_quickly(data, "zero-shot")
    features, labels = read_feature_file(other).split("test")
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    accuracy = evaluate_transfer(run, other).accuracy
    assert accuracy == ((features @ units.T).argmax(axis=1) == labels).mean()
    assert 0 < accuracy < 1


def test_a_flow_transfers_to_another_data_set(data, train_quickly, write_features, tmp_path):
    run = train_quickly(data, "fma")
    other = write_features(tmp_path / "other.npz", class_names=np.array(["elk", "fox", "gnu", "hen"]))
    evaluation = evaluate_transfer(run, other, split="val")
    assert set(evaluation.class_accuracy) == {"elk", "fox", "gnu", "hen"}
    dataset = read_feature_file(other)
    features, labels = dataset.split("val")
    logits = transfer_logits(run.estimator, features, dataset.class_embeddings, dataset.logit_scale)
    assert evaluation.accuracy == (logits.argmax(axis=1) == labels).mean()
    with pytest.raises(ConfigError, match="prompts go with images"):
        evaluate_transfer(run, other, templates="a {}")
    with pytest.raises(DataError, match="does not know"):
        evaluate_domain_shift(run, other)


@pytest.mark.parametrize("read_steps", [None, (0, 2, 4)])
def test_a_flow_to_the_texts_answers_as_itself_on_its_own_classes(make_problem, read_steps):
    problem = make_problem(shots=4)
    flow = FlowMatchingAlignment(
        num_blocks=1, epochs=30, learning_rate=3e-3, num_steps=4, text_samples=None, read_steps=read_steps
    )
    flow.fit(problem.features, problem.labels, problem.class_embeddings)
    got = transfer_logits(flow, problem.test_features, 3 * problem.class_embeddings, 100.0)
    np.testing.assert_allclose(got, flow.decision_function(problem.test_features), atol=1e-3)
    still = transfer_logits(
        ZeroShot().fit(problem.features, problem.labels, problem.class_embeddings),
        problem.test_features,
        problem.class_embeddings,
        100.0,
    )
    assert np.abs(got - still).max() > 1


@pytest.mark.parametrize("method", ["nearest-mean", "linear", "tip-adapter", "gda", "proker"])
def test_methods_that_know_their_classes_by_samples_say_so(data, train_quickly, method):
    run = train_quickly(data, method)
    with pytest.raises(ConfigError, match="has fitted weights for the classes it was trained on and none for others"):
        evaluate_transfer(run, data)


def test_base_to_new_refuses_them_before_it_reads_or_trains(tmp_path):
    with pytest.raises(ConfigError, match="GDA has fitted weights"):
        base_to_new(tmp_path / "none.npz", load_config(flags={"method": "gda", "device": "cpu"}))


@pytest.mark.parametrize("method", ["fma", "gda"])
def test_domain_shift_matches_classes_by_name_and_chooses_among_those_there_are(
    data, train_quickly, write_features, tmp_path, method
):
    run = train_quickly(data, method)
    features, labels = read_feature_file(data).split("test")
    # The same classes in another order.
    order = np.array([3, 1, 0, 2])
    shuffled = write_features(
        tmp_path / "shuffled.npz", class_names=np.array(NAMES)[order], test_labels=np.argsort(order)[labels]
    )
    whole = evaluate_domain_shift(run, shuffled)
    assert whole.accuracy == run.estimator.score(features, labels)
    assert set(whole.class_accuracy) == set(NAMES)
    # Two of them, blurred so that the other two would often be chosen.
    kept = np.isin(labels, [1, 3])
    blurred = features[kept] + np.random.default_rng(0).normal(size=features[kept].shape).astype(np.float32)
    part = write_features(
        tmp_path / "part.npz",
        class_names=np.array(["dog", "bee"]),
        class_embeddings=np.ones((2, 16), dtype=np.float32),
        train_features=None,
        train_labels=None,
        val_features=None,
        val_labels=None,
        test_features=blurred,
        test_labels=(labels[kept] == 1).astype(np.int64),
    )
    two = evaluate_domain_shift(run, part)
    logits = run.estimator.decision_function(blurred)
    expected = np.where(logits[:, 1] > logits[:, 3], 1, 3)
    assert (expected == labels[kept]).mean() > run.estimator.score(blurred, labels[kept])
    assert two.accuracy == (expected == labels[kept]).mean()
    assert two.num_samples == kept.sum()


def test_other_widths_are_named(data, train_quickly):
    run = train_quickly(data, "fma")
    with pytest.raises(ShapeError, match="one width"):
        transfer_logits(run.estimator, np.ones((2, 16)), np.ones((3, 15)), 100.0)
