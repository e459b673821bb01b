"""Bundles from strangers: whatever is wrong with one is a BundleError that names the file."""

from __future__ import annotations

import copy
import errno
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastfsl import bundle
from fastfsl.bundle import Manifest
from fastfsl.errors import BundleError, ConfigError

FIELDS = {
    "method": "fma",
    "class_names": ("cat", "día", "狗"),
    "embed_dim": 3,
    "num_steps": 2,
    "step_size": 0.1,
    "read_steps": [0, 2],
    "precision": "fp32",
    "logit_scale": 100,
    "preprocessing": {"image_size": [32, 32]},
    "encoder": {"backbone": "ViT-B-32", "pretrained": None, "digest": "0" * 64},
    "blend": {"alpha": 0.3, "normalized": False},
    "versions": {"torch": "2.15.0"},
    "metrics": {"held_out_support": {"accuracy": 0.91, "num_folds": 4}},
    "parity": {"flow": {"max_abs": 1e-6}},
    "training": {"num_shots": 16, "seed": 0, "support_digests": ["1" * 64]},
    "created": "2026-01-02T03:04:05+00:00",
}
FILES = ("visual/model.onnx", "flow/model.onnx", "flow/plan.safetensors", "heads/readout.safetensors", "LICENSE")


def _write(target: Path, fields=FIELDS, names=FILES, **options) -> Manifest:
    with bundle.staging_folder(target, **options) as staging:
        for name in names:
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_bytes(name.encode())
        return bundle.seal_bundle(staging, fields)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    _write(tmp_path / "bundle")
    return tmp_path / "bundle"


def _rewrite(made: Path, change) -> None:
    """Change the manifest's values and write them back."""
    values = json.loads((made / "manifest.json").read_bytes())
    change(values)
    (made / "manifest.json").write_text(json.dumps(values), encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- manifest


def test_manifest_round_trip(made):
    manifest = bundle.read_manifest(made)
    assert bundle.check_bundle(made) == manifest == Manifest.from_json(manifest.to_json())
    assert manifest.class_names == ("cat", "día", "狗")
    assert manifest.logit_scale == 100.0
    assert isinstance(manifest.logit_scale, float)
    assert manifest.created == FIELDS["created"]
    assert sorted(manifest.files) == sorted(FILES)
    assert len(bundle.bundle_digest(made)) == 64


_json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.sampled_from([10**400, "\ud800"])
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def _nodes(value, path=()):
    """Every place in a JSON value, as the keys that lead to it."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _nodes(child, (*path, key))


_VALID = json.loads(
    Manifest.from_json(
        json.dumps(
            {
                **FIELDS,
                "format_version": 1,
                "files": {name: {"sha256": "a" * 64, "size": 3} for name in FILES},
            }
        ).encode()
    ).to_json()
)


def _accepts_only_what_round_trips(data: bytes) -> None:
    try:
        manifest = Manifest.from_json(data)
    except BundleError:
        return
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.to_json() == manifest.to_json()


@settings(max_examples=400, deadline=None)
@given(place=st.sampled_from(list(_nodes(_VALID))[1:]), value=_json_values, key=st.none() | st.text(max_size=5))
@example(("num_steps",), True, None)
@example(("step_size",), float("nan"), None)
@example(("class_names",), [], None)
def test_manifests_with_any_value_changed(place, value, key):
    """A value is replaced, or under a new key added, anywhere; Python writes NaN and huge numbers as they are."""
    values = copy.deepcopy(_VALID)
    parent = values
    for step in place[:-1]:
        parent = parent[step]
    parent[key if key is not None and isinstance(parent, dict) else place[-1]] = value
    _accepts_only_what_round_trips(json.dumps(values).encode())


@settings(max_examples=400, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=4), cut=st.integers(0, 2)
)
def test_manifests_with_any_bytes_changed(edits, cut):
    data = bytearray(json.dumps(_VALID).encode())
    for position, value in edits:
        data[position % len(data)] = value
    _accepts_only_what_round_trips(bytes(data[: len(data) - cut]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "JSON object"),
        (b"{}", "format_version"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": -Infinity}', "not a number"),
        (b'{"format_version": 1, "format_version": 1}', "twice"),
        (b'{"format_version": 2}', "newer fastfsl"),
        (b'{"format_version": 0}', "must be 1, got 0"),
        (b'{"format_version": true}', "must be 1, got True"),
        (json.dumps({**_VALID, "surprise": 1}).encode(), "newer fastfsl"),
        (json.dumps({**_VALID, "precision": "fp8"}).encode(), "'precision' must be one of fp32, fp16, int8, got 'fp8'"),
        (json.dumps({**_VALID, "metrics": json.loads("[" * 40 + "]" * 40)}).encode(), "deeply"),
        (json.dumps({**_VALID, "encoder": None}).encode(), "come together"),
        (json.dumps({**_VALID, "preprocessing": None}).encode(), "come together"),
        (json.dumps({**_VALID, "files": {"flow/model.onnx": _VALID["files"]["LICENSE"]}}).encode(), "come together"),
        (json.dumps({**_VALID, "files": []}).encode(), "'files' must be an object"),
        (json.dumps({**_VALID, "read_steps": [2, 0]}).encode(), "ascending"),
        (json.dumps({**_VALID, "read_steps": [0, 0, 2]}).encode(), "ascending"),
        (json.dumps({**_VALID, "read_steps": [-1, 2]}).encode(), "ascending"),
        (json.dumps({**_VALID, "read_steps": [0, True, 2]}).encode(), "ascending"),
        *(
            (json.dumps({**_VALID, "blend": blend}).encode(), "'blend' must be null, or an object with an alpha")
            for blend in (
                {},
                0.3,
                {"alpha": 0.3},
                {"normalized": True},
                {"alpha": 1.01, "normalized": True},
                {"alpha": -0.01, "normalized": True},
                {"alpha": True, "normalized": True},
                {"alpha": "0.3", "normalized": True},
                {"alpha": None, "normalized": True},
                {"alpha": 0.3, "normalized": 0},
                {"alpha": 0.3, "normalized": True, "beta": 1},
            )
        ),
        (json.dumps({**_VALID, "class_names": ["x" * 500, 3]}).encode(), r"got \['x+\.\.\."),
    ],
)
def test_manifest_errors_say_what_is_wrong(data, message):
    with pytest.raises(BundleError, match=message) as caught:
        Manifest.from_json(data, "somewhere/manifest.json")
    assert "somewhere/manifest.json" in str(caught.value)


_ENTRY = {"sha256": "a" * 64, "size": 3}
_FLOW, _READOUT = {"flow/model.onnx": _ENTRY}, {"heads/readout.safetensors": _ENTRY}
_FEATURES = {**_VALID, "encoder": None, "preprocessing": None, "blend": None}
_NO_FLOW = {**_FEATURES, "files": _READOUT, "num_steps": 0, "step_size": None, "read_steps": []}


@pytest.mark.parametrize(
    "values",
    [
        _NO_FLOW,
        {**_FEATURES, "files": _FLOW},
        {**_FEATURES, "files": {**_FLOW, **_READOUT}},
        {**_FEATURES, "files": _FLOW, "num_steps": 0, "read_steps": []},  # a flow that leaves the features alone
        {key: value for key, value in {**_FEATURES, "files": _FLOW}.items() if key != "read_steps"},
    ],
    ids=["read-out", "flow", "both", "no steps", "read_steps left out"],
)
def test_a_flow_or_a_readout_or_both(values):
    manifest = Manifest.from_json(json.dumps(values).encode())
    assert manifest.step_size == values["step_size"]
    assert manifest.read_steps == tuple(values.get("read_steps", ()))
    _accepts_only_what_round_trips(json.dumps(values).encode())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**_FEATURES, "files": {}}, r"must list flow/model\.onnx, heads/readout\.safetensors or both"),
        ({**_NO_FLOW, "files": {"LICENSE": _ENTRY}}, r"must list flow/model\.onnx"),
        ({**_NO_FLOW, "num_steps": 1}, r"without flow/model\.onnx 'num_steps' is 0"),
        ({**_NO_FLOW, "step_size": 0.1}, r"without flow/model\.onnx"),
        ({**_NO_FLOW, "read_steps": [0]}, r"without flow/model\.onnx"),
        ({**_NO_FLOW, "files": {**_READOUT, "flow/plan.safetensors": _ENTRY}}, r"there is no flow/plan\.safetensors"),
        ({**_FEATURES, "files": _FLOW, "step_size": None}, "a flow has a 'step_size'"),
        ({**_FEATURES, "files": _FLOW, "read_steps": [0, 1]}, "end with 'num_steps'"),
        ({**_FEATURES, "files": _FLOW, "read_steps": [0, 3]}, "end with 'num_steps'"),
        ({**_FEATURES, "files": _FLOW, "blend": _VALID["blend"]}, "a 'blend' is an encoder's"),
    ],
)
def test_parts_that_contradict_each_other(values, message):
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(json.dumps(values).encode())


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_a_blend_may_be_left_out_and_holds_its_weight(alpha):
    blended = Manifest.from_json(json.dumps({**_VALID, "blend": {"alpha": alpha, "normalized": True}}).encode())
    assert blended.blend == {"alpha": alpha, "normalized": True}
    assert isinstance(blended.blend["alpha"], float)
    for values in ({**_VALID, "blend": None}, {key: value for key, value in _VALID.items() if key != "blend"}):
        assert Manifest.from_json(json.dumps(values).encode()).blend is None


@pytest.mark.parametrize("key", sorted(set(_VALID) - {"read_steps", "blend", "kernels", "text", "int8"}))
def test_every_other_key_is_required(key):
    with pytest.raises(BundleError, match=key):
        Manifest.from_json(json.dumps({k: v for k, v in _VALID.items() if k != key}).encode())


def test_oversized_manifest_is_not_parsed(made, monkeypatch):
    monkeypatch.setattr("fastfsl.bundle.manifest.MAX_MANIFEST_BYTES", 100)
    with pytest.raises(BundleError, match="more than the 100 allowed"):
        bundle.read_manifest(made)


def test_folders_that_are_no_bundles(tmp_path):
    with pytest.raises(BundleError, match="no such bundle folder"):
        bundle.read_manifest(tmp_path / "none")
    with pytest.raises(BundleError, match="fastfsl export"):
        bundle.read_manifest(tmp_path)
    (tmp_path / "manifest.json").symlink_to("/etc/hostname")
    with pytest.raises(BundleError, match="symbolic link that leaves the bundle"):
        bundle.read_manifest(tmp_path)


# --------------------------------------------------------------------------------------------------- files and paths


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/x",
        "C:\\x",
        "C:x",
        "a/../../x",
        "a\\..\\x",
        "./x",
        "a//x",
        "a/",
        "",
        "x\0y",
        "x\ny",
        "..",
        "manifest.json",
        "a" * 300,
        "\u202ex",
    ],
)
def test_paths_that_could_leave_the_bundle(made, name):
    _rewrite(made, lambda values: values["files"].update({name: {"sha256": "0" * 64, "size": 1}}))
    with pytest.raises(BundleError, match="no path inside the bundle"):
        bundle.check_bundle(made)


def test_a_link_out_of_the_bundle_is_refused(made):
    """Even one to the right contents."""
    (made.parent / "outside").write_bytes(b"visual/model.onnx")
    (made / "visual" / "model.onnx").unlink()
    (made / "visual" / "model.onnx").symlink_to(made.parent / "outside")
    with pytest.raises(BundleError, match="symbolic link that leaves the bundle"):
        bundle.check_bundle(made)


def test_a_linked_folder_is_refused(made):
    (made / "visual").rename(made.parent / "elsewhere")
    (made / "visual").symlink_to(made.parent / "elsewhere")
    with pytest.raises(BundleError, match="symbolic link"):
        bundle.read_file(made, bundle.read_manifest(made), "visual/model.onnx")


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated or altered: expected"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
            "altered: expected sha256",
        ),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "truncated or altered: expected"),
        (_fifo, "regular file"),
        (_folder, "regular file"),
    ],
    ids=["missing", "truncated", "altered", "grown", "fifo", "folder"],
)
def test_damaged_files_are_named_with_the_remedy(made, name, damage, message):
    damage(made / name)
    manifest = bundle.read_manifest(made)
    for check in (
        lambda: bundle.check_bundle(made),
        lambda: bundle.check_file(made, manifest, name),
        lambda: bundle.read_file(made, manifest, name),
    ):
        with pytest.raises(BundleError, match=message) as caught:
            check()
        assert name in str(caught.value)
        assert "export it again" in str(caught.value)


def test_read_file_returns_what_was_checked(made):
    manifest = bundle.read_manifest(made)
    assert bundle.read_file(made, manifest, "LICENSE") == b"LICENSE"
    with pytest.raises(BundleError, match="manifest lists no"):
        bundle.read_file(made, manifest, "other.bin")


def test_unlisted_files_are_no_concern(made):
    (made / "notes.txt").write_text("mine")
    bundle.check_bundle(made)


# ------------------------------------------------------------------------------------------------------------ writer


def test_existing_output_is_refused_without_force(made):
    before = bundle.bundle_digest(made)
    with pytest.raises(ConfigError, match=r"exists.*--force"):
        _write(made)
    with pytest.raises(ConfigError, match="exists"), bundle.staging_folder(made):
        pytest.fail("the staging folder must not be handed out")
    assert bundle.bundle_digest(made) == before


def test_force_replaces_a_bundle_and_leaves_nothing_else(made):
    (made / "notes.txt").write_text("old")
    manifest = _write(made, {**FIELDS, "method": "other"}, force=True)
    assert bundle.check_bundle(made) == manifest
    assert manifest.method == "other"
    assert not (made / "notes.txt").exists()
    assert list(made.parent.iterdir()) == [made]


def test_force_never_deletes_what_is_no_bundle(tmp_path):
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "wedding.jpg").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"no manifest\.json, so it is not replaced"):
        _write(precious, force=True)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"no manifest\.json, so it is not replaced"):
        _write(tmp_path / "file", force=True)
    (tmp_path / "empty").mkdir()
    _write(tmp_path / "empty", force=True)
    assert (precious / "wedding.jpg").exists()


def test_a_failed_replacement_brings_the_old_bundle_back(made, monkeypatch):
    before = bundle.bundle_digest(made)
    rename = Path.rename

    def failing(self, target):
        if self.name == "new":
            raise OSError(errno.ENOSPC, "disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ConfigError, match="disk full"):
        _write(made, force=True)
    assert bundle.bundle_digest(made) == before
    assert list(made.parent.iterdir()) == [made]


def test_an_interrupted_export_leaves_nothing(tmp_path):
    def interrupted():
        with bundle.staging_folder(tmp_path / "bundle") as staging:
            (staging / "model.onnx").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_unwritable_output(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot write"):
        _write(tmp_path / "file" / "bundle")


def test_parents_are_made_and_permissions_are_the_usual_ones(tmp_path):
    _write(tmp_path / "a" / "b" / "bundle")
    (tmp_path / "plain").mkdir()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "plain", tmp_path / "a" / "b" / "bundle")}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logit_scale": float("nan")}, "finite JSON"),
        ({"metrics": {"accuracy": np.float32(1)}}, "finite JSON"),
        ({"num_steps": -1}, "num_steps"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_invalid_fields_never_become_a_bundle(tmp_path, change, message):
    with pytest.raises(BundleError, match=message):
        _write(tmp_path / "bundle", {**FIELDS, **change})
    assert list(tmp_path.iterdir()) == []


def test_links_are_not_staged(tmp_path):
    def linked():
        with bundle.staging_folder(tmp_path / "bundle") as staging:
            (staging / "link").symlink_to("/etc/hostname")
            bundle.seal_bundle(staging, FIELDS)

    with pytest.raises(BundleError, match="regular files"):
        linked()
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_was_not_sealed_is_not_written(tmp_path):
    with pytest.raises(BundleError, match="not sealed"), bundle.staging_folder(tmp_path / "bundle") as staging:
        (staging / "model.onnx").write_bytes(b"all there is")
    assert list(tmp_path.iterdir()) == []


def test_created_is_filled_in(tmp_path):
    manifest = _write(tmp_path / "bundle", {k: v for k, v in FIELDS.items() if k != "created"})
    assert manifest.created.endswith("+00:00")
