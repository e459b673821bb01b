"""MPS-Tuning: Gram alignment, hierarchical sculpting and the tuned tower, in pure torch.

What the alignment keeps small, the mean |S - S'| of the Gram matrices, is an upper bound of the Gromov-Wasserstein
distance between tuned and frozen features: its value under the identity coupling.

Source: "Preserve and Sculpt", arXiv 2508.12877.
"""

from fastfsl.manifold.blend import BlendedCLIP
from fastfsl.manifold.gram import gram_alignment_loss, manifold_alignment_loss
from fastfsl.manifold.schedule import temperature_at
from fastfsl.manifold.sculpting import hierarchical_sculpting_loss, sculpting_loss
from fastfsl.manifold.tower import TowerOutput, TunedTower

__all__ = [
    "BlendedCLIP",
    "TowerOutput",
    "TunedTower",
    "gram_alignment_loss",
    "hierarchical_sculpting_loss",
    "manifold_alignment_loss",
    "sculpting_loss",
    "temperature_at",
]
