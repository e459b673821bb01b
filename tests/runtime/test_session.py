"""Sessions are on the device they claim, and say what is missing when they are not."""

from __future__ import annotations

import importlib.metadata
import logging
import re
import sys
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from fastfsl.errors import BundleError, ConfigError, DeviceError
from fastfsl.runtime import Classifier
from fastfsl.runtime import session as session_module
from fastfsl.runtime.probe import SQUARE_MODEL, probe
from fastfsl.runtime.session import create_session, installed_onnxruntimes, load_onnxruntime

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class FakeSession(SimpleNamespace):
    def __hash__(self) -> int:  # type: ignore[override]  # as onnxruntime's
        return id(self)


class FakeOnnxruntime:
    """An onnxruntime that lists CUDA, whose sessions come up on ``comes_up`` or raise."""

    __version__ = "1.31.1"

    def __init__(self, comes_up, raises=None):
        self.comes_up, self.raises = comes_up, raises
        self.asked, self.preloaded = [], False

    def get_available_providers(self):
        return [CUDA, CPU]

    def preload_dlls(self):
        self.preloaded = True

    def SessionOptions(self):  # noqa: N802 - onnxruntime's name
        return SimpleNamespace(add_session_config_entry=lambda *_: None)

    def InferenceSession(self, model, options, providers, enable_fallback, disabled_optimizers=()):  # noqa: N802 - onnxruntime's name
        assert enable_fallback == 0
        names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
        self.asked.append(names)
        if self.raises and CUDA in names:
            raise RuntimeError(self.raises)
        return FakeSession(get_providers=lambda: self.comes_up if CUDA in names else [CPU])


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setenv("FASTFSL_ARENA_BYTES", "0")  # it has no arenas

    def install(comes_up, raises=None):
        module = FakeOnnxruntime(comes_up, raises)
        monkeypatch.setattr(session_module, "load_onnxruntime", lambda: module)
        return module

    return install


def test_float16_is_for_cuda_alone(fake):
    """Whatever the manifest says: a session that may come down to the CPU must not get it."""
    module = fake([CUDA, CPU])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [2]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    model = helper.make_model(graph).SerializeToString()
    for device, half in (("cpu", True), ("auto", True), ("cuda", False)):
        with pytest.raises(BundleError, match="float16"):
            create_session(model, "model", device=device, half=half)
        assert module.asked == []
    create_session(model, "model", device="cuda", half=True)
    assert module.asked == [[CUDA, CPU]]


def test_cuda_that_comes_up_is_used(fake):
    module = fake([CUDA, CPU])
    assert create_session(SQUARE_MODEL, "model", device="cuda").get_providers() == [CUDA, CPU]
    assert create_session(SQUARE_MODEL, "model", device="auto").get_providers() == [CUDA, CPU]
    assert module.preloaded
    assert create_session(SQUARE_MODEL, "model", device="cpu").get_providers() == [CPU]
    assert module.asked[-1] == [CPU]


def test_cuda_that_is_listed_but_silently_missing_is_noticed(fake):
    fake([CPU])
    with pytest.raises(DeviceError, match=r"came up on \['CPUExecutionProvider'\] only.*fastfsl doctor"):
        create_session(SQUARE_MODEL, "model", device="cuda")
    assert create_session(SQUARE_MODEL, "model", device="auto").get_providers() == [CPU]


def test_cuda_that_fails_to_start(fake):
    module = fake([CUDA], raises="CUDA failure 100: no CUDA-capable device is detected")
    with pytest.raises(DeviceError, match="no CUDA-capable device"):
        create_session(SQUARE_MODEL, "model", device="cuda")
    assert create_session(SQUARE_MODEL, "model", device="auto").get_providers() == [CPU]
    assert module.asked == [[CUDA, CPU], [CUDA, CPU], [CPU]]


def test_cuda_on_the_cpu_build_names_the_extra(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(DeviceError, match=r"fastfsl\[gpu\].*fastfsl doctor"):
        create_session(SQUARE_MODEL, "model", device="cuda")
    assert create_session(SQUARE_MODEL, "model", device="auto", num_threads=1).get_providers() == [CPU]


def _distributions(monkeypatch, installed):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_both_distributions_are_refused(monkeypatch):
    _distributions(monkeypatch, {"onnxruntime", "onnxruntime-gpu"})
    assert installed_onnxruntimes() == {"onnxruntime": "1.0", "onnxruntime-gpu": "1.0"}
    for device in ("auto", "cpu", "cuda"):
        with pytest.raises(DeviceError, match="overwrite each other's files; pip uninstall"):
            create_session(SQUARE_MODEL, "model", device=device)


def test_missing_onnxruntime_names_the_extra(monkeypatch):
    _distributions(monkeypatch, set())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"fastfsl\[cpu\]"):
        load_onnxruntime()


def test_threads_reach_the_session(monkeypatch):
    created = {}
    real = onnxruntime.InferenceSession

    def recording(model, options, **arguments):
        created["threads"] = options.intra_op_num_threads
        created["spinning"] = options.get_session_config_entry("session.intra_op.allow_spinning")
        if created["spinning"] == "1":
            created["microseconds"] = options.get_session_config_entry("session.intra_op.spin_duration_us")
        return real(model, options, **arguments)

    monkeypatch.setattr(onnxruntime, "InferenceSession", recording)
    create_session(SQUARE_MODEL, "model", device="cpu", num_threads=3)
    brief = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 31)
    assert created == {"threads": 3, "spinning": "0"} | ({"spinning": "1", "microseconds": "20"} if brief else {})
    monkeypatch.setattr(session_module, "default_threads", lambda: 2)
    create_session(SQUARE_MODEL, "model", device="cpu")
    assert created["threads"] == 2


def test_an_onnxruntime_that_would_spin_without_bound_does_not_spin(monkeypatch):
    entries = {}

    add = onnxruntime.SessionOptions.add_session_config_entry

    def recording(self, key, value):
        entries[key] = value
        add(self, key, value)

    monkeypatch.setattr(onnxruntime.SessionOptions, "add_session_config_entry", recording)
    monkeypatch.setattr(onnxruntime, "__version__", "1.30.2")
    create_session(SQUARE_MODEL, "model", device="cpu")
    assert entries["session.intra_op.allow_spinning"] == "0"
    assert "session.intra_op.spin_duration_us" not in entries


def test_the_models_bytes_are_let_go():
    session = create_session(SQUARE_MODEL, "model", device="cpu", num_threads=1)
    assert vars(session)["_model_bytes"] is None
    np.testing.assert_array_equal(session.run(None, {"x": np.array([1, 2], np.float32)})[0], [1, 4])


def test_the_probe_model_is_what_its_comment_says():
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "x"], ["y"])], "square", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert model.SerializeToString() == SQUARE_MODEL


def test_probing(monkeypatch, fake):
    assert probe("cpu").error is None
    fake([CPU])
    found = probe("cuda")
    assert (found.device, found.provider) == ("cuda", CUDA)
    assert "came up on" in str(found.error)


def test_a_provider_that_computes_wrongly_is_not_usable(monkeypatch):
    wrong = SimpleNamespace(run=lambda *_: [np.array([9.0, -16.0], np.float32)])
    monkeypatch.setattr("fastfsl.runtime.probe.create_session", lambda *_, **__: wrong)
    assert "instead of" in str(probe("cuda").error)
    crashing = SimpleNamespace(run=lambda *_: 1 / 0)
    monkeypatch.setattr("fastfsl.runtime.probe.create_session", lambda *_, **__: crashing)
    assert "ZeroDivisionError" in str(probe("cuda").error)


@pytest.mark.parametrize(
    ("comes_up", "raises", "level", "reason"),
    [
        ([CPU], None, logging.WARNING, r"came up on \['CPUExecutionProvider'\] only"),
        ([CUDA, CPU], "libcublasLt.so.12: cannot open shared object", logging.WARNING, "libcublasLt"),
        (None, None, logging.INFO, "has no CUDA; pip uninstall onnxruntime"),
    ],
    ids=["GPU build, silent", "GPU build without libraries", "CPU build"],
)
def test_a_classifier_on_auto_says_that_it_fell_back_and_on_cuda_refuses(
    bundle_dir, monkeypatch, caplog, comes_up, raises, level, reason
):
    if comes_up is not None:
        real = onnxruntime.InferenceSession
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)

        def create(model, options, providers, enable_fallback, disabled_optimizers=()):
            if providers != [CPU] and raises:
                raise RuntimeError(raises)
            return real(model, options, providers=[CPU], enable_fallback=enable_fallback)

        monkeypatch.setattr(onnxruntime, "InferenceSession", create)
    else:
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with caplog.at_level(logging.INFO, "fastfsl.runtime"), Classifier.load(bundle_dir, num_threads=1) as classifier:
        described = classifier.describe()
    assert re.search(reason, described["device_fallback"])
    assert described["providers"] == {"visual": [CPU], "flow": [CPU]}
    told = [record for record in caplog.records if "came down to the CPU" in record.message]
    assert [record.levelno for record in told] == [level]
    assert re.search(reason, told[0].message)
    assert f"loaded {bundle_dir}: visual on CPUExecutionProvider, flow on CPUExecutionProvider" in caplog.text
    with pytest.raises(DeviceError, match=rf"^device='cuda': .*{reason}.*fastfsl doctor.*device='cpu'"):
        Classifier.load(bundle_dir, device="cuda", num_threads=1)
    with Classifier.load(bundle_dir, device="cpu", num_threads=1) as classifier:
        assert classifier.describe()["device_fallback"] is None


def test_a_classifier_refuses_both_distributions(bundle_dir, monkeypatch):
    _distributions(monkeypatch, {"onnxruntime", "onnxruntime-gpu"})
    for device in ("auto", "cuda"):
        with pytest.raises(DeviceError, match="overwrite each other's files; pip uninstall"):
            Classifier.load(bundle_dir, device=device)
