"""The straight path from image feature to text feature, and its two noise augmentations."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastfsl.errors import ConfigError, ShapeError

Noise = Literal["none", "bridge", "interpolant"]

# The bridge's target has variance sigma^2 t / (1 - t), unbounded as t -> 1: at 0.95 it is 19 sigma^2.
BRIDGE_MAX_T = 0.95
# The interpolant's target noise grows as 1 / (2 sqrt(t (1 - t))), 0/0 at both ends: at 1e-3 the factor is 15.8.
INTERPOLANT_MARGIN = 1e-3


@dataclass(frozen=True)
class PathSample:
    """A point on the path and the velocity the field should have there.

    Attributes:
        t: time, (n,), in [0, 1]; clamped where the noise requires it.
        x_t: point on the path, (n, d).
        target_velocity: regression target, (n, d).
    """

    t: Tensor
    x_t: Tensor
    target_velocity: Tensor


@dataclass(frozen=True)
class LinearPath:
    """x_t = (1 - t) x_0 + t x_1 with velocity u = x_1 - x_0, optionally noised.

    - `none`: the path itself.
    - `bridge` (the paper): x_t + sqrt(t (1 - t)) sigma eps, target (x_1 - x_t) / (1 - t) of the noised point,
      t <= 0.95. It is the drift of a bridge that ends in x_1, not the time derivative of the noised path.
    - `interpolant` (the released code): x_t + gamma sqrt(t (1 - t)) eps,
      target u + gamma (1 - 2t) / (2 sqrt(t (1 - t))) eps, t in [0.001, 0.999].

    Attributes:
        noise: which augmentation.
        scale: gamma of the interpolant, or a factor on the bridge's sigma; dimensionless.

    Source: FMA (arXiv 2510.14543), path and noise augmentation.
    """

    noise: Noise = "none"
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what no path is defined for."""
        if self.noise not in ("none", "bridge", "interpolant"):
            raise ConfigError(f"expected noise 'none', 'bridge' or 'interpolant', got {self.noise!r}")
        if not self.scale >= 0:
            raise ConfigError(f"expected a noise scale >= 0, got {self.scale}")

    def clamp(self, t: Tensor) -> Tensor:
        """Times kept where the noised path has a finite target."""
        if self.noise == "bridge":
            return t.clamp(0.0, BRIDGE_MAX_T)
        if self.noise == "interpolant":
            return t.clamp(INTERPOLANT_MARGIN, 1.0 - INTERPOLANT_MARGIN)
        return t

    def sample(
        self, x_0: Tensor, x_1: Tensor, t: Tensor, *, sigma: Tensor | None = None, eps: Tensor | None = None
    ) -> PathSample:
        """Point and target velocity at time t.

        Args:
            x_0: source features, (n, d).
            x_1: target features, (n, d).
            t: times, (n,).
            sigma: standard deviation of the source features by dimension, (d,); the bridge needs it.
            eps: standard normal noise, (n, d); drawn from torch's generator when omitted.

        Raises:
            ShapeError: if the shapes disagree.
            ConfigError: if the bridge is sampled without `sigma`.
        """
        if x_0.shape != x_1.shape or t.shape != x_0.shape[:1]:
            raise ShapeError(
                f"expected x_0 and x_1 (n, d) and t (n,), got {tuple(x_0.shape)}, {tuple(x_1.shape)}, {tuple(t.shape)}"
            )
        if self.noise == "bridge":
            if sigma is None:
                raise ConfigError("the bridge needs sigma, the standard deviation of the source features by dimension")
            spread = self.scale * sigma
        t = self.clamp(t)
        time = t[:, None]
        x_t = torch.lerp(x_0, x_1, time)
        if self.noise == "none":
            return PathSample(t, x_t, x_1 - x_0)

        noise = torch.randn_like(x_0) if eps is None else eps
        root = torch.sqrt(time * (1.0 - time))
        if self.noise == "bridge":
            x_t = x_t + root * spread * noise
            return PathSample(t, x_t, (x_1 - x_t) / (1.0 - time))
        x_t = x_t + self.scale * root * noise
        return PathSample(t, x_t, x_1 - x_0 + self.scale * (1.0 - 2.0 * time) / (2.0 * root) * noise)
