"""Bundles with compiled kernels in the classifier: on a card of host memory, and everywhere there is none."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from fastfsl.bundle import Readout, read_manifest
from fastfsl.bundle.flow_kernels import read_flow_kernels
from fastfsl.errors import BundleError, ConfigError, DeviceError
from fastfsl.runtime import Classifier
from fastfsl.runtime import session as session_module
from tests.runtime.compiled_bundle import CLASSES, DIM, random_flow, write_compiled
from tests.runtime.fake_driver import FakeDriver, Result
from tests.runtime.fake_kernels import by_equation, interpreted
from tests.runtime.fake_onnxruntime import CPU, CUDA, CudaOnnxruntime, Session

FEATURES = np.random.default_rng(5).normal(size=(5, DIM))


def _projection() -> np.ndarray:
    return np.random.default_rng(6).normal(size=(8 * 10 * 3, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def flow():
    return random_flow()


@pytest.fixture(scope="module")
def path(write, make_visual, flow, tmp_path_factory):
    """With an image encoder."""
    target = tmp_path_factory.mktemp("compiled") / "bundle"
    return write_compiled(write, target, flow, visual=make_visual(_projection()).SerializeToString())


@pytest.fixture
def driver(monkeypatch) -> FakeDriver:
    """The driver of this machine, for as long as the test runs."""
    driver = FakeDriver()
    driver.execute = by_equation(driver)
    monkeypatch.setattr("fastfsl.runtime.cuda_driver.load_driver", lambda: driver)
    return driver


@pytest.fixture
def no_card(monkeypatch):
    monkeypatch.setattr("fastfsl.runtime.cuda_driver.load_driver", lambda: FakeDriver(cards=0))


def _load(path, **options) -> Classifier:
    return Classifier.load(path, num_threads=1, max_batch=4, **options)


def _messages(caplog) -> list[tuple[int, str]]:
    """Of the flow; what is said of every load is left out."""
    said = [(record.levelno, record.getMessage()) for record in caplog.records if record.name == "fastfsl.runtime"]
    return [(level, message) for level, message in said if "computes the flow" in message]


@pytest.mark.parametrize(("flow_option", "kernels"), [("auto", interpreted), ("compiled", by_equation)])
def test_a_card_computes_the_flow(path, driver, flow_option, kernels, photos):
    driver.execute = kernels(driver)
    on_card, plain = _load(path, flow=flow_option), _load(path, flow="onnx")
    described = json.loads(json.dumps(on_card.describe()))
    assert described["flow"] == {
        "executor": "compiled sm_90",
        "reason": "fp16 kernels for sm_90 on Imaginary card (sm_90)",
    }
    assert plain.describe()["flow"] == {"executor": "onnxruntime", "reason": "flow='onnx' was asked for"}
    assert described["providers"] == {"visual": [CPU], "flow": [CPU]}
    launches = len(driver.launched)
    np.testing.assert_allclose(
        on_card.feature_probabilities(FEATURES), plain.feature_probabilities(FEATURES), atol=2e-3
    )
    np.testing.assert_allclose(on_card.transport(FEATURES), plain.transport(FEATURES), atol=2e-3)
    assert len(driver.launched) == 3 * launches  # of the proof, and two methods
    np.testing.assert_allclose(on_card.probabilities(photos), plain.probabilities(photos), atol=2e-3)
    assert [one.label for one in on_card.predict(photos)] == [one.label for one in plain.predict(photos)]
    assert driver.violations == []


def test_a_read_out_goes_on_top(write, tmp_path, driver, flow):
    rng = np.random.default_rng(5)
    readout = Readout(0.7, rng.normal(size=(CLASSES, DIM)).astype(np.float32), np.zeros(CLASSES, np.float32))
    path = write_compiled(write, tmp_path / "bundle", flow, readout=readout, with_encoder=False)
    expected = _load(path, device="cpu").feature_probabilities(FEATURES)
    np.testing.assert_allclose(_load(path).feature_probabilities(FEATURES), expected, atol=2e-3)
    assert driver.launched


@pytest.mark.usefixtures("no_card")
def test_without_a_card_onnxruntime_answers_and_it_is_told(path, caplog, photos):
    caplog.set_level(logging.INFO, "fastfsl.runtime")
    classifier, plain = _load(path), _load(path, device="cpu", flow="onnx")
    words = "cuInit: CUDA_ERROR_NO_DEVICE; no card answers: check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"
    assert classifier.describe()["flow"] == {"executor": "onnxruntime", "reason": words}
    assert _messages(caplog) == [(logging.INFO, f"ONNX Runtime computes the flow: {words}")]
    np.testing.assert_array_equal(classifier.feature_probabilities(FEATURES), plain.feature_probabilities(FEATURES))
    np.testing.assert_array_equal(classifier.probabilities(photos), plain.probabilities(photos))
    with pytest.raises(DeviceError, match="flow='compiled': cuInit: CUDA_ERROR_NO_DEVICE; no card answers"):
        _load(path, flow="compiled")


def test_the_cpu_does_not_ask_for_a_card(path, driver):
    classifier = _load(path, device="cpu")
    assert classifier.describe()["flow"]["reason"] == "device='cpu' was asked for; choose 'auto' or 'cuda'"
    assert not driver.calls
    with pytest.raises(DeviceError, match="flow='compiled': device='cpu' was asked for"):
        _load(path, device="cpu", flow="compiled")


def test_bundles_without_kernels_or_without_a_flow(bundle_dir, write, tmp_path, driver):
    assert "no compiled kernels" in Classifier.load(bundle_dir, num_threads=1).describe()["flow"]["reason"]
    with pytest.raises(DeviceError, match="flow='compiled': the bundle has no compiled kernels; export it with --arch"):
        Classifier.load(bundle_dir, flow="compiled")
    nothing = np.zeros((CLASSES, 6), np.float32)
    path = write(tmp_path / "bundle", with_flow=False, readout=Readout(0.0, nothing, nothing[:, 0]))
    assert Classifier.load(path, num_threads=1).describe()["flow"] is None
    with pytest.raises(DeviceError, match="the bundle has no flow"):
        Classifier.load(path, flow="compiled")
    assert not driver.calls


def test_the_option_is_checked(path):
    with pytest.raises(ConfigError, match="flow must be one of auto, compiled, onnx, got 'fast'"):
        Classifier.load(path, flow="fast")


def test_an_altered_kernel_is_refused_even_where_it_is_not_used(write, tmp_path, flow):
    path = write_compiled(write, tmp_path / "bundle", flow, with_encoder=False)
    kernels = read_flow_kernels(path, read_manifest(path))
    assert kernels is not None
    (path / kernels.targets["sm_80"].kernels[3].path).write_bytes(b"no kernel")
    for device in ("cpu", "auto"):
        with pytest.raises(BundleError, match="truncated or altered"):
            Classifier.load(path, device=device)


def test_a_driver_that_refuses_the_kernels(path, driver, caplog):
    driver.fail = lambda name: Result.CUDA_ERROR_NO_BINARY_FOR_GPU if name == "cuLibraryLoadData" else None
    classifier = _load(path)
    ((level, message),) = _messages(caplog)
    assert level == logging.WARNING
    assert "refuses the bundle's kernels" in message
    assert classifier.describe()["flow"]["executor"] == "onnxruntime"
    assert "refuses the bundle's kernels" in classifier.describe()["flow"]["reason"]
    classifier.transport(FEATURES)
    with pytest.raises(DeviceError, match=r"flow='compiled': .*refuses"):
        _load(path, flow="compiled")


def test_miscompiled_kernels_never_answer(write, tmp_path, driver, flow, caplog):
    plan = replace(flow.plan, second_weight=-flow.plan.second_weight)
    path = write_compiled(write, tmp_path / "bundle", flow, weights=replace(flow, plan=plan), with_encoder=False)
    classifier, plain = _load(path), _load(path, flow="onnx")
    assert [level for level, _ in _messages(caplog)] == [logging.WARNING]
    assert "differs from the ONNX flow" in classifier.describe()["flow"]["reason"]
    np.testing.assert_array_equal(classifier.transport(FEATURES), plain.transport(FEATURES))
    with pytest.raises(DeviceError, match=r"flow='compiled': .*differs"):
        _load(path, flow="compiled")


def test_a_card_that_fails_later_hands_over(path, driver, caplog, photos):
    classifier, required, plain = _load(path), _load(path, flow="compiled"), _load(path, flow="onnx")
    driver.fail = lambda name: Result.CUDA_ERROR_LAUNCH_FAILED if name == "cuGraphLaunch" else None
    np.testing.assert_array_equal(classifier.transport(FEATURES), plain.transport(FEATURES))
    assert classifier.describe()["flow"] == {
        "executor": "onnxruntime",
        "reason": "cuGraphLaunch: CUDA_ERROR_LAUNCH_FAILED; run `fastfsl doctor` to see what is missing",
    }
    ((level, message),) = _messages(caplog)
    assert level == logging.WARNING
    assert "from now on: cuGraphLaunch" in message
    np.testing.assert_array_equal(classifier.probabilities(photos), plain.probabilities(photos))
    with pytest.raises(DeviceError, match="flow='compiled': cuGraphLaunch"):
        required.transport(FEATURES)


class OnTheStream(CudaOnnxruntime):
    """Sessions come up on the stream they are given."""

    def __init__(self, driver) -> None:
        super().__init__()
        self.driver = driver
        self.on_the_stream: list[bool] = []
        self.bound = 0

    def session(self, real, settings) -> Session:
        self.on_the_stream.append("user_compute_stream" in settings)
        assert settings["device_id"] == "0"
        if not self.on_the_stream[-1]:
            return super().session(real, settings)
        assert self.driver.is_stream(int(settings["user_compute_stream"]))
        return StreamSession(real, settings, self)


class StreamSession(Session):
    """One of them."""

    def __init__(self, real, settings, module) -> None:
        super().__init__(real, settings)
        self._module = module

    def io_binding(self):
        binding, module = self._real.io_binding(), self._module
        bind = binding.bind_output

        def bind_output(name, device_type, device_id, element_type, shape, buffer_ptr):
            assert (device_type, device_id) == ("cuda", 0)
            assert module.driver.bytes_at(buffer_ptr, 4 * int(np.prod(shape))).size == 4 * np.prod(shape)
            module.bound += 1
            bind(name, "cpu", 0, element_type, shape, buffer_ptr)

        binding.bind_output = bind_output
        return binding

    def run_with_iobinding(self, binding, options=None):
        assert self._module.driver.stack()
        self._module.driver.flush()  # what is on the stream comes first
        self._real.run_with_iobinding(binding)


@pytest.fixture
def cuda(driver, monkeypatch) -> OnTheStream:
    module = OnTheStream(driver)
    monkeypatch.setenv("FASTFSL_ARENA_BYTES", "0")  # it has no arenas
    monkeypatch.setattr(session_module, "load_onnxruntime", lambda: module)
    return module


def test_embeddings_of_images_stay_on_the_card(path, cuda, driver, photos):
    plain = _load(path, device="cpu")
    classifier = _load(path, device="cuda")
    assert classifier.describe()["providers"] == {"visual": [CUDA, CPU], "flow": [CUDA, CPU]}
    assert cuda.on_the_stream == [False, True]  # the flow's own graph is not on it
    np.testing.assert_allclose(classifier.probabilities(photos), plain.probabilities(photos), atol=2e-3)
    assert cuda.bound == 3  # batches of 4, 4 and 1
    labels = [prediction.label for prediction in plain.predict(photos)]
    assert [prediction.label for prediction in classifier.predict(photos)] == labels
    assert cuda.bound == 6
    np.testing.assert_allclose(classifier.embed(photos), plain.embed(photos), atol=1e-6)
    assert cuda.bound == 6
    assert driver.violations == []


def test_they_do_not_where_the_graph_computes_the_flow(path, cuda, photos):
    classifier = _load(path, device="cuda", flow="onnx")
    classifier.probabilities(photos)
    assert cuda.on_the_stream == [False, False]
    assert cuda.bound == 0


def test_a_blend_that_is_not_normalized_comes_by_the_host(write, tmp_path, cuda, make_blend, flow, photos):
    """Its flow normalises, its read-out does not: both get what the encoder gave."""
    rng = np.random.default_rng(5)
    readout = Readout(0.7, rng.normal(size=(CLASSES, DIM)).astype(np.float32), np.zeros(CLASSES, np.float32))
    path = write_compiled(
        write,
        tmp_path / "bundle",
        flow,
        readout=readout,
        visual=make_blend(_projection(), -_projection()[::-1]).SerializeToString(),
        blend={"alpha": 0.3, "normalized": False},
    )
    classifier = _load(path, device="cuda")
    expected = _load(path, device="cpu").probabilities(photos)
    np.testing.assert_allclose(classifier.probabilities(photos), expected, atol=2e-3)
    assert classifier.describe()["flow"]["executor"] == "compiled sm_90"
    assert cuda.bound == 0


def test_a_card_that_fails_between_encoder_and_flow(path, cuda, driver, photos):
    plain = _load(path, device="cpu").probabilities(photos)
    classifier = _load(path, device="cuda")
    driver.fail = lambda name: Result.CUDA_ERROR_LAUNCH_FAILED if name == "cuGraphLaunch" else None
    np.testing.assert_array_equal(classifier.probabilities(photos), plain)
    assert classifier.describe()["flow"]["executor"] == "onnxruntime"


def test_classifying_needs_neither_torch_nor_triton(path):
    code = (
        "import sys; from fastfsl.runtime import Classifier; "
        f"print(Classifier.load({str(path)!r}, num_threads=1).describe()['flow']['executor']); "
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "triton", "onnx"} & set(done.stdout.split())
