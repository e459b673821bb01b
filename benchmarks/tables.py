"""Write the tables of README.md and docs/ from benchmarks/results: `python benchmarks/tables.py [--check]`."""

import json
import statistics
import sys
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/departures.md")

# Results of benchmarks/compare_features.py and what the table calls them.
PAPER_FILES = {"flowers102_vitb32_16shot": "Flowers102", "aircraft100_vitb32_16shot": "Aircraft"}
COMPARED = {"imagenet145_vitb32_4shot": "ImageNet-145"} | PAPER_FILES
NOISE_FILES = {
    "flowers102_vitb32_16shot": "Flowers102",
    "aircraft100_vitb32_16shot": "Aircraft",
    "imagenet145_vitb32_4shot": "ImageNet, 145 classes",
}
NO_CARD_YET = (
    "The Triton kernels of the flow and of the Gram loss are compared with float64 in Triton's interpreter, and",
    "compiled, not yet run on a card. `python benchmarks/gpu_suite.py --out DIR` does that in 9 minutes: correctness,",
    "determinism, timings beside the card's own peaks.",
)


def demo_table() -> str:
    """Accuracy, latency and size of the demo, five seeds."""
    result = _read("demo")
    lines = [
        "| | accuracy % (mean ± sd) | ms/image, batch 1 | ms/image, batch 32 | size MB |",
        "|---|---|---|---|---|",
    ]
    lines.extend(
        f"| {row['name']} | {100 * row['accuracy_mean']:.1f} ± {100 * row['accuracy_sd']:.1f} | "
        f"{row['ms_per_image_batch_1']:.2f} | {row['ms_per_image_batch_32']:.2f} | {row['size_bytes'] / 1e6:.1f} |"
        for row in result["rows"]
    )
    samples, same = result["num_samples"], min(result["same_class"])
    note = (
        f"{samples} test scans, five seeds. Runtime and torch give {same} of {samples} the same class at worst, with "
        f"probabilities\nwithin {_above(result['max_probability_error']):.0e}; int8 loses "
        f"{100 * result['int8_loses_at_most']:.1f} points of accuracy at worst.\n{_device(result)}."
    )
    return "\n".join([*lines, "", note])


def _above(value: float) -> float:
    """A number of one digit that is not below."""
    unit = Decimal(1).scaleb(Decimal(value).adjusted())
    return float((Decimal(value) / unit).to_integral_value(ROUND_CEILING) * unit)


def flow_table() -> str:
    """The exported flow against the plain module."""
    results = [_read(f"flow_graph_batch_{batch}") for batch in (1, 32, 256)]
    lines = [
        "The flow alone, as exported, against the plain module in torch eager",
        "(width 512, 12 blocks, 10 steps, 2 threads); medians, of the ratios too:",
        "",
        "| batch | torch eager, ms | the bundle's graph, ms | its matrix products alone, ms | times faster |",
        "|---|---|---|---|---|",
    ]
    lines.extend(
        f"| {row['batch']} | {row['plain_ms']:.1f} | {row['exported_ms']:.1f} | {row['products_ms']:.1f} | "
        f"{row['speed_up']:.1f} |"
        for row in results
    )
    return "\n".join([*lines, "", f"{_device(results[0])}."])


def bundle_table() -> str:
    """Latency of the demo's bundle, its start and its memory."""
    result = _read("bundle")
    lines = ["| batch | p50, ms | p95, ms | p99, ms | images/s |", "|---|---|---|---|---|"]
    lines.extend(
        f"| {row['batch']} | {row['p50_ms']:.1f} | {row['p95_ms']:.1f} | {row['p99_ms']:.1f} | "
        f"{row['images_per_second']:.0f} |"
        for row in result["rows"]
    )
    imported, start = _read("import")["times"], result["cold_start"]["beyond_onnxruntime_s"]
    loaded, after = (_read("memory")[f"{name}_bytes"] / 1e6 for name in ("loaded", "after"))
    note = (
        f"The demo's bundle, from image files to classes. `import fastfsl.runtime` takes {imported:.2f} times `import "
        f"onnxruntime`;\nimport, load and first prediction take {start:.2f} s beyond the latter. {loaded:.0f} MB when "
        f"loaded, {after:.0f} MB after 1000 predictions.\n{_device(result)}."
    )
    return "\n".join([*lines, "", note])


def image_table() -> str:
    """From decoded pixels to a class, beside torch."""
    results = [_read(f"image_to_class_batch_{batch}") for batch in (1, 8, 32)]
    sides = list(results[0]["ms"])
    lines = [
        f"From decoded pixels to a class, {results[0]['what'].partition(': ')[2]}: milliseconds a batch, and",
        "how many times faster than torch in float32 the bundle is in float32 and in int8:",
        "",
        "| batch | " + " | ".join(sides) + " | fp32, times | int8, times |",
        "|---|" + "---|" * (len(sides) + 2),
    ]
    for row in results:
        times = " | ".join(f"{row['ms'][side]:.1f}" for side in sides)
        ratios = " | ".join(f"{row['speed_up_over_torch_fp32'][side]:.1f}" for side in ("fp32", "int8"))
        lines.append(f"| {row['batch']} | {times} | {ratios} |")
    return "\n".join([*lines, "", f"{_device(results[0])}."])


def compare_table() -> str:
    """Accuracy of every method on the feature files that were compared."""
    results = {file: _read(f"compare_{file}") for file in COMPARED}
    columns = [(file, k) for file, result in results.items() for k in result["settings"]["shots"]]
    cells = {
        (file, row["method"], row["shots"]): row
        for file, result in results.items()
        for row in result["rows"]
        if (file, row["shots"]) in columns
    }
    methods = sorted(
        {method for _, method, _ in cells},
        key=lambda method: -statistics.fmean(cells[file, method, k]["accuracy_mean"] for file, k in columns),
    )
    lines = [
        "| method | " + " | ".join(f"{COMPARED[file]}, {k}" for file, k in columns) + " | mean |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for method in methods:
        values = [100 * cells[file, method, k]["accuracy_mean"] for file, k in columns]
        figures = " | ".join(f"{value:.1f}" for value in [*values, statistics.fmean(values)])
        lines.append(f"| {method} | {figures} |")
    errors = ", ".join(
        f"{name} "
        + " / ".join(f"{cells[file, 'auto', k]['calibration_error_mean']:.3f}" for one, k in columns if one == file)
        for file, name in COMPARED.items()
    )
    note = (
        "Test accuracy in %, CLIP ViT-B/32 features, by images a class, mean over seeds. ImageNet-145 has real class\n"
        "texts and 435 test images; the others have surrogate texts, made of images.\n"
        f"Expected calibration error of `auto`: {errors}.\n"
        f"`fma-paper`, one seed, 1 / 4 / 16 images a class: {_paper_row()}."
    )
    return "\n".join([*lines, "", note])


def _paper_row() -> str:
    """Accuracy of the published recipe, whose trainings are too long for three seeds."""
    parts = []
    for file, name in PAPER_FILES.items():
        rows = {(row["method"], row["shots"]): row for row in _read(f"compare_{file}_paper")["rows"]}
        figures = " / ".join(f"{100 * rows['fma-paper', k]['accuracy_mean']:.1f}" for k in (1, 4, 16))
        parts.append(f"{name} {figures}")
    return ", ".join(parts)


def tuning_table() -> str:
    """What tuning the encoder gives, part by part, and the peers that do."""
    results = [_read(f"tuning_{name}") for name in ("mps", "lora", "clip-adapter", "coop", "cocoop")]
    lines = [
        "| | accuracy % (mean ± sd) | drift on test images | trained numbers |",
        "|---|---|---|---|",
        f"| zero-shot | {100 * results[0]['rows'][0]['zero_shot']:.1f} | 0 | 0 |",
    ]
    lines.extend(
        f"| {row['name']} | {100 * row['accuracy_mean']:.1f} ± {100 * row['accuracy_sd']:.1f} | "
        f"{row.get('drift', '')} | {row['num_parameters']} |"
        for result in results
        for row in result["rows"]
    )
    step = _read("mps_step")
    devices = "; ".join(dict.fromkeys(_device(result) for result in [*results, step]))
    note = (
        "1000 test scans, five seeds; drift is the mean |S - S'| of the Gram matrices of tuned and frozen features,\n"
        "an upper bound of their Gromov-Wasserstein distance.\n"
        f"A training step of `mps` (ViT-B/16 shapes, batch {step['batch']}, 2 views) takes {step['ratio']:.2f} of the "
        f"time and {step['memory_ratio']:.2f} of the memory of the straightforward one.\n{devices}."
    )
    return "\n".join([*lines, "", note])


def noise_table() -> str:
    """What the noise on the flow's path gives, file by file."""
    results = {name: _read(f"flow_noise_{file}") for file, name in NOISE_FILES.items()}
    cells = {(name, row["shots"], row["noise"]): row for name, result in results.items() for row in result["rows"]}
    columns = list(dict.fromkeys((name, shots) for name, shots, _ in cells))
    noises = list(dict.fromkeys(noise for _, _, noise in cells))
    lines = [
        "| noise | " + " | ".join(f"{name}, {shots}" for name, shots in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for noise in noises:
        figures = " | ".join(f"{100 * cells[(*column, noise)]['accuracy_mean']:.1f}" for column in columns)
        lines.append(f"| {noise} | {figures} |")
    seeds = {name: len(result["rows"][0]["accuracies"]) for name, result in results.items()}
    note = "Seeds: " + ", ".join(f"{name} {count}" for name, count in seeds.items())
    return "\n".join([*lines, "", f"{note}. {_device(next(iter(results.values())))}."])


def gda_table() -> str:
    """GDA with views as samples against their means."""
    result = _read("gda_views")
    lines = ["| shots | mean of the views, % | views as samples, % | gain, points |", "|---|---|---|---|"]
    lines.extend(
        f"| {row['shots']} | {100 * row['mean_accuracy']:.1f} | {100 * row['always_accuracy']:.1f} | "
        f"{100 * row['gain']:+.1f} ± {100 * row['gain_standard_error']:.1f} |"
        for row in result["rows"]
    )
    note = f"Zero-shot {100 * result['zero_shot_accuracy']:.1f} %; ± one standard error of the mean over the seeds."
    return "\n".join([*lines, "", note])


def gpu_table() -> str:
    """The compiled kernels, from the last run of gpu_suite.py that was kept; what holds of them before there is one."""
    if not (RESULTS / "gpu_suite.json").is_file():
        return "\n".join(NO_CARD_YET)
    suite = _read("gpu_suite")
    parts = [make() for name, make in GPU_TABLES.items() if suite["outcomes"].get(name) == "done"]
    bounds = [f"| {row['bound']} | {row['expected']} | {_got(row)} | {_verdict(row)} |" for row in suite["bounds"]]
    wrong = ", ".join(f"{name} {count}" for name, count in suite["wrong"].items())
    made = suite["made_with"]
    note = f"Wrong results: {wrong}. {made['device']}, torch {made['versions']['torch']}, {made['date']}."
    return "\n\n".join([*parts, "\n".join(["| to be reached | | got | |", "|---|---|---|---|", *bounds]), note])


def _gpu_correctness() -> str:
    """Of every kernel and dtype the largest error, and the signs of the Gram difference."""
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    rows = _read("gpu_correctness")["rows"]
    for row in rows:
        key = (row["name"], row["precision"])
        if row.get("times_plain", -1.0) > worst.get(key, {}).get("times_plain", -2.0):
            worst[key] = row
    lines = ["| kernel, dtype | worst error | of that of plain torch | signs right |", "|---|---|---|---|"]
    for (name, precision), row in worst.items():
        figures = f"{row['error']:.1e} | {row['times_plain']:.2f} | " if "error" in row else f"| | {_signs(row)}"
        lines.append(f"| {name}, {precision} | {figures} |")
    return "\n".join([*lines, "", f"{len(rows)} cases against float64."])


def _signs(row: dict[str, Any]) -> str:
    return f"{100 * row['agreement']:.2f} %" if "agreement" in row else row.get("error", "")


def _gpu_flow() -> str:
    """The flow by batch: ours, the competitors, the roofline."""
    result = _read("gpu_flow")
    cells = {(row["batch"], row["name"]): row for row in result["rows"]}
    names = list(dict.fromkeys(name for _, name in cells))
    lines = [
        f"| batch | {' | '.join(names)} | roofline | share of the peak |",
        "|---|" + "---|" * (len(names) + 2),
    ]
    for batch in sorted({batch for batch, _ in cells}):
        ours = cells[batch, "euler_flow"]
        times = " | ".join(f"{cells[batch, n]['ms']:.3f}" if (batch, n) in cells else "" for n in names)
        lines.append(f"| {batch} | {times} | {ours['roofline_ms']:.3f} | {100 * ours['share_of_peak']:.0f} % |")
    size, ceilings = result["size"], result["ceilings"]
    note = (
        f"ms a call, bf16, width {size['dim']}, {size['num_blocks']} blocks, {size['num_steps']} steps. "
        f"Measured peaks: {ceilings['tflops']:.0f} TFLOP/s, {ceilings['gigabytes'] / 1e3:.2f} TB/s."
    )
    return "\n".join([*lines, "", note])


def _gpu_gram() -> str:
    """The Gram loss with its gradient."""
    lines = [
        "| Gram loss, forward and backward | ms | of it on the card, ms | roofline, ms | memory, of N x N |",
        "|---|---|---|---|---|",
    ]
    for row in _read("gpu_gram")["rows"]:
        shape = " x ".join(map(str, row["shape"]))
        about = f"{row['name']}, {shape}, {row['kind']}{'' if row['normalize'] else ', as given'}"
        device = f"{row['device_ms']:.3f}" if "device_ms" in row else ""
        memory = f"{100 * row['memory_share']:.0f} %"
        lines.append(f"| {about} | {row['ms']:.3f} | {device} | {row['roofline_ms']:.3f} | {memory} |")
    return "\n".join(lines)


def _gpu_aot() -> str:
    """The bundle's kernels without torch."""
    lines = ["| without torch | batch | ms | p95, ms |", "|---|---|---|---|"]
    lines.extend(
        f"| {row['dtype']}, {row['target']} | {row['batch']} | {row['ms']:.3f} | {row['p95_ms']:.3f} |"
        for row in _read("gpu_aot")["rows"]
        if row["name"] == "latency"
    )
    return "\n".join(lines)


GPU_TABLES = {"correctness": _gpu_correctness, "flow": _gpu_flow, "gram": _gpu_gram, "aot": _gpu_aot}


def _got(row: dict[str, Any]) -> str:
    return "" if row["got"] is None else f"{row['got']:.3g}"


def _verdict(row: dict[str, Any]) -> str:
    return {True: "met", False: "not met", None: "not run"}[row["met"]]


def with_tables(text: str) -> str:
    """A page with its tables made anew."""
    tables = {
        "demo": demo_table,
        "compare": compare_table,
        "tuning": tuning_table,
        "flow": flow_table,
        "image": image_table,
        "bundle": bundle_table,
        "gpu": gpu_table,
        "noise": noise_table,
        "gda": gda_table,
    }
    for name, table in ((name, make()) for name, make in tables.items() if f"<!-- {name}-table -->" in text):
        start, end = f"<!-- {name}-table -->", f"<!-- /{name}-table -->"
        head, _, rest = text.partition(start)
        _, _, tail = rest.partition(end)
        text = f"{head}{start}\n{table}\n{end}{tail}"
    return text


def main() -> int:
    """Rewrite the pages, or with --check say whether they are current."""
    stale = 0
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        made = with_tables(text)
        if "--check" not in sys.argv[1:]:
            path.write_text(made, encoding="utf-8")
        elif made != text:
            stale = 1
            sys.stderr.write(f"{page}'s tables are not those of benchmarks/results: run python benchmarks/tables.py\n")
    return stale


def _read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


# Of the instructions that a result was made with, those that matrix products take, as people call them.
INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "VNNI",
    "avx512_bf16": "BF16",
    "amx_int8": "AMX int8",
    "amx_bf16": "AMX bf16",
    "asimddp": "dot products",
    "i8mm": "int8 matrix products",
}


def instructions(made: dict[str, Any]) -> str:
    """The instruction set in brackets; nothing for a result from before it was recorded."""
    known = [words for name, words in INSTRUCTIONS.items() if name in (made.get("instructions") or ())]
    return f" ({', '.join(known)})" if known else ""


def _device(result: dict[str, Any]) -> str:
    made = result["made_with"]
    versions = made["versions"]
    return f"{made['device']}{instructions(made)}, torch {versions['torch']}, ONNX Runtime {versions['onnxruntime']}"


if __name__ == "__main__":
    sys.exit(main())
