"""The two forms that every head reduces to: what is evaluated here is what an exporter has to write."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfsl.errors import DataError

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

    def scaled(self, factor: float) -> "LinearForm":
        """The form whose logits are `factor` times these."""
        return LinearForm(factor * self.weight, factor * self.bias)

    def state(self) -> dict[str, NDArray[Any]]:
        """The arrays by name."""
        return {"weight": self.weight, "bias": self.bias}

    @property
    def num_parameters(self) -> int:
        """Numbers in it."""
        return self.weight.size + self.bias.size


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

    def scaled(self, factor: float) -> "KernelForm":
        """The form whose logits are `factor` times these."""
        return KernelForm(self.linear.scaled(factor), self.keys, factor * self.values, self.beta)

    def state(self) -> dict[str, NDArray[Any]]:
        """The arrays by name."""
        return {**self.linear.state(), "keys": self.keys, "values": self.values, "beta": np.array(self.beta)}

    @property
    def num_parameters(self) -> int:
        """Numbers in it."""
        return self.linear.num_parameters + self.keys.size + self.values.size


def form_from_state(state: Mapping[str, NDArray[Any]]) -> LinearForm | KernelForm:
    """The form whose `state` this is.

    Raises:
        DataError: the arrays are not those of a form.
    """
    try:
        weight, bias = state["weight"], state["bias"]
        linear = LinearForm(weight, bias)
        if "keys" not in state:
            fits = weight.ndim == 2 and bias.shape == weight.shape[:1]
        else:
            keys, values, beta = state["keys"], state["values"], state["beta"]
            fits = weight.ndim == 2 and bias.shape == weight.shape[:1] and beta.shape == ()
            fits = fits and keys.shape == (len(values), weight.shape[1]) and values.shape == (len(keys), len(weight))
    except (KeyError, TypeError) as error:
        raise DataError(f"expected the arrays of a head, {error} is missing: train it again") from error
    if not fits:
        shapes = {name: array.shape for name, array in state.items()}
        raise DataError(f"expected the arrays of a head, got {shapes}: train it again")
    return linear if "keys" not in state else KernelForm(linear, keys, values, float(beta))


def affinity(features: Array, keys: Array, beta: float) -> Array:
    """exp(-beta (1 - x keysᵀ)), (rows, n): between unit vectors a Gaussian kernel of their distance."""
    return sharpened(features @ keys.T, beta)


def sharpened(cosines: Array, beta: float) -> Array:
    """exp(-beta (1 - cosine)), of any shape."""
    scaled: Array = np.exp(beta * (cosines - 1.0))
    return scaled
