"""All that changes in a training: parameters, optimizer, loss scale, and how far it is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from fastfsl.fit.checkpoint import State

History = list[dict[str, Any]]

_PARAMETER = "parameter"


@dataclass
class Place:
    """Where a training is, in JSON values: epochs done, batches done of the next one, and its losses so far."""

    epoch: int = 0
    batch: int = 0
    samples: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    history: History = field(default_factory=list)

    def end_batch(self, losses: Mapping[str, float], num_samples: int, seconds: float) -> None:
        """Take the losses of a batch, and the time since the one before."""
        self.batch += 1
        self.samples += num_samples
        self.seconds += seconds
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * num_samples

    def end_epoch(self, learning_rate: float, results: Mapping[str, Any]) -> None:
        """Put the means over the epoch's samples, and what else is known of it, into the history."""
        means = {name: total / self.samples for name, total in self.sums.items()}
        rates = {"learning_rate": learning_rate, "seconds": round(self.seconds, 3)}
        self.epoch += 1
        self.history.append({"epoch": self.epoch, **means, **rates, **results})
        self.batch, self.samples, self.seconds, self.sums = 0, 0, 0.0, {}


@dataclass(frozen=True)
class TuningState:
    """A training as its checkpoint keeps it.

    Attributes:
        parameters: those that are trained, by name.
        optimizer: over them, in this order.
        scaler: of the loss.
        place: how far it is.
    """

    parameters: Mapping[str, Parameter]
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    place: Place = field(default_factory=Place)

    def expected(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint of this training has in any case: parameters as `parameter/NAME`."""
        return {f"{_PARAMETER}/{name}": parameter for name, parameter in self.parameters.items()}

    def capture(self) -> State:
        """What a checkpoint keeps: besides `expected` the optimizer's tensors, as `KEY/NAME`, and a record."""
        tensors = self.expected()
        for name, parameter in self.parameters.items():
            slots = self.optimizer.state.get(parameter, {})
            tensors |= {f"{key}/{name}": value for key, value in slots.items() if value is not None}
        return State(tensors, {"place": asdict(self.place), "scaler": self.scaler.state_dict()})

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Undo `capture`, in place."""
        numbers = {name: number for number, name in enumerate(self.parameters)}
        slots: dict[int, dict[str, Tensor]] = {}
        for path, tensor in state.tensors.items():
            key, name = path.split("/", maxsplit=1)
            if key == _PARAMETER:
                self.parameters[name].copy_(tensor)
            else:
                slots.setdefault(numbers[name], {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self.scaler.load_state_dict(state.record["scaler"])
        vars(self.place).update(state.record["place"])
