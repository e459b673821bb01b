"""From an estimator's deployment to the read-out that a bundle holds."""

import numpy as np

from fastfsl.bundle import KernelArrays, Readout
from fastfsl.errors import BundleError
from fastfsl.fit.deployment import Deployment
from fastfsl.heads import KernelForm


def has_flow(deployment: Deployment) -> bool:
    """Whether the flow has a part in the logits."""
    return deployment.plan is not None and deployment.flow_weight != 0


def deployed_readout(deployment: Deployment) -> Readout | None:
    """All linear parts in one, the kernels that add something, and what is done to the sum.

    Args:
        deployment: of a fitted estimator.

    Returns:
        The read-out, rounded to float32; None where the logits are simply the flow's.

    Raises:
        BundleError: there is neither a flow nor a form.
        DataError: a value is not finite in float32, or out of its range.
    """
    flow, forms = has_flow(deployment), deployment.forms
    if flow and not forms and (deployment.flow_weight, deployment.temperature, deployment.threshold) == (1, 1, None):
        return None
    linears = [form.linear if isinstance(form, KernelForm) else form for form in forms]
    like = linears[0].weight if linears else deployment.class_embeddings
    if like is None or not (flow or forms):
        raise BundleError("expected an estimator with a flow or forms, got a deployment with neither: report this")
    shape = (len(like), like.shape[-1])
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    kernels = [
        KernelArrays(form.keys.astype(np.float32), form.values.astype(np.float32), float(form.beta))
        for form in forms
        if isinstance(form, KernelForm)
    ]
    return Readout(
        flow_weight=float(deployment.flow_weight) if flow else 0.0,
        linear_weight=np.sum([np.zeros(shape), *weights], axis=0).astype(np.float32),
        linear_bias=np.sum([np.zeros(shape[0]), *biases], axis=0).astype(np.float32),
        kernels=tuple(kernel for kernel in kernels if kernel.values.any()),
        temperature=float(deployment.temperature),
        threshold=None if deployment.threshold is None else float(deployment.threshold),
    )
