"""A classifier's metrics for Prometheus, through the package prometheus_client (extra `metrics`).

>>> from fastfsl.runtime import Classifier  # doctest: +SKIP
>>> from fastfsl.runtime.prometheus import exporter  # doctest: +SKIP
>>> birds = Classifier.load("birds/", on_metrics=exporter("birds"))  # doctest: +SKIP
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from fastfsl.errors import ConfigError
from fastfsl.runtime.metrics import Kind, Metric

if TYPE_CHECKING:
    from types import ModuleType

    from prometheus_client import CollectorRegistry

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Of each metric: its kind, its help text, its labels besides the classifier, and a histogram's upper bounds.
_FAMILIES: dict[str, tuple[Kind, str, tuple[str, ...], tuple[float, ...]]] = {
    "images": ("counter", "Images answered.", (), ()),
    "errors": ("counter", "Images or batches that ended in an error, by its type.", ("kind",), ()),
    "rejections": ("counter", "Requests that a full queue turned away.", (), ()),
    "cancellations": ("counter", "Requests cancelled before their batch began.", (), ()),
    "batch_size": ("histogram", "Images computed at once.", (), _IMAGES),
    "queue_depth": ("gauge", "Requests accepted and not yet answered.", (), ()),
    "queue_wait_seconds": ("histogram", "From a request's acceptance to the start of its batch.", (), _SECONDS),
    "stage_seconds": ("histogram", "Of a stage: decode for an image, the others for a batch.", ("stage",), _SECONDS),
}

# The collectors of a registry: several classifiers in one registry share them and are told apart by a label.
_of_registry: WeakKeyDictionary[CollectorRegistry, dict[str, Any]] = WeakKeyDictionary()
_registering = threading.Lock()


def exporter(classifier: str, registry: CollectorRegistry | None = None) -> Callable[[Metric], None]:
    """What `Classifier.load(on_metrics=...)` is to call, so that a registry knows of it.

    The metrics are called `fastfsl_images_total`, `fastfsl_batch_size`, `fastfsl_stage_seconds` and so on.

    Args:
        classifier: value of the label `classifier`, which tells apart several in one process.
        registry: where the metrics are collected; None: prometheus_client's own.

    Raises:
        ConfigError: prometheus_client is not installed.
    """
    try:
        import prometheus_client
    except ImportError as error:
        raise ConfigError(
            f"metrics for Prometheus need prometheus_client ({error}); pip install 'fastfsl[metrics]'"
        ) from error
    registry = prometheus_client.REGISTRY if registry is None else registry
    with _registering:
        if registry not in _of_registry:
            _of_registry[registry] = _collectors(prometheus_client, registry)
        collectors = _of_registry[registry]

    return _Exporter(classifier, None if registry is prometheus_client.REGISTRY else registry, collectors)


class _Exporter:
    """What `exporter` returns. Pickled, it is that of the other process's own registry."""

    def __init__(self, classifier: str, registry: CollectorRegistry | None, collectors: Mapping[str, Any]) -> None:
        self._classifier = classifier
        self._registry = registry
        self._collectors = collectors

    def __reduce__(self) -> tuple[Callable[..., Callable[[Metric], None]], tuple[Any, ...]]:
        return exporter, (self._classifier, self._registry)

    def __call__(self, metric: Metric) -> None:
        child = self._collectors[metric.name].labels(classifier=self._classifier, **metric.labels)
        if metric.kind == "counter":
            child.inc(metric.value)
        elif metric.kind == "gauge":
            child.set(metric.value)
        else:
            child.observe(metric.value)


def _collectors(prometheus_client: ModuleType, registry: CollectorRegistry) -> dict[str, Any]:
    collectors = {}
    for name, (kind, help_text, labels, buckets) in _FAMILIES.items():
        options: dict[str, Any] = {"buckets": buckets} if buckets else {}
        if name.endswith("_seconds"):
            options["unit"] = "seconds"
        collector = getattr(prometheus_client, kind.capitalize())
        collectors[name] = collector(
            name, help_text, ("classifier", *labels), namespace="fastfsl", registry=registry, **options
        )
    return collectors
