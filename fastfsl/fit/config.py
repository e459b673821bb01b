"""The configuration of a training: a YAML file, command-line flags that win over it, and the method's parameters."""

import difflib
import inspect
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from fastfsl.errors import ConfigError
from fastfsl.fit.fma import FlowMatchingAlignment

METHODS: dict[str, type[FlowMatchingAlignment]] = {"fma": FlowMatchingAlignment}

# Set by the training itself, from the configuration's own `seed` and `device` and from the encoder.
_RESERVED = ("seed", "device", "logit_scale")

# numpy's and scikit-learn's random states take 32 bits.
_MAX_SEED = 2**32 - 1


class TrainConfig(BaseModel):
    """Everything that decides a run, as it is stored with the run.

    Attributes:
        method: a key of `METHODS`.
        shots: images a class, drawn by `seed`; None takes all of the train split.
        seed: seed of the episode, the augmented views and the training.
        backbone: open_clip architecture, `local-dir:PATH`, `hf-hub:NAME`, or `tiny-clip`.
        pretrained: open_clip tag or a local checkpoint file.
        templates: a preset's name, one template or several, each with `{}` for the class name.
        num_views: augmented views of each support image whose features are cached.
        augmentation: options of `fastfsl.encoders.Augmentation`.
        image_root: folder that a split file's paths are relative to.
        device: `auto`, `cpu` or `cuda`.
        params: the estimator's own parameters, by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = "fma"
    shots: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, le=_MAX_SEED)
    backbone: str = "ViT-B-16"
    pretrained: str | None = None
    templates: str | list[str] = "generic"
    num_views: int = Field(default=8, ge=1)
    augmentation: dict[str, Any] = Field(default_factory=dict)
    image_root: str | None = None
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    params: dict[str, Any] = Field(default_factory=dict)

    def estimator(self, *, logit_scale: float) -> FlowMatchingAlignment:
        """The method's unfitted estimator."""
        return METHODS[self.method](**self.params, logit_scale=logit_scale, seed=self.seed, device=self.device)


def load_config(path: Path | None = None, flags: dict[str, Any] | None = None) -> TrainConfig:
    """Resolve a configuration: defaults, then the YAML file, then flags.

    The file is flat: keys are `TrainConfig`'s own or the estimator's parameters (`num_blocks`, `epochs`, ...).

    Args:
        path: YAML file, or None.
        flags: values by key; None stands for "not given".

    Raises:
        ConfigError: if the file cannot be read, a key is unknown or a value is out of its range.
    """
    values = {**_read_yaml(path), **{key: value for key, value in (flags or {}).items() if value is not None}}
    method = values.get("method", "fma")
    if not isinstance(method, str) or method not in METHODS:
        raise ConfigError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    own = set(TrainConfig.model_fields) - {"params"}
    known = {name for name in inspect.signature(METHODS[method]).parameters if name not in _RESERVED}
    unknown = [key for key in values if key not in own | known]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), own | known, n=1)
        advice = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(sorted(own | known))}"
        raise ConfigError(f"unknown option {unknown[0]!r} for method {method!r}: {advice}")
    try:
        params = _checked_params(method, {key: value for key, value in values.items() if key in known})
        return TrainConfig(**{key: value for key, value in values.items() if key in own}, params=params)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"option {'.'.join(map(str, first['loc']))!r}: {first['msg']}, got {first['input']!r}"
        ) from error


def _checked_params(method: str, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters in the types of the estimator's signature: YAML reads 2e-4 as text, for one.

    Raises:
        ValidationError: if a value is of another type.
    """
    types = get_type_hints(METHODS[method].__init__)
    fields: dict[str, Any] = {name: (types[name], ...) for name in params}
    checked: BaseModel = create_model("Parameters", **fields)(**params)
    return checked.model_dump()


def _read_yaml(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"expected {path} to hold `option: value` lines, got {type(values).__name__}")
    return values
