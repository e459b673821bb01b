"""A run of CLIP-LoRA written when its updates were scaled by alpha / rank keeps its features.

lora_run was trained on a few digits with rank 4 and alpha 1.5, when a run did not yet record the scaling, the schedule
or what became of the last batch. `expected.safetensors` holds pixels and what the code of then made of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fastfsl.encoders import class_embeddings
from fastfsl.fit.evaluate import base_encoder
from fastfsl.fit.peft_sources import LoRASource
from fastfsl.fit.run import RUN_FILE, Run

OLD = Path(__file__).parent / "lora_run"


@pytest.fixture(scope="module")
def expected():
    return load_file(OLD / "expected.safetensors")


def features(run, pixels):
    with torch.no_grad():
        return run.tuned(base_encoder(run)).encode_images(torch.from_numpy(pixels)).numpy()


def test_an_old_lora_run_is_scaled_by_alpha_over_rank(expected):
    assert "scaling" not in json.loads((OLD / RUN_FILE).read_text(encoding="utf-8"))["source"]["params"]
    run = Run.load(OLD)
    np.testing.assert_allclose(features(run, expected["pixels"]), expected["features"], atol=1e-5)
    source = run.source
    assert isinstance(source, LoRASource)
    assert (source.rank, source.scale, source.scaling) == (4, 1.5, "rank")
    assert (source.schedule, source.final_rate, source.drop_last) == ("update", 0.0, False)
    # The updated text tower reads the prompts as it did.
    texts = class_embeddings(run.tuned(base_encoder(run)), run.record.class_names, run.record.config.templates)
    np.testing.assert_allclose(texts, expected["class_embeddings"], atol=1e-5)


def test_the_same_arrays_with_the_published_scaling_are_another_encoder(expected, tmp_path):
    """The record decides: the arrays alone do not say how they are scaled."""
    shutil.copytree(OLD, tmp_path / "run")
    record = json.loads((OLD / RUN_FILE).read_text(encoding="utf-8"))
    record["source"]["params"]["scaling"] = "sqrt-rank"
    (tmp_path / "run" / RUN_FILE).write_text(json.dumps(record), encoding="utf-8")
    other = features(Run.load(tmp_path / "run"), expected["pixels"])
    assert np.abs(other - expected["features"]).max() > 1e-3


def test_a_restored_old_run_that_is_saved_again_keeps_its_meaning(expected, tmp_path):
    Run.load(OLD).save(tmp_path / "again")
    again = features(Run.load(tmp_path / "again"), expected["pixels"])
    np.testing.assert_allclose(again, expected["features"], atol=1e-5)
