"""The registry of methods and sources: name, class, and what a preset pins. None is imported before it is asked for.

A method is an estimator on features (`METHODS`), a source that tunes the encoder or its texts (`SOURCES`), or both, the
estimator on what the source made: `mps+fma`.
"""

import difflib
import importlib
import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_type_hints

from fastfsl.errors import ConfigError
from fastfsl.fit.signatures import read_options

if TYPE_CHECKING:
    from fastfsl.fit.estimator import Estimator
    from fastfsl.fit.source import Source

DEFAULT_METHOD = "auto"

# Given by who makes an estimator, to those whose constructor takes them, and not among a method's own parameters.
RESERVED = ("logit_scale", "seed", "device", "normalized")

# A parameter of every estimator for scikit-learn's meta-estimators, and data: no option, and in no record.
_DATA = "class_embeddings"


@dataclass(frozen=True)
class Method:
    """An estimator or a source that can be asked for by name.

    Attributes:
        name: how `--method` and `compare` call it.
        path: module and class, `module:Class`.
        summary: one line for the user, with the source.
        preset: parameters that the method pins; whoever names one of them wins over the preset.
        before: parameters younger than the run's format, as they were before there was a choice: what a run that does
            not record them was trained with.
        knows_texts: its classifier is made of the classes' texts alone, so that a class can be added by name.
    """

    name: str
    path: str
    summary: str
    preset: Mapping[str, Any] = field(default_factory=dict)
    before: Mapping[str, Any] = field(default_factory=dict)
    knows_texts: bool = False

    @property
    def implementation(self) -> type[Any]:
        """The class, imported when it is asked for."""
        module, _, name = self.path.partition(":")
        cls: type[Any] = getattr(importlib.import_module(module), name)
        return cls

    def parameters(self) -> dict[str, Any]:
        """Types of its own parameters by name; read from the source where that can be, for an import takes seconds."""
        others = (*RESERVED, _DATA)
        types = read_options(self.path, others)
        if types is None:
            cls = self.implementation
            hints = get_type_hints(cls.__init__)
            types = {name: hints[name] for name in inspect.signature(cls).parameters if name not in others}
        return types


_FMA = "fastfsl.fit.fma:FlowMatchingAlignment"

# What a run that does not record how it was trained was trained with.
_FMA_BEFORE = {"warmup": "linear"}
_SOURCE_BEFORE = {"schedule": "update", "final_rate": 0.0, "drop_last": False}

# What all presets share. They choose the step count on the support (the released code does on the test set).
_PUBLISHED = {
    "max_steps": 10,
    "epochs": 200,
    "batch_size": 32,
    "learning_rate": 2e-4,
    "weight_decay": 0.01,
    "warmup_epochs": 1,
    "times_per_batch": None,
    "text_samples": None,
    "num_prototypes": 1,
    "cross_entropy_weight": 0.0,
    "ema_decay": None,
    "precision": "fp32",
    "read_steps": None,
    "solver": "euler",
    "exit_margin": None,
    "exit_velocity": None,
    "num_folds": 2,  # their trainings are long
}

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "auto",
            "fastfsl.fit.auto:Auto",
            "gda, proker, lp++ and fma together, weighted and calibrated on held-out support (arXiv 1706.04599)",
        ),
        Method(
            "zero-shot",
            "fastfsl.heads:ZeroShot",
            "cosines with the class texts (CLIP, arXiv 2103.00020)",
            knows_texts=True,
        ),
        Method(
            "nearest-mean",
            "fastfsl.heads:NearestMean",
            "cosines with the means of the classes (prototypical networks, arXiv 1703.05175)",
        ),
        Method("linear", "fastfsl.heads:LinearProbe", "logistic regression on the features (CLIP, arXiv 2103.00020)"),
        Method(
            "tip-adapter",
            "fastfsl.heads:TipAdapter",
            "zero-shot plus a cache of the support (Tip-Adapter, arXiv 2207.09519)",
        ),
        Method(
            "tip-adapter-f",
            "fastfsl.heads:TipAdapterF",
            "the same with trained keys (Tip-Adapter-F, arXiv 2207.09519)",
        ),
        Method(
            "gda",
            "fastfsl.heads:GDA",
            "zero-shot plus Gaussian discriminant analysis (GDA, arXiv 2402.04087)",
            before={"views": "mean"},
        ),
        Method("proker", "fastfsl.heads:ProKeR", "kernel ridge regression about zero-shot (ProKeR, arXiv 2501.11175)"),
        Method(
            "lp++",
            "fastfsl.heads:LPPlusPlus",
            "linear probe blended with the class texts (LP++, arXiv 2404.02285)",
        ),
        Method(
            "fma",
            _FMA,
            "a flow to targets of text and support, trained briefly (after FMA, arXiv 2510.14543)",
            before=_FMA_BEFORE,
            knows_texts=True,
        ),
        Method(
            "fma-paper",
            _FMA,
            "the flow as published, without its noise: 6 blocks, 200 epochs (FMA, arXiv 2510.14543)",
            {**_PUBLISHED, "num_blocks": 6, "noise": "none", "noise_scale": 1.0, "warmup": "linear"},
            _FMA_BEFORE,
            knows_texts=True,
        ),
        Method(
            "fma-bridge",
            _FMA,
            "the flow as published, with its noise, a bridge to the class text (FMA, arXiv 2510.14543)",
            {**_PUBLISHED, "num_blocks": 6, "noise": "bridge", "noise_scale": 1.0, "warmup": "linear"},
            _FMA_BEFORE,
            knows_texts=True,
        ),
        Method(
            "fma-released",
            _FMA,
            "the flow as in the authors' code: 12 blocks, its own warm-up, no noise unless noise_scale is set "
            "(FMA, arXiv 2510.14543)",
            {**_PUBLISHED, "num_blocks": 12, "noise": "interpolant", "noise_scale": 0.0, "warmup": "released"},
            _FMA_BEFORE,
            knows_texts=True,
        ),
    )
}


_MPS = "fastfsl.fit.mps:MPS"

SOURCES: dict[str, Method] = {
    source.name: source
    for source in (
        Method(
            "mps",
            _MPS,
            "the image tower's upper half, its manifold preserved and sculpted (arXiv 2508.12877)",
            before=_SOURCE_BEFORE,
        ),
        Method(
            "mps-paper",
            _MPS,
            "the same as in the authors' code: texts of the sculpting loss not normalised (arXiv 2508.12877)",
            {
                "alpha": 0.3,
                "learning_rate": 0.002,
                "schedule": "epoch",
                "final_rate": 0.0,
                "weight_decay": 5e-4,
                "warmup_epochs": 1,
                "drop_last": True,
                "sculpting_weight": 0.1,
                "align": "both",
                "gram": "l1",
                "text_norm": False,
            },
            _SOURCE_BEFORE,
        ),
        Method(
            "lora",
            "fastfsl.fit.peft_sources:LoRASource",
            "low-rank updates of both towers' attention (CLIP-LoRA, arXiv 2405.18541)",
            before={**_SOURCE_BEFORE, "scaling": "rank"},
        ),
        Method(
            "clip-adapter",
            "fastfsl.fit.peft_sources:AdapterSource",
            "a small network on the image features (CLIP-Adapter, arXiv 2110.04544)",
            before=_SOURCE_BEFORE,
        ),
        Method(
            "coop",
            "fastfsl.fit.peft_sources:CoOpSource",
            "learned prompts (CoOp, arXiv 2109.01134)",
            before=_SOURCE_BEFORE,
        ),
        Method(
            "cocoop",
            "fastfsl.fit.peft_sources:CoCoOpSource",
            "learned prompts that depend on the image; exports with an estimator after it (CoCoOp, arXiv 2203.05557)",
            before=_SOURCE_BEFORE,
        ),
    )
}

# The estimator of a source by itself.
_READOUT = Method(
    "texts", "fastfsl.fit.text_readout:TextReadout", "the class embeddings that the source leaves", knows_texts=True
)


def find_source(name: object) -> Method | None:
    """The source of a method; None where there is none.

    Raises:
        ConfigError: there is no such method.
    """
    return _parts(name)[0]


def find_method(name: object) -> Method:
    """The estimator of a method: of a source by itself, the read-out by its class embeddings.

    Raises:
        ConfigError: there is no such method.
    """
    return _parts(name)[1]


def check_takes_features(method: str) -> None:
    """Refuse a method that cannot do with a feature file.

    Raises:
        ConfigError: it tunes the encoder.
    """
    if find_source(method) is not None:
        raise ConfigError(
            f"method {method!r} tunes the encoder, and a feature file has none: give it images, or take one of the "
            "methods on features"
        )


def extensible(name: str, weights: object = None) -> bool:
    """Whether a class can be added to a method's classifier by its name alone.

    Args:
        name: of the method.
        weights: of the components that `auto` chose, by name.

    Raises:
        ConfigError: there is no such method.
    """
    method = find_method(name)
    if method.name == "auto" and isinstance(weights, dict):
        return bool(weights) and all(part in METHODS and METHODS[part].knows_texts for part in weights)
    return method.knows_texts


def _parts(name: object) -> tuple[Method | None, Method]:
    if isinstance(name, str):
        if name in METHODS:
            return None, METHODS[name]
        source, plus, estimator = name.partition("+")
        if source in SOURCES and (not plus or estimator in METHODS):
            return SOURCES[source], METHODS[estimator] if plus else _READOUT
    raise ConfigError(
        f"unknown method {name!r}: expected one of {', '.join((*METHODS, *SOURCES))}, or a source and an estimator on "
        "its features, such as mps+fma"
    )


def make_estimator(
    name: str,
    params: Mapping[str, Any] | None = None,
    *,
    logit_scale: float,
    seed: int,
    device: str,
) -> "Estimator":
    """A method's unfitted estimator.

    Args:
        name: a key of `METHODS`, of `SOURCES`, or one of each.
        params: the estimator's own parameters; they win over the preset's.
        logit_scale: exp of CLIP's learned temperature.
        seed: seed of everything random.
        device: torch device, or `auto`.

    Raises:
        ConfigError: there is no such method, or it has no such parameter.
    """
    source = find_source(name)
    normalized = source is None or not source.implementation.blended
    given = {"logit_scale": logit_scale, "seed": seed, "device": device, "normalized": normalized}
    estimator: Estimator = _made(find_method(name), params, given)
    return estimator


def make_source(name: str, params: Mapping[str, Any] | None = None, *, seed: int) -> "Source | None":
    """A method's untrained source; None where it has none.

    Args:
        name: of the method.
        params: the source's own parameters; they win over the preset's.
        seed: seed of everything random.

    Raises:
        ConfigError: there is no such method, or its source has no such parameter.
    """
    method = find_source(name)
    if method is None:
        return None
    source: Source = _made(method, params, {"seed": seed})
    return source


def _made(method: Method, params: Mapping[str, Any] | None, given: Mapping[str, Any]) -> Any:  # noqa: ANN401  # of the class that the method names
    own = {**method.preset, **(params or {})}
    check_names(own, method.parameters(), method.name)
    cls = method.implementation
    taken = inspect.signature(cls).parameters
    return cls(**own, **{key: value for key, value in given.items() if key in taken})


def recorded_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """An estimator's parameters without its data: what a run keeps."""
    return {name: value for name, value in params.items() if name != _DATA}


def own_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """An estimator's or a source's parameters without those that are given by who makes it."""
    return {name: value for name, value in params.items() if name not in (*RESERVED, _DATA)}


def check_names(given: Collection[str], known: Collection[str], method: str) -> None:
    """Refuse an option that there is not, and name the methods that have it or the closest one that there is.

    Args:
        given: options.
        known: options that the method has, and whatever else may be set beside them.
        method: its name.

    Raises:
        ConfigError: naming the first unknown option.
    """
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)  # YAML has keys of any type
            others = [other.name for other in (*METHODS.values(), *SOURCES.values()) if key in other.parameters()]
            if others:
                advice = f"it is an option of {', '.join(others)}"
            elif close:
                advice = f"did you mean {close[0]!r}?"
            else:
                advice = f"expected one of {', '.join(sorted(known))}"
            raise ConfigError(f"unknown option {key!r} for method {method!r}: {advice}")
