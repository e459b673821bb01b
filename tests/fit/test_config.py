import pytest

from fastfsl.errors import ConfigError
from fastfsl.fit.config import load_config
from fastfsl.fit.methods import METHODS


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text('method: fma\nshots: 4\nseed: 7\nepochs: 12\nnum_steps: 3\ntemplates: ["a drawing of a {}."]\n')
    config = load_config(file, {"shots": 8, "seed": None})
    assert (config.shots, config.seed, config.method, config.num_views) == (8, 7, "fma", 8)
    assert config.params == {"epochs": 12, "num_steps": 3}
    assert config.templates == ["a drawing of a {}."]
    params = config.estimator(logit_scale=50.0).get_params()
    assert params.items() >= {"epochs": 12, "num_steps": 3, "seed": 7, "logit_scale": 50.0}.items()


def test_an_empty_file_changes_nothing(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("# nothing yet\n")
    assert load_config(file) == load_config()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: fma\nnum_step: 3", "did you mean 'num_steps'"),
        ("method: lara", "'lara': expected one of auto, .*fma"),
        ("epochs: 3", "unknown option 'epochs' for method 'auto': it is an option of .*fma"),
        ("method: linear\nCs: [1, a]", "'Cs.1'"),
        ("shots: 0", "shots"),
        ("shots: many", "shots"),
        ("logit_scale: 3", "unknown option"),
        ("- a\n- b", "option: value"),
        ("a: [", "cannot read"),
        ("1: 2", "option: value"),
        ("method: fma\nepochs: abc", "'epochs'"),
        ("method: fma\nnum_steps: 2.5", "'num_steps'"),
        ("method: fma\nbatch_size: 1.5", "'batch_size'"),
        ("method: fma\nnum_folds: x", "'num_folds'"),
        ("method: fma\nnoise: gauss", "'noise'"),
        ("method: fma\nnoise: [bridge]", "'noise'"),
        ("method: [fma]", "unknown method"),
        ("seed: 4294967296", "'seed'"),
        ("method: fma\ntext_samples: .inf", "'text_samples': .*finite"),
        ("method: proker\nbetas: [1, .nan]", "'betas.1': .*finite"),
    ],
)
def test_bad_files_are_named(tmp_path, text, words):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(file)


def test_numbers_in_the_form_that_yaml_reads_as_text(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("method: fma\nlearning_rate: 2e-4\ntimes_per_batch: null\nepochs: 10.0\n")
    params = load_config(file).params
    assert params == {"learning_rate": 2e-4, "times_per_batch": None, "epochs": 10}
    assert type(params["epochs"]) is int


def test_a_list_becomes_the_tuple_that_the_head_takes(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("method: proker\nbetas: [1, 2.5]\nnum_folds: 3\n")
    assert load_config(file).params == {"betas": (1.0, 2.5), "num_folds": 3}


def test_a_preset_is_resolved_and_the_user_wins_over_it():
    params = load_config(flags={"method": "fma-paper", "epochs": 3}).params
    assert params == {**METHODS["fma-paper"].preset, "epochs": 3}


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
