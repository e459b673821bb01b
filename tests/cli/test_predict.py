"""`fastfsl predict` on files and folders, good and bad."""

from __future__ import annotations

import numpy as np
import pytest

from fastfsl.runtime import Classifier


def test_json_holds_what_the_runtime_says(fastfsl, image_bundle, photos):
    files = [photos / "2.png", photos / "10.jpg"]
    result = fastfsl("predict", image_bundle, *files, "--top-k", 2, "--json")
    assert result.exit_code == 0, result.stderr
    expected = Classifier.load(image_bundle, device="cpu").predict(files, top_k=2)
    rows = result.document["predictions"]
    assert [row["input"] for row in rows] == [str(file) for file in files]
    assert [tuple(row["labels"]) for row in rows] == [prediction.labels for prediction in expected]
    for row, prediction in zip(rows, expected, strict=True):
        np.testing.assert_allclose(row["probabilities"], prediction.probabilities, atol=1e-6)
        assert row["known"] is None
        assert "error" not in row
    assert result.document["providers"]["flow"] == ["CPUExecutionProvider"]
    assert result.document["flow"]["executor"] == "onnxruntime"
    assert "no compiled kernels" in result.document["flow"]["reason"]


def test_compiled_kernels_that_are_asked_for_and_missing(fastfsl, image_bundle, photos):
    result = fastfsl("predict", image_bundle, photos, "--flow", "compiled")
    assert result.exit_code == 2
    assert "flow='compiled': the bundle has no compiled kernels; export it with --arch" in " ".join(
        result.stderr.split()
    )
    assert fastfsl("predict", image_bundle, photos, "--flow", "onnx").exit_code == 0
    assert fastfsl("predict", image_bundle, photos, "--flow", "fast").exit_code == 2


def test_folders_are_searched_in_natural_order(fastfsl, image_bundle, photos):
    result = fastfsl("predict", image_bundle, photos, photos / "2.png", "--json")
    names = [row["input"].removeprefix(f"{photos}/") for row in result.document["predictions"]]
    assert names == ["2.png", "10.jpg", "nested/3.webp", "2.png"]


def test_one_line_an_image_never_folded(fastfsl, image_bundle, photos):
    result = fastfsl("predict", image_bundle, photos)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    predictions = Classifier.load(image_bundle).predict([photos / "2.png", photos / "10.jpg", photos / "nested/3.webp"])
    assert len(lines) == 3
    for line, name, prediction in zip(lines, ("2.png", "10.jpg", "nested/3.webp"), predictions, strict=True):
        assert line.startswith(f"{photos / name}  ")
        assert line.count("%") == 3
        assert f"  {prediction.label} {prediction.probabilities[0]:.1%}  " in line


def test_names_are_neither_commands_to_the_terminal_nor_markup(fastfsl, write_bundle, photos, tmp_path):
    names = ("ant\x1b[2J\x1b]0;title\x07", "be\x9be\nforged.png  cow 99.0%", "[bold]c\u202eow[/x] :smile:")
    path = write_bundle(tmp_path / "[bold]my[/x]", class_names=names)
    image = tmp_path / "a\x1b[31m\nb.png"
    image.write_bytes((photos / "2.png").read_bytes())
    (line,) = fastfsl("predict", path, image).stdout.splitlines()
    assert line.isprintable()
    for words in (r"a\x1b[31m\nb.png  ", r"ant\x1b[2J\x1b]0;title", r"be\x9be\nforged", r"[bold]c\u202eow[/x] :smile:"):
        assert words in line
    inspected = fastfsl("inspect", path).stdout
    assert "\x1b" not in inspected
    assert r"\x9be" in inspected
    missing = fastfsl("predict", path, tmp_path / "\x1b[31mnot there").stderr
    assert r"\x1b[31mnot" in missing
    assert "\x1b" not in missing
    assert fastfsl("predict", path, image, "--json").document["predictions"][0]["input"] == str(image)


def test_none_of_these_is_said_with_the_best_guess(fastfsl, write_bundle, make_readout, photos, tmp_path):
    file = photos / "2.png"
    for threshold, known in ((0.0, True), (1.0, False)):
        readout = make_readout(temperature=100.0, threshold=threshold)
        path = write_bundle(tmp_path / str(threshold), readout=readout)
        (row,) = fastfsl("predict", path, file, "--json").document["predictions"]
        assert row["known"] is known
        assert len(row["labels"]) == 3
        line = fastfsl("predict", path, file).stdout
        best = f"{row['labels'][0]} {row['probabilities'][0]:.1%}"
        assert line.startswith(f"{file}  {best}  " if known else f"{file}  none of these  best guess: {best}  ")


@pytest.fixture
def bad_photo(tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff")
    return path


def test_an_unreadable_image_is_an_error_that_names_it(fastfsl, image_bundle, photos, bad_photo):
    for options in ([], ["--json"]):
        result = fastfsl("predict", image_bundle, photos / "2.png", bad_photo, *options)
        assert result.exit_code == 2
        assert str(bad_photo) in result.stderr.replace("\n", "")
        assert result.stdout == ""
        assert "Traceback" not in result.stderr


def test_marked_errors_keep_their_place(fastfsl, image_bundle, photos, bad_photo):
    arguments = ("predict", image_bundle, bad_photo, photos / "2.png", "--on-error", "mark")
    result = fastfsl(*arguments, "--json")
    assert result.exit_code == 0
    bad, good = result.document["predictions"]
    assert set(bad) == {"input", "error"}
    assert "broken.jpg" in bad["error"]
    assert len(good["labels"]) == 3
    assert "1 of 2 images could not be read" in result.stderr
    assert "unreadable" in fastfsl(*arguments).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.jpg"], "no such image"),
        (["{empty}"], "no image in this folder"),
        (["{photo}", "--top-k", "0"], "top_k"),
        (["{photo}", "--on-error", "ignore"], "--on-error"),
        (["{photo}", "--device", "tpu"], "device must be one of"),
        (["{photo}", "--num-threads", "0"], "num_threads"),
        (["{photo}", "--no-such-option"], "no-such-option"),
        ([], "images"),
    ],
)
def test_bad_input_ends_with_code_2(fastfsl, image_bundle, photos, tmp_path, arguments, words):
    filled = [argument.format(empty=tmp_path, photo=photos / "2.png") for argument in arguments]
    result = fastfsl("predict", image_bundle, *filled)
    assert result.exit_code == 2
    assert words in result.stderr.lower()
    assert result.stdout == ""


def test_bundles_that_cannot_serve(fastfsl, write_bundle, photos, tmp_path):
    result = fastfsl("predict", tmp_path / "none", photos)
    assert (result.exit_code, "no such bundle" in result.stderr) == (2, True)
    features = write_bundle(tmp_path / "features", with_encoder=False)
    result = fastfsl("predict", features, photos)
    assert (result.exit_code, "classify_features" in result.stderr) == (2, True)
    damaged = write_bundle(tmp_path / "damaged")
    (damaged / "visual" / "model.onnx").write_bytes(b"")
    result = fastfsl("predict", damaged, photos)
    assert (result.exit_code, "truncated or altered" in result.stderr) == (2, True)
