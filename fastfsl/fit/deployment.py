"""What a fitted estimator comes down to when it is deployed: a flow, forms on its source features, and a read-out."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fastfsl.errors import ConfigError
from fastfsl.fit.auto import Auto
from fastfsl.fit.estimator import Estimator
from fastfsl.fit.fma import FlowMatchingAlignment
from fastfsl.fit.text_readout import TextReadout
from fastfsl.flow.plan import FlowPlan
from fastfsl.heads import Head, KernelForm, LinearForm


@dataclass(frozen=True)
class Deployment:
    """All that has to be computed for a feature x, of unit length but for a blend that its texts alone read.

        logits(x) = (flow_weight · flow_logits(x) + Σ_j form_j(x)) / temperature.

    With one read step M the flow's logits are logit_scale · cos(x_M, class embeddings); with several,
    log mean_k softmax(logit_scale · cos(x_k, class embeddings)). Of a class with several prototypes the largest cosine
    counts.

    Attributes:
        forms: weighted already.
        plan: the flow; None: there is none, and what belongs to it is empty.
        class_embeddings: what the flow is read out with, L2-normalised, (C, d), or (C, K, d) with K prototypes a
            class, float32.
        logit_scale: factor on the flow's cosines.
        read_steps: Euler steps whose probabilities are averaged, ascending, the last one M.
        flow_weight: weight of the flow's logits.
        temperature: divides the logits.
        threshold: probability of the best class below which the answer is "none of these"; None: there is always one.
    """

    forms: tuple[LinearForm | KernelForm, ...] = ()
    plan: FlowPlan | None = None
    class_embeddings: NDArray[np.float32] | None = None
    logit_scale: float = 100.0
    read_steps: tuple[int, ...] = ()
    flow_weight: float = 0.0
    temperature: float = 1.0
    threshold: float | None = None


def deployment(estimator: Estimator) -> Deployment:
    """The deployment of a fitted estimator.

    Raises:
        ConfigError: it is no estimator of this package.
    """
    if isinstance(estimator, Head | TextReadout):
        return Deployment((estimator.form_,))
    if isinstance(estimator, FlowMatchingAlignment):
        return flow_deployment(estimator)
    if isinstance(estimator, Auto):
        return _auto_deployment(estimator)
    raise ConfigError(f"expected an estimator of fastfsl, got {type(estimator).__name__}")


def flow_deployment(estimator: FlowMatchingAlignment) -> Deployment:
    """The deployment of a flow by itself, with its fixed number of Euler steps whatever its early exit is.

    Raises:
        ConfigError: it is solved otherwise than by Euler steps.
    """
    if estimator.solver != "euler":
        raise ConfigError(f"expected solver 'euler' for a deployment, got {estimator.solver!r}: a plan is Euler steps")
    return Deployment(
        plan=estimator.plan_.to("cpu"),
        class_embeddings=estimator.class_targets_.cpu().numpy(),
        logit_scale=estimator.logit_scale_,
        read_steps=estimator.read_steps_,
        flow_weight=1.0,
    )


def _auto_deployment(estimator: Auto) -> Deployment:
    selection = estimator.selection_
    parts = Deployment()
    forms: list[LinearForm | KernelForm] = []
    for name, component in estimator.components_.items():
        if isinstance(component, Head):
            forms.append(component.form_.scaled(selection.weights[name]))
        else:
            parts = replace(flow_deployment(component), flow_weight=selection.weights[name])
    return replace(parts, forms=tuple(forms), temperature=selection.temperature, threshold=selection.threshold)
