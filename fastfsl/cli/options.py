"""Options that several commands take, each told once."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Data = Annotated[
    Path, typer.Argument(help="Image folder, CoOp split file (.json) or feature file (.npz, .safetensors).")
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
ImageRoot = Annotated[Path | None, typer.Option(help="Folder that a split file's paths are relative to.")]
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
