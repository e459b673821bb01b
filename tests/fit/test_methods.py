"""The registry: every name makes an estimator, and presets pin what their source fixes."""

import pytest
from sklearn.base import clone

from fastfsl.errors import ConfigError
from fastfsl.fit.methods import DEFAULT_METHOD, METHODS, RESERVED, make_estimator


@pytest.mark.parametrize("name", METHODS)
def test_every_name_makes_its_estimator(name):
    estimator = make_estimator(name, logit_scale=50.0, seed=3, device="cpu")
    assert type(estimator) is METHODS[name].implementation
    params = clone(estimator).get_params()
    assert params.items() >= METHODS[name].preset.items()
    given = {"logit_scale": 50.0, "seed": 3, "device": "cpu"}
    assert {key: params[key] for key in RESERVED if key in params}.items() <= given.items()
    assert METHODS[name].name == name
    assert "arXiv" in METHODS[name].summary


def test_the_default_is_a_method():
    assert DEFAULT_METHOD in METHODS


def test_presets_are_those_of_their_source():
    paper, bridge, released = (
        make_estimator(name, logit_scale=100.0, seed=0, device="cpu").get_params()
        for name in ("fma-paper", "fma-bridge", "fma-released")
    )
    assert {key for key in paper if paper[key] != released[key]} == {"num_blocks", "noise", "noise_scale", "warmup"}
    assert bridge == {**paper, "noise": "bridge"}
    assert (paper["warmup"], released["warmup"]) == ("linear", "released")
    assert (paper["num_blocks"], paper["noise"], paper["noise_scale"]) == (6, "none", 1.0)
    assert (released["num_blocks"], released["noise"], released["noise_scale"]) == (12, "interpolant", 0.0)
    recipe = ("epochs", "batch_size", "learning_rate", "weight_decay", "warmup_epochs", "times_per_batch", "max_steps")
    assert tuple(paper[key] for key in recipe) == (200, 32, 2e-4, 0.01, 1, None, 10)


@pytest.mark.parametrize("name", ["fma-paper", "fma-bridge", "fma-released"])
def test_a_preset_leaves_nothing_to_the_defaults_but_what_its_source_leaves_open(name):
    open_choices = {"num_steps"}  # chosen on the support
    without_effect = {"updates"}  # where epochs are given
    assert METHODS[name].preset.keys() | open_choices | without_effect == METHODS[name].parameters().keys()


def test_the_users_parameters_win_over_a_preset():
    estimator = make_estimator("fma-paper", {"epochs": 3}, logit_scale=1.0, seed=0, device="cpu")
    assert estimator.get_params()["epochs"] == 3
    assert METHODS["fma-paper"].preset["epochs"] == 200


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("tip", {}, "unknown method 'tip': expected one of auto, .*tip-adapter"),
        ("gda", {"num_fold": 3}, "'num_fold' for method 'gda': did you mean 'num_folds'"),
        (
            "zero-shot",
            {"epochs": 3},
            "'epochs' for method 'zero-shot': it is an option of tip-adapter-f, fma, fma-paper",
        ),
        ("zero-shot", {"banana": 3}, "'banana' for method 'zero-shot': expected one of "),
        ("nearest-mean", {"seed": 3}, "'seed'"),
    ],
)
def test_what_does_not_exist_is_named(name, params, words):
    with pytest.raises(ConfigError, match=words):
        make_estimator(name, params, logit_scale=1.0, seed=0, device="cpu")
