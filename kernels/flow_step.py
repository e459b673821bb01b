"""The fused Euler flow of a plan, from torch tensors to torch tensors.

    x_M = x_0 + h (W_out sum_k m_k + M b_out),    u <- u + h (W_in W_out m + W_in b_out)

The launches are those of `fastfsl.bundle.flow_launches`, 2 B + 1 a step of B blocks, on a card in a CUDA graph of the
batch's row bucket. Inference only. Compiled for six architectures, not yet run on a card.

Reference: fastfsl.flow.plan.plan_states.
"""

import threading
import weakref
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastfsl.errors import ConfigError, DeviceError, ShapeError
from fastfsl.kernels.flow_executor import DTYPES, INTERPRETED, FlowExecutor, Plan
from fastfsl.kernels.flow_persistent import MAX_ROWS, MAX_STEPS
from fastfsl.kernels.tiles import PERSISTENT_ROWS

# By the plan's id, for as long as the plan lives.
_EXECUTORS: dict[int, dict[tuple[torch.dtype, torch.device, bool], FlowExecutor]] = {}
_LOCK = threading.Lock()


def euler_flow(
    plan: Plan,
    x: Tensor,
    num_steps: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    allow_tf32: bool = False,
    persistent: bool | Literal["auto"] = "auto",
) -> Tensor:
    """Carry features along the flow: x_M of a plan's Euler steps.

    Args:
        plan: a `fastfsl.flow.FlowPlan`, on any device; its weights are copied to the card at the first call.
        x: source features, (n, d), n >= 0, on a card; d a multiple of 16.
        num_steps: how many of the plan's steps to take; all of them if None, and x itself is returned after 0.
        dtype: of the products' operands and of the residual stream; sums, the carried u and the sum over the steps are
            float32 always. If None, the dtype of x if that has 16 bits, else that of the plan if that has, else
            float32: no precision is lost unasked.
        allow_tf32: float32 products may round their operands to 10 bits of mantissa.
        persistent: the whole flow in one cooperative launch, of at most 64 rows and 30 steps; "auto": where
            `kernels.tiles` has it measured to be faster.

    Returns:
        x_M, (n, d), not normalised, in the dtype of x.

    Raises:
        ShapeError: x is not a floating-point (n, d).
        ConfigError: the plan does not have these steps, d is not a multiple of 16, the dtype is another one, x
            requires a gradient (the flow is for inference), or there is too much for one launch.
        DeviceError: x is not on a card.
    """
    steps = plan.num_steps if num_steps is None else num_steps
    return flow_states(plan, x, (steps,), dtype=dtype, allow_tf32=allow_tf32, persistent=persistent)[0]


def flow_states(
    plan: Plan,
    x: Tensor,
    read_steps: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    allow_tf32: bool = False,
    persistent: bool | Literal["auto"] = "auto",
) -> list[Tensor]:
    """The states after some of the plan's Euler steps, each (n, d) in the dtype of x; 0 is x itself.

    Args:
        plan: as for `euler_flow`.
        x: as for `euler_flow`.
        read_steps: ascending, in 0..M; nothing is computed after the last.
        dtype: as for `euler_flow`.
        allow_tf32: as for `euler_flow`.
        persistent: as for `euler_flow`.

    Raises:
        ShapeError, ConfigError, DeviceError: as for `euler_flow`.
    """
    steps = tuple(read_steps)
    _check(plan, x, steps)
    if dtype is None:
        dtype = next((each for each in (x.dtype, plan.input_weight.dtype) if each.itemsize == 2), torch.float32)
    _check_device(x.device, dtype)
    fits = len(x) <= MAX_ROWS and steps[-1] <= MAX_STEPS
    if persistent is True and not fits:
        raise ConfigError(
            f"expected at most {MAX_ROWS} rows and {MAX_STEPS} steps for a flow in one launch, got {len(x)} and "
            f"{steps[-1]}; leave `persistent` out"
        )
    moving = tuple(step for step in steps if step > 0)
    states = [x] if steps[0] == 0 else []
    if not moving or not len(x):
        return states + [x] * len(moving)
    in_one = persistent is True or (persistent == "auto" and fits and len(x) <= PERSISTENT_ROWS)
    with torch.no_grad():
        executor = _executor(plan, dtype, x.device, allow_tf32=allow_tf32)
        return states + list(executor.states(x, moving, persistent=in_one).to(x.dtype).unbind())


def _executor(plan: Plan, dtype: torch.dtype, device: torch.device, *, allow_tf32: bool) -> FlowExecutor:
    key = (dtype, device, allow_tf32)
    with _LOCK:
        if id(plan) not in _EXECUTORS:
            weakref.finalize(plan, _EXECUTORS.pop, id(plan)).atexit = False
            _EXECUTORS[id(plan)] = {}
        executors = _EXECUTORS[id(plan)]
        if key not in executors:
            executors[key] = FlowExecutor(plan, dtype, device, allow_tf32=allow_tf32)
        return executors[key]


def _check(plan: Plan, x: Tensor, steps: tuple[int, ...]) -> None:
    if x.ndim != 2 or x.shape[1] != plan.dim or x.dtype not in DTYPES:
        raise ShapeError(
            f"expected features (n, {plan.dim}) in float16, bfloat16 or float32, got {tuple(x.shape)} in {x.dtype}"
        )
    if plan.dim % 16:
        raise ConfigError(f"expected a width that is a multiple of 16, got {plan.dim}; use fastfsl.flow.run_plan")
    if not steps or list(steps) != sorted(set(steps)) or steps[0] < 0 or steps[-1] > plan.num_steps:
        raise ConfigError(f"expected one or more ascending steps in 0..{plan.num_steps}, got {list(steps)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ConfigError(
            "the compiled flow has no gradient, and x requires one; use torch.no_grad(), or fastfsl.flow.run_plan to "
            "differentiate"
        )


def _check_device(device: torch.device, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"expected products in float16, bfloat16 or float32, got {dtype}")
    if device.type != "cuda" and not INTERPRETED:
        raise DeviceError(
            f"the compiled flow needs a CUDA card, got features on {device.type}; move them, or use "
            "fastfsl.flow.run_plan there"
        )
    if INTERPRETED and dtype == torch.bfloat16:
        raise DeviceError(
            "the compiled flow needs a CUDA card for bfloat16: Triton's interpreter, which TRITON_INTERPRET=1 asks "
            "for, multiplies it wrongly; use float16 or float32"
        )
