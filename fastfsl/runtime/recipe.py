"""How a classifier was loaded, so that another process can load the same one again."""

from __future__ import annotations

import logging
import os
import pickle  # noqa: TID251  # only written, and thrown away, to see whether a callback can be: nothing is unpickled
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfsl.errors import BundleError
from fastfsl.runtime.loading import Loaded, load_bundle

if TYPE_CHECKING:
    from fastfsl.runtime.classifier import Classifier
    from fastfsl.runtime.metrics import Metric

AddedClass = tuple[str, Sequence[str] | None]

_log = logging.getLogger("fastfsl.runtime")


@dataclass(frozen=True)
class Recipe:
    """A bundle's folder, what must be in it, and the options.

    Args:
        path: the folder, absolute: another process may have another working directory.
        digest: of the bundle that was loaded.
        options: of `Classifier.load`, as plain values; alpha is the weight that was used.
        on_metrics: the callback, or None.
    """

    path: Path
    digest: str
    options: Mapping[str, Any]
    on_metrics: Callable[[Metric], None] | None

    @classmethod
    def of(
        cls,
        loaded: Loaded,
        path: str | os.PathLike[str],
        options: Mapping[str, Any],
        on_metrics: Callable[[Metric], None] | None,
    ) -> Recipe:
        """The recipe of a bundle that was just loaded."""
        blend = loaded.origin["blend"]
        alpha = None if blend is None else blend["alpha"]
        return cls(Path(path).absolute(), loaded.origin["digest"], {**options, "alpha": alpha}, on_metrics)

    def load_again(self, origin: Mapping[str, Any]) -> Loaded:
        """The same bundle, loaded in this process.

        Args:
            origin: of the one that was loaded.

        Raises:
            BundleError: it was altered or removed.
        """
        options = {name: value for name, value in self.options.items() if name not in ("max_batch", "warm_up")}
        try:
            loaded = load_bundle(self.path, **options, expected_digest=self.digest)
        except BundleError as error:
            raise BundleError(f"{_CHANGED}: {error}") from error
        return replace(loaded, origin={**loaded.origin, "bundle": origin["bundle"]})

    def copied(self, kind: type[Classifier], added: Sequence[AddedClass]) -> Classifier:
        """The same classifier once more, in this process."""
        return unpickled(kind, str(self.path), self.digest, self.options, added, self.on_metrics)

    def pickled(self, kind: type[Classifier], added: Sequence[AddedClass]) -> tuple[Callable[..., Classifier], Any]:
        """What pickle makes the same classifier of."""
        on_metrics = self.on_metrics if can_be_pickled(self.on_metrics) else None
        if on_metrics is not self.on_metrics:
            _log.warning(
                "the classifier is pickled without on_metrics=%r, which cannot be pickled: give a function of a module "
                "to have its metrics in other processes too",
                self.on_metrics,
            )
        return unpickled, (kind, str(self.path), self.digest, dict(self.options), tuple(added), on_metrics)


_CHANGED = "the classifier's bundle was altered or removed after it was loaded, and this process has to load it again"


def unpickled(
    kind: type[Classifier],
    path: str,
    digest: str,
    options: Mapping[str, Any],
    added: Sequence[AddedClass],
    on_metrics: Callable[[Metric], None] | None,
) -> Classifier:
    """A classifier as it was when it was pickled or copied.

    Raises:
        BundleError: its bundle was altered, or is not there.
        DeviceError: there is no CUDA here, and it was asked for.
    """
    try:
        classifier = kind.load(path, **options, expected_digest=digest, on_metrics=on_metrics)
    except BundleError as error:
        raise BundleError(f"{_CHANGED}: {error}") from error
    for name, prompts in added:
        classifier.add_class(name, prompts)
    return classifier


def can_be_pickled(thing: object) -> bool:
    """Whether pickle takes it, which it says only when it is asked to do so."""
    try:
        pickle.dumps(thing)
    except Exception:  # noqa: BLE001 - objects raise anything when they are pickled
        return False
    return True
