"""`fastfsl predict`: classify image files with a bundle, a few to the screen or any number to a file."""

from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from fastfsl.cli.bulk import BulkOutput, Counts, classify, row_of
from fastfsl.cli.checks import check_images, check_is_bundle
from fastfsl.cli.image_inputs import STDIN, listed_images, walk_images
from fastfsl.cli.options import Alpha, ExpectedDigest, WideInt8
from fastfsl.cli.output import print_json, stdout, stdout_kept_clean, warn
from fastfsl.cli.progress import reporting
from fastfsl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fastfsl.data import Skipped
    from fastfsl.runtime import Classifier, Prediction

# Images between two updates of the progress bar.
_STEP = 32
# Images that are printed, at most: their predictions are held until the last is there.
_MAX_ON_SCREEN = 50_000
# Longer paths push their classes to the right instead of everybody's.
_MAX_PATH_COLUMN = 60
_UNREADABLE, _INTERRUPTED = 1, 130
# Of `Classifier.describe`, in a JSON document.
_ABOUT = ("digest", "providers", "flow", "preprocess", "int8")


def predict(
    bundle: Annotated[Path, typer.Argument(help="Bundle made by `fastfsl export`.")],
    images: Annotated[
        list[Path] | None, typer.Argument(help="Image files, or folders: every image below them, in natural order.")
    ] = None,
    listed: Annotated[
        Path | None, typer.Option("--list", help="File with one image path a line; - is the standard input.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Classes to show for each image.")] = 5,
    output: Annotated[
        Path | None, typer.Option(help="Write any number of images to FILE.jsonl or FILE.parquet, not to the screen.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue what an interrupted run left in OUTPUT.partial, or begin.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the output and what an interrupted run left.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda. auto takes the GPU where it really comes up.")
    ] = "auto",
    on_error: Annotated[
        str | None,
        typer.Option(
            help="raise: stop at an unreadable image. mark: report it in its place and go on.  "
            "[default: raise, with --output mark]"
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="End with exit code 1 if an image was marked as unreadable, or a file in a folder skipped."
        ),
    ] = False,
    batch: Annotated[int, typer.Option(help="Images computed at once, at most.")] = 32,
    num_threads: Annotated[
        int | None, typer.Option(help="CPU threads of one operator.  [default: what this process may use]")
    ] = None,
    image_threads: Annotated[
        int | None, typer.Option(help="Threads that decode images.  [default: one a processor, up to 8]")
    ] = None,
    preprocess: Annotated[
        str,
        typer.Option(help="exact: open_clip's pixels, bit for bit. fast: large JPEGs are decoded at a fraction."),
    ] = "exact",
    alpha: Alpha = None,
    flow: Annotated[
        str,
        typer.Option(help="auto, compiled or onnx. auto takes the bundle's kernels where a GPU runs them."),
    ] = "auto",
    expected_digest: ExpectedDigest = None,
    wide_int8: WideInt8 = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Classify images with an exported bundle. Needs neither torch nor a GPU.

    An image whose best class is less probable than the bundle's threshold, where it has one, is none of these.

    With --output each image becomes one row: input, labels, probabilities and known, or input and error. The file
    appears under its name when it is complete; until then its rows are in OUTPUT.partial, where --resume continues
    them with the same bundle, options and images, on the same kind of device.
    """
    from fastfsl.data.skipped import UNREADABLE, Skipped, file_account
    from fastfsl.runtime import Classifier

    if on_error not in (None, "raise", "mark"):
        raise ConfigError(f"--on-error must be raise or mark, got {on_error!r}")
    mode: Literal["raise", "mark"] = "mark" if on_error == "mark" or (output and on_error is None) else "raise"
    if not images and listed is None:
        raise ConfigError("expected images: files, folders, or --list FILE")
    if output is None and (resume or force):
        raise ConfigError("--resume and --force are about an --output: name one")
    check_is_bundle(bundle)
    if mode == "raise":
        check_images(images or [])
    target = None if output is None else BulkOutput(output, resume=resume, force=force)
    if target is not None and target.complete and resume:
        warn(f"{output} is complete: nothing to resume")
        counts = target.counts()
        # Nothing was loaded, and what made the rows is not in them.
        _summary(target.path, counts, {"bundle": str(bundle), **dict.fromkeys((*_ABOUT, "files"))} if as_json else None)
        _end(counts.images, counts.errors, strict=strict)
        return
    with stdout_kept_clean():
        classifier = Classifier.load(
            bundle,
            device=device,
            num_threads=num_threads,
            max_batch=batch,
            alpha=alpha,
            flow=flow,
            preprocess=preprocess,
            image_threads=image_threads,
            expected_digest=expected_digest,
            wide_int8=wide_int8,
        )
    about = _about(bundle, classifier)
    paths = images or []
    skipped = Skipped()
    if target is None:
        files = list(islice(_all(paths, listed, skipped), _MAX_ON_SCREEN + 1))
        if len(files) > _MAX_ON_SCREEN:
            raise ConfigError(
                f"more than {_MAX_ON_SCREEN} images are not printed; pass --output FILE.jsonl, for any number of them"
            )
        failed = _to_screen(classifier, files, top_k, mode, about if as_json else None, skipped)
        count = len(files)
    else:
        # What comes through a pipe comes once and cannot be counted beforehand.
        countable = listed is None or not (listed == STDIN or listed.is_fifo() or listed.is_char_device())
        total = sum(1 for _ in _all(paths, listed)) if countable else None
        settings = {
            "digest": about["digest"],
            "top_k": top_k,
            "batch": batch,
            "preprocess": preprocess,
            "alpha": alpha,
            # Where it runs, not what was asked for: "auto" may find a card in one run and none in the next, and a
            # card's products are rounded otherwise.
            "providers": {graph: providers[0] for graph, providers in about["providers"].items()},
            "flow": (about["flow"] or {}).get("executor"),
        }
        counts = _to_file(classifier, target, _all(paths, listed, skipped), total, settings, mode)
        count, failed = counts.images, counts.errors
        skipped.add(UNREADABLE, f"the rows with an error in {target.path}", failed)
        account = {**about, "files": file_account(count - failed, skipped)}
        _summary(target.path, counts, account if as_json else None)
    line = skipped.warning(count - failed + len(skipped)) if set(skipped.unexpected) - {UNREADABLE} else None
    if line is not None:
        warn(line)
    _end(count, failed, strict=strict)
    if strict and skipped.unexpected:
        raise typer.Exit(_UNREADABLE)


def _end(count: int, failed: int, *, strict: bool) -> None:
    if failed:
        warn(f"{failed} of {count} images could not be read")
        if strict:
            raise typer.Exit(_UNREADABLE)


def _all(paths: list[Path], listed: Path | None, skipped: "Skipped | None" = None) -> "Iterable[Path]":
    return chain(walk_images(paths, skipped), listed_images(listed) if listed else ())


def _about(bundle: Path, classifier: "Classifier") -> dict[str, Any]:
    described = classifier.describe()
    return {"bundle": str(bundle), **{key: described[key] for key in _ABOUT}}


def _to_screen(
    classifier: "Classifier",
    files: list[Path],
    top_k: int,
    mode: Literal["raise", "mark"],
    document: dict[str, Any] | None,
    skipped: "Skipped",
) -> int:
    """Classify and print, as one JSON document if there is one to begin with; returns how many could not be read.

    Those are counted as skipped, too.
    """
    from fastfsl.data.skipped import UNREADABLE, file_account

    predictions: list[Prediction] = []
    with reporting() as reporter:
        for prediction in classifier.stream(files, top_k=top_k, on_error=mode):
            predictions.append(prediction)
            if len(predictions) % _STEP == 0:
                reporter.stage("classifying", len(predictions), len(files))
    bad = [file for file, prediction in zip(files, predictions, strict=True) if prediction.error is not None]
    skipped.add(UNREADABLE, bad[0] if bad else "", len(bad))
    if document is not None:
        document = {**document, "files": file_account(len(files) - len(bad), skipped)}
        rows = [row_of(file, prediction) for file, prediction in zip(files, predictions, strict=True)]
        print_json({**document, "predictions": rows})
    else:
        width = min(max((len(str(file)) for file in files), default=0), _MAX_PATH_COLUMN)
        for file, prediction in zip(files, predictions, strict=True):
            stdout().print(_line(file, prediction, width), soft_wrap=True)
    return len(bad)


def _to_file(
    classifier: "Classifier",
    target: BulkOutput,
    files: "Iterable[Path]",
    total: int | None,
    settings: dict[str, Any],
    mode: Literal["raise", "mark"],
) -> Counts:
    try:
        with reporting() as reporter, target.rows(settings, settings["batch"]) as rows:
            return classify(
                classifier,
                files,
                rows,
                top_k=settings["top_k"],
                on_error=mode,
                progress=lambda done: reporter.stage("classifying", done, total),
            )
    except KeyboardInterrupt as error:
        warn(f"interrupted; {target.partial} holds the rows so far: --resume continues them")
        raise typer.Exit(_INTERRUPTED) from error


def _summary(output: Path, counts: Counts, document: dict[str, Any] | None) -> None:
    rate = round(counts.rate, 1)
    if document is not None:
        figures = {"images": counts.images, "errors": counts.errors, "resumed_after": counts.kept}
        seconds = round(counts.seconds, 3)
        print_json({**document, "output": str(output), **figures, "seconds": seconds, "images_per_second": rate})
        return
    kept = f", {counts.kept} of them before" if counts.kept else ""
    stdout().print(f"{output}: {counts.images} images{kept}, {rate:g} a second", soft_wrap=True, markup=False)


def _line(file: Path, prediction: "Prediction", width: int) -> Text:
    """One image a line, never folded, so that the output can be searched and cut: path, best class, the others."""
    name = f"{_one_line(file):<{width}}  "
    if prediction.error is not None:
        return Text.assemble(name, ("unreadable", "red"), f"  {_one_line(prediction.error)}")
    best, *others = (
        f"{_one_line(label)} {probability:.1%}"
        for label, probability in zip(prediction.labels, prediction.probabilities, strict=True)
    )
    if prediction.known is False:
        return Text.assemble(name, ("none of these", "yellow"), "  best guess: ", best, *(f"  {o}" for o in others))
    return Text.assemble(name, (best, "bold"), *(f"  {other}" for other in others))


def _one_line(name: object) -> str:
    return str(name).replace("\n", "\\n")
