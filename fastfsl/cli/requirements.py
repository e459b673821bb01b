"""Commands that need more than the runtime say which extra brings it."""

from importlib.util import find_spec

from fastfsl.errors import ConfigError

_TRAINING = ("torch", "open_clip", "sklearn", "pydantic", "yaml", "PIL", "matplotlib")
_EXPORT = (*_TRAINING, "onnx", "onnxscript", "onnxruntime")


def require_training() -> None:
    """Refuse to go on without the packages of the extra `train`."""
    _require(_TRAINING, "train")


def require_export() -> None:
    """Refuse to go on without the packages of the extras `export` and `cpu` or `gpu`."""
    _require(_EXPORT, "export,cpu")


def _require(modules: tuple[str, ...], extras: str) -> None:
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ConfigError(f'this command needs {", ".join(missing)}: pip install "fastfsl[{extras}]"')
