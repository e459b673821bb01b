"""`fastfsl compare` as a user meets it."""

import numpy as np
import pytest
from PIL import Image

from fastfsl.data import FeatureDataset, write_feature_file
from fastfsl.heads import GDA

CLASSES, DIM = 3, 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = np.random.default_rng(0)
    texts = rng.normal(size=(CLASSES, DIM)).astype(np.float32)
    splits = {}
    for name, each in (("train", 5), ("test", 40)):
        labels = np.repeat(np.arange(CLASSES), each)
        splits[name] = (texts[labels] + 1.5 * rng.normal(size=(len(labels), DIM))).astype(np.float32), labels
    path = tmp_path_factory.mktemp("data") / "flowers.npz"
    write_feature_file(path, FeatureDataset(("ant", "bee", "cow"), splits, texts))
    return path


@pytest.fixture
def compare(fastfsl, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTFSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments, of=data, methods="zero-shot,nearest-mean,gda"):
        return fastfsl("compare", of, "--device", "cpu", "--methods", methods, *arguments)

    return run


def test_json_is_one_document_with_the_keys_that_others_rely_on(compare, tmp_path):
    result = compare("--shots", "1,all", "--seeds", 2, "--json")
    assert result.exit_code == 0, result.stderr
    rows = result.document["rows"]
    assert [(row["method"], row["shots"]) for row in rows if row["method"] == "gda"] == [
        ("gda", 1), ("gda", "all"), ("gda", "mean"),
    ]  # fmt: skip
    for row in rows:
        assert 0 <= row["accuracy_mean"] <= 1
        assert {"accuracy_sd", "train_seconds", "num_parameters", "vs_best", "within_noise"} <= set(row)
    found = {path.name for path in (tmp_path / "compare-flowers").iterdir()}
    assert found == {"cells", "results.json", "results.csv", "accuracy.png"}
    with Image.open(tmp_path / "compare-flowers" / "accuracy.png") as picture:
        assert picture.width > picture.height > 300


def test_the_table_has_a_row_a_method_and_a_column_a_number_of_shots(compare):
    result = compare("--shots", "1,4", "--seeds", 1)
    assert result.exit_code == 0, result.stderr
    assert ["method", "1", "shot", "4", "shots", "mean", "train", "s", "params", "µs"] in _words(result)
    assert [words[0] for words in _words(result)[2:5]] == ["zero-shot", "nearest-mean", "gda"]
    assert "±" not in result.stdout  # one seed has no spread
    two = compare("--shots", "4", "--seeds", 2)
    assert ["method", "4", "shots", "train", "s", "params", "µs"] in _words(two)
    assert "±" in two.stdout


def _words(result):
    return [line.split() for line in result.stdout.splitlines() if line.strip()][1:]


def test_methods_can_be_left_out(compare):
    result = compare("--exclude", "gda", "--shots", 1, "--seeds", 1, "--json")
    assert {row["method"] for row in result.document["rows"]} == {"zero-shot", "nearest-mean"}


def test_parameters_and_options_come_from_the_yaml_file(compare, tmp_path):
    (tmp_path / "c.yaml").write_text("gda: {num_folds: 3}\nbackbone: tiny-clip\n")
    result = compare("--config", "c.yaml", "--shots", 1, "--seeds", 1, "--json")
    assert result.document["settings"]["methods"]["gda"]["num_folds"] == 3


def test_half_of_the_classes(compare):
    result = compare("--classes", "base", "--shots", 1, "--seeds", 1, "--json")
    assert (result.document["data"]["classes"], result.document["data"]["num_classes"]) == ("base", 2)
    assert result.document["data"]["num_test"] == 80


def test_a_failing_method_is_a_warning(compare, tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text("auto: {components: [gda], target_precision: 0.9}\n")
    result = compare("--config", "c.yaml", "--shots", 1, "--seeds", 1, methods="zero-shot,gda,auto")
    assert result.exit_code == 0, result.stderr
    assert "auto, 1 shot, seed 0" in " ".join(result.stderr.split())
    assert "failed" in result.stdout


@pytest.fixture
def pictures(tmp_path):
    """Two classes of noise: 3 images a class in train/, 2 in test/."""
    rng = np.random.default_rng(0)
    for split, each in (("train", 3), ("test", 2)):
        for label, name in enumerate(("dark", "bright")):
            for index in range(each):
                path = tmp_path / "pictures.v2" / split / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(120 * label, 120 * label + 100, (16, 16, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures.v2"


def test_methods_that_tune_the_encoder_stand_in_the_table(compare, tmp_path, pictures):
    (tmp_path / "c.yaml").write_text(
        "mps: {epochs: 1}\nmps+gda: {mps: {epochs: 1}, gda: {num_folds: 3}}\nbackbone: tiny-clip\nnum_views: 2\n"
    )
    result = compare("--config", "c.yaml", "--shots", 2, "--seeds", 1, of=pictures, methods="gda,mps,mps+gda")
    assert result.exit_code == 0, result.stderr
    assert [words[0] for words in _words(result)[2:5]] == ["gda", "mps", "mps+gda"]
    assert "failed" not in result.stdout


def test_images_are_encoded_once_and_compared(compare, tmp_path, pictures, monkeypatch):
    seen = []
    fit = GDA.fit

    def noted(self, features, labels, class_embeddings, *, plain_features=None, **options):
        seen.append((features.shape, plain_features.shape))
        return fit(self, features, labels, class_embeddings, plain_features=plain_features, **options)

    monkeypatch.setattr(GDA, "fit", noted)
    damaged = pictures / "train" / "dark" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    (tmp_path / "c.yaml").write_text("num_views: 2\nbackbone: ViT-B-32\n")
    options = ("--config", "c.yaml", "--backbone", "tiny-clip", "--shots", "all", "--seeds", 2, "--json")
    result = compare(*options, of=pictures)
    assert result.exit_code == 0, result.stderr
    assert result.document["data"]["num_train"] == 5
    assert result.document["data"]["num_test"] == 4
    assert "dark/1.png" in result.stderr.replace("\n", "")
    gda = next(row for row in result.document["rows"] if row["method"] == "gda")
    assert gda["accuracy_mean"] == 1
    width = seen[0][1][1]
    assert seen == [((5, 2, width), (5, width))] * 2
    assert (tmp_path / "compare-pictures.v2" / "results.csv").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shots", "1,two"), ["--shots", "1,two"]),
        (("--shots", "9", "--exact-shots"), ["at most 5"]),
        (("--shots", ""), ["number of shots"]),
        (("--seeds", "0"), ["at least one seed"]),
        (("--methods", "gdaa"), ["'gdaa'", "gda"]),
        (("--methods", "mps+gdaa"), ["'mps+gdaa'", "mps+gda"]),
        (("--methods", "gda,mps"), ["'mps'", "a feature file has none"]),
        (("--exclude", "gdaa"), ["'gdaa'", "gda"]),
        (("--exclude", "gda,zero-shot,nearest-mean"), ["at least one method"]),
        (("--split", "val"), ["'val'", "--split"]),
        (("--split", "train"), ["no episode is drawn from"]),
        (("--config", "none.yaml"), ["none.yaml"]),
        (("--config", "unknown.yaml"), ["unknown.yaml", "'gdaa'", "gda", "num_views"]),
        (("--config", "flat.yaml"), ["gda", "parameter"]),
        (("--config", "wrong.yaml"), ["num_fold", "num_folds"]),
        (("--out", "unknown.yaml"), ["unknown.yaml", "choose another"]),
        (("--image-root", "."), ["split file"]),
    ],
)
def test_bad_input_ends_with_one_message_and_code_2(compare, tmp_path, arguments, words):
    (tmp_path / "unknown.yaml").write_text("gdaa: {num_folds: 3}\n")
    (tmp_path / "flat.yaml").write_text("gda: 3\n")
    (tmp_path / "wrong.yaml").write_text("gda: {num_fold: 3}\n")
    before = sorted(tmp_path.iterdir())
    result = compare(*arguments)
    assert result.exit_code == 2, (result.stdout, result.stderr)
    message = " ".join(result.stderr.split())
    assert message.count("error:") == 1
    for word in words:
        assert word in message
    assert sorted(tmp_path.iterdir()) == before
