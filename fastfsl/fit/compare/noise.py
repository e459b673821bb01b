"""Whether a difference of accuracy is within noise.

Two methods are compared on the same episodes (seeds s = 1..S) and the same test samples (i = 1..n). d_si, the one's
correctness minus the other's, has two crossed sources of chance, the seeds and the samples:

    V_seed   = Σ_s (mean_i d_si - mean d)² / (S (S - 1))
    V_sample = Σ_i (mean_s d_si - mean d)² / (n (n - 1))
    interval = mean d ± t(0.975, df) · sqrt(V_seed + V_sample),
    df       = (V_seed + V_sample)² / (V_seed² / (S - 1) + V_sample² / (n - 1))

What is neither the seed's nor the sample's own is counted in both, so that the interval is a little wide where the
seeds differ by chance alone. One seed has no V_seed: the interval then tells of other test samples only, as McNemar's
test does. The train pool is taken as given: its images, not those of another pool, are what seeds draw from. Each
interval is for its pair alone; that the best of many methods was picked by the same figures is not allowed for.

Source: variance with two crossed clusters, Cameron, Gelbach and Miller (2011), without their subtraction of the
intersection; degrees of freedom, Satterthwaite (1946).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A mean difference of accuracy, as fractions, with its interval.

    Attributes:
        mean: of one method minus the other.
        low: lower end of the 95 % interval.
        high: upper end.
    """

    mean: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """Whether the interval holds 0."""
        return self.low <= 0 <= self.high


def paired_difference(differences: NDArray[np.float64]) -> Difference:
    """The mean of d (S, n), seeds by test samples, with its interval; S >= 1, n >= 1."""
    mean = float(differences.mean())
    squares = sum_of_shares = 0.0
    for along in (1, 0):
        means = differences.mean(axis=along)
        freedom = len(means) - 1
        if freedom:
            variance = float(((means - mean) ** 2).sum()) / (freedom * len(means))
            squares += variance
            sum_of_shares += variance**2 / freedom
    if not sum_of_shares:  # no disagreement anywhere
        return Difference(mean, mean, mean)
    half = float(t.ppf((1 + CONFIDENCE) / 2, squares**2 / sum_of_shares) * np.sqrt(squares))
    return Difference(mean, mean - half, mean + half)
