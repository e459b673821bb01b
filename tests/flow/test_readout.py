import math

import pytest
import torch

from fastfsl.errors import ConfigError
from fastfsl.flow import class_logits, normalize, read_out


def states(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return list(3 * torch.randn(count, 7, 6, generator=generator, dtype=torch.float64))


def embeddings() -> torch.Tensor:
    return normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(6), dtype=torch.float64))


def test_logits_are_scaled_cosines():
    x = torch.tensor([[3.0, 4.0]])
    classes = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(class_logits(x, classes, 10.0), torch.tensor([[6.0, 8.0]]))


def test_the_nearest_prototype_of_a_class_counts():
    x = torch.tensor([[3.0, 4.0], [0.0, -2.0]])
    classes = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]])
    torch.testing.assert_close(class_logits(x, classes, 10.0), torch.tensor([[8.0, -6.0], [0.0, 10.0]]))


def test_one_state_is_read_out_plainly():
    (state,) = states(1)
    torch.testing.assert_close(read_out([state], embeddings(), 20.0), class_logits(state, embeddings(), 20.0))


def test_several_states_give_the_log_of_their_mean_probabilities():
    probabilities = torch.stack([class_logits(state, embeddings(), 5.0).softmax(dim=-1) for state in states(3)])
    got = read_out(states(3), embeddings(), 5.0)
    torch.testing.assert_close(got, probabilities.mean(dim=0).log())
    assert (got.argmax(dim=-1) == probabilities.sum(dim=0).argmax(dim=-1)).all()


def test_probabilities_below_the_smallest_float_keep_their_order():
    # By hand: cosines (1, 0, -1) and (1, -1, 0) at scale 1000; the second class has probability e^-1000 / 2 at most.
    x = torch.tensor([[1.0, 0.0, -1.0]])
    y = torch.tensor([[1.0, -1.0, 0.0]])
    classes = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    got = read_out([x, y], classes, 1000.0 * math.sqrt(2))
    torch.testing.assert_close(got, torch.tensor([[0.0, -1000 - math.log(2), -1000 - math.log(2)]]))


def test_nothing_to_read_out_is_refused():
    with pytest.raises(ConfigError, match="at least one state"):
        read_out([], embeddings(), 1.0)
