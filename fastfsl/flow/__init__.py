"""Flow Matching Alignment in plain torch: coupling, path, velocity field, loss, solver, read-out, inference plan.

This is the mathematics, and the reference that kernels and exported graphs are compared with.
Source: "Exploring Cross-Modal Flows for Few-Shot Learning", arXiv 2510.14543.
"""

from fastfsl.flow.coupling import pair_with_class
from fastfsl.flow.early_exit import euler_early_exit
from fastfsl.flow.loss import endpoint_cross_entropy, flow_matching_loss, velocity_loss
from fastfsl.flow.path import LinearPath, PathSample
from fastfsl.flow.plan import FlowPlan, build_plan, plan_states, run_plan
from fastfsl.flow.readout import class_logits, normalize, read_out
from fastfsl.flow.solver import euler, euler_states, solve, solver_states
from fastfsl.flow.targets import blended_targets, text_target_frame, text_targets
from fastfsl.flow.velocity_field import VelocityField

__all__ = [
    "FlowPlan",
    "LinearPath",
    "PathSample",
    "VelocityField",
    "blended_targets",
    "build_plan",
    "class_logits",
    "endpoint_cross_entropy",
    "euler",
    "euler_early_exit",
    "euler_states",
    "flow_matching_loss",
    "normalize",
    "pair_with_class",
    "plan_states",
    "read_out",
    "run_plan",
    "solve",
    "solver_states",
    "text_target_frame",
    "text_targets",
    "velocity_loss",
]
