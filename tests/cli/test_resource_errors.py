"""Commands on a machine that runs out of something: typed, exit code 2, nothing recorded that is not so."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fastfsl.cli import image_inputs
from fastfsl.errors import ResourceError, resource_error
from fastfsl.images import opening
from fastfsl.runtime import Classifier

_PROGRAM = [sys.executable, "-c", "from fastfsl.cli import main; main()"]
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "300"}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX systems")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(5)
    for number in range(100):
        name = f"{number:03d}.{('jpg', 'png', 'webp')[number % 3]}"
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / name)
    return folder


def _program(*arguments, limit=None, **options):
    def lower():
        if limit is not None:
            resource.setrlimit(limit[0], (limit[1], limit[1]))

    return subprocess.run(
        [*_PROGRAM, *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False, env=_ENVIRONMENT, preexec_fn=lower, **options,
    )  # fmt: skip


def _rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _bulk(bundle, *arguments):
    return ("predict", bundle, *arguments, "--device", "cpu", "--num-threads", 1)


@pytest.mark.parametrize("handles", [8, 10])
def test_too_few_file_handles_make_no_good_image_a_bad_one(image_bundle, photos, tmp_path, handles):
    output = tmp_path / "rows.jsonl"
    command = _bulk(image_bundle, photos, "--output", output, "--batch", 4, "--image-threads", 8)
    found = _program(*command, limit=(resource.RLIMIT_NOFILE, handles))
    if found.returncode != 0:  # how many are needed at once is a matter of chance
        assert found.returncode == 2
        assert "oo many open files" in found.stderr
        assert "Traceback" not in found.stderr
        assert not output.exists()
        resumed = _program(*command, "--resume")
        assert resumed.returncode == 0, resumed.stderr
    rows = _rows(output)
    assert len(rows) == 100
    assert not [row for row in rows if "error" in row]


def _fault(number, path):
    fault = resource_error(OSError(number, os.strerror(number)), f"read the image {path}")
    assert fault is not None
    return fault


@pytest.fixture
def no_handles(monkeypatch):
    """From the tenth image on, there is no file handle left."""
    read, count = opening._read, []

    def fail(path):
        count.append(path)
        if len(count) >= 10:
            raise _fault(errno.EMFILE, path)
        return read(path)

    monkeypatch.setattr(opening, "_read", fail)
    return count


def test_a_run_that_stops_for_want_of_handles_is_resumed(
    fastfsl, image_bundle, photos, tmp_path, no_handles, monkeypatch
):
    output = tmp_path / "rows.jsonl"
    command = _bulk(image_bundle, photos, "--output", output, "--batch", 4, "--image-threads", 1)
    found = fastfsl(*command)
    assert found.exit_code == 2
    assert "too many open files; raise the limit of open files (ulimit -n)" in found.stderr.replace("\n", " ")
    rows = _rows(tmp_path / "rows.jsonl.partial" / "rows.jsonl")
    assert len(rows) == 8  # two whole batches
    assert not [row for row in rows if "error" in row]
    monkeypatch.undo()
    resumed = fastfsl(*command, "--resume", "--json")
    assert (resumed.document["resumed_after"], resumed.document["errors"]) == (8, 0)
    assert len(_rows(output)) == 100


def test_the_screen_marks_nothing_for_want_of_handles(fastfsl, image_bundle, photos, no_handles):
    found = fastfsl(*_bulk(image_bundle, photos, "--on-error", "mark", "--json"))
    assert (found.exit_code, found.stdout) == (2, "")


def test_evaluate_stops_for_want_of_handles(fastfsl, image_bundle, photos, tmp_path, no_handles):
    for place, name in enumerate(("ant", "bee", "cow")):
        folder = tmp_path / "test" / name
        folder.mkdir(parents=True)
        for photo in sorted(photos.iterdir())[place::3][:8]:
            (folder / photo.name).hardlink_to(photo)
    (tmp_path / "train").symlink_to("test")
    found = fastfsl("evaluate", image_bundle, tmp_path, "--json")
    assert (found.exit_code, found.stdout) == (2, "")
    assert "too many open files" in found.stderr


def test_a_request_of_the_batcher_gets_the_error_and_others_go_on(image_bundle, photos, monkeypatch):
    files = sorted(photos.iterdir())[:6]
    read = opening._read

    def fail(path):
        if path == files[2]:
            raise _fault(errno.EIO, path)
        return read(path)

    monkeypatch.setattr(opening, "_read", fail)
    with Classifier.load(image_bundle, device="cpu") as classifier, classifier.batcher() as submit:
        futures = [submit(file) for file in files]
        assert isinstance(futures[2].exception(timeout=30), ResourceError)
        assert all(future.result(timeout=30).labels for future in futures[:2] + futures[3:])


# ------------------------------------------------------------------------------------------------------ memory, disk


@pytest.mark.parametrize("error", [MemoryError, RuntimeError("can't start new thread")])
def test_out_of_memory_anywhere_is_a_message(fastfsl, image_bundle, photos, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Classifier, "load", fail)
    found = fastfsl(*_bulk(image_bundle, photos))
    assert found.exit_code == 2
    assert "cannot predict: " in found.stderr
    assert "Traceback" not in found.stderr


def test_a_full_disk_leaves_rows_that_can_be_resumed(image_bundle, photos, tmp_path):
    output = tmp_path / "rows.jsonl"
    command = _bulk(image_bundle, photos, "--output", output, "--batch", 4)
    found = _program(*command, limit=(resource.RLIMIT_FSIZE, 8000))
    assert found.returncode == 2, found.stderr
    assert "--resume" in found.stderr
    assert "Traceback" not in found.stderr
    assert not output.exists()
    resumed = _program(*command, "--resume", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["resumed_after"] > 0
    assert [row["input"] for row in _rows(output)] == [str(file) for file in image_inputs.find_images([photos])]


def test_a_run_killed_while_it_wrote_its_settings_is_resumed(fastfsl, image_bundle, photos, tmp_path):
    output = tmp_path / "rows.jsonl"
    (tmp_path / "rows.jsonl.partial" / ".settings.json.partial-0123abcd").mkdir(parents=True)
    assert fastfsl(*_bulk(image_bundle, photos, "--output", output, "--resume")).exit_code == 0
    assert list(tmp_path.iterdir()) == [output]


# ------------------------------------------------------------------------------------------------------------- lists


def test_a_list_from_a_closed_standard_input_is_refused(image_bundle):
    closed = subprocess.run(
        ["/bin/sh", "-c", '"$@" <&-', "sh", *_PROGRAM, *map(str, _bulk(image_bundle, "--list", "-"))],
        capture_output=True, text=True, timeout=60, check=False, env=_ENVIRONMENT,
    )  # fmt: skip
    assert closed.returncode == 2
    assert "the standard input is closed" in closed.stderr
    assert "Traceback" not in closed.stderr


_TALKATIVE = """
import os
from fastfsl.cli import main
from fastfsl.runtime import Classifier
stream = Classifier.stream
def talk(*arguments, **options):
    os.write(1, b"libraries talk")
    os.write(2, b"libraries talk")
    return stream(*arguments, **options)
Classifier.stream = talk
main()
"""


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_lead_nowhere_and_into_no_output(image_bundle, photos, tmp_path, streams):
    """Rows have the file's number that the stream had, if nobody sees to it, and a library's words between them."""
    output = tmp_path / "rows.jsonl"
    program = [sys.executable, "-c", _TALKATIVE]
    command = _bulk(image_bundle, min(photos.iterdir()), "--output", output, "--json")
    script = ["/bin/sh", "-c", f'"$@" {streams}', "sh", *program, *map(str, command)]
    found = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False, env=_ENVIRONMENT)
    assert found.returncode == 0, found.stderr
    assert [set(row) for row in _rows(output)] == [{"input", "labels", "probabilities", "known"}]


def test_a_list_larger_than_memory_is_refused_at_its_first_line(image_bundle, tmp_path):
    huge = tmp_path / "huge"
    huge.touch()
    os.truncate(huge, 2**40)
    memory = (resource.RLIMIT_AS, 3 * 2**30)
    for more in ([], ["--output", tmp_path / "rows.jsonl"]):
        found = _program(*_bulk(image_bundle, "--list", huge), *more, limit=memory)
        assert found.returncode == 2
        assert "line 1 is no path; expected a text file" in found.stderr


@pytest.mark.parametrize("content", [b"x" * 2**17, b"a.png\n" + b"y" * 2**17 + b"\n", b"a.png\0b.png\0"])
def test_a_list_that_is_no_list_of_paths_is_refused(fastfsl, image_bundle, tmp_path, content):
    (tmp_path / "list").write_bytes(content)
    found = fastfsl(*_bulk(image_bundle, "--list", tmp_path / "list"))
    assert found.exit_code == 2
    assert "is no path" in found.stderr


def test_more_images_than_are_printed_are_refused(fastfsl, image_bundle, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["fastfsl.cli.predict"], "_MAX_ON_SCREEN", 3)
    (tmp_path / "list").write_text("\n".join(map(str, sorted(photos.iterdir())[:4])))
    found = fastfsl(*_bulk(image_bundle, "--list", tmp_path / "list"))
    assert found.exit_code == 2
    assert "pass --output FILE.jsonl" in found.stderr.replace("\n", " ")
    assert fastfsl(*_bulk(image_bundle, *sorted(photos.iterdir())[:3])).exit_code == 0
