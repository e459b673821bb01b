"""What a killed process leaves is removed by a later one; what a living one writes is not."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastfsl import leftovers
from fastfsl.errors import ConfigError
from fastfsl.files import check_output, staged_directory, staged_file

MARKER = "run.json"
WEEK = 7 * 24 * 3600

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills with SIGKILL")

_WRITER = """
import sys, time
from pathlib import Path
from fastfsl.files import staged_directory, staged_file
target = Path(sys.argv[2])
make = {"file": staged_file(target), "folder": staged_directory(target, marker="run.json", force=True)}[sys.argv[1]]
with make as staging:
    (staging / "half" if sys.argv[1] == "folder" else staging).write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""

# Killed between the two renames, or after the second.
_REPLACER = """
import os, signal, sys
from pathlib import Path
from fastfsl.files import staged_directory
rename = Path.rename
def renamed(self, target):
    result = rename(self, target)
    if self.name == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
Path.rename = renamed
with staged_directory(Path(sys.argv[1]), marker="run.json", force=True) as staging:
    (staging / "run.json").write_text("new")
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(target: Path, text: str, **options: bool) -> None:
    with staged_directory(target, marker=MARKER, **options) as staging:
        (staging / MARKER).write_text(text)


@pytest.fixture
def writer(tmp_path):
    """Starts a process that writes, and is killed in the end."""
    started = []

    def start(kind: str, target: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _WRITER, kind, str(target)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(10)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_run_left_is_swept_and_what_a_living_one_writes_is_not(writer, tmp_path, kind, monkeypatch):
    first = writer(kind, tmp_path / "out")
    second = writer(kind, tmp_path / "out")
    living = {path: path.stat().st_ino for path in tmp_path.iterdir()}
    assert len(living) == 2
    check_output(tmp_path / "out", marker=MARKER)
    write(tmp_path / "other", "whole")
    with monkeypatch.context() as later:
        _aged(later, 2 * WEEK)  # however long it takes
        leftovers.sweep_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*(path.name for path in living), "other"])
    _kill(first)
    leftovers.sweep_leftovers(tmp_path)
    assert len([path for path in living if path.exists()]) == 1
    _kill(second)
    if kind == "file":
        with staged_file(tmp_path / "out") as staging:
            staging.write_text("whole")
    else:
        write(tmp_path / "out", "whole")
    assert names(tmp_path) == ["other", "out"]


@pytest.mark.parametrize(("after", "text"), [("run", "old"), ("new", "new")])
def test_a_run_killed_while_it_replaced_its_target_loses_neither(tmp_path, after, text):
    target = tmp_path / "run"
    write(target, "old")
    killed = subprocess.run([sys.executable, "-c", _REPLACER, str(target), after], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert target.exists() is (after == "new")
    with pytest.raises(ConfigError, match="exists: choose another name or pass --force"):
        check_output(target, marker=MARKER)  # the old one is back before the next run looks for it
    assert (target / MARKER).read_text() == text
    assert names(tmp_path) == ["run"]


def test_an_interrupted_replacement_that_cannot_be_undone_keeps_the_old_one(tmp_path, monkeypatch):
    target = tmp_path / "run"
    write(target, "old")
    rename = Path.rename

    def failing(self, to):
        if self.name in ("new", "old"):
            raise OSError(errno.EIO, "broken disk")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ConfigError, match=r"broken disk\): it lies in .*\.run\.partial-\w{8}/old, and the next run"):
        write(target, "new", force=True)
    monkeypatch.undo()
    assert not target.exists()
    leftovers.sweep_leftovers(tmp_path)
    assert (target / MARKER).read_text() == "old"
    assert names(tmp_path) == ["run"]


def _aged(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """As if so much time had passed: change times cannot be set."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + seconds)


def _area(folder: Path, **owner: object) -> Path:
    """A dead process's, on this machine unless said otherwise."""
    area = folder / ".out.partial-0123abcd"
    area.mkdir()
    about = {"kernel": leftovers._kernel(), "locked": True, "host": "here", "pid": 1, **owner}
    (area / leftovers._OWNER).write_text(json.dumps(about))
    return area


@pytest.mark.parametrize("owner", [{"kernel": "of another machine"}, {"locked": False}, {"kernel": None}])
def test_what_another_machine_may_be_writing_is_left_for_a_week(tmp_path, monkeypatch, owner):
    area = _area(tmp_path, **owner)
    leftovers.sweep_leftovers(tmp_path)
    assert area.exists()
    _aged(monkeypatch, WEEK - 60)
    leftovers.sweep_leftovers(tmp_path)
    assert area.exists()
    _aged(monkeypatch, WEEK + 120)
    leftovers.sweep_leftovers(tmp_path)
    assert not area.exists()


def test_one_that_was_just_made_is_nobody_s_to_sweep(tmp_path):
    (tmp_path / ".out.partial-0123abcd").mkdir()
    (tmp_path / ".out.partial-0123abce").mkdir()
    (tmp_path / ".out.partial-0123abce" / leftovers._OWNER).touch()
    leftovers.sweep_leftovers(tmp_path)
    assert len(names(tmp_path)) == 2


def test_without_locks_nothing_is_taken_for_dead(tmp_path, monkeypatch):
    import fcntl

    area = _area(tmp_path)

    def unsupported(*_):
        raise OSError("no locks on this disk")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    leftovers.sweep_leftovers(tmp_path)
    assert area.exists()
    write(tmp_path / "out", "whole")
    assert names(tmp_path) == [area.name, "out"]


def test_what_an_older_version_left_is_swept_in_the_end(tmp_path, monkeypatch):
    (tmp_path / ".a.json.partial-0123abcd").write_text("half")
    write(tmp_path / ".b.old-0123abcd", "old")
    write(tmp_path / "c", "kept")
    write(tmp_path / ".c.old-0123abcd", "old")
    _aged(monkeypatch, WEEK + 60)
    leftovers.sweep_leftovers(tmp_path)
    assert names(tmp_path) == ["b", "c"]
    assert (tmp_path / "c" / MARKER).read_text() == "kept"


@pytest.mark.parametrize("name", [".out.partial", ".out.partial-xyz", "out.partial-0123abcd", ".out.partial-0123abcde"])
def test_files_of_other_names_are_the_user_s(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    (tmp_path / ".link.partial-0123abcd").symlink_to(tmp_path / name)
    _aged(monkeypatch, 2 * WEEK)
    leftovers.sweep_leftovers(tmp_path)
    assert names(tmp_path) == sorted([name, ".link.partial-0123abcd"])


def test_a_forked_child_keeps_what_its_parent_writes(tmp_path):
    """It holds the lock as well: nothing is swept as long as either lives."""
    with staged_file(tmp_path / "out") as staging:
        child = os.fork()
        if child == 0:
            leftovers.sweep_leftovers(tmp_path)
            os._exit(0 if staging.parent.exists() else 1)
        assert os.waitpid(child, 0)[1] == 0
        staging.write_text("whole")
    assert names(tmp_path) == ["out"]
