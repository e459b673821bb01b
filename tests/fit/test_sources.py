"""Methods that tune the encoder: configuration, training on images, run folders, prediction."""

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastfsl.cli.run_report import write_run_report
from fastfsl.data import read_folder
from fastfsl.demo.digits import CLASS_NAMES, enlarge, load_scans
from fastfsl.encoders import class_embeddings, load_encoder
from fastfsl.errors import BundleError, ConfigError
from fastfsl.fit.checkpoint import Checkpoint, _read
from fastfsl.fit.config import load_config
from fastfsl.fit.evaluate import base_encoder, evaluate_run, run_encoder
from fastfsl.fit.methods import METHODS, SOURCES, find_method, find_source, make_source
from fastfsl.fit.mps import MPS, RECIPES, hold_out
from fastfsl.fit.protocols import base_to_new, evaluate_domain_shift, evaluate_transfer
from fastfsl.fit.run import RUN_FILE, Run
from fastfsl.fit.source import ClassTexts
from fastfsl.fit.train import SilentReporter, encode_plain, encode_support, train
from fastfsl.images import open_image

CLASSES, SHOTS = 3, 4
FLAGS = {
    "backbone": "tiny-clip",
    "templates": ["a photo of the digit {}."],
    "augmentation": {"horizontal_flip": False},
    "num_views": 2,
    "device": "cpu",
    "epochs": 2,
    "batch_size": 8,
    "precision": "fp32",
}
FLOW = {"num_blocks": 1, "epochs": 3, "num_folds": 2}


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Scans of three digits: 4 a class in train/, 6 a class in test/."""
    root = tmp_path_factory.mktemp("digits")
    scans, labels = load_scans()
    for label in range(CLASSES):
        for position, index in enumerate(np.flatnonzero(np.array(labels) == label)[: SHOTS + 6]):
            folder = root / ("train" if position < SHOTS else "test") / CLASS_NAMES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(enlarge(scans[index])).save(folder / f"{index:04d}.png")
    return root


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """Trains a method on the digits, once; gives the run."""
    runs: dict[str, Run] = {}

    def run(method, **flags):
        key = f"{method} {flags}"
        if key not in runs:
            own = {**FLAGS, **flags}
            if "+" in method:
                both = {name: own.pop(name) for name in ("epochs", "batch_size", "precision")}
                own |= {method.partition("+")[0]: both, "fma": FLOW}
            runs[key] = train(digits, load_config(flags={"method": method, **own}), cache_dir=digits.parent / "cache")
        return runs[key]

    return run


def test_every_source_is_found_alone_and_before_every_estimator():
    for name in SOURCES:
        assert find_source(name) is SOURCES[name]
        assert "arXiv" in SOURCES[name].summary
        for estimator in METHODS:
            assert find_method(f"{name}+{estimator}") is METHODS[estimator]
    assert find_source("fma") is None
    for wrong in ("mps+", "mps+mps", "fma+mps", "+fma", "mps+fma+gda"):
        with pytest.raises(ConfigError, match="such as mps\\+fma"):
            find_method(wrong)


def test_options_go_to_whom_they_belong():
    config = load_config(flags={"method": "mps+fma", "num_blocks": 2, "alpha": 0.5, "mps": {"epochs": 3}})
    assert config.params == {"num_blocks": 2}
    assert config.source_params == {"alpha": 0.5, "epochs": 3}
    assert load_config(flags={"method": "mps", "epochs": 3}).source_params == {"epochs": 3}
    with pytest.raises(ConfigError, match="'epochs' is one of mps and of fma"):
        load_config(flags={"method": "mps+fma", "epochs": 3})
    with pytest.raises(ConfigError, match="expected options under 'fma', got 3"):
        load_config(flags={"method": "mps+fma", "fma": 3})
    with pytest.raises(ConfigError, match="unknown option 1 for method 'mps'"):
        load_config(flags={"method": "mps+fma", "mps": {1: 3}})
    with pytest.raises(ConfigError, match="'beta'"):
        load_config(flags={"method": "mps+fma", "beta": 3})
    with pytest.raises(ConfigError, match="it is an option of mps"):
        load_config(flags={"method": "lora", "sculpting_weight": 3})


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mps", {"alpha": 0.0}),
        ("mps", {"alpha": 1.5}),
        ("mps", {"alignment_weight": -1.0}),
        ("mps", {"sculpting_weight": -1.0}),
        ("mps", {"temperature": (0.0, 0.1)}),
        ("mps", {"data_set": "mnist"}),
        ("mps", {"epochs": 0}),
        ("lora", {"batch_size": 0}),
        ("coop", {"learning_rate": 0.0}),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_read(method, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make_source(method, options, seed=0)


def test_the_paper_sets_what_the_user_does_not():
    for name, recipe in RECIPES.items():
        source = MPS(data_set=name)
        assert source.alignment_weight_ == recipe.alignment_weight
        assert source.recipe(160, 10).epochs == recipe.epochs
    assert MPS(data_set="food101", alignment_weight=0.25).alignment_weight_ == 0.25
    assert MPS(data_set="eurosat", epochs=7).recipe(160, 10).epochs == 7


def test_a_feature_file_has_no_encoder_to_tune(tmp_path, write_features):
    with pytest.raises(ConfigError, match="tunes the encoder, and a feature file has none"):
        train(write_features(tmp_path / "f.npz"), load_config(flags={"method": "mps+gda", "device": "cpu"}))


@pytest.mark.parametrize("method", [*SOURCES, *(f"{name}+fma" for name in SOURCES if name != "mps-paper")])
def test_a_run_comes_back_from_its_folder_as_it_was(trained, digits, tmp_path, method):
    run = trained(method)
    assert run.record.num_parameters > 0
    assert run.record.source is not None
    assert len(run.record.source.selection["history"]) == 2
    run.save(tmp_path / "run")
    loaded = Run.load(tmp_path / "run")
    cache = tmp_path / "cache"
    expected = evaluate_run(run, digits, device="cpu", cache_dir=cache)
    got = evaluate_run(loaded, digits, device="cpu", cache_dir=cache)
    assert got == expected
    assert loaded.source is not None
    assert run.source is not None
    assert loaded.source.num_parameters_ == run.source.num_parameters_


def test_mps_reads_out_the_blend_with_its_length(trained, digits):
    run = trained("mps")
    base, encoder = base_encoder(run), run_encoder(run)
    samples = run_samples(digits)
    blend = encode_plain(encoder, samples, cache_dir=digits.parent / "cache")
    assert (np.linalg.norm(blend, axis=1) < 1).all()
    tuned, frozen = (
        encode_plain(run_encoder(run, alpha=alpha), samples, cache_dir=digits.parent / "cache") for alpha in (1.0, 0.0)
    )
    np.testing.assert_allclose(blend, 0.3 * tuned + 0.7 * frozen, atol=1e-6)
    np.testing.assert_allclose(frozen, encode_plain(base, samples, cache_dir=digits.parent / "cache"), atol=1e-5)
    assert np.abs(tuned - frozen).max() > 1e-3  # it was trained
    texts = class_embeddings(base, run.record.class_names, run.record.config.templates)
    logits = run.record.logit_scale * (0.3 * tuned @ texts.T + 0.7 * frozen @ texts.T)
    np.testing.assert_allclose(run.estimator.decision_function(blend), logits, atol=1e-3)


def test_an_estimator_after_mps_sees_unit_features(trained, digits):
    encoder = run_encoder(trained("mps+fma"))
    features = encode_plain(encoder, run_samples(digits), cache_dir=digits.parent / "cache")
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)


def test_another_alpha_goes_with_a_blend_alone(trained):
    with pytest.raises(ConfigError, match="from 0 to 1"):
        run_encoder(trained("mps"), alpha=1.5)
    with pytest.raises(ConfigError, match="this run's method is coop"):
        run_encoder(trained("coop"), alpha=0.5)


def test_cocoop_alone_is_no_fixed_classifier(trained, digits):
    run = trained("cocoop")
    base = base_encoder(run)
    features = encode_plain(base, run_samples(digits), cache_dir=digits.parent / "cache")
    conditional = run.probabilities(features, lambda: base)
    assert np.abs(conditional - run.estimator.predict_proba(features)).max() > 1e-6
    with pytest.raises(ConfigError, match=r"cocoop cannot be exported.*cocoop\+fma"):
        run.deployment()
    trained("cocoop+fma").deployment()


@pytest.mark.parametrize("method", ["mps", "mps+fma", "lora", "coop", "cocoop"])
def test_classes_known_by_their_texts_are_told_apart_as_trained_where_they_are_the_same(trained, digits, method):
    run = trained(method)
    cache = digits.parent / "cache"
    assert evaluate_transfer(run, digits, device="cpu", cache_dir=cache).accuracy == pytest.approx(
        evaluate_run(run, digits, device="cpu", cache_dir=cache).accuracy
    )


def test_cocoop_meets_other_data_with_prompts_of_every_image(trained, digits, monkeypatch):
    run, cache = trained("cocoop"), digits.parent / "cache"
    expected = evaluate_run(run, digits, device="cpu", cache_dir=cache).accuracy
    assert expected != pytest.approx(1 / CLASSES)
    biased = replace(run.estimator.form_, bias=np.array([0.0, 1e3, 0.0]))
    monkeypatch.setattr(run.estimator, "form_", biased)  # the read-out has no say
    assert evaluate_domain_shift(run, digits, device="cpu", cache_dir=cache).accuracy == expected


def test_unseen_classes_have_no_mean_over_the_support(trained, tmp_path):
    """And that is told before anything is read or trained."""
    with pytest.raises(ConfigError, match="take cocoop alone"):
        evaluate_transfer(trained("cocoop+fma"), tmp_path / "none")
    with pytest.raises(ConfigError, match="take cocoop alone"):
        base_to_new(tmp_path / "none", load_config(flags={"method": "cocoop+fma", "device": "cpu"}))


@pytest.mark.parametrize("method", ["mps", "coop", "cocoop"])
def test_texts_of_a_feature_file_are_none_of_a_tuned_encoder(trained, tmp_path, write_features, method):
    with pytest.raises(ConfigError, match="give it images"):
        evaluate_transfer(trained(method), write_features(tmp_path / "f.npz"))


def test_weights_are_chosen_on_a_held_out_part_of_the_support(trained):
    run = trained("mps", alpha="choose", alignment_weight="choose")
    found = run.record.source.selection["held_out"]
    assert found["num_held_out"] == CLASSES
    assert len(found["candidates"]) == 20
    best = max(found["candidates"], key=lambda candidate: candidate["accuracy"])["accuracy"]
    assert found["accuracy"] == best
    chosen = {"alignment_weight": run.source.alignment_weight_, "alpha": run.source.alpha_, "accuracy": best}
    assert chosen in found["candidates"]
    assert all(len(curve) == 2 for curve in found["accuracy_by_epoch"].values())


def test_a_run_of_mps_tells_how_far_its_features_moved(trained, digits, tmp_path):
    """The mean |S - S'| over the support, by the name of what it bounds, in the record and in the report."""
    run = trained("mps")
    assert run.record.source is not None
    paths = tuple(sample.path for sample in read_folder(digits).split("train"))
    base = base_encoder(run)
    tuned, frozen = (
        encoder.encode_images(torch.stack([base.transform(open_image(path)) for path in paths])).double()
        for encoder in (run_encoder(run, alpha=1.0), base)
    )
    tuned = tuned / tuned.norm(dim=1, keepdim=True)
    expected = float((tuned @ tuned.T - frozen @ frozen.T).abs().mean())
    found = run.record.source.selection["gromov_wasserstein_bound"]
    assert found == pytest.approx(expected, rel=1e-2)
    assert found > 0
    run.save(tmp_path / "run")
    loaded = Run.load(tmp_path / "run")
    assert isinstance(loaded.source, MPS)
    assert loaded.source.drift_ == found
    write_run_report(tmp_path / "report.html", run)
    assert "Gromov-Wasserstein bound" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_weight_is_chosen_for_the_training_that_is_judged(trained):
    """The logits of a training with another weight have another gradient: what was held out says nothing of it."""
    run = trained("mps", alpha="choose", alignment_weight="choose")
    source, base = copy.copy(run.source), base_encoder(run)
    texts = ClassTexts(tuple(run.record.class_names), "generic", source.class_embeddings_)
    source.alpha_ = 0.9
    objective = source.restored_objective(base, texts)
    assert objective.alpha == 0.3
    assert source.tuned(base, texts).digest == objective.blended(0.9).digest


def test_a_training_that_went_on_counts_what_was_done_before(digits, tmp_path):
    config = load_config(flags={"method": "mps", **FLAGS})
    for _ in range(2):  # the second finds the first one finished
        run = train(digits, config, cache_dir=tmp_path / "cache", checkpoints=tmp_path / "checkpoints")
    assert run.record.source is not None
    history = run.record.source.selection["history"]
    assert run.record.source.train_seconds == pytest.approx(sum(epoch["seconds"] for epoch in history))
    assert run.record.feature_seconds > 0


def test_a_part_of_every_class_that_has_two_is_held_out():
    labels = np.array([0] * 8 + [1] * 2 + [2])
    kept, held_out = hold_out(labels, seed=0)
    assert sorted([*kept, *held_out]) == list(range(11))
    assert np.bincount(labels[held_out], minlength=3).tolist() == [2, 1, 0]


def test_the_training_is_a_function_of_the_seed(trained, digits):
    first, again = trained("mps").source, trained("mps", seed=0).source
    other = trained("mps", seed=1).source
    state, same, different = first.state(), again.state(), other.state()
    assert all(np.array_equal(state[name], same[name]) for name in state)
    assert any(not np.array_equal(state[name], different[name]) for name in state)


def test_a_run_without_its_tuned_weights_is_refused(trained, tmp_path):
    trained("mps").save(tmp_path / "run")
    (tmp_path / "run" / "source.safetensors").unlink()
    with pytest.raises(BundleError, match="train it again"):
        Run.load(tmp_path / "run")
    text = (tmp_path / "run" / RUN_FILE).read_text().replace('"method": "mps"', '"method": "zero-shot"')
    (tmp_path / "run" / RUN_FILE).write_text(text)
    with pytest.raises(BundleError, match="train it again"):
        Run.load(tmp_path / "run")


@pytest.mark.parametrize(("name", "value"), [("alpha", "much"), ("alignment_weight", []), ("held_out", 3)])
def test_a_run_with_a_damaged_record_of_its_source_is_refused(trained, tmp_path, name, value):
    trained("mps").save(tmp_path / "run")
    record = json.loads((tmp_path / "run" / RUN_FILE).read_text())
    record["source"]["selection"][name] = value
    (tmp_path / "run" / RUN_FILE).write_text(json.dumps(record))
    with pytest.raises(BundleError, match="train it again"):
        Run.load(tmp_path / "run")


_KILLED = """
import os, signal, sys
import fastfsl.fit.source as source
from fastfsl.cli import main
source.CHECKPOINT_SECONDS = 0.0
save, saved = source.Checkpoint.save, []
def save_and_die(self, state):
    save(self, state)
    saved.append(state)
    if len(saved) == 3:  # after the first batch of the second epoch
        os.kill(os.getpid(), signal.SIGKILL)
if sys.argv.pop(1) == "die":
    source.Checkpoint.save = save_and_die
main()
"""


@pytest.mark.slow  # tests/fit/test_checkpoint.py kills a training of a tower in the fast suite
def test_a_killed_training_goes_on_and_ends_alike(digits, tmp_path, monkeypatch, trained):
    monkeypatch.setenv("FASTFSL_CACHE", str(tmp_path / "cache"))
    config = tmp_path / "config.json"  # JSON is YAML
    config.write_text(json.dumps({**FLAGS, "method": "mps"}))

    def run(what):
        command = [sys.executable, "-c", _KILLED, what, "train", str(digits), "--out", str(tmp_path / "run")]
        return subprocess.run([*command, "--config", str(config)], capture_output=True, text=True, check=False)

    killed = run("die")
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "run").exists()
    resumed = run("live")
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after 1 epochs and 1 batches" in resumed.stderr
    first, expected = Run.load(tmp_path / "run").source, trained("mps").source.state()
    assert first is not None
    for name, array in first.state().items():
        np.testing.assert_array_equal(array, expected[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "config.json", "run"]


def test_a_stopped_training_goes_on_from_nothing_but_itself(digits, tmp_path, monkeypatch):
    """Every option that changes what a source sees changes what its checkpoint says that it is of."""
    named: list[str] = []

    def fingerprint(method, **flags):
        def seen(folder, fingerprint, **_options):
            named.append(json.dumps(fingerprint))

        monkeypatch.setattr("fastfsl.fit.source.Checkpoint", seen)
        config = load_config(flags={"method": method, **FLAGS, "epochs": 1, "batch_size": 12, **flags})
        train(digits, config, cache_dir=digits.parent / "cache", checkpoints=tmp_path)
        return named.pop()

    features = fingerprint("clip-adapter")
    assert features == fingerprint("clip-adapter")
    assert features != fingerprint("clip-adapter", num_views=1)
    for option, value in {"drop_last": False, "schedule": "update", "final_rate": 1e-6}.items():
        assert features != fingerprint("clip-adapter", **{option: value})
    assert fingerprint("lora") != fingerprint("lora", scaling="rank")
    pixels = fingerprint("mps")
    monkeypatch.setattr("fastfsl.fit.train.load_encoder", otherwise_prepared)
    assert pixels != fingerprint("mps")
    assert features != fingerprint("clip-adapter")


class Heard(SilentReporter):
    """Keeps the warnings."""

    def __init__(self, warnings: list[str]) -> None:
        self.warnings = warnings

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def test_a_training_begun_under_the_old_rules_starts_over(digits, tmp_path):
    """A checkpoint from when the last batch was kept and the rate fell by update is never gone on from."""

    def trained_with(checkpoints, warnings, **options):
        config = load_config(flags={"method": "clip-adapter", **FLAGS, **options})
        cache = digits.parent / "cache"
        source = train(digits, config, reporter=Heard(warnings), cache_dir=cache, checkpoints=checkpoints).source
        assert source is not None
        return source.state()

    warnings: list[str] = []
    old = trained_with(tmp_path, warnings, drop_last=False, schedule="update")
    path = tmp_path / "tuning" / "checkpoint.safetensors"
    state, fingerprint = _read(path)
    young = ("drop_last", "schedule", "final_rate")  # the options that were not there, and so not written
    for part in ("options", "recipe"):
        fingerprint[part] = {name: value for name, value in fingerprint[part].items() if name not in young}
    del fingerprint["batches"]
    Checkpoint(path.parent, fingerprint).save(state)
    assert not warnings

    found = trained_with(tmp_path, warnings)
    (warning,) = warnings
    assert re.search(r"of another training \(batches, options, recipe changed\): starting over", warning)
    fresh = trained_with(None, warnings)
    assert all(np.array_equal(found[name], fresh[name]) for name in fresh)
    assert any(not np.array_equal(old[name], fresh[name]) for name in fresh)


@pytest.mark.parametrize(("method", "kept"), [("mps", False), ("coop", False), ("clip-adapter", False), ("lora", True)])
def test_the_published_recipes_drop_a_smaller_last_batch_but_clip_loras(trained, method, kept):
    """12 images in batches of 8: one update an epoch, or two. The rule is an option, and the run records it."""
    run = trained(method, **({"learning_rate": 1e-3} if method == "coop" else {}))
    assert run.record.source is not None
    params = run.record.source.params
    assert params["drop_last"] is not kept
    assert (params["schedule"], params["final_rate"]) == (("update", 1e-6) if kept else ("epoch", 0.0))


def test_encoding_is_not_charged_to_the_training(digits, monkeypatch):
    now = [0.0]

    def encode(*arguments, **options):
        now[0] += 1000
        return encode_support(*arguments, **options)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("fastfsl.fit.train.encode_support", encode)
    record = train(digits, load_config(flags={"method": "coop", **FLAGS}), cache_dir=digits.parent / "cache").record
    assert record.feature_seconds == pytest.approx(1000, abs=10)
    assert record.train_seconds < 10


def otherwise_prepared(*arguments):
    encoder = load_encoder(*arguments)
    return replace(encoder, preprocessing=replace(encoder.preprocessing, interpolation="bilinear"))


def run_samples(digits):
    from fastfsl.data import load_dataset

    return load_dataset(digits, None).split("test")
