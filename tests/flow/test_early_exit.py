import pytest
import torch

from fastfsl.errors import ConfigError, ShapeError
from fastfsl.flow import class_logits, euler, euler_early_exit, euler_states, normalize

CLASSES = normalize(torch.randn(6, 48, generator=torch.Generator().manual_seed(7), dtype=torch.float64))


def features(n: int = 40) -> torch.Tensor:
    return normalize(torch.randn(n, 48, generator=torch.Generator().manual_seed(8), dtype=torch.float64))


def rowwise(field, x_0, *, margin=None, velocity_norm=None):
    """The definition, one sample at a time."""
    ends, steps = [], []
    for row in x_0[:, None]:
        for step, x in enumerate(euler_states(field, row, 10, 0.1)):
            first, second = class_logits(x, CLASSES, 8.0).softmax(dim=-1)[0].sort(descending=True).values[:2]
            speed = field(x, torch.full((1,), step * 0.1, dtype=torch.float64)).norm()
            clear = margin is not None and first - second >= margin
            still = velocity_norm is not None and speed < velocity_norm
            if step == 10 or clear or still:
                break
        ends.append(x[0])
        steps.append(step)
    return torch.stack(ends), torch.tensor(steps)


@pytest.mark.parametrize("criteria", [{"margin": 0.6}, {"velocity_norm": 3.2}, {"margin": 0.8, "velocity_norm": 3.0}])
def test_samples_stop_where_the_definition_says(field, criteria):
    with torch.no_grad():
        expected, expected_steps = rowwise(field, features(), **criteria)
        got, steps = euler_early_exit(field, features(), 10, 0.1, CLASSES, 8.0, **criteria)
    assert steps.tolist() == expected_steps.tolist()
    assert len(set(steps.tolist())) > 3  # otherwise nothing was tested
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_stopped_samples_are_not_computed(field):
    evaluated = []

    def counted(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        evaluated.append(len(x))
        return field(x, t)

    with torch.no_grad():
        _, steps = euler_early_exit(counted, features(), 10, 0.1, CLASSES, 8.0, margin=0.6)
    assert sum(evaluated) == steps.sum()
    assert evaluated == sorted(evaluated, reverse=True)
    assert evaluated[-1] < len(features())


def test_without_a_criterion_it_is_euler(field):
    with torch.no_grad():
        got, steps = euler_early_exit(field, features(), 7, 0.1, CLASSES, 8.0)
        torch.testing.assert_close(got, euler(field, features(), 7, 0.1), rtol=1e-10, atol=1e-10)
    assert (steps == 7).all()


def test_nothing_moves_when_all_is_clear_at_once(field):
    def refused(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the field was evaluated")

    got, steps = euler_early_exit(refused, CLASSES, 10, 0.1, CLASSES, 100.0, margin=0.5)
    assert torch.equal(got, CLASSES)
    assert (steps == 0).all()
    got, steps = euler_early_exit(refused, features(0), 10, 0.1, CLASSES, 8.0)
    assert got.shape == (0, 48)
    assert steps.shape == (0,)


@pytest.mark.parametrize("criteria", [{"margin": 0.0}, {"margin": 1.5}, {"velocity_norm": 0.0}, {"num_steps": 11}])
def test_bad_criteria_are_named(field, criteria):
    with pytest.raises(ConfigError, match="|".join(criteria)):
        euler_early_exit(field, features(), criteria.pop("num_steps", 10), 0.1, CLASSES, 8.0, **criteria)


def test_one_class_has_no_second_best(field):
    with pytest.raises(ShapeError, match="two classes"):
        euler_early_exit(field, features(), 10, 0.1, CLASSES[:1], 8.0, margin=0.5)
