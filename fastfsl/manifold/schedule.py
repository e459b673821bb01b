"""The temperature of the sculpting loss as training goes on."""

import math

from fastfsl.errors import ConfigError


def temperature_at(progress: float, start: float, end: float) -> float:
    """Temperature tau = w start + (1 - w) end with w = (1 + cos(pi progress)) / 2, a cosine from start to end.

    Args:
        progress: fraction of the training that is done, in [0, 1].
        start: temperature at 0, > 0.
        end: temperature at 1, > 0.

    Raises:
        ConfigError: if an argument is out of its range.

    Source: MPS-Tuning (arXiv 2508.12877), training details.
    """
    if not 0 <= progress <= 1:
        raise ConfigError(f"expected a progress in [0, 1], got {progress}: pass the fraction of the training done")
    if not (start > 0 and end > 0):
        raise ConfigError(f"expected temperatures > 0, got {start} and {end}")
    weight = (1 + math.cos(math.pi * progress)) / 2
    return weight * start + (1 - weight) * end
