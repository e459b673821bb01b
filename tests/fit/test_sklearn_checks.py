"""scikit-learn's own checks of every estimator."""

from typing import Any

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from fastfsl import (
    GDA,
    Auto,
    FlowMatchingAlignment,
    LinearProbe,
    LPPlusPlus,
    NearestMean,
    ProKeR,
    TextReadout,
    TipAdapter,
    TipAdapterF,
    ZeroShot,
)

BRIEF: dict[str, Any] = {"num_blocks": 1, "updates": 4, "batch_size": 64, "learning_rate": 3e-3, "num_folds": 2}
ESTIMATORS = [
    Auto(components=("gda", "fma")),
    FlowMatchingAlignment(**BRIEF, num_steps=2),
    GDA(num_folds=2),
    LPPlusPlus(iterations=(10,), num_folds=2),
    LinearProbe(Cs=(10.0,), num_folds=2),
    NearestMean(),
    ProKeR(betas=(1.0,), ridges=(0.1,), num_folds=2),
    TextReadout(),
    TipAdapter(betas=(5.5,), num_folds=2),
    TipAdapterF(betas=(5.5,), epochs=1, num_folds=2),
    ZeroShot(),
]


@pytest.fixture(autouse=True)
def short_flow(monkeypatch):
    """The flow inside `auto` trains in a moment too."""
    for name, value in BRIEF.items():
        monkeypatch.setitem(FlowMatchingAlignment.__init__.__kwdefaults__, name, value)


# What every estimator does otherwise than scikit-learn's, and why.
EXPECTED = {
    "check_estimators_dtypes": "small random integers have rows of zeros: a vector without a direction is refused",
}


@parametrize_with_checks(ESTIMATORS, expected_failed_checks=lambda estimator: EXPECTED)
def test_scikit_learns_check(estimator, check):
    check(estimator)
