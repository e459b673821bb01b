"""Also a program: `python test_checkpoint.py FOLDER OPTIMIZER` trains a small objective, slowly, with a checkpoint."""

import errno
import json
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastfsl.errors import ResourceError
from fastfsl.fit.batches import FeatureBatches
from fastfsl.fit.checkpoint import Checkpoint, State
from fastfsl.fit.tuning import TuningRecipe, tune

CPU = torch.device("cpu")
FILE = "checkpoint.safetensors"
EPOCHS, UPDATES = 4, 12


class Small(nn.Module):
    """With dropout, so that its random numbers must be taken up too; `stop_at` is the call that fails."""

    def __init__(self, width: int = 4, stop_at: int | None = None, seconds: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layer = nn.Linear(width, 3)
        for parameter in self.parameters():
            parameter.data.normal_(std=0.1, generator=generator)
        self.dropout = nn.Dropout(0.5)
        self.calls = 0
        self.stop_at = stop_at
        self.seconds = seconds

    def forward(self, inputs: Tensor, progress: float) -> tuple[dict[str, Tensor], Tensor | None]:
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        time.sleep(self.seconds)
        return {"logits": self.layer(self.dropout(inputs)).mean(dim=1)}, None

    def batch_loss(
        self, outputs: dict[str, Tensor], labels: Tensor, progress: float
    ) -> tuple[Tensor, dict[str, float]]:
        loss = nn.functional.cross_entropy(outputs["logits"], labels)
        return loss, {"cross_entropy": loss.item()}


def train(
    folder: Path | None,
    small: Small,
    optimizer: Any = "sgd",
    fingerprint: Any = ("a", 1),
    interval: float = 0.0,
    told: list[str] | None = None,
    **options: Any,
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    features = torch.randn(11, 4, small.layer.in_features, generator=torch.Generator().manual_seed(0))
    batches = FeatureBatches(features, torch.arange(11) % 3, num_views=2, batch_size=4, seed=0)
    recipe = TuningRecipe(**{"epochs": EPOCHS, "optimizer": optimizer, "learning_rate": 0.05, **options})
    checkpoint = None
    if folder is not None:
        told = [] if told is None else told
        checkpoint = Checkpoint(folder, {"data": fingerprint}, interval=interval, on_message=told.append)
    history = tune(
        small,
        batches,
        recipe,
        seed=0,
        device=CPU,
        checkpoint=checkpoint,
        evaluate=lambda done: {"done": done},
    )
    for entry in history:
        del entry["seconds"]
    return history, {name: tensor.detach().clone() for name, tensor in small.state_dict().items()}


def assert_same(result, expected):
    assert result[0] == expected[0]
    assert all(torch.equal(result[1][name], tensor) for name, tensor in expected[1].items())


@pytest.fixture(scope="module")
def uninterrupted():
    return {optimizer: train(None, Small(), optimizer) for optimizer in ("sgd", "adamw")}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stops", [(0,), (1,), (2, 1, 3), (3,), (7,), (11,)])
def test_a_stopped_training_goes_on_bit_by_bit(tmp_path, uninterrupted, optimizer, stops):
    folder = tmp_path / "deep" / "checkpoint"
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            train(folder, Small(stop_at=stop), optimizer)
    rest = Small()
    assert_same(train(folder, rest, optimizer), uninterrupted[optimizer])
    assert rest.calls == UPDATES - sum(stops)
    finished = Small()
    assert_same(train(folder, finished, optimizer), uninterrupted[optimizer])
    assert finished.calls == 0


def test_a_training_in_parts_goes_on_bit_by_bit(tmp_path):
    expected = train(None, Small(), micro_batch=3)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Small(stop_at=9), micro_batch=3)
    assert_same(train(tmp_path, Small(), micro_batch=3), expected)


def test_a_scaled_loss_goes_on_with_its_scale(tmp_path, monkeypatch):
    # what fp16 does on CUDA: the scale doubles after every second update
    plain = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: plain(device, init_scale=64.0, growth_interval=2)
    )
    expected = train(tmp_path / "whole", Small())
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", Small(stop_at=5))
    assert_same(train(tmp_path / "parts", Small()), expected)
    scalers = []
    for folder in ("whole", "parts"):
        with safe_open(tmp_path / folder / FILE, framework="pt") as file:
            scalers.append(json.loads(file.metadata()["header"])["record"]["scaler"])
    assert scalers[0] == scalers[1]
    assert scalers[0]["scale"] == 64.0 * 2 ** (UPDATES // 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fingerprint": ("b", 1)}, "data changed"),
        ({"learning_rate": 0.06}, "recipe changed"),
        ({"small": {"width": 5}}, "layer.weight does not fit"),
    ],
)
def test_the_state_of_another_training_is_told_and_left(tmp_path, change, reason):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Small(stop_at=5))
    told: list[str] = []
    small = Small(**change.pop("small", {}))
    train(tmp_path, small, told=told, **change)
    assert small.calls == UPDATES
    assert len(told) == 1
    assert reason in told[0]
    assert "starting over" in told[0]


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flip(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


def _record(content: bytes) -> bytes:
    return content.replace(rb"\"batch\": 2", rb"\"batch\": 1")


@pytest.mark.parametrize("damage", [_cut, _flip, _record, lambda _: b"", lambda _: b"\xff" * 4096])
def test_a_damaged_state_is_told_and_left(tmp_path, uninterrupted, damage):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Small(stop_at=5))
    path = tmp_path / FILE
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert path.read_bytes() != content
    told: list[str] = []
    small = Small()
    assert_same(train(tmp_path, small, told=told), uninterrupted["sgd"])
    assert small.calls == UPDATES
    assert len(told) == 1
    assert "is damaged" in told[0]


def test_a_write_that_is_cut_short_leaves_the_old_state(tmp_path, monkeypatch, uninterrupted):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Small(stop_at=5))
    old = (tmp_path / FILE).read_bytes()

    def cut_short(_tensors, path, **_options):
        Path(path).write_bytes(old[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastfsl.fit.checkpoint.save_file", cut_short)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, Small())
    assert (tmp_path / FILE).read_bytes() == old
    assert_same(train(tmp_path, Small()), uninterrupted["sgd"])


def test_a_folder_that_cannot_be_written_costs_the_checkpoint_alone(tmp_path, uninterrupted):
    (tmp_path / "file").write_text("")
    told: list[str] = []
    assert_same(train(tmp_path / "file" / "folder", Small(), told=told), uninterrupted["sgd"])
    assert len(told) == 1
    assert "no checkpoint can be written" in told[0]


def test_states_are_written_at_intervals_and_at_the_end(tmp_path, monkeypatch):
    clock, written = [0.0], []

    def timed(*values, **names):
        written.append(clock[0])
        save_file(*values, **names)

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr("fastfsl.fit.checkpoint.save_file", timed)

    class Timed(Small):
        def forward(self, inputs: Tensor, progress: float) -> tuple[dict[str, Tensor], Tensor | None]:
            clock[0] += 25
            return super().forward(inputs, progress)

    train(tmp_path, Timed(), interval=60.0)
    assert written == [75, 150, 225, 300]
    written.clear()
    train(tmp_path / "other", Timed(), interval=1e9)
    assert written == [600]


def test_tensors_come_back_exactly(tmp_path):
    tensors = {
        "a": torch.tensor([1.0, -0.0, float("inf"), 1e-45]),
        "b": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "c": torch.tensor(7.0, dtype=torch.float64),
        "d": torch.arange(6).reshape(2, 3).T,
        "e": torch.zeros(0, 3),
    }
    record = {"loss": 0.1 + 0.2, "names": ["λ"]}
    checkpoint = Checkpoint(tmp_path / "state", {"classes": ("a", "b")})
    checkpoint.save(State(tensors, record))
    found = Checkpoint(tmp_path / "state", {"classes": ["a", "b"]}).load(tensors)
    assert found is not None
    assert found.record == record
    assert set(found.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    assert torch.signbit(found.tensors["a"][1])


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    (tmp_path / f".{FILE}.partial-0123abcd").write_text("half")
    assert Checkpoint(tmp_path, {}).load({}) is None
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch):
    """Starting over would replace it."""
    state = State({"a": torch.ones(2)}, {})
    Checkpoint(tmp_path, {}).save(state)
    opened = Path.open

    def fail(path, *arguments, **options):
        if path.name == FILE:
            raise OSError(errno.EMFILE, "Too many open files")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(ResourceError, match="too many open files"):
        Checkpoint(tmp_path, {}).load(state.tensors)
    monkeypatch.undo()
    assert Checkpoint(tmp_path, {}).load(state.tensors) is not None


def test_a_warning_is_the_default_message(tmp_path):
    (tmp_path / FILE).write_text("no state")
    with pytest.warns(UserWarning, match="is damaged"):
        assert Checkpoint(tmp_path, {}).load({}) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Checkpoint(tmp_path, {}).load({}, silent=True) is None


def kill_after(program: list[str], path: Path, seconds: float) -> None:
    """Start it and kill it that long after a new state was written."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    process = subprocess.Popen(program)
    deadline = time.monotonic() + 120
    while not path.exists() or path.stat().st_mtime_ns == before:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    assert process.wait() == -9


def test_a_killed_training_goes_on_bit_by_bit(tmp_path, uninterrupted):
    kill_after([sys.executable, __file__, str(tmp_path / "state"), "sgd"], tmp_path / "state" / FILE, 0.0)
    rest = Small()
    assert_same(train(tmp_path / "state", rest), uninterrupted["sgd"])
    assert 0 < rest.calls < UPDATES


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_training_killed_again_and_again_ends_the_same(tmp_path, uninterrupted, optimizer):
    program = [sys.executable, __file__, str(tmp_path), optimizer]
    chance = random.Random(0)
    for _ in range(3):
        kill_after(program, tmp_path / FILE, chance.uniform(0, 0.1))
    subprocess.run(program, check=True)
    small = Small()
    assert_same(train(tmp_path, small, optimizer), uninterrupted[optimizer])
    assert small.calls == 0


if __name__ == "__main__":
    train(Path(sys.argv[1]), Small(seconds=0.1), sys.argv[2])
