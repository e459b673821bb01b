"""Pretraining: the loss, a short run, and the weights that ship."""

import dataclasses
import json
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from fastfsl.demo import contrastive, fonts, pretrain
from fastfsl.demo.digits import CLASS_NAMES, TEMPLATES, tiny_clip_dir
from fastfsl.demo.glyphs import Warp

LOCAL = f"local-dir:{tiny_clip_dir()}"


@pytest.fixture(scope="module")
def small_atlas():
    return fonts.build_atlas({"DejaVu Sans": ("DejaVuSans",)}, "0123456789ab")


def test_loss_is_clips_when_every_concept_has_one_image():
    images, texts = F.normalize(torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    logits = 10 * images @ texts[order].T
    diagonal = torch.arange(6)
    clip = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
    torch.testing.assert_close(contrastive.contrastive_loss(images, texts, order, torch.tensor(10.0)), clip)


def test_loss_does_not_punish_equal_pairs():
    texts = torch.eye(4)
    concepts = torch.tensor([0, 0, 0, 1])
    loss = contrastive.contrastive_loss(texts[concepts], texts, concepts, torch.tensor(100.0))
    # All that is left is the share among equal images: -log(1/3) for one of the two concepts present.
    assert loss.item() == pytest.approx(math.log(3) / 4, abs=1e-4)


def test_captions_hold_the_demos_prompts():
    tokenizer = open_clip.get_tokenizer(LOCAL)
    tokens = contrastive.caption_tokens(tokenizer)
    assert tokens.shape == (2 * len(contrastive.CAPTIONS), len(fonts.CONCEPTS), 24)
    assert (tokens == tokenizer.eot_token_id).any(-1).all()
    assert (tokens[..., -1] == 0).all()  # none was cut
    captions = tokens.flatten(0, 1).tolist()
    assert all(tokenizer([TEMPLATES[0].format(name)])[0].tolist() in captions for name in CLASS_NAMES)


def test_batches_keep_the_share_of_digits(small_atlas):
    batches = contrastive.GlyphBatches(small_atlas, digit_share=0.5, warp=Warp(), seed=0)
    images, concepts = batches.draw(400)
    assert images.shape == (400, 3, 32, 32)
    assert -1 <= images.min() < images.max() <= 1
    assert 0.9 < (concepts < 10).float().mean() <= 1  # two of 26 letters: 0.5 against 0.5 * 2 / 26


def test_a_short_run_is_seeded_and_saves_what_open_clip_loads(small_atlas, tmp_path):
    recipe = contrastive.Recipe(steps=5, batch_size=16, warmup_steps=2, seed=3)
    lines: list[str] = []
    first = contrastive.pretrain(recipe, atlas=small_atlas, log=lines.append, log_every=2)
    second = contrastive.pretrain(recipe, atlas=small_atlas, log=lines.append)
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "5/5", "5/5"]
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert 1 <= first.logit_scale.exp() <= contrastive.MAX_LOGIT_SCALE
    weights = pretrain.save_weights(first, tmp_path / "model")
    assert sorted(path.name for path in weights.parent.iterdir()) == [pretrain.CONFIG_FILE, pretrain.WEIGHTS_FILE]
    loaded = open_clip.create_model(f"local-dir:{weights.parent}")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name].half().float()), name


@pytest.mark.slow
def test_training_lowers_the_loss(small_atlas):
    lines: list[str] = []
    recipe = contrastive.Recipe(steps=60, batch_size=32, learning_rate=3e-3, warmup_steps=10, digit_share=1.0)
    contrastive.pretrain(recipe, atlas=small_atlas, log=lines.append, log_every=10)
    losses = [float(line.split()[3]) for line in lines]
    assert losses[-1] < losses[0] - 0.2


def test_learning_rate_rises_and_falls():
    recipe = contrastive.Recipe(steps=100, warmup_steps=10)
    rates = [contrastive._learning_rate(step, recipe) for step in range(101)]
    assert rates[0] == 0.1
    assert max(rates) == rates[10] == 1
    assert rates[100] == pytest.approx(0)


def test_package_weights_are_small_and_half():
    size = sum(path.stat().st_size for path in tiny_clip_dir().iterdir())
    assert size <= 8_000_000
    with safe_open(tiny_clip_dir() / pretrain.WEIGHTS_FILE, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118 - not a mapping


def test_package_model_loads_offline_in_full_precision(monkeypatch):
    import socket

    def no_network(*_args, **_kwargs):
        raise OSError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    model, _, transform = open_clip.create_model_and_transforms(LOCAL)
    tokens = open_clip.get_tokenizer(LOCAL)(["a photo of the digit seven."])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert tokens.shape == (1, 24)
    assert model.encode_text(tokens).shape == (1, 128)
    assert model.encode_image(torch.zeros(2, 3, 32, 32)).shape == (2, 128)
    normalise = transform.transforms[-1]
    assert tuple(normalise.mean) == (contrastive.PIXEL_MEAN,) * 3
    assert tuple(normalise.std) == (contrastive.PIXEL_STD,) * 3
    assert model.visual.image_size == (32, 32)


@pytest.mark.slow
def test_the_report_holds_for_the_shipped_weights():
    report = json.loads((tiny_clip_dir() / pretrain.REPORT_FILE).read_text())
    model = open_clip.create_model(LOCAL).eval()
    assert report["weights_bytes"] == (tiny_clip_dir() / pretrain.WEIGHTS_FILE).stat().st_size
    assert report["logit_scale"] == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)
    assert report["logit_scale"] <= contrastive.MAX_LOGIT_SCALE
    # A tie may fall either way on another machine: 2 of 2000, 1 of 1000.
    assert contrastive.held_out_accuracy(model) == pytest.approx(report["held_out_font_accuracy"], abs=2e-3)
    assert contrastive.scans_accuracy(tiny_clip_dir()) == pytest.approx(report["digits_zero_shot_accuracy"], abs=1e-3)
    assert report["digits_zero_shot_accuracy"] >= 0.3


def test_the_recipe_of_the_report_is_the_committed_one():
    report = json.loads((tiny_clip_dir() / pretrain.REPORT_FILE).read_text())
    ours = json.loads(json.dumps(dataclasses.asdict(contrastive.Recipe())))
    assert report["recipe"] == ours


@pytest.mark.slow
def test_command_line_trains_into_a_folder(tmp_path, capsys, monkeypatch, small_atlas):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr(contrastive, "build_atlas", lambda *_args: small_atlas)
    threads = torch.get_num_threads()
    pretrain.main(["--out", str(tmp_path), "--steps", "1", "--seed", "7", "--threads", str(threads)])
    report = json.loads((tmp_path / pretrain.REPORT_FILE).read_text())
    assert report["recipe"]["seed"] == 7
    assert report["recipe"]["steps"] == 1
    assert "digits_zero_shot_accuracy" not in report  # the scans are read by --report alone
    assert "step 1/1" in capsys.readouterr().out
    pretrain.main(["--out", str(tmp_path), "--report"])
    report = json.loads((tmp_path / pretrain.REPORT_FILE).read_text())
    assert 0 <= report["digits_zero_shot_accuracy"] <= 1
