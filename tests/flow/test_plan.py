import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastfsl.errors import ConfigError, ShapeError
from fastfsl.flow import FlowPlan, build_plan, euler, euler_states, normalize, plan_states, run_plan


def features(n: int, dim: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).to(dtype)


@settings(max_examples=25, deadline=None)
@given(
    dim=st.sampled_from([8, 17, 48]),
    num_blocks=st.integers(1, 3),
    num_steps=st.integers(0, 10),
    n=st.integers(0, 5),
    seed=st.integers(0, 3),
)
def test_plan_is_exact_in_float64(randomised, dim, num_blocks, num_steps, n, seed):
    field = randomised(dim, num_blocks, seed)
    x_0 = features(n, dim)
    with torch.no_grad():
        expected = euler(field, x_0, num_steps, 0.1)
    got = run_plan(build_plan(field, num_steps, 0.1), x_0)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    if num_steps and n:
        assert (got - x_0).abs().max() > 1e-3


def test_float32_error_is_at_most_twice_that_of_plain_euler(randomised):
    double = randomised(256, 6)
    single = randomised(256, 6).float()
    x_0 = features(64, 256, torch.float32)
    with torch.no_grad():
        exact = euler(double, x_0.double(), 10, 0.1)
        plain = euler(single, x_0, 10, 0.1)
    planned = run_plan(build_plan(single, 10, 0.1), x_0)
    assert (planned - exact).norm() <= 2 * (plain - exact).norm()


def test_plan_survives_its_file(tmp_path, field):
    plan = build_plan(field.float(), 4, 0.1)
    plan.save(tmp_path / "plan.safetensors")
    loaded = FlowPlan.load(tmp_path / "plan.safetensors")
    x_0 = features(3, 48, torch.float32)
    assert torch.equal(run_plan(loaded, x_0), run_plan(plan, x_0))
    assert (loaded.num_steps, loaded.num_blocks, loaded.dim, loaded.step_size) == (4, 3, 48, 0.1)


def test_plan_of_zero_steps_survives_its_file(tmp_path, field):
    build_plan(field.float(), 0, 0.1).save(tmp_path / "plan.safetensors")
    loaded = FlowPlan.load(tmp_path / "plan.safetensors")
    x_0 = features(3, 48, torch.float32)
    assert loaded.num_steps == 0
    assert torch.equal(run_plan(loaded, x_0), x_0)


def test_building_leaves_the_field_alone(field):
    before = {name: value.clone() for name, value in field.state_dict().items()}
    build_plan(field, 10, 0.1)
    assert all(torch.equal(before[name], value) for name, value in field.state_dict().items())


@pytest.mark.parametrize("read_steps", [(0,), (3,), (0, 4, 8), (1, 2, 10), tuple(range(11))])
def test_states_on_the_way_are_those_of_the_field(field, read_steps):
    x_0 = features(5, 48)
    with torch.no_grad():
        expected = list(euler_states(field, x_0, 10, 0.1))
    got = plan_states(build_plan(field, 10, 0.1), x_0, read_steps)
    assert len(got) == len(read_steps)
    for step, state in zip(read_steps, got, strict=True):
        torch.testing.assert_close(state, expected[step], rtol=1e-10, atol=1e-10)


def test_nothing_is_computed_after_the_last_read_out(field):
    plan = build_plan(field, 10, 0.1)
    plan.block_table[4:] = torch.nan
    plan.final_table[4:] = torch.nan
    assert all(torch.isfinite(state).all() for state in plan_states(plan, features(2, 48), (2, 4)))
    assert torch.isnan(plan_states(plan, features(2, 48), (2, 5))[1]).all()


@pytest.mark.parametrize("read_steps", [(), (11,), (-1, 3), (4, 2), (2, 2)])
def test_steps_that_cannot_be_read_out_are_refused(field, read_steps):
    with pytest.raises(ConfigError, match=r"ascending read-out steps in 0\.\.10"):
        plan_states(build_plan(field, 10, 0.1), features(2, 48), read_steps)


def test_bad_arguments_are_named(field):
    with pytest.raises(ConfigError, match="num_steps"):
        build_plan(field, 11, 0.1)
    with pytest.raises(ShapeError, match="48"):
        run_plan(build_plan(field, 1, 0.1), torch.zeros(2, 47, dtype=torch.float64))
