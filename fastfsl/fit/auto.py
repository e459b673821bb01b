"""`auto`: heads and flow together, weighted and calibrated on held-out support."""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax, softmax
from sklearn.model_selection import KFold

from fastfsl.arrays import as_array, check_logit_scale, numbers
from fastfsl.data.scoring import calibration_error
from fastfsl.errors import ConfigError, DataError
from fastfsl.fit.estimator import StageCallback
from fastfsl.fit.fma import FlowMatchingAlignment
from fastfsl.heads import GDA, ClassEmbeddings, FromLogits, Head, LPPlusPlus, ProKeR, also_named
from fastfsl.heads.blending import fit_weights, wrong_class_spread
from fastfsl.heads.form import Array
from fastfsl.heads.support import Labels, Support, check_support, with_centred_texts

# With one image a class nothing can be held out, so these shares are fixed. They were chosen on images that one-shot
# episodes leave over (benchmarks/text_frames.py).
ONE_SHOT_SHARES = {"lp++": 0.3, "fma": 0.7}

_HEADS: dict[str, type[Head]] = {"gda": GDA, "proker": ProKeR, "lp++": LPPlusPlus}
_FLOW = "fma"
_CALIBRATION_FOLDS = 4
_Z_95 = 1.96

# Held-out logits that are wrong more often than by chance have no likeliest temperature. At this one they are flat, and
# classes are still told apart in float32.
_MAX_TEMPERATURE = 1000.0


@dataclass(frozen=True)
class AutoSelection:
    """How the components were put together, and the evidence for it.

    Attributes:
        rule: `folds` (held-out support) or `one-shot` (`ONE_SHOT_SHARES`).
        weights: factor on the logits of each component that has any.
        temperature: divides their sum.
        threshold: probability of the best class below which the answer is "none of these"; None: not asked for.
        log_likelihood: mean log-probability of the right class on held-out support, weights and temperature fitted on
            other samples, nats; NaN under the one-shot rule.
        accuracy: likewise, fraction.
        calibration_error: likewise, expected calibration error of the best class's probability over 15 bins.
        coverage: likewise, fraction of samples that the threshold lets through; NaN without one.
        components: each component's own selection, as its record.
    """

    rule: Literal["folds", "one-shot"]
    weights: dict[str, float]
    temperature: float = 1.0
    threshold: float | None = None
    log_likelihood: float = float("nan")
    accuracy: float = float("nan")
    calibration_error: float = float("nan")
    coverage: float = float("nan")
    components: dict[str, dict[str, Any]] = field(default_factory=dict)


class Auto(FromLogits):
    """The sum of calibrated logits of GDA, ProKeR, LP++ and a flow, each in turn zero-shot plus what it has learned.

        logits = Σ_j w_j · logits_j / T.
    Every component gives logits for each support sample from the fold that held it out. w maximises their likelihood,
    drawn to equal shares as by one sample; T is then fitted on samples that w was not, with a margin. At one shot,
    where nothing can be held out, the shares are fixed (`ONE_SHOT_SHARES`), and wrong classes' logits get the spread
    on the support that they have in the flow, whose size the texts alone tell. The heads' zero-shot part is that of
    centred texts (`with_centred_texts`).

    Args:
        components: which to use, of `gda`, `proker`, `lp++` and `fma`.
        target_precision: share of right answers among those given, in (0, 1), that the threshold for "none of these"
            is chosen for; None: there is no threshold.
        logit_scale: scale of the zero-shot cosines; None means 100.
        seed: seed of everything random.
        device: torch device of the flow, or `auto`.
        class_embeddings: of the classes, where `fit` is given none: as a meta-estimator of scikit-learn calls it.

    Attributes:
        components_: the fitted components by name.
        selection_: weights, temperature and threshold with the evidence (`AutoSelection`).
        classes_: the classes, ascending; see `fit`.
        n_features_in_: width of the features.
        held_out_: probabilities and labels behind `selection_`'s figures; None at one shot. A restored one has none.
        train_seconds_: wall-clock time of `fit`.

    Source: stacking with non-negative weights (Wolpert 1992; Breiman 1996); temperature: Guo et al. (arXiv 1706.04599).
    """

    def __init__(
        self,
        *,
        components: tuple[str, ...] = ("gda", "proker", "lp++", "fma"),
        target_precision: float | None = None,
        logit_scale: float | None = None,
        seed: int = 0,
        device: str = "cpu",
        class_embeddings: ClassEmbeddings = None,
    ) -> None:
        self.components = components
        self.target_precision = target_precision
        self.logit_scale = logit_scale
        self.seed = seed
        self.device = device
        self.class_embeddings = class_embeddings

    @also_named(features="X", labels="y")
    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        class_embeddings: ClassEmbeddings = None,
        *,
        class_names: Sequence[Any] | None = None,
        plain_features: ArrayLike | None = None,
        on_stage: StageCallback | None = None,
    ) -> Self:
        """Fit the components, then weigh and calibrate them on what each had held out.

        Args:
            X: image features, (n, d), or of V augmented views of each image, (n, V, d); any length.
            y: labels, (n,): texts, numbers or bools. Whole numbers in 0 .. C-1 are indices of rows of
                `class_embeddings`; of other labels the rows follow the distinct ones in ascending order.
            class_embeddings: text features, (C, d), any length, or a vector by class; by default the constructor's.
                Without any the support alone decides.
            class_names: the class of each row, where neither rule is meant. A class that is named may have no sample.
            plain_features: features of the same images as they will be classified (not augmented), (n, d).
            on_stage: called with (name of the stage, units done, units in all).

        Returns:
            The estimator.

        Raises:
            ShapeError: if the shapes do not fit together.
            DataError: if a value is not finite, a row is zero, labels and rows cannot be matched, a class has no
                sample, or a threshold is asked for where nothing can be held out.
            ConfigError: if a parameter is out of its range.
        """
        start = time.perf_counter()
        self.check_parameters()
        self.components_ = self._unfitted()
        texts = self.class_embeddings if class_embeddings is None else class_embeddings
        support = check_support(X, y, texts, plain_features, class_names)
        self._keep_columns(X, reset=True)
        centred = with_centred_texts(support)
        held_out: dict[str, Array] = {}
        for index, (name, component) in enumerate(self.components_.items()):
            if isinstance(component, Head):
                if on_stage is not None:
                    on_stage("heads", index, sum(other in _HEADS for other in self.components))
                logits = component.fit_support(centred).selection_.held_out
            else:
                component.fit(
                    as_array(X, "features"),
                    support.given.labels,
                    support.given.class_embeddings,
                    class_names=range(support.num_classes),
                    plain_features=plain_features,
                    on_stage=on_stage,
                )
                logits = _in_order(component.selection_.held_out, support)
            if logits is not None:
                held_out[name] = logits
            elif self.target_precision is not None:  # told before the flow is trained
                raise DataError(
                    "expected two samples or more in most classes to choose a threshold for target_precision on, got "
                    "one: leave target_precision out, or add images"
                )
        if len(held_out) < len(self.components_):
            self.held_out_: tuple[Array, Labels] | None = None
            self.selection_ = AutoSelection("one-shot", self._one_shot_weights(support), components=self._records())
        else:
            self.selection_ = self._weigh(held_out, support.labels)
        self.components_ = {name: self.components_[name] for name in self.selection_.weights}
        self.n_features_in_ = support.features.shape[1]
        self.classes_ = support.given.names
        self.train_seconds_ = time.perf_counter() - start
        return self

    @also_named(features="X")
    def logits(self, X: ArrayLike) -> Array:
        """Logits, (n, C), calibrated: their softmax is what the classifier believes."""
        self._check_fitted()
        rows = numbers(X, "features")
        if rows.ndim == 2:
            self._check_width(rows.shape[1])
        self._keep_columns(X, reset=False)
        weighted = [
            weight * self.components_[name].logits(rows).astype(np.float64)
            for name, weight in self.selection_.weights.items()
        ]
        total: Array = np.sum(weighted, axis=0) / self.selection_.temperature
        return total

    @property
    def num_parameters_(self) -> int:
        """Numbers that the components' fits determined."""
        return sum(component.num_parameters_ for component in self.components_.values())

    def selection_record(self) -> dict[str, Any]:
        """Weights, temperature, threshold and the components' own selections, as JSON values."""
        return {name: None if value != value else value for name, value in vars(self.selection_).items()}  # noqa: PLR0124  # NaN

    def state(self) -> dict[str, NDArray[Any]]:
        """The components' arrays, each under the component's name."""
        arrays = {
            f"{name}/{key}": array
            for name, component in self.components_.items()
            for key, array in component.state().items()
        }
        return arrays | self._class_state()

    def restore(self, state: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> Self:
        """Make the estimator fitted again from `state()` and `selection_record()`.

        Raises:
            DataError: they are not those of an `Auto` with these components.
        """
        self.components_ = self._unfitted()
        try:
            values: dict[str, Any] = {
                name: float("nan") if value is None and name != "threshold" else value for name, value in record.items()
            }
            selection = AutoSelection(**values)
            self.components_ = {name: self.components_[name] for name in selection.weights}
            for name, component in self.components_.items():
                own = {key.removeprefix(f"{name}/"): state[key] for key in state if key.startswith(f"{name}/")}
                component.restore(own, selection.components[name])
                self.n_features_in_ = component.n_features_in_
            self._restore_classes(state, len(component.classes_))
        except (KeyError, TypeError) as error:
            raise DataError(f"expected a run of {', '.join(self.components)}, got another: train it again") from error
        self.selection_ = selection
        return self

    def check_parameters(self) -> None:
        """Refuse parameters out of their range, as `fit` does.

        Raises:
            ConfigError: naming the parameter.
        """
        self._unfitted()
        check_logit_scale(self.logit_scale)

    def _unfitted(self) -> dict[str, Head | FlowMatchingAlignment]:
        known = (*_HEADS, _FLOW)
        if not self.components or len(set(self.components)) != len(self.components):
            raise ConfigError(f"expected components, each once, of {', '.join(known)}, got {self.components}")
        unknown = [name for name in self.components if name not in known]
        if unknown:
            raise ConfigError(f"unknown component {unknown[0]!r}: expected some of {', '.join(known)}")
        if self.target_precision is not None and not 0 < self.target_precision < 1:
            raise ConfigError(f"expected target_precision between 0 and 1, got {self.target_precision}")
        common: dict[str, Any] = {"logit_scale": self.logit_scale, "seed": self.seed}
        return {
            name: FlowMatchingAlignment(**common, device=self.device) if name == _FLOW else _HEADS[name](**common)
            for name in self.components
        }

    def _weigh(self, held_out: dict[str, Array], labels: Labels) -> AutoSelection:
        stacked = np.stack(list(held_out.values()))
        rows = np.flatnonzero(np.isfinite(stacked).all(axis=(0, 2)))
        parts, right = stacked[:, rows], labels[rows]
        crossed = np.empty_like(parts[0])
        for kept, left in KFold(min(_CALIBRATION_FOLDS, len(rows)), shuffle=True, random_state=self.seed).split(rows):
            crossed[left] = np.tensordot(_share(parts[:, kept], right[kept]), parts[:, left], axes=1)
        temperature = _temperature(crossed, right)
        probabilities = softmax(crossed / temperature, axis=1)
        best = probabilities.max(axis=1)
        is_right = probabilities.argmax(axis=1) == right
        threshold = None if self.target_precision is None else _threshold(best, is_right, self.target_precision)
        self.held_out_ = (probabilities, right)
        weights = dict(zip(held_out, _share(parts, right).tolist(), strict=True))
        return AutoSelection(
            "folds",
            {name: weight for name, weight in weights.items() if weight > 0},
            temperature=float(temperature),
            threshold=threshold,
            log_likelihood=float(log_softmax(crossed / temperature, axis=1)[np.arange(len(right)), right].mean()),
            accuracy=float(is_right.mean()),
            calibration_error=calibration_error(probabilities, right),
            coverage=float("nan") if threshold is None else float((best >= threshold).mean()),
            components=self._records(),
        )

    def _records(self) -> dict[str, dict[str, Any]]:
        return {name: component.selection_record() for name, component in self.components_.items()}

    def _one_shot_weights(self, support: Support) -> dict[str, float]:
        shares = {name: share for name, share in ONE_SHOT_SHARES.items() if name in self.components_}
        shares = shares or dict.fromkeys(self.components_, 1.0)
        every_class = np.ones((len(support.labels), support.num_classes), dtype=np.bool_)
        logits = {name: self.components_[name].logits(support.plain).astype(np.float64) for name in shares}
        spread = {name: wrong_class_spread(logits[name], support.labels, every_class) for name in shares}
        aim = spread.get(_FLOW, float(np.mean(list(spread.values()))))
        return {name: share / sum(shares.values()) * aim / spread[name] for name, share in shares.items()}


def _in_order(rows: NDArray[np.float32] | None, support: Support) -> Array | None:
    """The flow's held-out logits in the support's order; NaN for samples that stand in for a class without any."""
    if rows is None:
        return None
    given = np.full((len(support.order), support.num_classes), np.nan)
    given[: len(rows)] = rows
    return given[support.order]


def _share(parts: Array, labels: Labels) -> Array:
    """Weights of calibrated logits (J, n, C), drawn to 1/J times the factor that calibrates each by itself."""
    alone = np.array([fit_weights(part[None], labels, np.ones(1))[0] for part in parts])
    return fit_weights(parts, labels, np.maximum(alone, 1e-6) / len(parts))


def _temperature(logits: Array, labels: Labels) -> float:
    """The upper end of the 95 % interval of the likeliest temperature, a quarter above it at most.

    The components' settings were chosen on the same samples, so that what is wrong is wrong on the confident side.
    """
    inverse = float(fit_weights(logits[None], labels, np.ones(1))[0])
    probabilities = softmax(inverse * logits, axis=1)
    mean = (probabilities * logits).sum(axis=1, keepdims=True)
    information = float((probabilities * (logits - mean) ** 2).sum())
    lower = inverse - _Z_95 / np.sqrt(information) if information > 0 else inverse
    return 1.0 / max(lower, inverse / 1.25, 1.0 / _MAX_TEMPERATURE)


def _threshold(best: Array, is_right: NDArray[np.bool_], target_precision: float) -> float:
    """The lowest held-out probability from which on the share of right answers reaches the target."""
    order = np.argsort(-best, kind="stable")
    precision = np.cumsum(is_right[order]) / np.arange(1, len(order) + 1)
    last_of_equals = np.append(np.diff(best[order]) < 0, True)
    reached = np.flatnonzero(last_of_equals & (precision >= target_precision))
    if not reached.size:
        reached = np.flatnonzero(last_of_equals & (precision == precision[last_of_equals].max()))
        warnings.warn(
            f"no threshold reaches a precision of {target_precision:g} on the held-out support: the chosen one reaches "
            f"{precision[reached[-1]]:.3f}",
            UserWarning,
            stacklevel=4,
        )
    return float(best[order][reached[-1]])
