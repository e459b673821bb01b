"""Which method wins on these data, and by how much: methods by shots by seeds, resumable, with honest intervals."""

from fastfsl.fit.compare.cell import Cell, CellSpec
from fastfsl.fit.compare.comparison import compare
from fastfsl.fit.compare.leaderboard import Row, by_method
from fastfsl.fit.compare.noise import Difference, paired_difference
from fastfsl.fit.compare.results import Comparison, Failure
from fastfsl.fit.comparison_plan import check_methods, default_methods

__all__ = [
    "Cell",
    "CellSpec",
    "Comparison",
    "Difference",
    "Failure",
    "Row",
    "by_method",
    "check_methods",
    "compare",
    "default_methods",
    "paired_difference",
]
