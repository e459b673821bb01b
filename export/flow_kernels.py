"""The flow's compiled kernels as a part of the bundle: their dtype, their weights, and what rounding these costs.

No card takes part in an export: the kernels are compiled, not run. What is measured here is plain torch in float32 with
the weights rounded to 16 bits, which the kernels share; their activations are rounded besides.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fastfsl import bundle
from fastfsl.bundle import FlowWeights
from fastfsl.errors import BundleError, ConfigError, DataError
from fastfsl.export.readout import has_flow
from fastfsl.fit.deployment import Deployment
from fastfsl.flow import FlowPlan, normalize, plan_states, read_out
from fastfsl.kernels.aot import check_dim, compile_flow

DTypeChoice = Literal["auto", "fp16", "bf16"]

# fp16 is left where an activation comes within this factor of its largest number, 65504: other features may go further.
_HEADROOM: Final = 16.0
# Random plans of widths 128 and 512 keep 0.99999 in bf16: below this it is not rounding.
_MIN_COSINE: Final = 0.99
_ROWS, _SEED = 256, 0


@dataclass(frozen=True)
class KernelOptions:
    """What to compile.

    Args:
        architectures: compute capabilities times ten, of `kernels.tiles.ARCHITECTURES`; none: no kernels.
        dtype: of weights and activations; "auto": fp16 where its range suffices, which has more digits than bf16.
    """

    architectures: tuple[int, ...] = ()
    dtype: DTypeChoice = "auto"


def check_compilable(deployed: Deployment) -> None:
    """Refuse what there are no kernels for, before the long work.

    Raises:
        ConfigError: there is no flow, it takes no step or has a width without kernels, or Triton is missing.
    """
    plan = deployed.plan
    if plan is None or not has_flow(deployed) or plan.num_steps == 0:
        raise ConfigError(
            "--arch compiles the kernels of a flow, and this run has none, or one of no step; leave it out"
        )
    check_dim(plan.dim)
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("--arch needs Triton, which is not installed: pip install triton (Linux), or leave it out")


def choose_dtype(plan: FlowPlan, class_embeddings: NDArray[np.float32]) -> Literal["fp16", "bf16"]:
    """fp16, unless a weight, or an activation within a factor of 16, is beyond its range: then bf16.

    Args:
        plan: the flow plan.
        class_embeddings: unit vectors (C, d) or (C, K, d), near which the activations are looked at.
    """
    watch = _LargestRounded()
    with torch.inference_mode(), watch:
        plan_states(plan, _features(class_embeddings), (plan.num_steps,))
    weights = max(float(getattr(plan, name).abs().max()) for name in bundle.WEIGHT_NAMES if getattr(plan, name).numel())
    limit = float(np.finfo(np.float16).max)
    return "fp16" if weights <= limit and watch.largest * _HEADROOM <= limit else "bf16"


def write_kernels(
    staging: Path,
    deployed: Deployment,
    options: KernelOptions,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile a flow's kernels and write them, their index and their weights.

    Args:
        staging: the bundle's folder.
        deployed: of `check_compilable`.
        options: at least one architecture.
        on_progress: called with (compilations done, compilations in all).

    Returns:
        The manifest's `kernels`, and the report of `rounding_error`.

    Raises:
        ConfigError: a weight is out of the range of the dtype asked for, or the kernels cannot be compiled.
        BundleError: the rounded weights do not give the flow.
    """
    plan, classes = deployed.plan, deployed.class_embeddings
    if plan is None or classes is None:
        raise BundleError("expected a deployment with a flow: report this")
    dtype = choose_dtype(plan, classes) if options.dtype == "auto" else options.dtype
    try:
        weights = FlowWeights.from_plan(plan.to_arrays(), dtype, classes, deployed.logit_scale)
    except DataError as error:
        raise ConfigError(f"{error} in {dtype}: expected numbers within its range; use --kernel-dtype auto") from error
    report = rounding_error(plan, weights, deployed.read_steps)
    compiled = compile_flow(plan.dim, dtype, options.architectures, on_progress=on_progress)
    compiled.write(staging)
    bundle.write_flow_weights(staging / bundle.FLOW_KERNELS_WEIGHTS, weights)
    return {"architectures": compiled.kernels.architectures, "dtype": dtype}, report


def rounding_error(plan: FlowPlan, weights: FlowWeights, read_steps: Sequence[int]) -> dict[str, Any]:
    """What rounding the weights alone does to the flow, both computed by torch in float32.

    Returns:
        `dtype`, `rows`, `max_abs_error` and `min_cosine` of the features, `max_probability_error`, `kernels_run`
        (False: this is no measurement of the kernels).

    Raises:
        BundleError: the features are turned by more than rounding would.
    """
    shape = (weights.num_classes, weights.num_prototypes, weights.dim)
    classes = torch.from_numpy(weights.class_embeddings.reshape(shape))
    x_0 = _features(weights.class_embeddings)
    with torch.inference_mode():
        exact = plan_states(plan, x_0, read_steps)
        rounded = plan_states(FlowPlan.from_arrays(weights.to_plan()), x_0, read_steps)
        features, found = normalize(exact[-1]), normalize(rounded[-1])
        probabilities = [read_out(states, classes, weights.logit_scale).softmax(dim=-1) for states in (exact, rounded)]
    cosine = float((features * found).sum(dim=1).min())
    report = {
        "dtype": weights.dtype,
        "rows": len(x_0),
        "max_abs_error": float((features - found).abs().max()),
        "min_cosine": cosine,
        "max_probability_error": float((probabilities[0] - probabilities[1]).abs().max()),
        "kernels_run": False,
    }
    if not cosine >= _MIN_COSINE:
        raise BundleError(
            f"with weights in {weights.dtype} the flow leads elsewhere ({report}): export without --arch, or with the "
            "other --kernel-dtype"
        )
    return report


class _LargestRounded(TorchFunctionMode):
    """The largest of the numbers that kernels round: what linear layers multiply, and the residual stream.

    The executor hands both to `linear` and `layer_norm`; of the sum over the steps the kernels round the mean, which is
    smaller.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0.0

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func in (functional.linear, functional.layer_norm) and isinstance(args[0], Tensor):
            self.largest = max(self.largest, float(args[0].abs().nan_to_num(nan=torch.inf).max()))
        return func(*args, **(kwargs or {}))


def _features(class_embeddings: NDArray[np.float32]) -> Tensor:
    """Unit vectors where real features lie: noise and, in a random proportion, a class."""
    generator = torch.Generator().manual_seed(_SEED)
    places = torch.from_numpy(class_embeddings.reshape(-1, class_embeddings.shape[-1]))
    noise = normalize(torch.randn(_ROWS, places.shape[1], generator=generator))
    near = places[torch.randint(len(places), (_ROWS,), generator=generator)]
    return normalize(noise + near * torch.rand(_ROWS, 1, generator=generator) * 2)
