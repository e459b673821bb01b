"""`fastfsl inspect` believes nothing it has not verified."""

from __future__ import annotations

import json

import numpy as np

from fastfsl import bundle


def test_json_is_the_manifest_verified(fastfsl, image_bundle):
    document = fastfsl("inspect", image_bundle, "--json").document
    manifest = bundle.read_manifest(image_bundle)
    assert document["verified"] is True
    assert document["digest"] == bundle.bundle_digest(image_bundle)
    assert document["files"] == manifest.files
    assert document["metrics"]["held_out_support"] == {"accuracy": 0.875, "num_folds": 4}
    assert document["parity"] == {"flow": {"max_abs_error": 1e-6}}
    assert document["training"]["support_digests"] == ["1" * 64] * 48
    assert document["flow"] == {"num_steps": 2, "num_blocks": 1, "dim": 5}
    assert document["total_bytes"] == sum(
        file.stat().st_size for file in image_bundle.rglob("*") if file.is_file() and file.name != "manifest.json"
    )


def test_the_table_is_for_people(fastfsl, image_bundle):
    result = fastfsl("inspect", image_bundle)
    assert result.exit_code == 0
    for words in ("3 files verified", "3: ant, bee, cow", "0.875", "48 entries", "visual/model.onnx"):
        assert words in " ".join(result.stdout.split())  # lines may be folded
    assert "1" * 64 not in result.stdout


def test_many_classes_are_counted_not_listed(fastfsl, write_bundle, tmp_path):
    path = write_bundle(tmp_path / "bundle", class_names=tuple(f"class {index}" for index in range(1000)))
    result = fastfsl("inspect", path)
    assert "1000: class 0" in result.stdout
    assert "and 990 more" in " ".join(result.stdout.split())


def test_a_bundle_without_encoder(fastfsl, write_bundle, tmp_path):
    path = write_bundle(tmp_path / "bundle", with_encoder=False)
    assert fastfsl("inspect", path, "--json").document["encoder"] is None
    assert fastfsl("inspect", path).exit_code == 0


def test_a_readout_is_described(fastfsl, write_bundle, make_readout, tmp_path):
    path = write_bundle(tmp_path / "bundle", method="auto", readout=make_readout(temperature=1.5, threshold=0.25))
    document = fastfsl("inspect", path, "--json").document
    assert document["readout"] == {
        "flow_weight": 0.0,
        "linear": True,
        "kernels": [{"keys": 7, "beta": 5.5}, {"keys": 2, "beta": 1.0}],
        "temperature": 1.5,
        "threshold": 0.25,
    }
    assert (document["flow"], document["num_steps"], document["step_size"], document["read_steps"]) == (
        None,
        0,
        None,
        [],
    )
    words = " ".join(fastfsl("inspect", path).stdout.split())
    for part in ("method auto", "readout.kernels 7 keys, beta 5.5; 2 keys, beta 1", "readout.threshold 0.25"):
        assert part in words


def test_the_steps_a_flow_is_read_at(fastfsl, write_bundle, tmp_path):
    path = write_bundle(tmp_path / "bundle", read_steps=[0, 2])
    document = fastfsl("inspect", path, "--json").document
    assert (document["read_steps"], document["readout"]) == ([0, 2], None)
    assert "read_steps 0, 2" in " ".join(fastfsl("inspect", path).stdout.split())


def test_a_readout_that_contradicts_the_manifest(fastfsl, write_bundle, make_readout, tmp_path):
    path = write_bundle(tmp_path / "bundle", readout=make_readout(), class_names=("a", "b"))
    result = fastfsl("inspect", path)
    assert result.exit_code == 2
    assert "the manifest says (2, 5, False)" in result.stderr.replace("\n", " ")


def test_damage_ends_with_code_2(fastfsl, write_bundle, make_readout, tmp_path):
    path = write_bundle(tmp_path / "bundle")
    heads = write_bundle(tmp_path / "heads", readout=make_readout())
    for file in (path / "flow" / "model.onnx", heads / "heads" / "readout.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        result = fastfsl("inspect", file.parents[1], "--json")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "altered" in result.stderr
        assert file.name in result.stderr
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "manifest.json").write_text(json.dumps({"format_version": 9}))
    assert "newer fastfsl" in fastfsl("inspect", newer).stderr


def test_a_plan_that_contradicts_the_manifest(fastfsl, write_bundle, tmp_path):
    result = fastfsl("inspect", write_bundle(tmp_path / "bundle", num_steps=7))
    assert result.exit_code == 2
    assert "the manifest says (7, 5, 0.1)" in result.stderr.replace("\n", " ")


def test_the_plan_is_read_not_only_hashed(fastfsl, write_bundle, tmp_path):
    path = write_bundle(tmp_path / "bundle")
    with bundle.staging_folder(tmp_path / "other") as staging:
        for folder in ("flow", "visual"):
            (staging / folder).mkdir()
            (staging / folder / "model.onnx").write_bytes((path / folder / "model.onnx").read_bytes())
        np.savez(staging / "flow" / "plan.npz", a=np.zeros(3))
        (staging / "flow" / "plan.npz").rename(staging / "flow" / "plan.safetensors")
        fields = {**json.loads((path / "manifest.json").read_bytes())}
        bundle.seal_bundle(staging, {k: v for k, v in fields.items() if k != "files"})
    result = fastfsl("inspect", tmp_path / "other")
    assert result.exit_code == 2
    assert "plan.safetensors" in result.stderr.replace("\n", "")


def test_the_digest_alone(fastfsl, image_bundle):
    digest = bundle.bundle_digest(image_bundle)
    assert fastfsl("inspect", image_bundle, "--digest").stdout == f"{digest}\n"
    assert fastfsl("inspect", image_bundle, "--digest", "--json").document == {"digest": digest}
    assert fastfsl("inspect", image_bundle, "--digest", "--expected-digest", digest).exit_code == 0
    other = fastfsl("inspect", image_bundle, "--expected-digest", "0" * 64)
    assert (other.exit_code, other.stdout) == (2, "")
    assert digest in other.stderr


def test_a_digest_of_damaged_files_is_not_printed(fastfsl, write_bundle, tmp_path):
    path = write_bundle(tmp_path / "bundle")
    (path / "flow" / "model.onnx").write_bytes(b"")
    result = fastfsl("inspect", path, "--digest")
    assert (result.exit_code, result.stdout) == (2, "")


def test_predict_takes_the_expected_bundle_alone(fastfsl, image_bundle, photos):
    digest = bundle.bundle_digest(image_bundle)
    assert fastfsl("predict", image_bundle, photos, "--expected-digest", digest, "--json").exit_code == 0
    assert fastfsl("predict", image_bundle, photos, "--expected-digest", digest[::-1], "--json").exit_code == 2


def test_bench_and_evaluate_take_the_expected_bundle_alone(fastfsl, image_bundle, write_bundle, tmp_path):
    wrong = ("--expected-digest", "0" * 64)
    for command in (("bench", image_bundle, "--seconds", 0.01), ("evaluate", image_bundle, tmp_path / "none")):
        refused = fastfsl(*command, *wrong)
        assert refused.exit_code == 2
        assert bundle.bundle_digest(image_bundle) in refused.stderr
    path, features = write_bundle(tmp_path / "features", with_encoder=False), tmp_path / "features.npz"
    rows = np.eye(5, dtype=np.float32)[:3]
    np.savez(
        features, test_features=rows, test_labels=np.arange(3), class_embeddings=rows, class_names=["ant", "bee", "cow"]
    )
    result = fastfsl("evaluate", path, features, "--expected-digest", bundle.bundle_digest(path))
    assert result.exit_code == 0, result.stderr
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    of_run = fastfsl("evaluate", tmp_path / "run", features, *wrong)
    assert of_run.exit_code == 2
    assert "about bundles" in of_run.stderr


def test_files_that_are_no_part_of_the_bundle_are_told(fastfsl, write_bundle, tmp_path):
    path = write_bundle(tmp_path / "bundle")
    assert fastfsl("inspect", path, "--json").document["unlisted"] == []
    (path / "notes.txt").write_text("mine")
    result = fastfsl("inspect", path, "--json")
    assert result.document["unlisted"] == ["notes.txt"]
    assert "notes.txt" in result.stderr


def test_what_may_be_edited_is_told_without_a_warning(fastfsl, write_bundle, tmp_path):
    path = write_bundle(tmp_path / "bundle")
    digest = fastfsl("inspect", path, "--digest").stdout
    (path / "README.md").write_text("# Mine\n")
    (path / ".gitattributes").write_text("*.onnx filter=lfs\n")
    result = fastfsl("inspect", path, "--json")
    assert result.exit_code == 0
    assert result.document["unverified"] == [".gitattributes", "README.md"]
    assert result.stderr == ""
    assert fastfsl("inspect", path, "--digest").stdout == digest
