"""The state of a training on disk, so that a killed one goes on where it was.

One safetensors file in a folder: the tensors, and in its header a JSON record, what the training is of, and a checksum.
It is replaced as a whole, so whenever the process dies it is the old one or the new one.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastfsl.errors import ConfigError, ResourceError, resource_error
from fastfsl.files import staged_file
from fastfsl.leftovers import sweep_leftovers

_FILE = "checkpoint.safetensors"
_FORMAT = "fastfsl-checkpoint-1"


@dataclass(frozen=True)
class State:
    """What is kept of a training.

    Attributes:
        tensors: by name, of any dtype.
        record: JSON values.
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]


class Checkpoint:
    """A folder for the state of one training.

    Args:
        folder: made when the first state is written.
        fingerprint: everything that the training depends on; JSON values. The state of another one is not taken up.
        interval: seconds between two states, at least.
        on_message: told why a state that is there is not taken up, or none can be written; default a warning.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: Mapping[str, Any],
        *,
        interval: float = 60.0,
        on_message: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.folder = Path(folder)
        self.fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint))
        self.interval = interval
        self.on_message = on_message
        self._written = time.monotonic()
        self._writable = True

    def including(self, **parts: object) -> Self:
        """The same folder for a training that depends on more."""
        return type(self)(
            self.folder, {**self.fingerprint, **parts}, interval=self.interval, on_message=self.on_message
        )

    def load(self, expected: Mapping[str, Tensor], *, silent: bool = False) -> State | None:
        """The state to go on from, or None.

        Args:
            expected: tensors that must be in it, with these shapes and dtypes.
            silent: another process tells why a state is not taken up.

        Raises:
            ResourceError: the machine cannot read it at the moment; it may be good.
        """
        self._written = time.monotonic()
        path = self.folder / _FILE
        if not silent:
            self._remove_partial_files()
        if not path.exists():
            return None
        try:
            path.open("rb").close()  # safetensors calls a file missing that it cannot open, whatever the reason
            state, fingerprint = _read(path)
            reason = _difference(fingerprint, self.fingerprint) or _misfit(state.tensors, expected)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            fault = resource_error(error, f"read {path}")  # starting over would cost a good state
            if fault is not None:
                raise fault from error
            reason = f"is damaged ({error})"
        if not reason:
            return state
        if not silent:
            self.on_message(f"{path} {reason}: starting over")
        return None

    @property
    def due(self) -> bool:
        """Whether the last state is old enough for the next."""
        return time.monotonic() - self._written >= self.interval

    def save(self, state: State) -> None:
        """Replace the state on disk. Where that is impossible a message says so, once, and the training goes on."""
        if not self._writable:
            return
        header = {"format": _FORMAT, "fingerprint": self.fingerprint, "record": state.record}
        text = json.dumps(header, sort_keys=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        try:
            with staged_file(self.folder / _FILE) as staging:
                save_file(tensors, staging, metadata={"header": text, "sha256": _checksum(text, tensors)})
        except (ConfigError, ResourceError, SafetensorError) as error:
            self._writable = False
            self.on_message(f"no checkpoint can be written ({error}): a stopped training will start over")
        self._written = time.monotonic()

    def _remove_partial_files(self) -> None:
        """What a process killed while it wrote has left; as a file, that of an older version."""
        sweep_leftovers(self.folder)
        for path in self.folder.glob(f".{_FILE}.partial-*"):
            with suppress(OSError):
                path.unlink()


def _read(path: Path) -> tuple[State, dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = file.metadata() or {}
    if metadata["sha256"] != _checksum(metadata["header"], tensors):
        raise ValueError("its checksum is wrong")
    header = json.loads(metadata["header"])
    if header["format"] != _FORMAT:
        raise ValueError(f"expected format {_FORMAT}, got {header['format']}")
    return State(tensors, header["record"]), header["fingerprint"]


def _difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    return f"is of another training ({', '.join(names)} changed)" if names else ""


def _misfit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    for name, tensor in expected.items():
        if name not in found or found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            return f"is of another model ({name} does not fit)"
    return ""


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
