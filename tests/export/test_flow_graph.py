from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from fastfsl.errors import BundleError, ConfigError, ShapeError
from fastfsl.export.flow_graph import flow_graph
from fastfsl.export.parity import flow_parity
from fastfsl.flow import (
    FlowPlan,
    VelocityField,
    build_plan,
    class_logits,
    euler,
    euler_states,
    normalize,
    read_out,
)

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


@pytest.mark.parametrize("read_steps", [(0,), (2,), (0, 4, 8), (1, 3), (0, 10), tuple(range(11))])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_averaged_read_out_equals_torch_on_the_field_itself(read_steps, batch):
    field, plan = make_plan(10)
    features = torch.randn(batch, DIM, generator=torch.Generator().manual_seed(2))
    model = flow_graph(plan.to_arrays(), embeddings().numpy(), 50.0, read_steps=read_steps)
    got, logits = session(model).run(None, {"image_embeds": features.numpy()})
    with torch.no_grad():
        states = list(euler_states(field, normalize(features), 10, 0.1))
    states = [states[step] for step in read_steps]
    np.testing.assert_allclose(got, normalize(states[-1]), atol=2e-6)
    np.testing.assert_allclose(logits, read_out(states, embeddings(), 50.0), atol=2e-4)


@pytest.mark.parametrize("read_steps", [(3,), (0, 2, 3)])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_nearest_of_several_prototypes_counts(read_steps, batch):
    field, plan = make_plan(3)
    prototypes = embeddings(3 * CLASSES).unflatten(0, (CLASSES, 3))
    features = torch.randn(batch, DIM, generator=torch.Generator().manual_seed(2))
    model = flow_graph(plan.to_arrays(), prototypes.numpy(), 50.0, read_steps=read_steps)
    _, logits = session(model).run(None, {"image_embeds": features.numpy()})
    with torch.no_grad():
        states = list(euler_states(field, normalize(features), 3, 0.1))
    expected = read_out([states[step] for step in read_steps], prototypes, 50.0)
    np.testing.assert_allclose(logits, expected, atol=2e-4)
    inputs = {"image_embeds": features.numpy(), "class_embeddings": prototypes.flatten(0, 1).numpy()}
    got: Any = ReferenceEvaluator(model).run(None, inputs)
    np.testing.assert_allclose(got[1], expected, atol=2e-4)
    assert flow_parity(plan, prototypes.numpy(), 50.0, model, read_steps=read_steps)["max_probability_error"] < 1e-4


def test_one_prototype_a_class_is_the_plain_graph_to_all_but_its_place():
    _, plan = make_plan(3)
    plain = flow_graph(plan.to_arrays(), embeddings().numpy(), 50.0)
    assert flow_graph(plan.to_arrays(), embeddings()[:, None].numpy(), 50.0) == plain
    assert not any(node.op_type in ("ReduceMax", "Reshape") for node in plain.graph.node)


def test_steps_after_the_last_read_out_are_not_in_the_graph():
    _, plan = make_plan(10)
    names = {
        node.name for node in flow_graph(plan.to_arrays(), embeddings().numpy(), 1.0, read_steps=(0, 4)).graph.node
    }
    assert "step3_m" in names
    assert not any(name.startswith(f"step{step}_") for name in names for step in range(4, 10))


def test_reading_the_last_step_is_the_plain_graph():
    _, plan = make_plan(3)
    plain = flow_graph(plan.to_arrays(), embeddings().numpy(), 50.0)
    assert flow_graph(plan.to_arrays(), embeddings().numpy(), 50.0, read_steps=(3,)) == plain


def test_averaged_read_out_is_stable():
    # At this scale every probability but the largest is below the smallest float32, and its log is not.
    field, plan = make_plan(2)
    features = normalize(torch.randn(5, DIM, generator=torch.Generator().manual_seed(2)))
    model = flow_graph(plan.to_arrays(), embeddings().numpy(), 5000.0, read_steps=(0, 2))
    _, logits = session(model).run(None, {"image_embeds": features.numpy()})
    with torch.no_grad():
        states = list(euler_states(field.double(), features.double(), 2, 0.1))
    np.testing.assert_allclose(logits, read_out([states[0], states[2]], embeddings().double(), 5000.0), atol=2e-2)
    assert logits.min() < -1000


@pytest.mark.parametrize("read_steps", [None, (0, 1, 3)])
def test_graph_needs_nothing_but_the_onnx_standard(read_steps):
    _, plan = make_plan(3)
    model = flow_graph(plan.to_arrays(), embeddings().numpy(), 100.0, read_steps=read_steps)
    assert {entry.domain for entry in model.opset_import} == {""}
    features = normalize(torch.randn(3, DIM)).numpy()
    expected = session(model).run(None, {"image_embeds": features})
    # onnx's own numpy evaluator shares no code with ONNX Runtime.
    inputs = {"image_embeds": features, "class_embeddings": embeddings().numpy()}
    got: Any = ReferenceEvaluator(model).run(None, inputs)
    np.testing.assert_allclose(got[0], expected[0], atol=2e-6)
    np.testing.assert_allclose(got[1], expected[1], atol=2e-4)


@pytest.mark.parametrize("read_steps", [(2,), (0, 2)])
def test_class_embeddings_can_be_overridden_with_more_classes(read_steps):
    field, plan = make_plan(2)
    other = embeddings(9)
    features = normalize(torch.randn(4, DIM)).numpy()
    onnx_session = session(flow_graph(plan.to_arrays(), embeddings().numpy(), 100.0, read_steps=read_steps))
    assert [value.name for value in onnx_session.get_inputs()] == ["image_embeds"]
    _, logits = onnx_session.run(None, {"image_embeds": features, "class_embeddings": other.numpy()})
    assert logits.shape == (4, 9)
    with torch.no_grad():
        states = list(euler_states(field, torch.from_numpy(features), 2, 0.1))
    np.testing.assert_allclose(logits, read_out([states[step] for step in read_steps], other, 100.0), atol=1e-3)


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
    altered = flow_graph(plan.to_arrays(), embeddings().numpy(), 100.0)
    report = flow_parity(plan, embeddings().numpy(), 100.0, altered)
    assert report["batches"] == [1, 2, 5]
    assert report["max_probability_error"] < 1e-4
    for tensor in altered.graph.initializer:
        if tensor.name == "step1_block0_gate":
            values = onnx.numpy_helper.to_array(tensor).copy()
            values[:4] += 0.5
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    with pytest.raises(BundleError, match="does not match torch"):
        flow_parity(plan, embeddings().numpy(), 100.0, altered)


def test_parity_asks_for_the_same_read_out():
    _, plan = make_plan(3)
    averaged = flow_graph(plan.to_arrays(), embeddings().numpy(), 10.0, read_steps=(0, 3))
    assert flow_parity(plan, embeddings().numpy(), 10.0, averaged, read_steps=(0, 3))["max_probability_error"] < 1e-4
    with pytest.raises(BundleError, match="does not match torch"):  # same features, other probabilities
        flow_parity(plan, embeddings().numpy(), 10.0, averaged)


def test_steps_the_plan_lacks_are_named():
    _, plan = make_plan(3)
    with pytest.raises(ConfigError, match=r"0\.\.3, got \[0, 4\]"):
        flow_graph(plan.to_arrays(), embeddings().numpy(), 100.0, read_steps=(0, 4))
