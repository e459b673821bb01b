"""Flow Matching Alignment in plain torch: coupling, path, velocity field, solver, inference plan.

This is the mathematics, and the reference that kernels and exported graphs are compared with.
Source: "Exploring Cross-Modal Flows for Few-Shot Learning", arXiv 2510.14543.
"""

from fastfsl.flow.coupling import pair_with_class
from fastfsl.flow.loss import flow_matching_loss
from fastfsl.flow.path import LinearPath, PathSample
from fastfsl.flow.plan import FlowPlan, build_plan, plan_states, run_plan
from fastfsl.flow.readout import class_logits, normalize, read_out
from fastfsl.flow.solver import euler, euler_states, solve, solver_states
from fastfsl.flow.velocity_field import VelocityField

__all__ = [
    "FlowPlan",
    "LinearPath",
    "PathSample",
    "VelocityField",
    "build_plan",
    "class_logits",
    "euler",
    "euler_states",
    "flow_matching_loss",
    "normalize",
    "pair_with_class",
    "plan_states",
    "read_out",
    "run_plan",
    "solve",
    "solver_states",
]
