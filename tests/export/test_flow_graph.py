from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from fastfsl.errors import BundleError, ShapeError
from fastfsl.export.flow_graph import flow_graph
from fastfsl.export.parity import flow_parity
from fastfsl.flow import FlowPlan, VelocityField, build_plan, class_logits, euler, normalize

DIM, CLASSES = 32, 6


def make_plan(num_steps: int, num_blocks: int = 2) -> tuple[VelocityField, FlowPlan]:
    torch.manual_seed(0)
    field = VelocityField(DIM, num_blocks)
    with torch.no_grad():
        for parameter in field.parameters():  # zero-initialised layers would make v = 0, which any graph computes
            parameter.add_(0.1 * torch.randn_like(parameter))
    return field, build_plan(field, num_steps, 0.1)


def embeddings(count: int = CLASSES) -> torch.Tensor:
    return normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(1)))


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("num_steps", [0, 1, 2, 10])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_graph_equals_euler_on_the_field_itself(num_steps, batch):
    field, plan = make_plan(num_steps)
    features = torch.randn(batch, DIM, generator=torch.Generator().manual_seed(2))
    model = flow_graph(plan.to_arrays(), embeddings().numpy(), 50.0)
    got, logits = session(model).run(None, {"image_embeds": features.numpy()})
    with torch.no_grad():
        expected = normalize(euler(field, normalize(features), num_steps, 0.1))
    np.testing.assert_allclose(got, expected, atol=2e-6)
    np.testing.assert_allclose(logits, class_logits(expected, embeddings(), 50.0), atol=2e-4)
    if num_steps:
        assert (expected - normalize(features)).abs().max() > 1e-2


def test_graph_needs_nothing_but_the_onnx_standard():
    _, plan = make_plan(3)
    model = flow_graph(plan.to_arrays(), embeddings().numpy(), 100.0)
    assert {entry.domain for entry in model.opset_import} == {""}
    features = normalize(torch.randn(3, DIM)).numpy()
    expected = session(model).run(None, {"image_embeds": features})
    # onnx's own numpy evaluator shares no code with ONNX Runtime.
    inputs = {"image_embeds": features, "class_embeddings": embeddings().numpy()}
    got: Any = ReferenceEvaluator(model).run(None, inputs)
    np.testing.assert_allclose(got[0], expected[0], atol=2e-6)
    np.testing.assert_allclose(got[1], expected[1], atol=2e-4)


def test_class_embeddings_can_be_overridden_with_more_classes():
    _, plan = make_plan(2)
    other = embeddings(9)
    features = normalize(torch.randn(4, DIM)).numpy()
    onnx_session = session(flow_graph(plan.to_arrays(), embeddings().numpy(), 100.0))
    assert [value.name for value in onnx_session.get_inputs()] == ["image_embeds"]
    transported, logits = onnx_session.run(None, {"image_embeds": features, "class_embeddings": other.numpy()})
    assert logits.shape == (4, 9)
    np.testing.assert_allclose(logits, 100 * transported @ other.numpy().T, atol=1e-3)


def test_runtime_fuses_layer_norm_and_silu(tmp_path):
    _, plan = make_plan(2)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    model = flow_graph(plan.to_arrays(), embeddings().numpy(), 100.0)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert operators.count("QuickGelu") == 2 * 2
    assert "Sigmoid" not in operators
    assert operators.count("LayerNormalization") == 2 * (2 + 1)
    # 2 products a block and step, 1 carry between steps, 1 in, 1 out, 1 for the classes.
    products = sum(operators.count(name) for name in ("Gemm", "MatMul", "FusedGemm", "FusedMatMul"))
    assert products == 2 * 2 * 2 + 1 + 2 + 1


def test_wrong_width_is_named():
    _, plan = make_plan(1)
    with pytest.raises(ShapeError, match="32"):
        flow_graph(plan.to_arrays(), np.ones((3, 31), dtype=np.float32), 100.0)


def test_parity_notices_an_altered_graph():
    _, plan = make_plan(3)
    model = flow_graph(plan.to_arrays(), embeddings().numpy(), 100.0)
    report = flow_parity(plan, embeddings().numpy(), 100.0, model)
    assert report["batches"] == [1, 2, 5]
    assert report["max_probability_error"] < 1e-4
    for tensor in model.graph.initializer:
        if tensor.name == "step1_block0_gate":
            values = onnx.numpy_helper.to_array(tensor).copy()
            values[:4] += 0.5
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    with pytest.raises(BundleError, match="does not match torch"):
        flow_parity(plan, embeddings().numpy(), 100.0, model)
