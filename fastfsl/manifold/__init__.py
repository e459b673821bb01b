"""MPS-Tuning: Gram alignment, hierarchical sculpting and the tuned tower, in pure torch."""

from fastfsl.manifold.blend import BlendedCLIP
from fastfsl.manifold.tower import TowerOutput, TunedTower

__all__ = ["BlendedCLIP", "TowerOutput", "TunedTower"]
