"""A folder as a phone leaves it: trained on, evaluated, compared and predicted, with every file accounted for."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fastfsl.fit.methods import METHODS
from fastfsl.images import heif_installed

TINY = ("--backbone", "tiny-clip")
QUICK = "method: gda\nnum_views: 1\n"


def _draw(rng, kind):
    """A picture of one kind, of its own colour, place and size."""
    width, height = (int(edge) for edge in rng.integers(60, 90, 2))
    image = Image.new("RGB", (width, height), tuple(int(v) for v in rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(image)
    box = (5, 5, int(rng.integers(30, 55)), int(rng.integers(30, 55)))
    color = tuple(int(v) for v in rng.integers(0, 256, 3))
    (draw.ellipse if kind == "plate" else draw.rectangle)(box, fill=color)
    return image


def phone_folder(root, number, *, flat=False):
    """`number` pictures of two classes in two splits, and what phones and computers put beside them.

    Returns:
        The original of the near-duplicates, and the folder of the class that they stand under.
    """
    heic = heif_installed()
    if heic:
        import pillow_heif
    rng = np.random.default_rng(0)
    places = [(split, kind) for split in (("",) if flat else ("Train", "TEST")) for kind in ("book", "plate")]
    for place, (split, kind) in enumerate(places):
        folder = root / split / kind
        folder.mkdir(parents=True)
        for index in range(number // len(places)):
            image, name = _draw(rng, kind), f"IMG_{place}{index:04d}"
            exif = Image.Exif()
            exif[0x0112] = int(rng.integers(1, 9))
            exif[0x010F] = "Maker"
            if heic and index % 3 == 0:
                pillow_heif.from_pillow(image).save(folder / f"{name}.HEIC", exif=exif.tobytes())
                (folder / f"{name}.MOV").write_bytes(b"film of a live photo")
            else:
                image.save(folder / f"{name}.{('JPG', 'jpeg')[index % 2]}", "JPEG", exif=exif)
            if index % 4 == 0:
                (folder / f"{name}.AAE").write_text("edits")
            if index % 5 == 0:
                (folder / f"._{name}.JPG").write_bytes(b"\0\5\26\7")
        (folder / ".DS_Store").touch()
    first, last = (root / places[index][0] / places[index][1] for index in (0, 1))
    jpeg = min(first.glob("*.jpeg"))
    # Two near-duplicates, of another class than the original.
    with Image.open(jpeg) as image:
        exif = image.getexif()
        image.save(last / "WhatsApp 1.JPG", "JPEG", quality=97, exif=exif)
        image.save(last / "WhatsApp 2.JPG", "JPEG", quality=94, exif=exif)
    (last / "IMG_BROKEN.JPG").write_bytes(jpeg.read_bytes()[:300])
    (first / "DSC_1.NEF").write_bytes(b"raw")
    (root / "@eaDir").mkdir()
    shutil.copy(jpeg, root / "@eaDir" / "SYNOFILE_THUMB_M.jpg")
    (root / "list.txt").touch()
    return jpeg, last


def count_files(root):
    return sum(len(files) for _, _, files in os.walk(root))


def adds_up(files, root):
    assert files["seen"] == files["used"] + files["skipped"] == count_files(root)
    assert sum(files["reasons"].values()) == files["skipped"]
    assert set(files["examples"]) == set(files["reasons"])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(QUICK)
    return tmp_path


@pytest.mark.parametrize("number", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_every_file_of_a_phones_folder_is_accounted_for(fastfsl, write_bundle, here, number):
    data = here / "phone"
    original, last = phone_folder(data, number)
    trained = fastfsl("train", data, "--out", "run", *TINY, "--config", "c.yaml", "--json")
    assert trained.exit_code == 0, trained.stderr
    document = trained.document
    adds_up(document["files"], data)
    assert document["files"]["used"] == document["num_support"] == number // 2 + 2
    assert document["files"]["reasons"]["unreadable (.jpg)"] == 1
    assert document["files"]["reasons"]["in another split (test)"] == number // 2
    assert document["files"]["reasons"]["image of a format that is not read (.nef)"] == 1
    assert sum(document["class_counts"].values()) == document["num_support"]
    said = trained.stderr.replace("\n", "")
    assert "IMG_BROKEN.JPG" in said
    assert "DSC_1.NEF" in said
    assert "pairs of images of different classes are nearly the same picture" in said
    assert f"{original} (book)" in said
    assert f"{last / 'WhatsApp 1.JPG'} (plate)" in said

    evaluated = fastfsl("evaluate", "run", data, "--json")
    assert evaluated.exit_code == 0, evaluated.stderr
    adds_up(evaluated.document["files"], data)
    assert evaluated.document["files"]["used"] == evaluated.document["num_samples"] == number // 2

    if number > 1000:
        exported = fastfsl("export", "run", "bundle")
        assert exported.exit_code == 0, exported.stderr
    else:
        write_bundle(here / "bundle", class_names=("book", "plate", "owl"))
    evaluated = fastfsl("evaluate", "bundle", data, "--json")
    assert evaluated.exit_code == 0, evaluated.stderr
    adds_up(evaluated.document["files"], data)

    for options in ((), ("--output", "rows.jsonl")):
        predicted = fastfsl("predict", "bundle", data, "--on-error", "mark", *options, "--json")
        assert predicted.exit_code == 0, predicted.stderr
        files = predicted.document["files"]
        adds_up(files, data)
        assert files["used"] == number + 2
        assert "DSC_1.NEF" in predicted.stderr.replace("\n", "")
        again = fastfsl(
            "predict", "bundle", data, "--on-error", "mark", *options, "--strict", *("--force",) * bool(options)
        )
        assert again.exit_code == 1


def test_a_comparison_accounts_for_every_file(fastfsl, here):
    data = here / "phone"
    original, _last = phone_folder(data, 40)
    arguments = (
        "compare",
        data,
        *TINY,
        "--methods",
        "zero-shot,nearest-mean",
        "--shots",
        "4,16",
        "--seeds",
        1,
        "--views",
        1,
    )
    result = fastfsl(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    adds_up(result.document["data"]["files"], data)
    (pair,) = [line for line in result.document["warnings"] if "different classes are nearly the same" in line]
    assert original.relative_to(data).as_posix() in pair
    assert "WhatsApp" in pair
    assert fastfsl(*arguments, "--strict").exit_code == 2


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_strict_refuses_what_would_be_skipped(fastfsl, here, command):
    data = here / "phone"
    phone_folder(data, 20)
    train = ("train", data, *TINY, "--config", "c.yaml", "--out")
    assert fastfsl(*train, "run").exit_code == 0
    arguments = (*train, "other") if command == "train" else ("evaluate", "run", data)
    result = fastfsl(*arguments, "--strict")
    assert result.exit_code == 2
    assert "--strict: 1 files would be skipped" in " ".join(result.stderr.split())
    (data / "Train" / "book" / "DSC_1.NEF").unlink()
    result = fastfsl(*arguments, "--strict")
    assert result.exit_code == (2 if command == "train" else 0), result.stderr  # the broken one is in Train/
    if command == "train":
        assert "IMG_BROKEN.JPG" in result.stderr.replace("\n", "")
        (data / "Train" / "plate" / "IMG_BROKEN.JPG").unlink()
        assert fastfsl(*arguments, "--strict").exit_code == 0, "sidecars and system files are no mistake"


def test_heic_without_pillow_heif_is_said_and_refused_under_strict(fastfsl, here, monkeypatch):
    data = here / "data"
    rng = np.random.default_rng(1)
    for kind in ("book", "plate"):
        (data / kind).mkdir(parents=True)
        for index in range(3):
            _draw(rng, kind).save(data / kind / f"{index}.jpg")
    for index in range(30):
        (data / "book" / f"IMG_{index}.heic").write_bytes(b"\0\0\0\x18ftypheic")
    monkeypatch.setattr("fastfsl.data.walk.heif_installed", lambda: False)
    arguments = ("train", data, "--out", "run", *TINY, "--config", "c.yaml")
    result = fastfsl(*arguments, "--strict")
    assert result.exit_code == 2
    result = fastfsl(*arguments, "--json")
    assert result.exit_code == 0
    assert result.document["files"]["reasons"] == {"image of a format that is not read (.heic)": 30}
    said = result.stderr.replace("\n", "")
    assert "skipped 30 of 36 files" in said
    assert "pip install 'fastfsl[heic]' to read HEIC" in said


@pytest.mark.parametrize("methods", [("gda", "lp++"), pytest.param(tuple(METHODS), marks=pytest.mark.slow)])
def test_up_to_so_many_shots(fastfsl, here, methods):
    data = here / "data"
    rng = np.random.default_rng(2)
    for kind, number in (("book", 1), ("plate", 20)):
        (data / kind).mkdir(parents=True)
        for index in range(number):
            _draw(rng, kind).save(data / kind / f"{index}.png")
    arguments = ("train", data, *TINY, "--shots", 16, "--views", 1, "--out", "run")
    result = fastfsl(*arguments, "--exact-shots")
    assert result.exit_code == 2
    assert "'book' (1)" in result.stderr
    for method in methods:
        result = fastfsl(*arguments, "--method", method, "--force", "--json")
        assert result.exit_code == 0, (method, result.stderr)
        assert result.document["class_counts"] == {"book": 1, "plate": 16}
        assert result.document["files"]["reasons"] == {"not drawn": 4}
    assert "'book' (1)" in result.stderr
    assert '"class_counts": [' in (here / "run" / "run.json").read_text()
    result = fastfsl(*arguments, "--method", "gda", "--force")
    assert "1 to 16" in result.stdout


def test_a_table_trains_and_evaluates(fastfsl, write_bundle, here):
    rng = np.random.default_rng(3)
    data = here / "data"
    data.mkdir()
    lines = ["where;what;when"]
    for index in range(12):
        kind = ("book", "plate")[index % 2]
        _draw(rng, kind).save(data / f"{index}.png")
        lines.append(f"{index}.png;{kind};{'Testing' if index > 7 else 'Training'}")
    (data / "list.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    columns = ("--path-column", "where", "--label-column", "what", "--split-column", "when")
    for source in (data, data / "list.csv"):
        result = fastfsl("train", source, *columns, "--out", "run", *TINY, "--config", "c.yaml", "--force", "--json")
        assert result.exit_code == 0, result.stderr
        assert result.document["class_counts"] == {"book": 4, "plate": 4}
        result = fastfsl("evaluate", "run", source, *columns, "--json")
        assert (result.exit_code, result.document["num_samples"]) == (0, 4)
        assert result.document["files"]["used"] == 4
    write_bundle(here / "bundle", class_names=("book", "plate", "owl"))
    result = fastfsl("evaluate", "bundle", data / "list.csv", *columns, "--json")
    assert result.document["num_samples"] == 4
    result = fastfsl("train", data / "list.csv", "--label-column", "genus", "--out", "other", *TINY)
    assert result.exit_code == 2
    assert "has the columns" in " ".join(result.stderr.split())


@pytest.mark.filterwarnings("default:the model reads")
def test_the_same_picture_in_two_classes_and_prompts_alike_are_named(fastfsl, here):
    rng = np.random.default_rng(4)
    data = here / "data"
    for kind in ("red kite", "red_kite", "Red Kite", "owl"):
        (data / kind).mkdir(parents=True)
        for index in range(3):
            _draw(rng, "plate").save(data / kind / f"{index}.png")
    shutil.copy(data / "owl" / "0.png", data / "red kite" / "9.png")
    result = fastfsl("train", data, "--out", "run", *TINY, "--config", "c.yaml")
    assert result.exit_code == 0, result.stderr
    said = result.stderr.replace("\n", "")
    assert "'red kite' = 'red_kite' = 'Red Kite'" in said or "'Red Kite' = 'red kite' = 'red_kite'" in said
    assert "1 images are in several classes, byte for byte" in said
    assert f"{data / 'owl' / '0.png'} (owl) = {data / 'red kite' / '9.png'} (red kite)" in said


def test_a_list_from_windows_with_a_mark(fastfsl, image_bundle, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    listed = tmp_path / "list.txt"
    listed.write_bytes(b"\xef\xbb\xbf2.png\r\nnested\\3.webp\r\n")
    result = fastfsl("predict", image_bundle, "--list", listed, "--json")
    assert result.exit_code == 0, result.stderr
    assert [row["input"] for row in result.document["predictions"]] == ["2.png", "nested/3.webp"]
    listed.write_bytes(b"nested\\4.webp\n")
    result = fastfsl("predict", image_bundle, "--list", listed)
    assert result.exit_code == 2
    assert "as Windows writes it" in " ".join(result.stderr.split())
    result = fastfsl("predict", image_bundle, "https://example.org/a.jpg")
    assert "download it first" in " ".join(result.stderr.split())
