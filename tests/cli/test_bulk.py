"""Many predictions in a file: complete or resumable, and the same whether or not a run was interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from fastfsl.cli.bulk import BulkOutput
from fastfsl.cli.image_inputs import find_images, walk_images
from fastfsl.data.natural_order import natural_key
from fastfsl.errors import ConfigError, DataError
from fastfsl.runtime import Classifier

BATCH = 4


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Fourteen images in folders, the sixth unreadable."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(5)
    for index in range(14):
        path = folder / ("b" if index % 2 else "a 10") / f"photo {index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(path)
    find_images([folder])[5].write_bytes(b"no picture")
    return folder


@pytest.fixture
def bulk(fastfsl, image_bundle):
    def run(*arguments, batch=BATCH):
        return fastfsl("predict", image_bundle, *arguments, "--device", "cpu", "--num-threads", 1, "--batch", batch)

    return run


def _rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_what_the_runtime_says(bulk, image_bundle, many, tmp_path):
    output = tmp_path / "new" / "rows.jsonl"
    result = bulk(many, "--output", output, "--top-k", 2, "--json")
    assert result.exit_code == 0, result.stderr
    files = find_images([many])
    expected = Classifier.load(image_bundle, device="cpu", max_batch=BATCH).predict(files, top_k=2, on_error="mark")
    rows = _rows(output)
    assert [row["input"] for row in rows] == [str(file) for file in files]
    for row, prediction in zip(rows, expected, strict=True):
        if prediction.error:
            assert set(row) == {"input", "error"}
            assert row["error"] == prediction.error
        else:
            assert (tuple(row["labels"]), row["known"]) == (prediction.labels, None)
            np.testing.assert_allclose(row["probabilities"], prediction.probabilities, atol=1e-6)
    said = result.document
    assert (said["images"], said["errors"], said["resumed_after"]) == (14, 1, 0)
    assert said["images_per_second"] > 0
    assert "1 of 14 images could not be read" in result.stderr
    assert list(output.parent.iterdir()) == [output]


def test_strict_fails_when_all_is_written(bulk, many, tmp_path):
    output = tmp_path / "rows.jsonl"
    result = bulk(many, "--output", output, "--strict")
    assert result.exit_code == 1
    assert "14 images" in result.stdout
    assert len(_rows(output)) == 14


def test_parquet_holds_the_same_rows(bulk, many, tmp_path, monkeypatch):
    monkeypatch.setattr("fastfsl.cli.parquet._ROWS_IN_A_GROUP", 5)
    assert bulk(many, "--output", tmp_path / "rows.jsonl").exit_code == 0
    assert bulk(many, "--output", tmp_path / "rows.parquet").exit_code == 0
    assert not (tmp_path / "rows.parquet.partial").exists()
    assert pyarrow.parquet.ParquetFile(tmp_path / "rows.parquet").num_row_groups == 3
    table = pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    for got, row in zip(table, _rows(tmp_path / "rows.jsonl"), strict=True):
        assert {key: value for key, value in got.items() if key != "probabilities"} == {
            "input": row["input"], "labels": row.get("labels"), "known": None, "error": row.get("error")
        }  # fmt: skip
        assert got["probabilities"] is None or got["probabilities"] == row["probabilities"]  # both are float32's values


def test_without_pyarrow_parquet_says_what_to_install(bulk, many, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = bulk(many, "--output", tmp_path / "rows.parquet")
    assert result.exit_code == 2
    assert "fastfsl[parquet]" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize(("share", "kept"), [(0, 0), (0.001, 0), (0.5, 4), (0.8, 8), (1, 12)])
def test_a_resumed_run_gives_the_file_of_an_uninterrupted_one(bulk, many, tmp_path, name, share, kept, monkeypatch):
    whole, output = tmp_path / "whole" / name, tmp_path / name
    assert bulk(many, "--output", whole).exit_code == 0
    assert bulk(many, "--output", tmp_path / "all.jsonl").exit_code == 0
    lines = (tmp_path / "all.jsonl").read_bytes()

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastfsl.cli.bulk.row_of", killed)
        result = bulk(many, "--output", output)
    assert result.exit_code == 130
    assert "--resume" in result.stderr
    assert not output.exists()
    partial = tmp_path / f"{name}.partial"
    (partial / "rows.jsonl").write_bytes(lines[: int(share * len(lines))])
    again = bulk(many, "--output", output)
    assert (again.exit_code, "--resume" in again.stderr) == (2, True)
    result = bulk(many, "--output", output, "--resume", "--json")
    assert result.exit_code == 0, result.stderr
    assert output.read_bytes() == whole.read_bytes()
    assert result.document["resumed_after"] == kept
    assert result.document["errors"] == 1
    assert not partial.exists()
    done = bulk(many, "--output", output, "--resume", "--json")
    assert (done.exit_code, "is complete" in done.stderr, "1 of 14 images" in done.stderr) == (0, True, True)
    figures = {"images": 14, "errors": 1, "resumed_after": 14, "seconds": 0, "images_per_second": 0}
    assert done.document.items() >= figures.items()
    assert done.document.keys() == result.document.keys()
    assert done.document["output"] == result.document["output"]
    done = bulk(many, "--output", output, "--resume", "--strict")
    assert (done.exit_code, "14 images, 14 of them before" in done.stdout) == (1, True)
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_complete_output_of_something_else_is_no_result(bulk, many, tmp_path, name):
    output = tmp_path / name
    output.write_text('{"mine": 1}\n')
    result = bulk(many, "--output", output, "--resume")
    assert (result.exit_code, "no rows of predictions" in " ".join(result.stderr.split())) == (2, True)
    pyarrow.parquet.write_table(pyarrow.table({"mine": [1]}), tmp_path / "other.parquet")
    assert bulk(many, "--output", tmp_path / "other.parquet", "--resume").exit_code == 2
    assert output.read_text() == '{"mine": 1}\n'


def test_a_complete_table_has_both_columns_that_are_counted(tmp_path):
    for name in ("input", "error"):
        pyarrow.parquet.write_table(pyarrow.table({name: ["a", None]}), tmp_path / "rows.parquet")
        with pytest.raises(DataError, match="no rows of predictions"):
            BulkOutput(tmp_path / "rows.parquet", resume=True, force=False).counts()


_SLOW = """
import sys, time
from fastfsl.runtime.image_encoder import ImageEncoder
from fastfsl import cli
embed = ImageEncoder.embed
def slow(self, pixels):
    time.sleep(0.05)
    return embed(self, pixels)
ImageEncoder.embed = slow
cli.main()
"""


def test_a_killed_process_is_resumed(bulk, image_bundle, many, tmp_path):
    output, rows = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.partial" / "rows.jsonl"
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(str(file) for file in find_images([many]) * 100))
    arguments = ["predict", image_bundle, "--list", listed, "--output", output, "--batch", BATCH, "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW, *map(str, arguments), "--num-threads", "1"], stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 60
    while not (rows.exists() and rows.stat().st_size > 2000) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    assert process.poll() is None
    second = bulk("--list", listed, "--output", output, "--resume")
    assert (second.exit_code, "another run" in second.stderr) == (2, True)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    result = bulk("--list", listed, "--output", output, "--resume", "--json")
    assert result.exit_code == 0, result.stderr
    assert 0 < result.document["resumed_after"] < 1400
    assert bulk("--list", listed, "--output", tmp_path / "whole.jsonl").exit_code == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.fixture
def interrupted(bulk, many, tmp_path, monkeypatch):
    """An output whose run ended after eight rows."""
    output = tmp_path / "rows.jsonl"
    assert bulk(many, "--output", output).exit_code == 0
    lines = output.read_bytes().splitlines(keepends=True)
    output.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("fastfsl.runtime.Classifier.stream", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert bulk(many, "--output", output).exit_code == 130
    (tmp_path / "rows.jsonl.partial" / "rows.jsonl").write_bytes(b"".join(lines[:8]))
    return output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--top-k", 2], "top_k=5 (now 2)"),
        (["--preprocess", "fast"], "preprocess='exact' (now 'fast')"),
        (["--force"], "pass one of them"),
    ],
)
def test_a_run_is_continued_only_as_it_began(bulk, many, interrupted, options, words):
    result = bulk(many, "--output", interrupted, "--resume", *options)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert bulk(many, "--output", interrupted, "--resume", batch=5).exit_code == 2
    assert bulk(many, "--output", interrupted, "--resume").exit_code == 0


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"providers": {"visual": ["CUDAExecutionProvider", "CPUExecutionProvider"]}}, "'CUDAExecutionProvider'"),
        ({"flow": {"executor": "compiled sm_90", "reason": ""}}, "flow='onnxruntime' (now 'compiled sm_90')"),
        ({"flow": None}, "flow='onnxruntime' (now None)"),
    ],
)
def test_a_run_is_continued_only_where_it_began(bulk, many, interrupted, monkeypatch, found, words):
    describe = Classifier.describe
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "describe", lambda self: {**describe(self), **found})
        result = bulk(many, "--output", interrupted, "--resume")
        assert result.exit_code == 2
        said = " ".join(result.stderr.split())
        assert words in said
        assert "providers" not in found or "'CPUExecutionProvider'" in said
    assert bulk(many, "--output", interrupted, "--resume", "--json").document["resumed_after"] == 8


def test_other_images_are_not_continued_with(bulk, many, interrupted):
    files = find_images([many])
    for images, words in ((files[1:], "image 1 of"), (files[:6], "missing"), ([files[0], *files[2:]], "image 2 of")):
        result = bulk(*images, "--output", interrupted, "--resume")
        assert result.exit_code == 2
        assert words in " ".join(result.stderr.split())
    assert bulk(*files, "--output", interrupted, "--resume").exit_code == 0


def test_damaged_rows_are_not_continued(bulk, many, interrupted):
    partial = interrupted.with_name("rows.jsonl.partial")
    lines = (partial / "rows.jsonl").read_bytes().splitlines()
    (partial / "rows.jsonl").write_bytes(b"\n".join([*lines[:2], b"\0" * 40, *lines[3:], b""]))
    result = bulk(many, "--output", interrupted, "--resume")
    assert (result.exit_code, "row 3 is damaged" in " ".join(result.stderr.split())) == (2, True)
    (partial / "settings.json").write_text("[]")
    assert bulk(many, "--output", interrupted, "--resume").exit_code == 2
    assert bulk(many, "--output", interrupted, "--force").exit_code == 0
    assert len(_rows(interrupted)) == 14


def test_nothing_of_others_is_replaced(bulk, many, tmp_path):
    output = tmp_path / "rows.jsonl"
    output.write_text("mine")
    assert "exists" in bulk(many, "--output", output).stderr
    assert output.read_text() == "mine"
    assert bulk(many, "--output", output, "--force").exit_code == 0
    partial = tmp_path / "other.jsonl.partial"
    partial.mkdir()
    (partial / "diary.txt").write_text("mine")
    for options in ([], ["--resume"], ["--force"]):
        result = bulk(many, "--output", tmp_path / "other.jsonl", *options)
        assert (result.exit_code, "in the way" in result.stderr) == (2, True)
    assert (partial / "diary.txt").read_text() == "mine"


def test_an_interrupted_run_that_was_to_replace_an_output_is_continued(bulk, many, interrupted):
    interrupted.write_text("of another bundle")
    assert bulk(many, "--output", interrupted).exit_code == 2
    assert bulk(many, "--output", interrupted, "--resume", "--json").document["resumed_after"] == 8
    assert len(_rows(interrupted)) == 14
    assert not interrupted.with_name("rows.jsonl.partial").exists()


def test_a_list_through_a_pipe_is_read_once(bulk, many, tmp_path):
    files = find_images([many])
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"\n".join(map(os.fsencode, files)),), daemon=True)
    writer.start()
    result = bulk("--list", pipe, "--output", tmp_path / "rows.jsonl")
    assert (result.exit_code, [row["input"] for row in _rows(tmp_path / "rows.jsonl")]) == (0, list(map(str, files)))
    writer.join(10)


def test_lists_come_from_a_file_or_the_standard_input(image_bundle, many, tmp_path, bulk):
    files = find_images([many])
    listed = tmp_path / "list.txt"
    listed.write_bytes(b"\r\n\r\n".join(os.fsencode(file) for file in files))
    assert bulk("--list", listed, "--output", tmp_path / "a.jsonl").exit_code == 0
    program = [sys.executable, "-c", "from fastfsl import cli; cli.main()", "predict", image_bundle]
    arguments = ["--list", "-", "--output", tmp_path / "b.jsonl", "--device", "cpu", "--num-threads", "1"]
    run = subprocess.run(
        [*map(str, [*program, *arguments]), "--batch", str(BATCH)],
        input=listed.read_bytes(),
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert [row["input"] for row in _rows(tmp_path / "a.jsonl")] == [str(file) for file in files]
    result = bulk("--list", listed, "--on-error", "mark")
    assert [line.split("  ")[0].strip() for line in result.stdout.splitlines()] == [str(file) for file in files]


def test_names_that_are_no_text(bulk, many, tmp_path):
    name = os.fsdecode(b"caf\xe9 \xe2\x82\xac.png")
    (tmp_path / name).write_bytes(find_images([many])[0].read_bytes())
    for ending in (".jsonl", ".parquet"):
        assert bulk(tmp_path / name, "--output", tmp_path / f"rows{ending}").exit_code == 0
    assert _rows(tmp_path / "rows.jsonl")[0]["input"] == str(tmp_path / name)
    (row,) = pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert row["input"] == str(tmp_path / "caf� €.png")


def test_folders_are_walked_in_the_natural_order_of_whole_paths(tmp_path):
    names = ["b/2.png", "b/10.png", "b.png", "B/1.jpg", "a2/x.png", "a10/x.png", "a 1/z.webp", "a-1.png", "a/b/c.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "no.png").touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    expected = sorted((tmp_path / name for name in names), key=lambda path: natural_key(path.as_posix()))
    assert find_images([tmp_path]) == expected
    walk = walk_images([tmp_path, tmp_path / "a" / "missing"])
    assert [next(walk) for _ in range(len(names) + 1)] == [*expected, tmp_path / "a" / "missing"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image in this folder"):
        find_images([tmp_path / "empty"])


def test_a_disk_that_refuses_is_told_with_the_way_on(bulk, many, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    result = bulk(many, "--output", tmp_path / "rows.jsonl")
    assert result.exit_code == 2
    assert "No space left on device" in " ".join(result.stderr.split())
    assert "--resume" in result.stderr
    monkeypatch.undo()
    assert bulk(many, "--output", tmp_path / "rows.jsonl", "--resume").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output", "rows.csv"], "must end in .jsonl or .parquet"),
        (["--resume"], "name one"),
        (["--output", "{tmp}"], "must end in"),
        (["--list", "{tmp}/missing.txt", "--output", "{tmp}/rows.jsonl"], "no such file"),
        (["--list", "{tmp}", "--output", "{tmp}/rows.jsonl"], "is a directory"),
        (["--preprocess", "quick", "--output", "{tmp}/rows.jsonl"], "preprocess must be one of"),
        (["--image-threads", "0"], "image_threads"),
    ],
)
def test_bad_options_end_with_code_2(bulk, many, tmp_path, arguments, words):
    result = bulk(many, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.lower().split())
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_output(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        BulkOutput(tmp_path / "rows.jsonl", force=True)
