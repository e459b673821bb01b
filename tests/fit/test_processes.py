"""Also a program: under `torchrun` or `accelerate launch --multi_gpu` it trains with several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastfsl.errors import ConfigError
from fastfsl.fit.batches import FeatureBatches
from fastfsl.fit.checkpoint import Checkpoint
from fastfsl.fit.processes import _OTHER_SIZES, ALONE, Processes, join_processes
from fastfsl.fit.tuning import TuningRecipe, tune

CPU = torch.device("cpu")
NUM_CLASSES, DIM = 3, 5


class Coupled(nn.Module):
    """A loss over the batch that couples all samples, with a parameter of its own, and one of each sample."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layer = nn.Linear(DIM, DIM)
        self.texts = nn.Parameter(torch.empty(NUM_CLASSES, DIM))  # used in batch_loss alone
        self.unused = nn.Parameter(torch.empty(DIM))
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        self.double()
        self.calls = 0
        self.stop_at = stop_at

    def forward(self, inputs: Tensor, progress: float) -> tuple[dict[str, Tensor], Tensor | None]:
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        hidden = self.layer(inputs)
        return {"hidden": hidden}, hidden.square().mean()

    def batch_loss(
        self, outputs: dict[str, Tensor], labels: Tensor, progress: float
    ) -> tuple[Tensor, dict[str, float]]:
        rows = outputs["hidden"].flatten(0, 1).tanh()
        gram = (rows @ rows.T).square().mean()
        logits = outputs["hidden"].mean(dim=1) @ self.texts.T
        return gram + nn.functional.cross_entropy(logits, labels), {"gram": gram.item()}


def train(folder: Path, coupled: Coupled, **options: Any) -> list[dict[str, Any]]:
    """13 samples in batches of 6, 6 and 1: with two processes the last one has a share of none."""
    features = torch.randn(13, 4, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batches = FeatureBatches(features, torch.arange(13) % NUM_CLASSES, num_views=2, batch_size=6, seed=0)
    recipe = TuningRecipe(**{"epochs": 3, "learning_rate": 0.05, **options})
    checkpoint = Checkpoint(folder / "checkpoint", {}, interval=0.0)
    return tune(coupled, batches, recipe, seed=0, device=CPU, checkpoint=checkpoint)


def program() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    try:  # interrupted at first, on all processes alike
        train(folder, Coupled(stop_at=5), **options)
    except KeyboardInterrupt:
        join_processes(CPU).total(torch.zeros(1))  # everyone is here
    coupled = Coupled()
    history = train(folder, coupled, **options)
    processes = join_processes(CPU)
    save_file(dict(coupled.state_dict()), folder / f"{processes.rank}.safetensors")
    (folder / f"{processes.rank}.json").write_text(
        json.dumps({"history": history, "calls": coupled.calls, "world": processes.world})
    )
    torch.distributed.destroy_process_group()


def launch(launcher: list[str], folder: Path, options: dict[str, Any]) -> None:
    command = [sys.executable, "-m", *launcher, __file__, str(folder), json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


# With --cpu it would start one process; with --multi_gpu it starts two, and these find that there is no card.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "options", "calls_left"),
    # Nine updates of one call, five of them done; or, by epoch, of 4, 4 and 1, of which one is done.
    [(ACCELERATE, {}, 4), (TORCHRUN, {"micro_batch": 2, "optimizer": "adamw"}, 23)],
)
def test_two_processes_train_as_one(tmp_path, launcher, options, calls_left):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone = Coupled()
    expected = train(tmp_path / "one", alone, **options)
    launch(launcher, tmp_path / "two", options)
    for rank in range(2):
        told = json.loads((tmp_path / "two" / f"{rank}.json").read_text())
        assert told["world"] == 2
        for entry, other in zip(told["history"], expected, strict=True):
            for name in ("loss", "own", "gram", "learning_rate"):
                assert entry[name] == pytest.approx(other[name], rel=1e-9)
        found = load_file(tmp_path / "two" / f"{rank}.safetensors")
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9)
        assert told["calls"] == calls_left  # both went on from the checkpoint
    first, second = (load_file(tmp_path / "two" / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("num_samples", [1, 2, 6, 32])
def test_shares_cover_a_batch(world, num_samples):
    shares = [Processes(rank, world).share(num_samples) for rank in range(world)]
    assert [index for share in shares for index in range(num_samples)[share]] == list(range(num_samples))
    assert max(share.stop - share.start for share in shares) - min(share.stop - share.start for share in shares) <= 1


def test_one_process_needs_no_other(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_processes(CPU) == ALONE
    assert ALONE.is_main
    tensor = torch.ones(3)
    assert ALONE.total(tensor) is tensor
    ALONE.agree(5, CPU)


def _launched_by(monkeypatch, **variables):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION", *_OTHER_SIZES):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
            "several processes and started one.*torchrun",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "do not know each other.*torchrun"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "do not know each other.*torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
    ],
)
def test_one_process_where_several_were_asked_for_is_said(monkeypatch, variables, message):
    _launched_by(monkeypatch, **variables)
    with pytest.raises(ConfigError, match=message):
        join_processes(CPU)


def test_one_process_that_was_asked_for_is_no_error(monkeypatch):
    for variables in (
        {"ACCELERATE_MIXED_PRECISION": "no"},
        {"MASTER_ADDR": "head"},
        {"WORLD_SIZE": "1", "PMI_SIZE": "2"},
    ):
        _launched_by(monkeypatch, **variables)
        assert join_processes(CPU) == ALONE


@pytest.mark.slow
def test_accelerate_on_a_cpu_is_told_to_be_torchrun(tmp_path):
    """The real launcher, which starts one process where two were asked for."""
    command = "from fastfsl.cli import main; import sys; sys.argv = ['fastfsl', 'train', 'x', '--out', 'r']; main()"
    (tmp_path / "train.py").write_text(command)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    found = subprocess.run(
        [*launcher, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode != 0
    assert "torchrun --standalone" in found.stderr.replace("\n", " ")
    assert not (tmp_path / "r").exists()


def test_processes_that_read_different_checkpoints_are_told(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.add_(torch.tensor([0, 3])))
    with pytest.raises(ConfigError, match=r"got \[5, 3\]"):
        Processes(0, 2).agree(5, CPU)


def test_half_precision_is_summed_in_float32(monkeypatch):
    # in bfloat16 256 + 1 + 1 would be 256
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.add_(1).add_(1))
    summed = Processes(0, 3).total(torch.tensor([256.0], dtype=torch.bfloat16))
    assert summed.dtype == torch.bfloat16
    assert summed.item() == 258


if __name__ == "__main__":
    program()
