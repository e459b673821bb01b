"""Ranges of options that have one under every method: a value outside is told before torch is imported.

The estimators and sources hold the same ranges and narrower ones, by `check_parameters` and when they are made.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastfsl.errors import ConfigError


@dataclass(frozen=True)
class _Range:
    words: str
    holds: Callable[[float], bool]


_ONE_OR_MORE = _Range(">= 1", lambda value: value >= 1)
_TWO_OR_MORE = _Range(">= 2", lambda value: value >= 2)
_NOT_NEGATIVE = _Range(">= 0", lambda value: value >= 0)
_POSITIVE = _Range("> 0", lambda value: value > 0)
_SHARE = _Range("between 0 and 1", lambda value: 0 < value < 1)
_BELOW_ONE = _Range(">= 0 and < 1", lambda value: 0 <= value < 1)

RANGES: Mapping[str, _Range] = {
    **dict.fromkeys(
        ("num_blocks", "epochs", "updates", "batch_size", "times_per_batch", "micro_batch", "num_prototypes"),
        _ONE_OR_MORE,
    ),
    **dict.fromkeys(("max_steps", "rank"), _ONE_OR_MORE),
    "num_folds": _TWO_OR_MORE,
    **dict.fromkeys(
        ("num_steps", "warmup_epochs", "weight_decay", "final_rate", "cross_entropy_weight", "text_samples"),
        _NOT_NEGATIVE,
    ),
    "learning_rate": _POSITIVE,
    **dict.fromkeys(("target_precision", "ema_decay"), _SHARE),
    "dropout": _BELOW_ONE,
}


def check_ranges(params: Mapping[str, Any]) -> None:
    """Refuse a number outside the range of its option; whatever is no number is left to others.

    Raises:
        ConfigError: naming the option and its range.
    """
    for name, value in params.items():
        known = RANGES.get(name)
        if known is not None and isinstance(value, int | float) and not known.holds(value):
            raise ConfigError(f"expected {name} {known.words}, got {value}")
