"""Options out of their range: told before anything is encoded, and the quick table agrees with the classes."""

import re

import pytest
from PIL import Image

from fastfsl.errors import ConfigError
from fastfsl.fit import train as training
from fastfsl.fit.config import TrainConfig, load_config
from fastfsl.fit.methods import METHODS, SOURCES, find_method, find_source, make_estimator, make_source
from fastfsl.fit.option_ranges import RANGES

_OUTSIDE = {"target_precision": 1.0, "ema_decay": 1.0, "dropout": 1.0, "num_folds": 1, "learning_rate": 0.0}


def _outside(name):
    """A number that the range leaves out, one step from those it holds."""
    return _OUTSIDE.get(name, 0 if RANGES[name].words == ">= 1" else -1)


@pytest.mark.parametrize("name", [*METHODS, *SOURCES])
def test_a_number_out_of_range_is_told_by_the_configuration(name):
    part = find_source(name) or find_method(name)
    for option in set(part.parameters()) & set(RANGES):
        with pytest.raises(ConfigError, match=re.escape(f"expected {option} {RANGES[option].words}, got")):
            load_config(flags={"method": name, option: _outside(option)})


@pytest.mark.parametrize("name", METHODS)
def test_what_the_table_refuses_the_estimator_refuses_too(name):
    for option in set(METHODS[name].parameters()) & set(RANGES):
        estimator = make_estimator(name, {option: _outside(option)}, logit_scale=100.0, seed=0, device="cpu")
        with pytest.raises(ConfigError):
            estimator.check_parameters()


@pytest.mark.parametrize("name", SOURCES)
def test_what_the_table_refuses_the_source_refuses_too(name):
    # A source of no fixed shape learns of its rank and dropout only beside its encoder.
    for option in set(SOURCES[name].parameters()) & set(RANGES) - {"rank", "dropout", "warmup_epochs"}:
        with pytest.raises(ConfigError):
            make_source(name, {option: _outside(option)}, seed=0)


def test_an_option_that_cannot_be_used_is_told_before_the_images_are_encoded(tmp_path, monkeypatch):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for index in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{index}.png")
    monkeypatch.setattr(training, "_image_support", lambda *_: pytest.fail("the images were encoded first"))
    config = TrainConfig(method="proker", backbone="tiny-clip", params={"betas": ()})
    with pytest.raises(ConfigError, match="betas"):
        training.train(tmp_path, config)
