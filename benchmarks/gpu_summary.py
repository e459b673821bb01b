"""What a run of the GPU suite found, from its JSON files: a short text, and whether any result was wrong."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_bounds import judged

NOT_RUN = "not run"
SIZE = ("batch", "shape", "kind", "normalize")


def summary(out: Path, outcomes: Mapping[str, str], judges: Collection[str]) -> tuple[str, bool]:
    """Write `gpu_suite.json`: how each section ended, and the bounds.

    Args:
        out: folder of the sections' JSON files.
        outcomes: how the sections of this run ended, by name.
        judges: the sections whose rows can be wrong.

    Returns:
        The text; whether a result was wrong, or a section that looks for wrong ones broke off.
    """
    documents = read_documents(out, outcomes)
    broken = [name for name, outcome in outcomes.items() if outcome != "done" and not outcome.startswith(NOT_RUN)]
    wrong = {name: sum(row.get("ok") is False for row in doc["rows"]) for name, doc in documents.items()}
    bounds = list(judged(documents))
    made = next((document["made_with"] for document in documents.values()), None)
    kept = {"outcomes": dict(outcomes), "wrong": wrong, "bounds": bounds, "made_with": made}
    (out / "gpu_suite.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")

    lines = [""]
    for name, outcome in outcomes.items():
        lines.extend(["", f"--- {name}: {outcome}{_counted(documents.get(name))}"])
        if name in documents:
            lines.extend(_section(name, documents[name]))
    if any(bound["met"] is not None for bound in bounds):
        lines.extend(["", "--- bounds", *map(bound_line, bounds)])
    return "\n".join(lines), any(wrong.values()) or bool(set(broken) & set(judges))


def read_documents(out: Path, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """The JSON documents of sections that left one."""
    paths = {name: out / f"gpu_{name}.json" for name in names}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


def bound_line(bound: Mapping[str, Any]) -> str:
    """One bound, and whether it is met."""
    if bound["met"] is None:
        return f"not run  {bound['bound']}"
    times = "" if bound["ms"] is None else f"; {bound['ms']:.4f} ms, roofline {bound['roofline_ms']:.4f} ms"
    verdict = "met    " if bound["met"] else "NOT MET"
    return f"{verdict}  {bound['bound']} {bound['expected']}, got {bound['got']:.3g}{times}"


def _counted(document: Mapping[str, Any] | None) -> str:
    if document is None:
        return ""
    wrong = sum(row.get("ok") is False for row in document["rows"])
    dry = ", a dry run: no figure of it counts" if document["dry_run"] else ""
    return f", {len(document['rows'])} rows, {wrong} wrong, {len(document['not_run'])} cases not run{dry}"


def _section(name: str, document: Mapping[str, Any]) -> Iterator[str]:
    rows = document["rows"]
    yield from (f"not run: {case['what']}: {case['reason']}" for case in document["not_run"][:8])
    yield from (f"WRONG {json.dumps(row)}" for row in [row for row in rows if row.get("ok") is False][:12])
    if name == "correctness":
        yield from _worst(rows)
    elif name in {"determinism", "sanitizer"}:
        yield f"right: {', '.join(row['name'] for row in rows if row['ok'])}"
    elif name == "sweep":
        yield from map(_said, document.get("best", []))
    elif name == "aot":
        yield from map(_said, rows)
    else:
        yield from _timed(rows)


def _worst(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Of each kernel and dtype the row that comes nearest to being wrong."""
    worst: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in rows:
        key = (row["name"], row["precision"])
        if key not in worst or row.get("times_plain", 0.0) > worst[key].get("times_plain", 0.0):
            worst[key] = row
    for (name, precision), row in worst.items():
        figures = {key: value for key, value in row.items() if key not in {"name", "precision", "ok"}}
        yield f"{name} {precision}, worst case: {_said(figures)}"


def _timed(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each size: the times of all versions in ms, in brackets those on the card alone, and the roofline."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        size = _said({key: row[key] for key in SIZE if key in row})
        device = f" ({row['device_ms']:.4f})" if "device_ms" in row else ""
        if size not in lines:
            lines[size] = [f"roofline {row['roofline_ms']:.4f}"]
        lines[size].append(f"{row['name']} {row['ms']:.4f}{device}")
    yield from (f"{size}: {'; '.join(times)}" for size, times in lines.items())


def _said(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )
