"""What a shell and a user's first questions meet: -h, --version, completion, progress without a terminal."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from fastfsl.cli import progress
from fastfsl.cli.progress import LineReporter, reporting


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", "from fastfsl.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "100", **environment},
        timeout=60,
    )


@pytest.mark.parametrize("command", [(), ("train",), ("predict",), ("doctor",)])
def test_h_is_help(fastfsl, command):
    short, whole = fastfsl(*command, "-h"), fastfsl(*command, "--help")
    assert short.exit_code == whole.exit_code == 0
    assert short.stdout == whole.stdout
    assert "Usage" in short.stdout


def test_version_names_the_packages_a_result_depends_on_without_importing_them(fastfsl):
    result = fastfsl("--version")
    assert result.exit_code == 0
    assert re.match(r"fastfsl \d+\.\d+\.\d+\nPython 3\.\d+", result.stdout)
    assert re.search(r"onnxruntime(-gpu)? \d", result.stdout)
    assert re.search(r"torch \d", result.stdout)
    ask = "from fastfsl.cli import app; app(['--version'])"
    code = f"import sys\ntry:\n    {ask}\nfinally:\n    print('loaded:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    loaded = done.stdout.partition("loaded:")[2].split()
    assert "fastfsl.cli" in loaded
    assert not {"torch", "onnxruntime", "numpy"} & set(loaded)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full here")
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["train", "-h"]])
def test_a_full_disk_under_the_output_is_told_in_a_line(arguments):
    code = f"import sys; sys.argv = {['fastfsl', *arguments]}; from fastfsl.cli import main; main()"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert done.returncode == 2, done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_version_says_nothing_of_what_is_not_installed(fastfsl, monkeypatch):
    monkeypatch.setattr("fastfsl.cli.version_of", {"fastfsl": "9.9"}.get)
    lines = fastfsl("--version").stdout.splitlines()
    assert lines[0] == "fastfsl 9.9"
    assert re.fullmatch(r"Python [\d.]+\S*", lines[1])


def test_completion_can_be_installed_and_completes(fastfsl):
    assert "--install-completion" in fastfsl("--help").stdout
    # The program's own name decides the variable's.
    code = "import sys; sys.argv[0] = 'fastfsl'; from fastfsl.cli import main; main()"
    asked = {"_FASTFSL_COMPLETE": "complete_bash", "COMP_WORDS": "fastfsl ev", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **asked}
    )
    assert done.stdout.split() == ["evaluate"]


@pytest.fixture
def features(tmp_path):
    rng = np.random.default_rng(0)
    texts = np.eye(3, 8, dtype=np.float32)
    labels = np.repeat(np.arange(3), 4)
    drawn = (texts[labels] + 0.1 * rng.normal(size=(12, 8))).astype(np.float32)
    np.savez(tmp_path / "f.npz", train_features=drawn, train_labels=labels, class_embeddings=texts)
    return tmp_path / "f.npz"


def test_without_a_terminal_a_stage_is_a_line_when_it_begins_and_one_when_it_ends(fastfsl, features, tmp_path):
    result = fastfsl("train", features, "--out", tmp_path / "run", "--method", "gda")
    assert result.exit_code == 0, result.stderr
    lines = result.stderr.splitlines()
    assert "loading torch ..." in lines
    assert any(re.fullmatch(r"loading torch: done in \d+\.\d s", line) for line in lines)
    assert "fitting" in lines
    assert "\x1b" not in result.stderr  # no cursor is moved
    assert "\r" not in result.stderr


def test_quiet_leaves_warnings_and_errors(fastfsl, features, tmp_path):
    result = fastfsl("train", features, "--out", tmp_path / "run", "--method", "gda", "--quiet")
    assert result.exit_code == 0
    assert result.stderr == ""
    again = fastfsl("train", features, "--out", tmp_path / "run", "--method", "gda", "-q")
    assert again.exit_code == 2
    assert "run exists" in again.stderr
    # The option of one command is not that of the next.
    assert "loading torch" in fastfsl("train", features, "--out", tmp_path / "b", "--method", "gda").stderr


def test_stages_as_lines(capsys, monkeypatch):
    clock = iter(np.arange(0.0, 1000.0, 20.0).tolist())
    monkeypatch.setattr("fastfsl.cli.progress.time.monotonic", lambda: next(clock))
    written = []
    monkeypatch.setattr(LineReporter, "_line", lambda _, words: written.append(words))
    lines = LineReporter()
    for done in range(5):  # a call each 20 s
        lines.stage("encoding", done, 4)
    lines.stage("counting", 0, None)
    lines.stage("counting", 7, None)
    lines.stage("counting", 9, None)
    lines.stage("written", 5, 5)
    lines.end()
    assert written == [
        "encoding ...",
        "encoding: 2 of 4, 40 s",
        "encoding: 4 done in 100.0 s",
        "counting ...",
        "counting: 9, 40 s",
        "counting: done in 80.0 s",
        "written",
    ]


def test_of_a_whole_the_parts_are_not_told(monkeypatch):
    written = []
    monkeypatch.setattr(LineReporter, "_line", lambda _, words: written.append(words))
    lines = LineReporter("cells")
    lines.stage("cells", 0, 2)
    lines.stage("gda, 1 shot: fitting", 1, 1)
    lines.stage("cells", 2, 2)
    assert written[0] == "cells ..."
    assert written[1].startswith("cells: 2 done in ")
    assert len(written) == 2


def test_a_terminal_has_bars(monkeypatch):
    class Terminal:
        is_terminal = True

    monkeypatch.setattr(progress, "stderr", Terminal)
    monkeypatch.setattr(progress, "Progress", _Recorded)
    with reporting() as reporter:
        reporter.stage("encoding", 1, 2)
    assert _Recorded.tasks == [("encoding", 2)]


class _Recorded:
    tasks: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, *columns, console, transient):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def add_task(self, name, total):
        self.tasks.append((name, total))
        return 0

    def update(self, task, **values):
        pass
