"""An ONNX Runtime session on a card's stream, which can leave its output on the card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fastfsl.runtime.cuda_driver import Device
    from fastfsl.runtime.session import Node, Session


class CudaSession:
    """A session that was created with a card's stream, used by one thread at a time as everything on that stream.

    Args:
        session: an ``onnxruntime.InferenceSession`` on the card; it is let go of before the card.
        card: the card.
    """

    def __init__(self, session: Any, card: Device) -> None:  # noqa: ANN401 - ships no types
        self._session = session
        self.card = card

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> list[Any]:
        """Compute the named outputs, as host arrays."""
        with self.card.active():
            outputs: list[Any] = self._session.run(output_names, input_feed)
            return outputs

    def run_into(self, output: str, shape: tuple[int, ...], pointer: int, input_feed: Mapping[str, Any]) -> None:
        """Compute one float32 output into memory of the card, in the order of its stream.

        Args:
            output: its name.
            shape: its shape.
            pointer: address of memory for it.
            input_feed: host arrays.
        """
        with self.card.active():
            binding = self._session.io_binding()
            for name, array in input_feed.items():
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
            binding.bind_output(output, "cuda", 0, np.float32, shape, pointer)
            self._session.run_with_iobinding(binding)

    def get_inputs(self) -> list[Node]:
        """The graph's inputs."""
        return self._inner().get_inputs()

    def get_overridable_initializers(self) -> list[Node]:
        """The graph's inputs that have a value of their own."""
        return self._inner().get_overridable_initializers()

    def get_outputs(self) -> list[Node]:
        """The graph's outputs."""
        return self._inner().get_outputs()

    def get_providers(self) -> list[str]:
        """The execution providers that really came up, best first."""
        return self._inner().get_providers()

    def _inner(self) -> Session:
        session: Session = self._session
        return session
