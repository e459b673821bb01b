import math

import pytest
import torch

from fastfsl.errors import ConfigError
from fastfsl.flow import LinearPath, PathSample, endpoint_cross_entropy, flow_matching_loss, normalize, velocity_loss

CLASSES = normalize(torch.randn(5, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
LABELS = torch.tensor([0, 3, 3, 4, 1, 2])


def ends() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return normalize(torch.randn(6, 48, generator=generator, dtype=torch.float64)), CLASSES[LABELS]


def sample() -> PathSample:
    return LinearPath().sample(*ends(), torch.linspace(0, 0.9, 6, dtype=torch.float64))


def ones(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(x)


def test_loss_sums_over_dims_and_averages_over_samples():
    target = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 3.0]])
    point = PathSample(torch.zeros(2), torch.zeros(2, 3), target)
    assert flow_matching_loss(ones, point).item() == pytest.approx((3 + 4) / 2)
    assert velocity_loss(torch.ones(2, 3), point).item() == pytest.approx((3 + 4) / 2)


def test_endpoint_cross_entropy_by_hand():
    # x_t + (1 - t) v = (1, 0) + 0.5 (4, 4) = (3, 2) -> and (0, 1) + 0.25 (0, 4) = (0, 2): cosines with (1, 0), (0, 1).
    point = PathSample(torch.tensor([0.5, 0.75]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 2))
    velocity = torch.tensor([[4.0, 4.0], [0.0, 4.0]])
    length = math.sqrt(13)
    first = -10 * 2 / length + math.log(math.exp(10 * 3 / length) + math.exp(10 * 2 / length))
    second = -10 + math.log(math.exp(10) + 1)
    got = endpoint_cross_entropy(velocity, point, torch.tensor([1, 1]), torch.eye(2), 10.0)
    assert got.item() == pytest.approx((first + second) / 2, rel=1e-6)


@pytest.mark.parametrize("noise", ["none", "bridge"])
def test_true_velocity_predicts_its_own_class(noise):
    x_0, x_1 = ends()
    torch.manual_seed(0)
    point = LinearPath(noise).sample(x_0, x_1, torch.rand(6, dtype=torch.float64), sigma=x_0.std(dim=0))
    endpoint_loss = endpoint_cross_entropy(point.target_velocity, point, LABELS, CLASSES, 100.0)
    of_the_targets = torch.nn.functional.cross_entropy(100.0 * x_1 @ CLASSES.T, LABELS)
    torch.testing.assert_close(endpoint_loss, of_the_targets)


def test_terms_add_up_and_the_field_is_evaluated_once(field):
    evaluations = []

    def counted(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        evaluations.append(len(x))
        return field(x, t)

    loss = flow_matching_loss(counted, sample(), weight=0.1, labels=LABELS, class_embeddings=CLASSES, logit_scale=50.0)
    assert evaluations == [6]
    velocity = field(sample().x_t, sample().t)
    expected = velocity_loss(velocity, sample())
    assert torch.equal(flow_matching_loss(field, sample()), expected)
    expected = expected + 0.1 * endpoint_cross_entropy(velocity, sample(), LABELS, CLASSES, 50.0)
    torch.testing.assert_close(loss, expected)


def test_gradient_of_the_term_lowers_it(field):
    def term() -> torch.Tensor:
        point = sample()
        return endpoint_cross_entropy(field(point.x_t, point.t), point, LABELS, CLASSES, 10.0)

    before = term()
    before.backward()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.sub_(parameter.grad, alpha=1e-3)
    assert term() < before


def test_bad_arguments_are_named():
    with pytest.raises(ConfigError, match=">= 0"):
        flow_matching_loss(ones, sample(), weight=-1.0)
    with pytest.raises(ConfigError, match="labels and class embeddings"):
        flow_matching_loss(ones, sample(), weight=0.1, labels=LABELS)
