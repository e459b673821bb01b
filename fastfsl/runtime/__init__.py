"""The lean runtime: numpy and ONNX Runtime, never torch or triton.

>>> from fastfsl.runtime import Classifier  # doctest: +SKIP
>>> classifier = Classifier.load("bundle")  # doctest: +SKIP
>>> classifier.predict(["a.jpg"])[0].label  # doctest: +SKIP
"""

from fastfsl.runtime.classifier import Classifier
from fastfsl.runtime.metrics import Metric
from fastfsl.runtime.prediction import Prediction

__all__ = ["Classifier", "Metric", "Prediction"]
