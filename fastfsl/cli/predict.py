"""`fastfsl predict`: classify image files with a bundle."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from fastfsl.cli.options import Alpha, ExpectedDigest
from fastfsl.cli.output import print_json, stdout, stdout_kept_clean, warn
from fastfsl.cli.progress import reporting
from fastfsl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fastfsl.runtime import Prediction

# Images between two updates of the progress bar.
_CHUNK = 64
# Longer paths push their classes to the right instead of everybody's.
_MAX_PATH_COLUMN = 60


def predict(
    bundle: Annotated[Path, typer.Argument(help="Bundle made by `fastfsl export`.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders: every image below them.")],
    top_k: Annotated[int, typer.Option(help="Classes to show for each image.")] = 5,
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda. auto takes the GPU where it really comes up.")
    ] = "auto",
    on_error: Annotated[
        str, typer.Option(help="raise: stop at an unreadable image. mark: report it in its place and go on.")
    ] = "raise",
    num_threads: Annotated[
        int | None, typer.Option(help="CPU threads of one operator.  [default: what this process may use]")
    ] = None,
    alpha: Alpha = None,
    flow: Annotated[
        str,
        typer.Option(help="auto, compiled or onnx. auto takes the bundle's kernels where a GPU runs them."),
    ] = "auto",
    expected_digest: ExpectedDigest = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Classify images with an exported bundle. Needs neither torch nor a GPU.

    An image whose best class is less probable than the bundle's threshold, where it has one, is none of these.
    """
    from fastfsl.runtime import Classifier

    if on_error not in ("raise", "mark"):
        raise ConfigError(f"--on-error must be raise or mark, got {on_error!r}")
    mode: Literal["raise", "mark"] = "mark" if on_error == "mark" else "raise"
    with stdout_kept_clean():
        classifier = Classifier.load(
            bundle, device=device, num_threads=num_threads, alpha=alpha, flow=flow, expected_digest=expected_digest
        )
    files = find_images(images)
    predictions: list[Prediction] = []
    with reporting() as reporter:
        for start in range(0, len(files), _CHUNK):
            chunk = files[start : start + _CHUNK]
            predictions += classifier.predict(chunk, top_k=top_k, on_error=mode)
            reporter.stage("classifying", len(predictions), len(files))

    failed = sum(prediction.error is not None for prediction in predictions)
    if failed:
        warn(f"{failed} of {len(files)} images could not be read")
    if as_json:
        rows = [_row(file, prediction) for file, prediction in zip(files, predictions, strict=True)]
        described = classifier.describe()
        about = {"bundle": str(bundle), "providers": described["providers"], "flow": described["flow"]}
        print_json({**about, "predictions": rows})
    else:
        width = min(max((len(str(file)) for file in files), default=0), _MAX_PATH_COLUMN)
        for file, prediction in zip(files, predictions, strict=True):
            stdout().print(_line(file, prediction, width), soft_wrap=True)


def find_images(paths: list[Path]) -> list[Path]:
    """Files as they are, and of each folder every visible image file below it, in natural order.

    Raises:
        DataError: a path does not exist, or a folder holds no image.
    """
    from fastfsl.data.folder import IMAGE_EXTENSIONS
    from fastfsl.data.natural_order import natural_key

    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)  # the reader says what is wrong with it, if anything
            continue
        found = [
            file
            for file in path.rglob("*")
            if file.suffix.lower() in IMAGE_EXTENSIONS
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
            and file.is_file()
        ]
        if not found:
            raise DataError(f"{path}: no image in this folder; expected files such as .jpg or .png")
        files += sorted(found, key=lambda file: natural_key(file.as_posix()))
    return files


def _row(file: Path, prediction: "Prediction") -> dict[str, Any]:
    if prediction.error is not None:
        return {"input": str(file), "error": prediction.error}
    return {
        "input": str(file),
        "labels": list(prediction.labels),
        "probabilities": list(prediction.probabilities),
        "known": prediction.known,
    }


def _line(file: Path, prediction: "Prediction", width: int) -> Text:
    """One image a line, never folded, so that the output can be searched and cut: path, best class, the others."""
    name = f"{file!s:<{width}}  "
    if prediction.error is not None:
        return Text.assemble(name, ("unreadable", "red"), f"  {prediction.error}")
    best, *others = (
        f"{label} {probability:.1%}"
        for label, probability in zip(prediction.labels, prediction.probabilities, strict=True)
    )
    if prediction.known is False:
        return Text.assemble(name, ("none of these", "yellow"), "  best guess: ", best, *(f"  {o}" for o in others))
    return Text.assemble(name, (best, "bold"), *(f"  {other}" for other in others))
