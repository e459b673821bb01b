"""The page of the runtime's figures: benchmarks/report.html, from benchmarks/results.

`python benchmarks/latency_report.py` writes it anew, and so does every `pytest benchmarks --save-results`. What
`make bench` measures is on it; trainings, which `make bench-all` measures too, are not.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.tables import instructions
from fastfsl.cli.bench_report import latency_figure, stage_figures, throughput_figure
from fastfsl.cli.output import field_words
from fastfsl.report import Part, Section, Series, Table, write_report
from fastfsl.report.charts import line_chart
from fastfsl.report.page import Figure

ROOT = Path(__file__).resolve().parent
RESULTS, PAGE = ROOT / "results", ROOT / "report.html"
# Of trainings, and of cards.
LEFT_OUT = ("compare_", "flow_options", "gpu_", "mps_step", "step_selection", "training", "text_frames_", "tuning_")
_FLOW_SIDES = {
    "plain_ms": "torch eager",
    "exported_ms": "the bundle's graph",
    "products_ms": "its matrix products alone",
}
_FLOW, _IMAGE, _BUNDLE = "flow_graph_batch_", "image_to_class_batch_", "bundle"


def write_page(page: Path = PAGE, results: Path = RESULTS) -> None:
    """Write the page, whole or not at all."""
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(results.glob("*.json"))
        if not path.stem.startswith(LEFT_OUT)
    }
    write_report(page, "fastfsl: latency, throughput, start and memory", list(_sections(found)))


def _sections(found: dict[str, dict[str, Any]]) -> Iterator[Section]:
    if _BUNDLE in found:
        result = found.pop(_BUNDLE)
        plots: list[Part] = [latency_figure(result["rows"]), throughput_figure(result["rows"])]
        rest = {name: value for name, value in result.items() if name not in ("rows", "stages")}
        yield Section("The demo's bundle", [*plots, *stage_figures(result["stages"], result["rows"]), *_parts(rest)])
    image, flow = (_by_batch(found, prefix) for prefix in (_IMAGE, _FLOW))
    if image:
        times = {name: [row["ms"].get(name) for row in image] for name in image[0]["ms"]}
        about = {name: value for name, value in image[-1].items() if name not in ("what", "batch", "ms")}
        yield Section("From pixels to a class", [_batches_figure(image, times), *_parts(about)])
    if flow:
        times = {name: [row.get(key) for row in flow] for key, name in _FLOW_SIDES.items()}
        about = {"times faster": [row["speed_up"] for row in flow], "made_with": flow[0]["made_with"]}
        yield Section("The flow alone", [_batches_figure(flow, times), *_parts(about)])
    for name, result in found.items():
        yield Section(name.replace("_", " "), _parts(result))


def _by_batch(found: dict[str, dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    """Takes the results of one benchmark out of all, by ascending batch."""
    return sorted((found.pop(name) for name in list(found) if name.startswith(prefix)), key=lambda row: row["batch"])


def _batches_figure(rows: list[dict[str, Any]], times: dict[str, list[float | None]]) -> Figure:
    """Milliseconds a call of each side against the batch size."""
    series = [Series(name, tuple(values)) for name, values in times.items()]
    last = ", ".join(f"{name} {values[-1]} ms" for name, values in times.items())
    return Figure(
        line_chart([str(row["batch"]) for row in rows], series, x_label="batch", y_label="ms a call", log=True),
        f"At batch {rows[-1]['batch']}: {last}",
        rows[0]["what"],
        Table(
            ("batch", *(f"{name}, ms" for name in times)),
            [(row["batch"], *(values[index] for values in times.values())) for index, row in enumerate(rows)],
        ),
    )


def _parts(result: dict[str, Any]) -> list[Part]:
    """What it is in words, its plain values, and each of its lists of rows as a table."""
    lists = {name: value for name, value in result.items() if _is_rows(value)}
    plain = {name: value for name, value in result.items() if name not in (*lists, "what", "made_with")}
    parts: list[Part] = [result["what"]] if "what" in result else []
    for name, rows in lists.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[_cell(row.get(key)) for key in columns] for row in rows]
        parts.append(Table(tuple(column.replace("_", " ") for column in columns), cells, name))
    if plain:
        parts.append(Table(("", ""), field_words(plain)))
    return [*parts, _origin(result["made_with"])]


def _origin(made: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    device = made["device"] + instructions(made)
    return f"{made['command']}. {device}, Python {made['python']}, {versions}; {made['commit']}, {made['date']}."


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _cell(value: Any) -> str | int | float | None:
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    write_page()
