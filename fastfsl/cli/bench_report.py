"""The page of `fastfsl bench`."""

from typing import Any

from fastfsl.cli.output import field_words
from fastfsl.report import Figure, Section, Series, Table, line_chart  # noqa: TID253  # imported to write a report

_PERCENTILES = (("p50", "p50_ms"), ("p95", "p95_ms"), ("p99", "p99_ms"))
_HEADER = ("batch", "p50, ms", "p95, ms", "p99, ms", "images/s", "rounds")


def bench_sections(document: dict[str, Any]) -> list[Section]:
    """Latency, throughput, stages, start and memory, and what they were measured on.

    Args:
        document: as `--json` prints it.
    """
    rows, described = document["rows"], document["described"]
    about = {
        "bundle": document["bundle"],
        "provider": rows[0]["provider"],
        "providers": described["providers"],
        "flow": described["flow"],
        "method": described["method"],
        "precision": described["precision"],
        "encoder": described["encoder"],
        "classes": described["num_classes"],
        "flow steps": described["num_steps"],
        "inputs": f"{document['inputs']}, {document['num_inputs']}",
    }
    memory = {
        name.removesuffix("_bytes"): value / 1e6 for name, value in document["memory"].items() if value is not None
    }
    sizes = [(name, size / 1e6) for name, size in sorted(described["files"].items())]
    return [
        Section(
            "Latency", [latency_figure(rows), "A call takes a whole batch, from image files (or features) to classes."]
        ),
        Section("Throughput", [throughput_figure(rows)]),
        Section("Stages", stage_figures(document["stages"], rows)),
        Section(
            "Start and memory",
            [
                Table(("", "seconds"), list(document["cold_start"].items()), "In fresh processes, medians"),
                Table(("", "MB"), list(memory.items())),
            ],
        ),
        Section("Configuration", [Table(("", ""), field_words(about))]),
        Section("Parity with torch, and accuracy when it was trained", _figures(document)),
        Section("Sizes", [Table(("file", "MB"), [*sizes, ("all", sum(size for _, size in sizes))])]),
        Section("Machine", [Table(("", ""), field_words(document["processor"] | {"threads": document["threads"]}))]),
        Section("Versions", [Table(("", ""), field_words(document["versions"]))]),
    ]


def latency_figure(rows: list[dict[str, Any]]) -> Figure:
    """Percentiles of a call against its batch size."""
    series = [Series(name, tuple(row[key] for row in rows)) for name, key in _PERCENTILES]
    first, last = rows[0], rows[-1]
    return Figure(
        line_chart(_batches(rows), series, x_label="batch", y_label="ms a call", log=True),
        f"Latency of a call: median {first['p50_ms']:.2f} ms at batch {first['batch']}, {last['p50_ms']:.2f} ms at "
        f"batch {last['batch']}",
        "Percentiles of the latency of a call against its batch size; the axis of the milliseconds is logarithmic.",
        Table(_HEADER, [_cells(row) for row in rows]),
    )


def throughput_figure(rows: list[dict[str, Any]]) -> Figure:
    """Images a second against the batch size."""
    best = max(rows, key=lambda row: float(row["images_per_second"]))
    values = tuple(row["images_per_second"] for row in rows)
    return Figure(
        line_chart(
            _batches(rows),
            [Series("images a second", values)],
            x_label="batch",
            y_label="images/s",
            limits=(0, best["images_per_second"]),
        ),
        f"Throughput: at most {best['images_per_second']:.1f} images a second, at batch {best['batch']}",
        "Images a second against the batch size, one call after the other.",
        Table(("batch", "images/s"), [(row["batch"], row["images_per_second"]) for row in rows]),
    )


def stage_figures(stages: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[Figure | Table]:
    """Time an image of each stage against the batch size; none where there are no stages."""
    if not stages:
        return []
    names = list(dict.fromkeys(stage["stage"] for stage in stages))
    medians = {(stage["stage"], stage["batch"]): stage["p50_ms"] / stage["batch"] for stage in stages}
    series = [Series("whole", tuple(row["p50_ms"] / row["batch"] for row in rows))]
    series += [Series(name, tuple(medians[name, row["batch"]] for row in rows)) for name in names]
    return [
        Figure(
            line_chart(_batches(rows), series, x_label="batch", y_label="ms an image", log=True),
            f"Median time an image of the whole and of {', '.join(names)}, by batch size",
            "Each stage by itself. Stages that overlap take less together than one after the other.",
            Table(("stage", *_HEADER), [(stage["stage"], *_cells(stage)) for stage in stages]),
        )
    ]


def _figures(document: dict[str, Any]) -> list[Table]:
    found = [("parity", document["parity"]), ("metrics", document["metrics"])]
    return [Table((name, ""), field_words(values)) for name, values in found if values]


def _batches(rows: list[dict[str, Any]]) -> list[str]:
    return [str(row["batch"]) for row in rows]


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("batch", "p50_ms", "p95_ms", "p99_ms", "images_per_second", "rounds"))
