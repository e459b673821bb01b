"""Several processes that train together, as `torchrun` starts them (or `accelerate launch --multi_gpu`)."""

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfsl.errors import ConfigError, DeviceError


@dataclass(frozen=True)
class Processes:
    """Which of how many this one is.

    Attributes:
        rank: from 0; that one writes files and reports.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one writes and reports."""
        return self.rank == 0

    def share(self, num_samples: int) -> slice:
        """Which samples of a batch this one takes: contiguous, in the order of the ranks."""
        return slice(self.rank * num_samples // self.world, (self.rank + 1) * num_samples // self.world)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of everyone's tensor, by everyone called alike; half precision is summed in float32."""
        if self.world == 1:
            return tensor
        total = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.clone()
        torch.distributed.all_reduce(total)
        return total.to(tensor.dtype)

    def agree(self, number: int, device: torch.device) -> None:
        """Check that everyone starts from the same update.

        Raises:
            ConfigError: they read different checkpoints.
        """
        numbers = self.total(F.one_hot(torch.tensor(self.rank), self.world).to(device) * number)
        if not (numbers == number).all():
            raise ConfigError(
                f"expected all processes to start from one update, got {numbers.tolist()}: keep the checkpoints in a "
                "folder that all of them see"
            )


ALONE = Processes()

# By these a launcher tells how many processes it started; only torchrun's WORLD_SIZE comes with how to meet them.
_OTHER_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_TORCHRUN = "torchrun --standalone --nproc_per_node N --no_python fastfsl train ..."


def launched_processes() -> int:
    """How many processes a launcher started that can meet each other; 1 without one.

    Raises:
        ConfigError: several were asked for, and this one would train alone.
    """
    world = os.environ.get("WORLD_SIZE")
    if world is not None:
        if not world.isdecimal() or int(world) < 1:
            raise ConfigError(f"expected WORLD_SIZE to be the number of processes, got {world!r}: unset it")
        return int(world)
    # What `accelerate launch` sets for several processes on a CPU, of which it starts one without a word.
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        raise ConfigError(
            "`accelerate launch` was asked for several processes and started one, as it does on a CPU: use "
            f"`{_TORCHRUN}`, or --num_processes 1"
        )
    for name in _OTHER_SIZES:
        if os.environ.get(name, "1") not in ("", "1"):
            raise ConfigError(
                f"{name}={os.environ[name]} processes were started that do not know each other, and each would train "
                f"alone: use `{_TORCHRUN}`; or set WORLD_SIZE=1 if each is to train for itself"
            )
    return 1


def join_processes(device: torch.device) -> Processes:
    """Meet the processes that were launched with this one, if any.

    With CUDA each process takes the card of its local rank: call this before a model is loaded onto "cuda".

    Args:
        device: where this one computes.

    Raises:
        DeviceError: the device is another than this process's.
        ConfigError: several processes were asked for, and fewer are here.
    """
    world = launched_processes()
    if world == 1:
        return ALONE
    from accelerate import PartialState  # type: ignore[import-untyped]  # it ships no annotations

    state = PartialState(cpu=device.type == "cpu")
    if state.device.type != device.type or device.index not in (None, state.device.index):
        raise DeviceError(
            f"process {state.process_index} of {state.num_processes}: expected device {state.device}, got {device}"
        )
    if state.num_processes != world:
        raise ConfigError(f"expected {world} processes (WORLD_SIZE), got {state.num_processes}: use `{_TORCHRUN}`")
    return Processes(state.process_index, state.num_processes)
