"""Options that several commands take, each told once."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Data = Annotated[
    Path,
    typer.Argument(
        help="Image folder, CoOp split file (.json), table of paths and labels (.csv, .tsv, .jsonl, .parquet) or "
        "feature file (.npz, .safetensors)."
    ),
]
Backbone = Annotated[
    str | None,
    typer.Option(help="open_clip model, local-dir:PATH, hf-hub:NAME or tiny-clip.  [default: ViT-B-16]"),
]
Pretrained = Annotated[str | None, typer.Option(help="open_clip tag, or a checkpoint file (.safetensors, .pt).")]
Template = Annotated[
    list[str] | None,
    typer.Option("--template", help="Prompt with {} for the class name, or a preset's name; may be repeated."),
]
Views = Annotated[int | None, typer.Option(help="Augmented views of each image.  [default: 8]")]
Classes = Annotated[
    Literal["all", "base", "new"] | None,
    typer.Option(help="base: the first half of the classes, rounded up; new: the rest.  [default: all]"),
]
ImageRoot = Annotated[
    Path | None,
    typer.Option("--image-root", "--images", help="Folder that the paths of a split file or table are relative to."),
]
PathColumn = Annotated[
    str | None, typer.Option(help="Of a table: the column with the image files.  [default: found by name and values]")
]
LabelColumn = Annotated[str | None, typer.Option(help="Of a table: the column with the classes.  [default: found]")]
SplitColumn = Annotated[
    str | None, typer.Option(help="Of a table: the column that says train, val or test.  [default: found, if any]")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse data of which a file would be skipped that may be an image.")
]
ExactShots = Annotated[bool, typer.Option("--exact-shots", help="Refuse classes with fewer images than --shots.")]
TrainingDevice = Annotated[str | None, typer.Option(help="auto, cpu or cuda.  [default: auto]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Alpha = Annotated[
    float | None,
    typer.Option(
        help="Where an encoder blends a tuned tower (1) with the frozen one (0): its weight.  [default: the training's]"
    ),
]
WideInt8 = Annotated[
    bool,
    typer.Option(
        "--wide-int8",
        help="Run an older int8 bundle, more slowly, where it is refused because the processor would cut its sums off.",
    ),
]
ExpectedDigest = Annotated[
    str | None,
    typer.Option(help="What `fastfsl inspect BUNDLE --digest` prints of the one bundle that may be loaded."),
]
