"""Softmax and ranking at the edges of float32."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastfsl.runtime.prediction import Prediction, rank, softmax

_logits = hnp.arrays(
    np.float32,
    st.tuples(st.integers(0, 4), st.integers(1, 6)),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@settings(max_examples=100, deadline=None)
@given(_logits)
def test_softmax_is_a_distribution_whatever_the_logits(logits):
    probabilities = softmax(logits)
    assert probabilities.dtype == np.float32
    assert (probabilities >= 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


def test_softmax_values():
    np.testing.assert_allclose(softmax(np.array([[0, np.log(3)]], np.float32)), [[0.25, 0.75]], atol=1e-7)
    np.testing.assert_array_equal(softmax(np.array([[1e4, 0]], np.float32)), [[1, 0]])
    logits = np.array([[3, 1]], np.float32)
    softmax(logits)
    np.testing.assert_array_equal(logits, [[3, 1]])


def test_rank_keeps_the_order_of_equal_logits_and_of_vanished_probabilities():
    names = ("a", "b", "c", "d")
    (tied,) = rank(np.zeros((1, 4), np.float32), names, 3)
    assert tied.labels == ("a", "b", "c")
    (far,) = rank(np.array([[-3e4, -2e4, 0, -1e4]], np.float32), names, 4)
    assert far.labels == ("c", "d", "b", "a")
    assert far.probabilities == (1.0, 0.0, 0.0, 0.0)


def test_a_prediction_is_json():
    (prediction,) = rank(np.array([[1, 3, 2]], np.float32), ("ant", "bee", "cat"), 2, threshold=0.5)
    written = json.loads(json.dumps(prediction))
    assert written == prediction.to_dict() == json.loads(json.dumps(prediction.to_dict()))
    assert written["labels"] == ["bee", "cat"]
    assert written["probabilities"] == list(prediction.probabilities)
    assert written["known"] is True
    assert written["error"] is None
    assert json.loads(json.dumps({"all": [prediction]})) == {"all": [written]}
    assert asdict(prediction) == {**written, "labels": ("bee", "cat"), "probabilities": prediction.probabilities}


def test_numbers_of_numpy_become_pythons():
    fields: dict[str, Any] = {
        "labels": tuple(np.array(["a", "b"])),
        "probabilities": tuple(np.array([0.75, 0.25], np.float32)),
        "known": np.bool_(True),
    }
    given = Prediction(**fields)
    assert json.loads(json.dumps(given)) == {
        "labels": ["a", "b"],
        "probabilities": [0.75, 0.25],
        "error": None,
        "known": True,
    }
    assert {type(value) for value in (*given.labels, *given.probabilities, given.known)} == {str, float, bool}


def test_a_prediction_keeps_its_value():
    prediction = Prediction(("a", "b"), (0.75, 0.25))
    for same in (copy.deepcopy(prediction), copy.copy(prediction), pickle.loads(pickle.dumps(prediction))):
        assert same == prediction
        assert json.dumps(same) == json.dumps(prediction)
    assert replace(prediction, known=False)["known"] is False
    with pytest.raises(TypeError, match="cannot be changed"):
        prediction["labels"] = ()
    with pytest.raises(TypeError, match="cannot be changed"):
        prediction.update(known=True)
