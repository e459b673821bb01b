"""Plots of results."""

from fastfsl.report.accuracy_plot import AccuracyLine, write_accuracy_plot

__all__ = ["AccuracyLine", "write_accuracy_plot"]
