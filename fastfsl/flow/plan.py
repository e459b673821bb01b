"""The flow plan: a velocity field and a step count, reduced to what inference needs.

With fixed steps, time depends on the step alone, so every adaLN shift, scale and gate is a constant. Together with
LayerNorm's affine (gamma, beta) they fold into tables, a = gamma (1 + scale), c = beta (1 + scale) + shift, and the
time embedding and every modulation layer disappear. Between steps the plan carries u = W_in x + b_in instead of x:

    u <- u + h (W_in W_out m + W_in b_out),    x_M = x_0 + h (W_out sum_k m_k + M b_out),

m being the final layer's modulated input: one product a step fewer, and x is never recovered by inverting W_in.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastfsl import bundle
from fastfsl.errors import ShapeError
from fastfsl.flow.readout import check_read_steps
from fastfsl.flow.solver import check_steps
from fastfsl.flow.velocity_field import NORM_EPS, Block, VelocityField


@dataclass(frozen=True)
class FlowPlan:
    """Shared weights and per-step tables of M Euler steps; linears are (out, in), y = x W^T + b.

    Attributes:
        step_size: h, dimensionless.
        input_weight: W_in, (d, d). input_bias: (d,).
        first_weight: (B, d, d). first_bias: (B, d).
        second_weight: (B, d, d). second_bias: (B, d).
        output_weight: W_out, (d, d). output_bias: (d,).
        carry_weight: W_in W_out, (d, d). carry_bias: W_in b_out, (d,).
        block_table: a, c, gate of every step and block, (M, B, 3, d).
        final_table: a, c of the final layer, (M, 2, d).
    """

    step_size: float
    input_weight: Tensor
    input_bias: Tensor
    first_weight: Tensor
    first_bias: Tensor
    second_weight: Tensor
    second_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor
    carry_weight: Tensor
    carry_bias: Tensor
    block_table: Tensor
    final_table: Tensor

    @property
    def num_steps(self) -> int:
        """M, the number of Euler steps the plan was made for."""
        return self.block_table.shape[0]

    @property
    def num_blocks(self) -> int:
        """B, the number of residual blocks."""
        return self.block_table.shape[1]

    @property
    def dim(self) -> int:
        """d, the width of the features."""
        return self.input_weight.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "FlowPlan":
        """The same plan on another device or in another dtype."""
        tensors = {name: tensor.to(device=device, dtype=dtype) for name, tensor in self._tensors().items()}
        return FlowPlan(step_size=self.step_size, **tensors)

    def to_arrays(self) -> bundle.PlanArrays:
        """The plan as float32 arrays, the form that is stored and exported."""
        arrays = {
            name: np.ascontiguousarray(tensor.detach().cpu().to(torch.float32).numpy())
            for name, tensor in self._tensors().items()
        }
        return bundle.PlanArrays(step_size=self.step_size, **arrays)

    @classmethod
    def from_arrays(cls, arrays: bundle.PlanArrays) -> "FlowPlan":
        """The plan of stored arrays, on the CPU in float32."""
        names = [field.name for field in fields(cls) if field.name != "step_size"]
        tensors = {name: torch.from_numpy(np.array(getattr(arrays, name))) for name in names}
        return cls(step_size=arrays.step_size, **tensors)

    def save(self, path: Path) -> None:
        """Write the plan as safetensors, atomically."""
        bundle.write_plan(path, self.to_arrays())

    @classmethod
    def load(cls, path: Path) -> "FlowPlan":
        """Read a plan written by `save`.

        Raises:
            BundleError: if the file is not a plan of a known version.
        """
        return cls.from_arrays(bundle.read_plan(path))

    def _tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "step_size"}


@torch.no_grad()
def build_plan(velocity_field: VelocityField, num_steps: int, step_size: float) -> FlowPlan:
    """Fold a velocity field and a fixed number of Euler steps into a plan.

    The folding is done in float64 and rounded once, to the field's dtype.

    Args:
        velocity_field: the trained field.
        num_steps: M >= 0; zero leaves the features where they are.
        step_size: h, with M h <= 1.

    Raises:
        ConfigError: if the steps leave [0, 1].
    """
    check_steps(num_steps, step_size)
    dtype = velocity_field.input.weight.dtype
    field = copy.deepcopy(velocity_field).double()
    blocks = [block for block in field.blocks if isinstance(block, Block)]
    dim = field.dim
    device = field.input.weight.device
    times = torch.arange(num_steps, dtype=torch.float64, device=device) * step_size
    silu_y = functional.silu(field.time_embedding(times))

    block_table = torch.zeros(num_steps, len(blocks), 3, dim, dtype=torch.float64, device=device)
    for index, block in enumerate(blocks):
        shift, scale, gate = block.modulation(silu_y).chunk(3, dim=-1)
        block_table[:, index, 0] = block.norm.weight * (1.0 + scale)
        block_table[:, index, 1] = block.norm.bias * (1.0 + scale) + shift
        block_table[:, index, 2] = gate
    shift, scale = field.final.modulation(silu_y).chunk(2, dim=-1)
    final_table = torch.stack([1.0 + scale, shift], dim=1)

    def stacked(tensors: list[Tensor], *shape: int) -> Tensor:
        return torch.stack(tensors) if tensors else torch.zeros(0, *shape, dtype=torch.float64, device=device)

    w_in, w_out = field.input.weight, field.final.output.weight
    return FlowPlan(
        step_size=step_size,
        input_weight=w_in,
        input_bias=field.input.bias,
        first_weight=stacked([block.first.weight for block in blocks], dim, dim),
        first_bias=stacked([block.first.bias for block in blocks], dim),
        second_weight=stacked([block.second.weight for block in blocks], dim, dim),
        second_bias=stacked([block.second.bias for block in blocks], dim),
        output_weight=w_out,
        output_bias=field.final.output.bias,
        carry_weight=w_in @ w_out,
        carry_bias=w_in @ field.final.output.bias,
        block_table=block_table,
        final_table=final_table,
    ).to(dtype=dtype)


def plan_states(plan: FlowPlan, x_0: Tensor, read_steps: Sequence[int]) -> list[Tensor]:
    """The states after some of the plan's Euler steps, x_k = x_0 + h (W_out sum_{j<k} m_j + k b_out).

    Nothing is computed after the last of them.

    Args:
        plan: the plan, on the device and in the dtype of `x_0`.
        x_0: source features, (n, d).
        read_steps: which, ascending, in 0..M; 0 is the source.

    Returns:
        One state a read step, each (n, d), not normalised.

    Raises:
        ShapeError: if x_0 is not (n, d).
        ConfigError: if the plan does not have these steps.

    Source: FMA (arXiv 2510.14543), early-stopping solver.
    """
    if x_0.ndim != 2 or x_0.shape[1] != plan.dim:
        raise ShapeError(f"expected features (n, {plan.dim}), got {tuple(x_0.shape)}")
    check_read_steps(read_steps, plan.num_steps)
    last = read_steps[-1]
    states = [x_0] if read_steps[0] == 0 else []
    if last == 0:
        return states

    u = functional.linear(x_0, plan.input_weight, plan.input_bias)
    total = torch.zeros_like(x_0)
    for step in range(last):
        h = u
        for block in range(plan.num_blocks):
            a, c, gate = plan.block_table[step, block]
            modulated = functional.layer_norm(h, (plan.dim,), a, c, NORM_EPS)
            hidden = functional.silu(functional.linear(modulated, plan.first_weight[block], plan.first_bias[block]))
            residual = functional.linear(hidden, plan.second_weight[block], plan.second_bias[block])
            h = torch.addcmul(h, gate, residual)
        a, c = plan.final_table[step]
        m = functional.layer_norm(h, (plan.dim,), a, c, NORM_EPS)
        total = total + m
        done = step + 1
        if done in read_steps:
            displacement = functional.linear(total, plan.output_weight, done * plan.output_bias)
            states.append(x_0 + plan.step_size * displacement)
        if done < last:
            u = u + plan.step_size * functional.linear(m, plan.carry_weight, plan.carry_bias)
    return states


def run_plan(plan: FlowPlan, x_0: Tensor) -> Tensor:
    """x_M, (n, d), the last of `plan_states`: the reference of every other executor."""
    return plan_states(plan, x_0, (plan.num_steps,))[0]
