"""The two forms that every head reduces to: what is evaluated here is what an exporter has to write."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LinearForm:
    """logits = x Wᵀ + b.

    Attributes:
        weight: W, (C, d).
        bias: b, (C,).
    """

    weight: Array
    bias: Array

    def apply(self, features: Array) -> Array:
        """Logits (rows, C) of unit features (rows, d)."""
        return features @ self.weight.T + self.bias


@dataclass(frozen=True)
class KernelForm:
    """logits = x Wᵀ + b + exp(-beta (1 - x keysᵀ)) values.

    Attributes:
        linear: W and b.
        keys: (n, d); their length is free (trained keys are no longer unit vectors).
        values: (n, C).
        beta: sharpness of the kernel.
    """

    linear: LinearForm
    keys: Array
    values: Array
    beta: float

    def apply(self, features: Array) -> Array:
        """Logits (rows, C) of unit features (rows, d)."""
        return self.linear.apply(features) + affinity(features, self.keys, self.beta) @ self.values


def affinity(features: Array, keys: Array, beta: float) -> Array:
    """exp(-beta (1 - x keysᵀ)), (rows, n): between unit vectors a Gaussian kernel of their distance."""
    return sharpened(features @ keys.T, beta)


def sharpened(cosines: Array, beta: float) -> Array:
    """exp(-beta (1 - cosine)), of any shape."""
    scaled: Array = np.exp(beta * (cosines - 1.0))
    return scaled
