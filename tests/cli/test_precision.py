"""`fastfsl export --precision`: what the accuracy gate says and does at the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastfsl.export import precision as precision_module
from fastfsl.export.accuracy_gate import compare


@pytest.fixture(scope="module")
def run(run_fastfsl, tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    means, labels = rng.normal(size=(4, 16)), np.repeat(np.arange(4), 5)
    train, test = (means[labels] + 0.2 * rng.normal(size=(2, 20, 16))).astype(np.float32)
    np.savez(
        folder / "features.npz",
        train_features=train,
        test_features=test,
        train_labels=labels,
        test_labels=labels,
        class_embeddings=means.astype(np.float32),
        logit_scale=np.float32(20),
    )
    (folder / "config.yaml").write_text("method: fma\nnum_blocks: 1\nepochs: 5\nnum_steps: 2\nlearning_rate: 0.01\n")
    result = run_fastfsl("train", folder / "features.npz", "--out", folder / "run", "--config", folder / "config.yaml")
    assert result.exit_code == 0, result.stderr
    return folder


def test_int8_is_exported_checked_and_evaluated(fastfsl, run, tmp_path):
    document = fastfsl("export", run / "run", tmp_path / "bundle", "--precision", "int8", "--json").document
    assert document["precision"] == "int8"
    report = document["parity"]["precision"]
    assert (report["num_samples"], report["samples"], report["allow_drop"]) == (20, "support features", False)
    assert report["int8_layers"]["flow"] > 0
    evaluated = fastfsl("evaluate", tmp_path / "bundle", run / "features.npz", "--json").document
    assert evaluated["accuracy"] > 0.9


def test_what_the_gate_refuses_takes_allow_drop(fastfsl, run, tmp_path, monkeypatch):
    monkeypatch.setattr(precision_module, "compare", lambda *answers: {**compare(*answers), "agreement": 0.5})
    command = ("export", run / "run", tmp_path / "bundle", "--precision", "int8")
    refused = fastfsl(*command)
    assert refused.exit_code == 2
    words = " ".join(refused.stderr.split())
    assert "int8 gives 50.0 % of 20 support features the class that fp32 gives them" in words
    assert "--precision fp32, or accept the loss with --allow-drop" in words
    assert not (tmp_path / "bundle").exists()
    assert fastfsl(*command, "--allow-drop").exit_code == 0
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["parity"]["precision"]["allow_drop"] is True
    assert "the same class for 50.0 %" in (tmp_path / "bundle" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--precision", "fp16"], "nothing for fp16"), (["--precision", "int4"], "int4")],
)
def test_a_precision_that_nothing_can_have_is_refused(fastfsl, run, tmp_path, options, words):
    result = fastfsl("export", run / "run", tmp_path / "bundle", *options)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert not (tmp_path / "bundle").exists()
