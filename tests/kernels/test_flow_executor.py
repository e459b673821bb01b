"""How graphs and their buffers are kept, dry: stand-ins for torch's graphs run what they were to hold."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastfsl.flow import normalize
from fastfsl.kernels import flow_executor
from fastfsl.kernels.flow_executor import FlowExecutor, Way
from fastfsl.kernels.tiles import Tile


class Graph:
    """Holds the launches of a capture."""

    def __init__(self) -> None:
        self.held: list[Any] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for launch in self.held:
            launch()


@pytest.fixture
def card(monkeypatch):
    """A card in name: what was captured, and which tensors were said to be used on which streams."""
    card = SimpleNamespace(graphs=[], capturing=None, recorded=[], stream=None, synchronised=0)

    def stream(pointer: int) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=pointer, wait_stream=lambda other: None, wait_event=lambda event: None)

    @contextmanager
    def capture(graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        card.graphs.append(graph)
        card.capturing = graph
        yield
        card.capturing = None

    card.stream = stream(1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: card.stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream(99))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: card.recorded.append(stream.cuda_stream))
    card.make_stream = stream
    return card


@pytest.fixture
def executor(card, random_plan, monkeypatch):
    tile = Tile(16, 128, 128, 4, 3)
    monkeypatch.setattr(flow_executor, "flow_tile", lambda arch, dim, rows, dtype: tile)
    executor = FlowExecutor(random_plan(128, 0, 2), torch.float32, torch.device("cpu"))
    idle = SimpleNamespace(
        record=lambda stream: None, synchronize=lambda: setattr(card, "synchronised", card.synchronised + 1)
    )
    monkeypatch.setattr(executor, "_idle", idle, raising=False)
    enqueue = executor._enqueue

    def enqueue_or_hold(*arguments):
        if card.capturing is None:
            enqueue(*arguments)
        else:
            card.capturing.held.append(lambda: enqueue(*arguments))

    monkeypatch.setattr(executor, "_enqueue", enqueue_or_hold)
    return executor


def flow(executor, n: int, read_steps: tuple[int, ...] = (2,), *, replay: bool = True) -> Tensor:
    x = normalize(torch.randn(n, 128, generator=torch.Generator().manual_seed(n)))
    out = torch.full((len(read_steps), n, 128), torch.nan)
    (executor._replay if replay else executor._run)(x, Way(read_steps, persistent=False), out)
    return out


@pytest.mark.parametrize("n", [1, 3, 17])
def test_a_replay_computes_what_the_launches_do(executor, n):
    assert torch.equal(flow(executor, n), flow(executor, n, replay=False))
    assert torch.equal(flow(executor, n, (1, 2)), flow(executor, n, (1, 2), replay=False))
    # Padding rows of an earlier, larger call are in the buffers now.
    assert torch.equal(flow(executor, n), flow(executor, n, replay=False))


def test_a_bucket_is_captured_once_and_shares_the_buffers_of_its_class(executor, card):
    for n in (3, 4, 3, 1):
        flow(executor, n)
    assert [graph.replays for graph in card.graphs] == [3, 1]
    assert len(executor._memory) == 1
    flow(executor, 4, (1, 2))
    assert len(card.graphs) == 3
    assert len(executor._memory) == 2


def test_the_graph_unused_for_longest_goes_first_and_only_when_the_card_is_idle(executor, card, monkeypatch):
    monkeypatch.setattr(flow_executor, "MAX_GRAPHS", 2)
    for n in (1, 2, 1):
        flow(executor, n)
    assert card.synchronised == 0
    flow(executor, 4)
    assert card.synchronised == 1
    assert [rows for rows, _ in executor._graphs] == [1, 4]
    flow(executor, 1)
    assert len(card.graphs) == 3


def test_tensors_are_kept_from_others_for_every_stream_that_uses_them(executor, card):
    for pointer in (1, 2, 1):
        card.stream = card.make_stream(pointer)
        flow(executor, 2)
    used = len(executor._arrays) + len(next(iter(executor._memory.values())))
    assert [card.recorded.count(pointer) for pointer in (1, 2)] == [used, used]
    flow(executor, 2, (1, 2))  # other buffers, on a stream that has been seen
    assert card.recorded.count(1) > used
