"""Bundles written by the first version of the format load for ever, and compute what torch computed then."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fastfsl import bundle
from fastfsl.runtime import Classifier

GOLDEN = Path(__file__).parent / "v1"
NAMES = ("red kite", "Köter", "狗", "none of 'these'", "🦆")
# The sha256 of each manifest: a golden bundle that was "refreshed" is no golden bundle.
DIGESTS = {
    "images": "7825f9e2cc7083110d629475b6432c680bbbf6d962ec12c44767cf8a57aea8ce",
    "blend": "a0a81a2f6eb212f3cbed5f339942459f79312a1482f079932fb5da791befd895",
    "compiled": "c6c1e932e358d0fa961cdfae21f8faa9a270770dd4b446cd28410f7821a5b231",
    "text": "4238595beaf0636e7ead28d465fb1c48c638f1a4868e8836f72c173a457e3a02",
}
# Other processors and other versions of ONNX Runtime and Pillow round differently.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDEN / "expected.safetensors") | load_file(GOLDEN / "expected_text.safetensors")


@pytest.mark.parametrize("name", DIGESTS)
def test_every_byte_is_the_one_committed(name):
    assert bundle.bundle_digest(GOLDEN / name) == DIGESTS[name]
    manifest = bundle.check_bundle(GOLDEN / name)
    found = {path.relative_to(GOLDEN / name).as_posix() for path in (GOLDEN / name).rglob("*") if path.is_file()}
    assert found == {bundle.MANIFEST_NAME, *manifest.files}


@pytest.mark.parametrize("name", DIGESTS)
def test_it_computes_what_torch_computed(name, expected):
    classifier = Classifier.load(GOLDEN / name, device="cpu", num_threads=1)
    assert classifier.class_names == NAMES
    wanted = {key.removeprefix(f"{name}."): value for key, value in expected.items() if key.startswith(f"{name}.")}
    if name == "compiled":
        probabilities = classifier.feature_probabilities(wanted["features"])
        transported = classifier.transport(wanted["features"])
    else:
        images = [expected[f"image{index}"] for index in range(3)]
        probabilities, embeds = classifier.probabilities(images), classifier.embed(images)
        np.testing.assert_allclose(embeds, wanted["embeds"], atol=TOLERANCE)
        transported = classifier.transport(wanted["embeds"])
    if name == "text":
        classifier.add_class("blue_jay", ["a blue jay on a branch", "it&#39;s \u00c3\u00a9"])
        np.testing.assert_allclose(classifier.probabilities(images), wanted["added"], atol=TOLERANCE)
    np.testing.assert_allclose(probabilities, wanted["probabilities"], atol=TOLERANCE)
    np.testing.assert_allclose(
        transported, wanted["transported" if "transported" in wanted else "embeds"], atol=TOLERANCE
    )
    assert np.ptp(probabilities, axis=0).max() > 0.05  # the inputs are told apart


def test_every_part_of_the_format_is_read():
    plan = bundle.read_plan(GOLDEN / "images" / bundle.FLOW_PLAN)
    assert (plan.num_steps, plan.num_blocks, plan.dim) == (3, 1, 24)
    images, blend, compiled, text = (bundle.read_manifest(GOLDEN / name) for name in DIGESTS)
    readout = bundle.load_readout(GOLDEN / "images", images)
    assert readout is not None
    assert (readout.flow_weight, readout.temperature, readout.threshold) == (0.7, 1.5, 0.25)
    assert blend.blend == {"alpha": 0.3, "normalized": False}
    assert text.text is not None
    assert (text.text["context_length"], text.text["vocab_size"], text.text["templates"][1]) == (12, 664, "{}")
    assert bundle.read_class_places(GOLDEN / "text", text).target_shift.any()
    kernels = bundle.read_flow_kernels(GOLDEN / "compiled", compiled)
    assert kernels is not None
    kernel = kernels.targets["sm_90"].find("exit", 32)
    assert kernel is not None
    assert bundle.read_kernel(GOLDEN / "compiled", compiled, kernel) == b"stand-in exit 32\n"
    weights = bundle.read_flow_weights(GOLDEN / "compiled", compiled)
    assert (weights.dim, weights.num_steps, weights.num_blocks, weights.num_classes) == (128, 1, 0, 5)
