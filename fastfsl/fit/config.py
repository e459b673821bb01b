"""The configuration of a training: a YAML file, command-line flags that win over it, and the method's parameters."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from fastfsl.data import ClassSelection, Columns, FeatureDataset, ImageDataset, load_dataset, select_classes
from fastfsl.errors import ConfigError, resource_error
from fastfsl.fit.methods import (
    DEFAULT_METHOD,
    Method,
    check_names,
    find_method,
    find_source,
    make_estimator,
    make_source,
)
from fastfsl.fit.option_ranges import check_ranges

if TYPE_CHECKING:  # either would import torch, and a wrong option is to be told before that
    from fastfsl.fit.estimator import Estimator
    from fastfsl.fit.source import Source

# numpy's and scikit-learn's random states take 32 bits.
_MAX_SEED = 2**32 - 1


class TrainConfig(BaseModel):
    """Everything that decides a run, as it is stored with the run.

    Attributes:
        method: a key of `METHODS`, of `SOURCES`, or a source and an estimator on its features (`mps+fma`).
        shots: most images per class, drawn by `seed`; None takes all of the train split.
        exact_shots: refuse classes with fewer images than `shots`.
        seed: seed of the episode, the augmented views and the training.
        classes: `all`, `base` (the first half of the classes, rounded up) or `new` (the rest).
        backbone: open_clip architecture, `local-dir:PATH`, `hf-hub:NAME`, or `tiny-clip`.
        pretrained: open_clip tag or a local checkpoint file.
        templates: a preset's name, one template or several, each with `{}` for the class name.
        num_views: augmented views of each support image whose features are cached.
        augmentation: options of `fastfsl.encoders.Augmentation`.
        image_root: folder that the paths of a split file or table are relative to.
        path_column: of a table, the column of the image files; None guesses it, as the next two.
        label_column: of a table, the column of the classes.
        split_column: of a table, the column that says train, val or test.
        strict: refuse data of which files would be skipped that may have been meant.
        device: `auto`, `cpu` or `cuda`.
        params: the estimator's own parameters, by name: those of the method's preset and those that were given.
        source_params: the source's, likewise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = DEFAULT_METHOD
    shots: int | None = Field(default=None, ge=1)
    exact_shots: bool = False
    seed: int = Field(default=0, ge=0, le=_MAX_SEED)
    classes: ClassSelection = "all"
    backbone: str = "ViT-B-16"
    pretrained: str | None = None
    templates: str | list[str] = "generic"
    num_views: int = Field(default=8, ge=1)
    augmentation: dict[str, Any] = Field(default_factory=dict)
    image_root: str | None = None
    path_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    strict: bool = False
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    params: dict[str, Any] = Field(default_factory=dict)
    source_params: dict[str, Any] = Field(default_factory=dict)

    def dataset(self, data: Path) -> ImageDataset | FeatureDataset:
        """The data set at a path, read as configured, with the classes that are to be learnt.

        Errors as for `fastfsl.data.load_dataset` and `select_classes`.
        """
        columns = Columns(self.path_column, self.label_column, self.split_column)
        return select_classes(load_dataset(data, self.image_root, columns), self.classes)

    def source(self) -> "Source | None":
        """The method's untrained source; None where it has none."""
        return make_source(self.method, self.source_params, seed=self.seed)

    def estimator(self, *, logit_scale: float) -> "Estimator":
        """The method's unfitted estimator."""
        return make_estimator(self.method, self.params, logit_scale=logit_scale, seed=self.seed, device=self.device)

    def check_options(self) -> None:
        """Refuse options of the method that its estimator or its source cannot work with.

        Raises:
            ConfigError: naming the option.
        """
        self.source()  # checks when it is made
        self.estimator(logit_scale=100.0).check_parameters()


def load_config(path: Path | None = None, flags: dict[str, Any] | None = None) -> TrainConfig:
    """Resolve a configuration: defaults, then the YAML file, then flags.

    The file is flat: keys are `TrainConfig`'s own or the method's parameters (`num_blocks`, `epochs`, ...). Those of a
    source and an estimator stand under the names of the two where both have them: `mps: {epochs: 50}`.

    Args:
        path: YAML file, or None.
        flags: values by key; None stands for "not given".

    Raises:
        ConfigError: if the file cannot be read, a key is unknown or a value is out of its range.
    """
    values = {**read_yaml(path), **{key: value for key, value in (flags or {}).items() if value is not None}}
    own = set(TrainConfig.model_fields) - {"params", "source_params"}
    given = {key: value for key, value in values.items() if key not in own}
    try:
        params, source_params = method_params(values.get("method", DEFAULT_METHOD), given, own)
        return TrainConfig(
            **{key: values[key] for key in values if key in own}, params=params, source_params=source_params
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"option {'.'.join(map(str, first['loc']))!r}: {first['msg']}, got {first['input']!r}"
        ) from error


def method_params(
    name: object, given: Mapping[str, Any], others: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of a method's estimator and of its source ({} without one): the presets' and those given.

    Args:
        name: of the method.
        given: parameters by name, or by section as `load_config` takes them.
        others: options that may be set beside them, for advice on an unknown one.

    Raises:
        ConfigError: there is no such method or parameter, or it is not clear whose it is.
        ValidationError: a value is of another type; its title is the part of the method that it was given to.
    """
    method, source = find_method(name), find_source(name)
    for_source, for_method = ({}, given) if source is None else _shared_out(given, source, method)
    for part, options in ((source, for_source), (method, for_method)):
        if part is not None:
            check_names(options, {*others, *part.parameters()}, part.name)
    return (
        typed_params(method, {**method.preset, **for_method}),
        {} if source is None else typed_params(source, {**source.preset, **for_source}),
    )


def check_params(name: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`method_params`, with every mistake told as one of ours.

    Raises:
        ConfigError: there is no such method or parameter, or a value is of another type.
    """
    try:
        return method_params(name, given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, dict.fromkeys((name, error.title, *first["loc"]))))
        raise ConfigError(f"option {place!r}: {first['msg']}, got {first['input']!r}") from error


def _shared_out(given: Mapping[str, Any], source: Method, method: Method) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the source and of the estimator: by section, and else by whose they can only be."""
    for_source: dict[str, Any] = {}
    for_method: dict[str, Any] = {}
    for key, value in given.items():
        for part, options in ((source, for_source), (method, for_method)):
            if key == part.name:
                if not isinstance(value, dict):
                    raise ConfigError(f"expected options under {key!r}, got {value!r}")
                options.update(value)
                break
        else:
            if key in method.parameters() and key in source.parameters():
                raise ConfigError(
                    f"option {key!r} is one of {source.name} and of {method.name}: put it under the name of the one "
                    f"that is meant, as {source.name}: {{{key}: {value}}}"
                )
            (for_method if key in method.parameters() else for_source)[key] = value
    return for_source, for_method


def typed_params(method: Method, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in the types of its signature: YAML reads 2e-4 as text, JSON a tuple as a list.

    Raises:
        ConfigError: if the method has no such parameter, or a number is out of its range.
        ValidationError: if a value is of another type, or infinite or NaN, which no JSON file could keep.
    """
    types = method.parameters()
    check_names(params, types, method.name)
    fields: dict[str, Any] = {name: (types[name], ...) for name in params}
    finite = ConfigDict(allow_inf_nan=False)
    checked: BaseModel = create_model(method.name, __config__=finite, **fields)(**params)
    values = checked.model_dump()
    check_ranges(values)
    return values


def read_yaml(path: Path | None) -> dict[str, Any]:
    """What a YAML file of options holds; nothing for None.

    Raises:
        ConfigError: if the file cannot be read or holds no mapping from names.
    """
    if path is None:
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise resource_error(error, f"read {path}") or ConfigError(
            f"cannot read the configuration {path}: {error}"
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"expected {path} to hold `option: value` lines, got {type(values).__name__}")
    return values
