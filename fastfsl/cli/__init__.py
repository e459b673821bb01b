"""The fastfsl command line: one file per command, imports inside. The help text is the documentation."""

import functools
import inspect as inspect_module
import io
import os
import platform
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, ParamSpec

import typer

from fastfsl.cli.bench import bench
from fastfsl.cli.compare import compare
from fastfsl.cli.demo import demo
from fastfsl.cli.doctor import doctor
from fastfsl.cli.evaluate import evaluate
from fastfsl.cli.export import export
from fastfsl.cli.inspect import inspect
from fastfsl.cli.output import print_error, warn
from fastfsl.cli.parts import version_of
from fastfsl.cli.predict import predict
from fastfsl.cli.progress import silenced
from fastfsl.cli.train import train
from fastfsl.errors import FastFSLError, resource_error

_P = ParamSpec("_P")

BAD_INPUT = 2
INTERRUPTED = 130


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,  # noqa: ARG001  # the signature of warnings.showwarning
    lineno: int,  # noqa: ARG001
    file: object = None,  # noqa: ARG001
    line: str | None = None,  # noqa: ARG001
) -> None:
    """Warnings meant for the user as one line; those meant for developers not at all."""
    if issubclass(category, UserWarning):
        warn(str(message))


def _guarded(command: Callable[_P, None]) -> Callable[_P, None]:
    """The command with bad input reported in one line and exit code 2, and Ctrl-C with exit code 130."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                command(*args, **kwargs)
        except FastFSLError as error:
            print_error(str(error))
            raise typer.Exit(BAD_INPUT) from error
        except (MemoryError, RuntimeError) as error:
            fault = resource_error(error, command.__name__)
            if fault is None:
                raise
            # Without the frames that it passed, and all that they hold: a message takes memory too.
            error.__traceback__ = None
            message = str(fault)
        except BrokenPipeError:  # `| head` has seen enough: typer ends the program quietly
            raise
        except OSError as error:  # what no room foresaw: permissions, impossible names, a vanished disk
            print_error(str(error))
            raise typer.Exit(BAD_INPUT) from error
        except KeyboardInterrupt as error:
            print_error("interrupted; nothing half-written was left behind")
            raise typer.Exit(INTERRUPTED) from error
        else:
            return
        print_error(message)
        raise typer.Exit(BAD_INPUT)

    return run


def _quietable(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option --quiet, which keeps its progress off stderr."""

    @functools.wraps(command)
    def run(*, quiet: bool = False, **kwargs: object) -> None:
        with silenced(quiet=quiet):
            command(**kwargs)

    # typer reads the options off the signature.
    signature = inspect_module.signature(command, eval_str=True)
    option = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr; warnings and errors stay.")]
    added = inspect_module.Parameter(
        "quiet", inspect_module.Parameter.POSITIONAL_OR_KEYWORD, default=False, annotation=option
    )
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), added])  # type: ignore[attr-defined]
    run.__annotations__ = {**command.__annotations__, "quiet": option}
    return run


def _print_versions(wanted: bool) -> None:
    """Print the versions that a question about a result needs. Nothing is imported for it."""
    if not wanted:
        return
    known = {
        name: version_of(name) for name in ("fastfsl", "onnxruntime", "onnxruntime-gpu", "torch", "open_clip_torch")
    }
    others = [f"{name} {version}" for name, version in known.items() if version is not None and name != "fastfsl"]
    typer.echo(f"fastfsl {known['fastfsl'] or '(not installed)'}")
    typer.echo(", ".join([f"Python {platform.python_version()}", *others]))
    raise typer.Exit


app = typer.Typer(
    name="fastfsl",
    help="From a CLIP model and a handful of labelled images per class to a classifier in production.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
# With a stage to report, so with --quiet.
_LONG = (demo, train, evaluate, compare, export, predict, bench)
for _command in (*_LONG, inspect, doctor):
    _guard = _guarded(_command)
    app.command(name=_command.__name__)(_quietable(_guard) if _command in _LONG else _guard)


@app.callback()
def _common(
    version: Annotated[  # its callback ends the program
        bool,
        typer.Option("--version", callback=_print_versions, is_eager=True, help="Show versions and exit."),
    ] = False,
) -> None:
    """From a CLIP model and a handful of labelled images per class to a classifier in production."""


def _fill_closed_streams() -> None:
    """Lead closed standard streams to nowhere.

    Otherwise an output file gets the number of one of them, and what a library prints lands in the file. The standard
    input stays None for Python: nothing may be read from it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8")


def main() -> None:
    """Entry point of the `fastfsl` program."""
    _fill_closed_streams()
    # OpenMP threads that spin while they wait stall each other on a busy machine. Read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Names that the terminal's encoding does not have are shown escaped; they do not end the program.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():  # bars are for people who watch; a log gets a line per stage
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except BrokenPipeError:
        raise
    except OSError as error:  # outside of a command: help and versions onto a full disk
        print_error(str(error))
        sys.exit(BAD_INPUT)
