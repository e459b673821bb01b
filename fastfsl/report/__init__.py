"""Reports: one HTML file with plots and tables, drawn by strings and numpy alone; and compare's PNG (matplotlib)."""

from fastfsl.report.charts import Series, line_chart
from fastfsl.report.confusion import confusion_parts
from fastfsl.report.flow_map import flow_map
from fastfsl.report.page import Figure, Gallery, Part, Picture, Section, Table, write_report
from fastfsl.report.reliability import reliability_figure

__all__ = [
    "Figure",
    "Gallery",
    "Part",
    "Picture",
    "Section",
    "Series",
    "Table",
    "confusion_parts",
    "flow_map",
    "line_chart",
    "reliability_figure",
    "write_report",
]
