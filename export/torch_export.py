"""A torch module as an ONNX model with a free batch; where it cannot be one, the layer that stands in the way."""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from fastfsl.errors import BundleError
from fastfsl.export.attention import TRANSLATIONS, plain_attention

# 18 is the torch exporter's own default; 23 emits Attention, whose CUDA kernel is new.
OPSET = 18
# A batch of 1 would be baked into the graph as a constant.
TRACED_BATCH = 2
# A protobuf message, so a model with its weights inside, cannot be larger than 2 GiB; some of that is not weights.
MAX_BYTES = 2**31 - 2**24


def check_size(tower: nn.Module, what: str) -> None:
    """Refuse at once what would be exported for minutes and could not be written.

    Raises:
        BundleError: a tower's weights do not fit in one ONNX file.
    """
    size = sum(tensor.nbytes for tensor in (*tower.parameters(), *tower.buffers()))
    if size > MAX_BYTES:
        raise BundleError(
            f"the {what} has {size / 2**30:.1f} GiB of weights, and an ONNX file with its weights inside holds at most "
            "2 GiB: choose a smaller backbone"
        )


def to_onnx(module: nn.Module, inputs: dict[str, Tensor], output: str, what: str) -> onnx.ModelProto:
    """Export a module.

    Args:
        module: in evaluation mode, on the CPU.
        inputs: examples by name, in the order of `forward`; the first one's first dimension, of `TRACED_BATCH`, is the
            batch and stays free.
        output: name of the output, whose first dimension is the batch too.
        what: what messages call the module.

    Raises:
        BundleError: it cannot be exported, or not with a free batch; the layer is named where it can be
            found.
    """
    batched = next(iter(inputs))
    shapes = {name: {0: torch.export.Dim("batch")} if name == batched else None for name in inputs}
    try:
        with _exporting(), plain_attention(module):
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=[output],
                dynamic_shapes=shapes,
                custom_translation_table=TRANSLATIONS,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        layer = _failing_layer(module, tuple(inputs.values()), tuple(shapes.values()), str(cause))
        raise BundleError(
            f"the {what} cannot be exported to ONNX: {f'in the layer {layer}: ' if layer else ''}{reason}; "
            "choose another backbone, or report this model"
        ) from error
    if program is None:
        raise BundleError(f"torch exported nothing for the {what}: report this model")
    model: onnx.ModelProto = program.model_proto
    batch = model.graph.output[0].type.tensor_type.shape.dim[0]
    if not batch.dim_param:
        raise BundleError(
            f"the {what} was exported for batches of {batch.dim_value} only: its code fixes the batch size"
        )
    _strip_traces(model)
    return model


def _failing_layer(module: nn.Module, inputs: tuple[Tensor, ...], shapes: tuple[Any, ...], reason: str) -> str:
    """Path and type of the innermost layer at which an export fails, by doing its first half again; "" if unknown."""
    entered: list[str] = []
    names = {part: name for name, part in module.named_modules()}

    def enter(part: nn.Module, _: object) -> None:
        entered.append(f"{names[part]} ({type(part).__name__})")

    def leave(*_: object) -> None:
        entered.pop()

    hooks = [part.register_forward_pre_hook(enter) for part in names]
    hooks += [part.register_forward_hook(leave) for part in names]
    try:
        with _exporting():
            program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    except Exception:  # noqa: BLE001 - whatever it is, the layers entered and not left say where
        return entered[-1] if entered else ""
    finally:
        for hook in hooks:
            hook.remove()
    # The module can be traced, so one of its operations has no counterpart in ONNX; the message names its node.
    for node in program.graph.nodes:
        if re.search(rf"%{re.escape(node.name)}\b", reason) and node.meta.get("nn_module_stack"):
            path, kind = list(node.meta["nn_module_stack"].values())[-1]
            return f"{path} ({kind if isinstance(kind, str) else kind.__name__})"
    return ""


def _strip_traces(model: onnx.ModelProto) -> None:
    """Remove what torch notes about where every node came from: source paths and stack traces of this machine."""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    for part in (*model.graph.node, *model.graph.initializer, *model.graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]


@contextlib.contextmanager
def _exporting() -> Iterator[None]:
    """Attention as plain operators, and no chatter from the exporter."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    torch.backends.mha.set_fastpath_enabled(False)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
