"""fastfsl: few-shot adapters for CLIP, from a handful of labelled images to a classifier in production.

>>> from fastfsl import Auto, FlowMatchingAlignment    # training, needs the extra `train`
>>> from fastfsl.runtime import Classifier             # production, needs neither torch nor triton

Public names are imported on first use, so that `import fastfsl.runtime` stays light.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastfsl.errors import BundleError, ConfigError, DataError, DeviceError, FastFSLError, ShapeError
    from fastfsl.fit.auto import Auto
    from fastfsl.fit.fma import FlowMatchingAlignment
    from fastfsl.fit.text_readout import TextReadout
    from fastfsl.heads import (
        GDA,
        LinearProbe,
        LPPlusPlus,
        NearestMean,
        ProKeR,
        TipAdapter,
        TipAdapterF,
        ZeroShot,
    )

__all__ = [
    "GDA",
    "Auto",
    "BundleError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "FastFSLError",
    "FlowMatchingAlignment",
    "LPPlusPlus",
    "LinearProbe",
    "NearestMean",
    "ProKeR",
    "ResourceError",
    "ShapeError",
    "TextReadout",
    "TipAdapter",
    "TipAdapterF",
    "ZeroShot",
    "__version__",
]

_HOME = {name: "fastfsl.errors" for name in __all__ if name.endswith("Error")}
_HOME |= {
    "Auto": "fastfsl.fit.auto",
    "FlowMatchingAlignment": "fastfsl.fit.fma",
    "TextReadout": "fastfsl.fit.text_readout",
}
_HOME |= dict.fromkeys(
    ("GDA", "LPPlusPlus", "LinearProbe", "NearestMean", "ProKeR", "TipAdapter", "TipAdapterF", "ZeroShot"),
    "fastfsl.heads",
)


def __getattr__(name: str) -> Any:  # noqa: ANN401  # whatever the name stands for
    """Import a public name on first use (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("fastfsl")
    if name not in _HOME:
        raise AttributeError(f"module 'fastfsl' has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        from fastfsl.errors import ConfigError

        raise ConfigError(f'fastfsl.{name} needs {error.name}: pip install "fastfsl[train]"') from error


def __dir__() -> list[str]:
    """The names that can be had here: help() asks for each one, and must not fail where the training is missing."""
    from importlib.util import find_spec

    trains = all(find_spec(package) is not None for package in ("torch", "scipy", "sklearn"))
    return sorted(name for name in __all__ if trains or _HOME.get(name, "fastfsl.errors") == "fastfsl.errors")
