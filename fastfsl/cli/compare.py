"""`fastfsl compare`: which method wins on the user's data, and by how much."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastfsl.cli import options
from fastfsl.cli.checks import check_comparison, check_data
from fastfsl.cli.next_command import command, data_options, encoder_options, free_name
from fastfsl.cli.output import print_json, stdout
from fastfsl.cli.progress import LOADING, one_step, reporting
from fastfsl.cli.requirements import require_training
from fastfsl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.text import Text

    from fastfsl.fit.compare import Comparison, Row
    from fastfsl.fit.config import TrainConfig


# Keys of --config beside the methods' names.
_DATA_OPTIONS = (
    "classes", "backbone", "pretrained", "templates", "num_views", "augmentation", "exact_shots", "image_root",
    "path_column", "label_column", "split_column", "strict", "device",
)  # fmt: skip


def compare(
    data: options.Data,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, with commas: those of `fastfsl train --help`. Methods that tune the encoder (mps, mps+fma) "
            "take part only when they are named.  [default: all on frozen features but fma-paper, fma-bridge and "
            "fma-released]"
        ),
    ] = None,
    exclude: Annotated[str, typer.Option(help="Methods to leave out, with commas.")] = "",
    shots: Annotated[
        str, typer.Option(help="Up to so many images per class, with commas; `all` takes all there are.")
    ] = "1,4,16",
    exact_shots: options.ExactShots = False,
    seeds: Annotated[int, typer.Option(help="Episodes of each: seeds 0, 1, ...")] = 3,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder for cells and results.  [default: compare-NAME in the working folder]"
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file: parameters as {method: {parameter: value}}, of two parts as {mps+fma: {mps: {...}, "
            f"fma: {{...}}}}}}, and {', '.join(_DATA_OPTIONS)}."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split to score on: test or val.")] = "test",
    classes: options.Classes = None,
    backbone: options.Backbone = None,
    pretrained: options.Pretrained = None,
    template: options.Template = None,
    views: options.Views = None,
    image_root: options.ImageRoot = None,
    path_column: options.PathColumn = None,
    label_column: options.LabelColumn = None,
    split_column: options.SplitColumn = None,
    strict: options.Strict = False,
    device: options.TrainingDevice = None,
    force: Annotated[bool, typer.Option("--force", help="Compute again the cells that OUT holds already.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Rank methods on a data set: each is fitted on few-shot episodes of the train split and scored on the test split.

    Every method meets the same episodes. A finished cell (method, shots, seed) is kept in OUT/cells: the same command
    again computes only what is missing, and goes on inside the tuning of an encoder. OUT/results.json, results.csv and
    accuracy.png hold the outcome.

    Methods that tune the encoder take images. Those with the same tuning, such as mps and mps+fma, share it; each is
    charged for it in full.
    """
    require_training()
    check_data(data)
    from fastfsl.fit.comparison_plan import check_folder, check_plan
    from fastfsl.fit.config import check_params, load_config

    chosen = _chosen(methods, exclude)
    params, data_options = _from_yaml(config)
    flags = {
        "classes": classes,
        "backbone": backbone,
        "pretrained": pretrained,
        "templates": template[0] if template and len(template) == 1 else template,
        "num_views": views,
        "exact_shots": exact_shots or None,
        "image_root": None if image_root is None else str(image_root),
        "path_column": path_column,
        "label_column": label_column,
        "split_column": split_column,
        "strict": strict or None,
        "device": device,
    }
    whole = data.resolve()
    name = whole.name if whole.is_dir() else whole.stem
    folder = Path(f"compare-{name}") if out is None else out
    given = {name: value for name, value in flags.items() if value is not None}
    resolved, numbers = load_config(flags={**data_options, **given}), _shots(shots)
    check_plan(chosen, numbers, seeds)
    check_folder(folder)
    for method in chosen:
        check_params(method, params.get(method, {}))
    check_comparison(data, resolved, chosen, numbers, split)

    with reporting(overall="cells") as reporter:
        with one_step(reporter, LOADING):
            from fastfsl.fit.compare import compare as run_comparison
        comparison = run_comparison(
            data,
            methods=chosen,
            shots=numbers,
            seeds=seeds,
            params=params,
            split=split,
            out=folder,
            force=force,
            config=resolved,
            reporter=reporter,
        )
    _draw(comparison, name, folder / "accuracy.png")
    following = _next(comparison, data, resolved)
    if as_json:
        print_json({**comparison.document(), "out": str(folder), "next": following})
    else:
        _print_table(comparison)
        stdout().print(f"Results and plot: {folder}", soft_wrap=True)
        stdout().print(f"Next: {following}", soft_wrap=True)


def _next(comparison: "Comparison", data: Path, config: "TrainConfig") -> str:
    """The command that trains the method that did best."""
    ranked = [row for row in comparison.rows if row.accuracy_mean is not None]
    if not ranked:
        return command("fastfsl", "doctor")
    last = [row for row in ranked if row.shots == ranked[-1].shots]
    options = [*data_options(dict(config)), *encoder_options(dict(config), dict(type(config)()))]
    best = max(last, key=lambda row: row.accuracy_mean or 0.0)
    return command("fastfsl", "train", data, "--out", free_name("run"), "--method", best.method, *options)


def _chosen(methods: str | None, exclude: str) -> list[str]:
    from fastfsl.fit.comparison_plan import check_methods, default_methods

    chosen = _listed(methods) if methods is not None else list(default_methods())
    left_out = _listed(exclude)
    check_methods([*chosen, *left_out])
    return [name for name in chosen if name not in left_out]


def _shots(text: str) -> list[int | None]:
    try:
        return [None if word == "all" else int(word) for word in _listed(text)]
    except ValueError as error:
        raise ConfigError(
            f"expected --shots to be numbers or `all`, with commas, such as 1,4,16, got {text!r}"
        ) from error


def _listed(text: str) -> list[str]:
    return [word for word in map(str.strip, text.split(",")) if word]


def _from_yaml(config: Path | None) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Parameters by method, and the options of data and encoder."""
    from fastfsl.fit.comparison_plan import check_methods
    from fastfsl.fit.config import read_yaml

    values = read_yaml(config)
    options = {name: values.pop(name) for name in _DATA_OPTIONS if name in values}
    try:
        check_methods(values)
    except ConfigError as error:
        raise ConfigError(f"{config}: {error}; beside methods it may hold {', '.join(_DATA_OPTIONS)}") from error
    for method, params in values.items():
        if not isinstance(params, dict):
            raise ConfigError(f"{config}: expected {method} to hold `parameter: value` lines, got {params!r}")
    return values, options


def _draw(comparison: "Comparison", title: str, path: Path) -> None:
    from fastfsl.fit.compare import by_method
    from fastfsl.report.accuracy_plot import AccuracyLine, write_accuracy_plot

    lines = []
    for method, rows in by_method(comparison.rows).items():
        own = rows[: len(comparison.settings["shots"])]
        lines.append(
            AccuracyLine(method, tuple(row.accuracy_mean for row in own), tuple(row.accuracy_sd for row in own))
        )
    write_accuracy_plot(path, comparison.settings["shots"], lines, title)


def _print_table(comparison: "Comparison") -> None:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    from fastfsl.fit.compare import by_method

    grouped = by_method(comparison.rows)
    first = next(iter(grouped.values()))
    settings = comparison.settings
    title = f"Accuracy, %{' (mean ± sd over seeds)' if settings['seeds'] > 1 else ''}"
    table = Table(title=Text(title), title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for row in first:
        shots = "mean" if row.shots == "mean" else "1 shot" if row.shots == 1 else f"{row.shots} shots"
        table.add_column(shots, justify="right", no_wrap=True)
    for header in ("train s", "params", "µs"):
        table.add_column(header, justify="right", no_wrap=True)
    for method, rows in grouped.items():
        table.add_row(Text(method), *map(_accuracy, rows), *_costs(rows))
    stdout().print(table)
    stdout().print(
        "Best in bold; * within noise of it (paired over seeds and test samples). Costs: one fit, the numbers it "
        f"determines, and a feature's time on the CPU in batches of {settings['batch_size']}, after the encoder"
        f"{', means over shots' if len(first) > 1 else ''}."
    )


def _accuracy(row: "Row") -> "Text":
    from rich.text import Text

    if row.accuracy_mean is None:
        return Text("failed", style="red")
    spread = "" if row.accuracy_sd is None else f"±{100 * row.accuracy_sd:.1f}"
    mark = "*" if row.within_noise and not row.best else " "
    return Text(f"{100 * row.accuracy_mean:.1f}{spread}{mark}", style="bold" if row.best else "")


def _costs(rows: "Sequence[Row]") -> list[str]:
    """Of the last row: the mean over numbers of shots where there are several."""
    last = rows[-1]
    if last.train_seconds is None or last.num_parameters is None or last.microseconds_per_feature is None:
        return ["-"] * 3
    return [f"{last.train_seconds:.2f}", _short(last.num_parameters), f"{last.microseconds_per_feature:.0f}"]


def _short(number: int) -> str:
    """1234567 as 1.2M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)
