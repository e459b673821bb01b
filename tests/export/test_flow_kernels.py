"""A run exported with --arch: its kernels and 16-bit weights are in the bundle, read back, and checked."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fastfsl import bundle
from fastfsl.bundle import FlowWeights
from fastfsl.cli import app
from fastfsl.errors import BundleError, ConfigError
from fastfsl.export import flow_kernels
from fastfsl.export.bundle_writer import export_run
from fastfsl.export.flow_kernels import KernelOptions, check_compilable, choose_dtype, rounding_error
from fastfsl.fit.config import load_config
from fastfsl.fit.deployment import Deployment, deployment
from fastfsl.fit.run import Run
from fastfsl.fit.train import train
from fastfsl.flow import FlowPlan, VelocityField, build_plan
from fastfsl.kernels import aot
from fastfsl.kernels.aot import compile_flow
from fastfsl.kernels.tiles import flow_tile, logits_tile
from fastfsl.runtime import Classifier

CLASSES, DIM = 4, 128
SM_80 = KernelOptions((80,))


def _unit(rows: np.ndarray) -> Any:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def _train(folder: Path, method: str = "fma", dim: int = DIM, **flags: Any) -> Run:
    rng = np.random.default_rng(0)
    means, labels = _unit(rng.normal(size=(CLASSES, dim))), np.repeat(np.arange(CLASSES), 4)
    np.savez(
        folder / "features.npz",
        train_features=_unit(means[labels] + 0.05 * rng.normal(size=(len(labels), dim))),
        train_labels=labels,
        class_embeddings=_unit(means + 0.1 * rng.normal(size=means.shape)),
        logit_scale=np.float32(40.0),
    )
    brief = {"num_blocks": 1, "epochs": 5, "batch_size": 8, "learning_rate": 1e-2, "num_steps": 3}
    params = brief if method == "fma" else {}
    return train(folder / "features.npz", load_config(flags={"method": method, "device": "cpu", **params, **flags}))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return _train(tmp_path_factory.mktemp("run"), num_prototypes=2)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> tuple[Path, list[tuple[str, int, int]]]:
    stages: list[tuple[str, int, int]] = []
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        # The tile of few rows for all: a quarter of the compilations, and the quick ones.
        patch.setattr(aot, "flow_tile", lambda arch, dim, rows, dtype: flow_tile(arch, dim, 1, dtype))
        patch.setattr(aot, "logits_tile", lambda rows: logits_tile(1))
        export_run(run, folder, kernels=SM_80, on_stage=lambda *stage: stages.append(stage))
    return folder, stages


@pytest.fixture
def made(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported[0], tmp_path / "bundle"))


def _plan(dim: int = DIM, blocks: int = 2) -> FlowPlan:
    torch.manual_seed(0)
    field = VelocityField(dim, blocks)
    for parameter in field.parameters():
        parameter.data = 0.5 * torch.randn_like(parameter) * parameter.shape[-1] ** -0.5
    return build_plan(field, 3, 0.1)


def _classes(dim: int = DIM) -> Any:
    return _unit(np.random.default_rng(0).normal(size=(3, dim)))


# ------------------------------------------------------------------------------------------------------- the bundle


def test_the_bundle_has_kernels_for_the_architecture_and_ptx(exported, run):
    folder, stages = exported
    manifest = bundle.check_bundle(folder)
    assert manifest.kernels == {"architectures": ["sm_80"], "dtype": "fp16"}
    kernels = bundle.read_flow_kernels(folder, manifest)
    assert kernels is not None
    assert (list(kernels.targets), kernels.dim, kernels.dtype) == (["ptx", "sm_80"], DIM, "fp16")
    for target in kernels.targets.values():
        for kernel in target.kernels:
            data = bundle.read_kernel(folder, manifest, kernel)
            assert hashlib.sha256(data).hexdigest() == kernel.sha256
            assert (data[:4] == b"\x7fELF") == (target.kind == "cubin")
            assert kernel.entry.encode() in data
    compiled = [stage for stage in stages if stage[0] == "compiling the kernels"]
    assert [done for _, done, _ in compiled] == list(range(1, len(compiled) + 1))
    assert compiled[-1][1] == compiled[-1][2]

    weights = bundle.read_flow_weights(folder, manifest)
    deployed = deployment(run.estimator)
    assert deployed.plan is not None
    assert deployed.class_embeddings is not None
    np.testing.assert_array_equal(weights.arrays["first_weight"], deployed.plan.first_weight.numpy().astype(np.float16))
    np.testing.assert_array_equal(weights.class_embeddings, deployed.class_embeddings.reshape(-1, DIM))
    assert (weights.num_prototypes, weights.num_classes) == (2, CLASSES)

    report = manifest.parity["rounded_weights"]
    assert report["kernels_run"] is False
    assert 1e-7 < report["max_abs_error"] < 1e-2
    assert 0.999 < report["min_cosine"] <= 1.0001
    card = (folder / "README.md").read_text()
    assert "Compiled kernels of the flow: sm_80, and PTX" in card
    assert "compiled and not run" in card
    assert "rounded_weights" not in card


def test_the_bundle_still_classifies_without_a_card(made, run):
    features = _unit(np.random.default_rng(3).normal(size=(20, DIM)))
    found = Classifier.load(made, device="cpu", num_threads=1).feature_probabilities(features)
    np.testing.assert_allclose(found, run.estimator.predict_proba(features), atol=2e-5)


def _invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_inspect_tells_what_was_compiled(made):
    document = json.loads(_invoke("inspect", made, "--json").stdout)
    assert document["kernels"] == {"architectures": ["sm_80"], "dtype": "fp16"}
    assert document["compiled"]["targets"] == ["ptx", "sm_80"]
    assert document["compiled"]["num_kernels"] == sum(name.endswith((".cubin", ".ptx")) for name in document["files"])
    assert document["compiled"]["status"] == "compiled, not run where it was exported"
    assert "not run where it was exported" in " ".join(_invoke("inspect", made).stdout.split())


@pytest.mark.parametrize("name", ["kernels.json", "weights.safetensors", "sm_80/first_64.cubin", "ptx/carry_64.ptx"])
def test_inspect_refuses_what_was_altered(name, made):
    path = made / "flow/kernels" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    result = _invoke("inspect", made)
    assert result.exit_code == 2
    assert name in result.stderr.replace("\n", "")


def test_inspect_refuses_weights_of_another_scale(made):
    manifest = json.loads((made / "manifest.json").read_text())
    (made / "manifest.json").write_text(json.dumps({**manifest, "logit_scale": 1.0}))
    result = _invoke("inspect", made)
    assert result.exit_code == 2
    assert "weights.safetensors" in result.stderr.replace("\n", "")


def test_without_architectures_there_are_no_kernels(run, tmp_path):
    manifest = export_run(run, tmp_path / "bundle")
    assert manifest.kernels is None
    assert "rounded_weights" not in manifest.parity
    assert not (tmp_path / "bundle/flow/kernels").exists()
    assert "Compiled kernels" not in (tmp_path / "bundle/README.md").read_text()


# --------------------------------------------------------------------------------------------------------- the dtype


def test_fp16_is_taken_where_its_range_suffices():
    assert choose_dtype(_plan(), _classes()) == "fp16"


@pytest.mark.parametrize(
    "changes",
    [
        lambda plan: {"output_weight": plan.output_weight * 0 + 7e4},
        lambda plan: {"input_bias": plan.input_bias + torch.linspace(-5000, 5000, DIM)},  # the residual stream
        lambda plan: {"first_bias": plan.first_bias + 5000},  # what the second product multiplies
        lambda plan: {"block_table": plan.block_table * 1e5},  # what the first product multiplies
        lambda plan: {"input_bias": plan.input_bias * torch.nan},
    ],
)
def test_bf16_is_taken_where_fp16_could_overflow(changes):
    plan = _plan()
    assert choose_dtype(replace(plan, **changes(plan)), _classes()) == "bf16"


def test_a_plan_without_blocks_has_a_dtype():
    assert choose_dtype(_plan(blocks=0), _classes()) == "fp16"


@pytest.mark.parametrize(("dtype", "most"), [("fp16", 2e-4), ("bf16", 2e-3)])
def test_rounding_is_measured(dtype, most):
    plan = _plan()
    weights = FlowWeights.from_plan(plan.to_arrays(), dtype, _classes(), 40.0)
    report = rounding_error(plan, weights, (1, 3))
    assert most / 100 < report["max_abs_error"] < most
    assert 0 < report["max_probability_error"] < 0.1
    assert report["dtype"] == dtype


def test_weights_of_another_flow_are_refused():
    plan = _plan()
    other = replace(plan, output_weight=-5 * plan.output_weight)
    weights = FlowWeights.from_plan(other.to_arrays(), "fp16", _classes(), 40.0)
    with pytest.raises(BundleError, match="leads elsewhere"):
        rounding_error(plan, weights, (3,))


def test_a_dtype_asked_for_is_taken(run, tmp_path, monkeypatch):
    asked = []

    def compiled(dim, dtype, architectures, on_progress=None):
        asked.append((dim, dtype, tuple(architectures)))
        raise ConfigError("enough")

    monkeypatch.setattr(flow_kernels, "compile_flow", compiled)
    for dtype in ("bf16", "fp16", "auto"):
        with pytest.raises(ConfigError, match="enough"):
            export_run(run, tmp_path / "bundle", kernels=KernelOptions((90, 80), dtype))
    assert asked == [(DIM, dtype, (90, 80)) for dtype in ("bf16", "fp16", "fp16")]
    assert list(tmp_path.iterdir()) == []  # nothing half-made


def test_fp16_asked_for_where_a_weight_does_not_fit(tmp_path):
    plan = _plan()
    deployed = Deployment(
        plan=replace(plan, output_weight=plan.output_weight * 0 + 7e4),
        class_embeddings=_classes(),
        read_steps=(3,),
        flow_weight=1.0,
    )
    with pytest.raises(ConfigError, match=r"output_weight holds NaN or infinite values in fp16.*--kernel-dtype auto"):
        flow_kernels.write_kernels(tmp_path, deployed, KernelOptions((80,), "fp16"))


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("dim", [16, 112, 136, 1296])
def test_a_width_without_kernels(dim):
    with pytest.raises(ConfigError, match=f"multiples of 16 from 128 to 1280, got {dim}"):
        check_compilable(Deployment(plan=_plan(dim, 0), class_embeddings=_classes(dim), flow_weight=1.0))
    with pytest.raises(ConfigError, match="multiples of 16"):
        compile_flow(dim, "fp16", (80,))


def test_a_flow_without_a_part_in_the_logits_is_not_compiled():
    with pytest.raises(ConfigError, match="this run has none"):
        check_compilable(Deployment(plan=_plan(), class_embeddings=_classes(), flow_weight=0.0))


def test_a_flow_that_takes_no_step_has_nothing_to_compile():
    plan = build_plan(VelocityField(DIM, 1), 0, 0.1)
    with pytest.raises(ConfigError, match="of no step"):
        check_compilable(Deployment(plan=plan, class_embeddings=_classes(), flow_weight=1.0))


def test_triton_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install triton"):
        check_compilable(Deployment(plan=_plan(), class_embeddings=_classes(), flow_weight=1.0))


def test_the_command_line_refuses_with_code_2(run, tmp_path):
    run.save(tmp_path / "run")
    linear = _train(tmp_path, "linear")
    linear.save(tmp_path / "linear")
    for arguments, words in (
        (("run", "--arch", "sm_75"), "unknown architecture 'sm_75'; expected 'all', or some of sm_80, sm_86"),
        (("run", "--arch", ""), "unknown architecture ''"),
        (("linear", "--arch", "sm_80"), "this run has none"),
        (("run", "--arch", "all", "--kernel-dtype", "fp8"), "fp8"),
    ):
        result = _invoke("export", tmp_path / arguments[0], tmp_path / "bundle", *arguments[1:])
        assert result.exit_code == 2, result.output
        assert words in " ".join(result.stderr.split())
        assert not (tmp_path / "bundle").exists()
