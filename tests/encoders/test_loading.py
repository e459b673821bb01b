"""Loading models: names, tags, checkpoint files, and never the wrong activation."""

import json
import logging
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from fastfsl.encoders import load_encoder
from fastfsl.encoders.architecture import models_like
from fastfsl.encoders.checkpoint_file import read_checkpoint
from fastfsl.errors import ConfigError, DeviceError
from fastfsl.images import open_image, preprocess


def _pixels(seed=0):
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def _features(model, pixels):
    with torch.inference_mode():
        return torch.nn.functional.normalize(model.encode_image(pixels), dim=-1)


def _assert_same_features(encoder, model):
    torch.testing.assert_close(encoder.encode_images(_pixels()), _features(model, _pixels()), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def registered(toy, tmp_path_factory):
    """Two architectures under open_clip names, as ViT-B-32 and ViT-B-32-quickgelu are."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "Toy-16.json").write_text(json.dumps(toy.config))
    (folder / "Toy-16-quickgelu.json").write_text(json.dumps(toy.config | {"quick_gelu": True}))
    open_clip.add_model_config(folder)
    yield "Toy-16"
    for name in ("Toy-16", "Toy-16-quickgelu"):
        del open_clip.factory._MODEL_CONFIGS[name]
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)


def _archive(path: Path, model: torch.nn.Module) -> Path:
    """A TorchScript archive like OpenAI's: half precision, with three numbers among its buffers."""

    class Traced(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, child in model.named_children():
                setattr(self, name, child)
            for name, parameter in model.named_parameters(recurse=False):
                setattr(self, name, parameter)
            for name, number in (("input_resolution", 32), ("context_length", 16), ("vocab_size", 49408)):
                self.register_buffer(name, torch.tensor(number))

        def forward(self, image):
            return self.get_submodule("visual")(image)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(Traced(), torch.zeros(2, 3, 32, 32), check_trace=False), path)
    return path


@pytest.fixture
def reachable(monkeypatch):
    """A network that answers, as far as is asked before a download."""
    monkeypatch.setattr("fastfsl.downloads.unreachable", lambda _: None)


# Names and tags


@pytest.mark.parametrize(
    ("backbone", "pretrained", "message"),
    [
        ("ViT-B-33", None, r"unknown backbone 'ViT-B-33': did you mean ViT-B-32"),
        ("vit_b_16", None, r"unknown backbone 'vit_b_16': did you mean ViT-B-16"),
        ("qqqqqqqq", None, r"unknown backbone 'qqqqqqqq': expected one of "),
        ("ViT-B-32", "opnai", r"no weights 'opnai', and no such file exists: did you mean openai\?"),
        ("ViT-B/32", "laion2b-s34b-b79", r"did you mean laion2b_s34b_b79k"),
        ("ViT-B-32", "weights/none.pt", r"checkpoint file weights/none.pt does not exist"),
        ("ViT-B-32", "x" * 5000, r"no weights 'x+', and no such file exists: expected one of openai, "),
        ("local-dir:" + "x" * 5000, None, r"open_clip_config.json is missing"),
        ("ViT-B-32", "a\0b", r"no weights"),
        ("ViT-B-32", None, r"ViT-B-32 needs weights: --pretrained with a tag \(openai, "),
        ("ViT-B-32-quickgelu", "laion2b_e16", r"trained without QuickGELU: use --backbone ViT-B-32$"),
        ("local-dir:/nowhere", None, r"open_clip_config.json is missing"),
        ("hf-hub:some/model", "openai", r"'openai' is no local checkpoint file"),
    ],
)
def test_unknown_names_suggest_close_ones(backbone, pretrained, message):
    with pytest.raises(ConfigError, match=message):
        load_encoder(backbone, pretrained)


def test_a_folder_as_a_name_tells_the_prefix(model_folder):
    with pytest.raises(ConfigError, match=f"write local-dir:{model_folder}"):
        load_encoder(str(model_folder))


@pytest.mark.parametrize(("backbone", "pretrained"), [("RN50", "cc12m"), ("hf-hub:some/model", None)])
def test_a_download_that_fails_tells_to_pass_a_file(backbone, pretrained, monkeypatch, reachable):
    def unreachable(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", unreachable)
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(ConfigError, match=r"could not be downloaded or loaded .*(--pretrained FILE|local-dir:FOLDER)"):
        load_encoder(backbone, pretrained)


def test_a_hub_model_without_weights_is_refused(model_folder, monkeypatch, reachable):
    """open_clip would log that the weights could not be fetched, and return a random model."""

    def only_the_config(repo_id, filename, **options):
        if filename == "open_clip_config.json":
            return str(model_folder / filename)
        raise OSError("no such file in the repository")

    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", only_the_config)
    with pytest.raises(ConfigError, match="hf-hub:some/model could not be downloaded or loaded"):
        load_encoder("hf-hub:some/model")


def test_text_towers_of_transformers_fetch_nothing_that_a_file_will_replace(tmp_path, monkeypatch, toy):
    asked = []

    def create(name, pretrained, **options):
        asked.append(options["pretrained_text"])
        raise OSError("not made in this test")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    save_file(toy.model().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="could not be made"):
        load_encoder("roberta-ViT-B-32", tmp_path / "w.safetensors")
    assert asked == [False]


def test_unknown_devices():
    with pytest.raises(DeviceError, match="expected device"):
        load_encoder("tiny-clip", device="abacus")


# What is loaded


def test_a_model_folder(toy, model_folder, image_files):
    encoder = load_encoder(f"local-dir:{model_folder}")
    _assert_same_features(encoder, toy.model())
    assert encoder.embed_dim == 32
    assert encoder.logit_scale == pytest.approx(1 / 0.07)
    assert encoder.device == torch.device("cpu")
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert encoder.preprocessing.to_dict() == {
        "image_size": [32, 32],
        **toy.preprocessing,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    for file in image_files:  # the transform and the stored preprocessing say the same
        image = open_image(file)
        pixels = preprocess(image, encoder.preprocessing).astype(np.float32) / 255
        normalised = (pixels - toy.preprocessing["mean"]) / toy.preprocessing["std"]
        np.testing.assert_allclose(encoder.transform(image).numpy(), normalised.transpose(2, 0, 1), atol=1e-5)


def test_the_tiny_clip_of_the_package():
    encoder = load_encoder("tiny-clip")
    assert encoder.backbone == "tiny-clip"
    assert encoder.encode_texts(["a photo of the digit seven"]).shape == (1, encoder.embed_dim)


def test_loading_leaves_the_program_s_logging_alone(model_folder, caplog, monkeypatch):
    root = logging.getLogger()
    with caplog.at_level(logging.INFO):
        load_encoder(f"local-dir:{model_folder}")
    assert not caplog.records
    monkeypatch.setattr(root, "handlers", [])  # then logging.info() would call logging.basicConfig()
    load_encoder(f"local-dir:{model_folder}")
    assert root.handlers == []
    assert root.filters == []


def test_the_digest_tells_weights_and_architectures_apart(toy, tmp_path, model_folder):
    digest = load_encoder(f"local-dir:{model_folder}").digest
    assert len(digest) == 64
    same = toy.folder(tmp_path / "same", toy.model())
    assert load_encoder(f"local-dir:{same}").digest == digest
    other = toy.folder(tmp_path / "other", toy.model(seed=1))
    heads = toy.folder(tmp_path / "heads", toy.model(), vision_cfg=toy.config["vision_cfg"] | {"head_width": 16})
    quick = toy.folder(tmp_path / "quick", toy.model(), quick_gelu=True)
    digests = {load_encoder(f"local-dir:{folder}").digest for folder in (other, heads, quick)}
    assert len(digests | {digest}) == 4


# Checkpoint files


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"lr": 0.1}},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}},
        lambda state: {name: tensor.half() for name, tensor in state.items()},
        lambda state: state | {"logit_scale": state["logit_scale"].reshape(1)},
    ],
    ids=["bare", "open_clip training", "distributed", "compiled", "half precision", "logit scale as (1,)"],
)
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_checkpoint_files(toy, tmp_path, registered, wrap, suffix):
    model = toy.model(seed=5)
    content = wrap(dict(model.state_dict()))
    path = tmp_path / f"checkpoint{suffix}"
    if suffix != ".safetensors":
        torch.save(content, path)
    elif all(isinstance(value, torch.Tensor) for value in content.values()):
        save_file(content, path)
    else:
        torch.save(content, path)  # a torch file under a wrong name: the content decides
    encoder = load_encoder(registered, path)
    assert all(parameter.dtype == torch.float32 for parameter in encoder.model.parameters())
    tolerance = 2e-3 if any(value.dtype == torch.half for value in content.values() if torch.is_tensor(value)) else 1e-5
    expected = _features(model, _pixels())
    torch.testing.assert_close(encoder.encode_images(_pixels()), expected, atol=tolerance, rtol=0)
    assert encoder.pretrained == str(path)


def test_a_checkpoint_with_a_separate_text_tower_goes_through_open_clip(toy, tmp_path, bare_folder):
    """open_clip's own converters are used where the names differ."""
    model = open_clip.CustomTextCLIP(**toy.config).eval()
    plain = toy.folder(tmp_path / "custom", None, custom_text=True)
    state = {name.removeprefix("text."): tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "plain.pt")
    _assert_same_features(load_encoder(f"local-dir:{plain}", tmp_path / "plain.pt"), model)


def test_wrong_checkpoints_say_what_is_wrong(toy, tmp_path, registered):
    state = dict(toy.model().state_dict())
    cases = {
        "missing": ({k: v for k, v in state.items() if not k.startswith("ln_final")}, r"2 missing entries \(ln_final"),
        "unexpected": (state | {"extra.weight": torch.ones(2)}, r"1 unexpected entries \(extra.weight\)"),
        "misshapen": (
            state | {"visual.proj": torch.ones(64, 48)},
            r"1 entries of another shape \(visual.proj is \(64, 48\), expected \(64, 32\)\)",
        ),
        "position": (
            state | {"visual.positional_embedding": torch.ones(10, 64)},
            r"visual.positional_embedding is \(10, 64\), expected \(5, 64\)",
        ),
        "transformers": ({"vision_model.embeddings.class_embedding": torch.ones(3)}, "layout of transformers"),
        "nan": (state | {"visual.proj": torch.full((64, 32), torch.nan)}, "visual.proj has NaN"),
    }
    for name, (content, message) in cases.items():
        save_file(content, tmp_path / f"{name}.safetensors")
        with pytest.raises(ConfigError, match=message):
            load_encoder(registered, tmp_path / f"{name}.safetensors")


def test_the_model_a_checkpoint_looks_like_is_named(toy, tmp_path, registered):
    """Every native architecture of open_clip is recognised by its sizes."""
    for name in ("ViT-B-16", "ViT-B-32", "RN50", "ViT-L-14-336"):
        with torch.device("meta"):
            config = {key: value for key, value in open_clip.get_model_config(name).items() if key != "custom_text"}
            state = open_clip.CLIP(**config).state_dict()
        assert models_like(state)[0] == name
    save_file(toy.model().state_dict(), tmp_path / "toy.safetensors")
    with pytest.raises(ConfigError, match=r"It looks like Toy-16: --backbone Toy-16"):
        load_encoder("ViT-S-32-alt", tmp_path / "toy.safetensors")


def test_files_that_are_no_checkpoint(toy, tmp_path, registered):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "exploded").touch, ())

    torch.save(toy.model(), tmp_path / "module.pt")  # a whole module: a pickle that holds code
    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pt")
    (tmp_path / "bomb.bin").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "text.pt").write_text("<html>404 Not Found</html>")
    (tmp_path / "empty.pt").touch()
    torch.save({"epoch": 1}, tmp_path / "numbers.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    torch.save(toy.model().state_dict(), tmp_path / "cut.pt")
    whole = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    save_file(toy.model().state_dict(), tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    messages = {
        "module.pt": "never unpickled",
        "bomb.pt": "never unpickled",
        "bomb.bin": "never unpickled",
        "text.pt": "(never unpickled|cannot be read)",
        "empty.pt": "is empty",
        "numbers.pt": "holds no tensors",
        "list.pt": "holds a list",
        "cut.pt": "damaged archive",
        "cut.safetensors": "damaged safetensors file",
    }
    for name, message in messages.items():
        with pytest.raises(ConfigError, match=message) as caught:
            load_encoder(registered, tmp_path / name)
        assert "weights_only" not in str(caught.value)  # torch's own message advises to unpickle
    assert not (tmp_path / "exploded").exists()


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_give_a_typed_error_or_tensors(tmp_path, data):
    kind = data.draw(st.sampled_from(["zip", "legacy", "safetensors", "noise"]))
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.half)}
    path = tmp_path / "w.bin"
    if kind == "safetensors":
        save_file(tensors, path)
    elif kind == "noise":
        path.write_bytes(data.draw(st.binary(max_size=40)))
    else:
        torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=kind == "zip")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        checkpoint = read_checkpoint(path)
    except ConfigError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in checkpoint.state_dict.values())


def test_model_folders_without_or_with_too_many_weights(toy, bare_folder, tmp_path):
    with pytest.raises(ConfigError, match="holds no weights"):
        load_encoder(f"local-dir:{bare_folder}")
    folder = toy.folder(tmp_path / "two", None)
    for name in ("a.safetensors", "b.safetensors"):
        save_file(toy.model().state_dict(), folder / name)
    with pytest.raises(ConfigError, match=r"several checkpoints \(a.safetensors, b.safetensors\)"):
        load_encoder(f"local-dir:{folder}")
    _assert_same_features(load_encoder(f"local-dir:{folder}", folder / "b.safetensors"), toy.model())
    (folder / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 32}}')
    with pytest.raises(ConfigError, match="check its configuration"):
        load_encoder(f"local-dir:{folder}", folder / "b.safetensors")


def test_images_for_a_file_are_prepared_as_for_the_model_s_published_weights(toy, monkeypatch, tmp_path, registered):
    """open_clip would take OpenAI's mean and standard deviation for any file; SigLIP's are 0.5."""
    siglip = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear", "resize_mode": "squash"}
    published = {"one": dict(siglip), "two": dict(siglip)}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: list(published))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: published[tag])
    save_file(toy.model().state_dict(), tmp_path / "w.safetensors")
    prepared = load_encoder(registered, tmp_path / "w.safetensors").preprocessing
    assert (prepared.mean, prepared.std) == (siglip["mean"], siglip["std"])
    assert (prepared.interpolation, prepared.resize_mode) == ("bilinear", "squash")
    published["two"]["mean"] = (0.1, 0.2, 0.3)
    with pytest.warns(UserWarning, match="do not all prepare images alike"):
        prepared = load_encoder(registered, tmp_path / "w.safetensors").preprocessing
    assert prepared.mean == open_clip.OPENAI_DATASET_MEAN


# QuickGELU


def test_gelu_and_quickgelu_differ_on_these_models(toy):
    """Otherwise the tests below could not fail."""
    difference = _features(toy.model(), _pixels()) - _features(toy.model(quick_gelu=True), _pixels())
    assert difference.abs().max() > 2e-3  # two hundred times the tolerance below


def test_an_openai_archive_under_the_plain_name_becomes_quickgelu(toy, tmp_path, registered):
    path = _archive(tmp_path / "ViT-T.pt", toy.model(quick_gelu=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.load(str(path))
    with pytest.warns(
        UserWarning, match=r"trained with QuickGELU \(it is one of OpenAI's\): loading them as Toy-16-quick"
    ):
        encoder = load_encoder(registered, path)
    assert encoder.backbone == "Toy-16-quickgelu"
    # The archive itself computes the truth.
    truth = torch.nn.functional.normalize(script(_pixels()), dim=-1)
    torch.testing.assert_close(encoder.encode_images(_pixels()), truth, atol=1e-5, rtol=0)
    again = load_encoder(encoder.backbone, path)  # under the right name: no warning, the same model
    assert again.digest == encoder.digest


def test_an_openai_archive_for_a_model_folder(toy, tmp_path, bare_folder):
    path = _archive(tmp_path / "archive.pt", toy.model(quick_gelu=True))
    with pytest.warns(UserWarning, match="trained with QuickGELU"):
        encoder = load_encoder(f"local-dir:{bare_folder}", path)
    _assert_same_features(encoder, toy.model(quick_gelu=True))
    save_file(toy.model(quick_gelu=True).state_dict(), tmp_path / "bare.safetensors")
    gelu = load_encoder(f"local-dir:{bare_folder}", tmp_path / "bare.safetensors")
    assert gelu.digest != encoder.digest  # the same weights, but another function


@pytest.mark.parametrize(
    "mark",
    [
        lambda path, state, toy: torch.save(
            state | {n: torch.tensor(1) for n in ("input_resolution", "context_length", "vocab_size")}, path
        ),
        lambda path, state, toy: torch.save({"state_dict": state, "model": "ViT-B-16-quickgelu"}, path),
        lambda path, state, toy: save_file(state, path, {"quick_gelu": "true"}),
        lambda path, state, toy: save_file(state, path, {"architecture": "ViT-B-16-QuickGELU"}),
        lambda path, state, toy: torch.save(state, toy.folder(path.parent, None, quick_gelu=True) / path.name),
    ],
    ids=["OpenAI's state dict", "name beside it", "metadata", "name in metadata", "config beside it"],
)
def test_files_that_say_quickgelu_get_it(toy, tmp_path, registered, mark):
    model = toy.model(quick_gelu=True)
    mark(tmp_path / "w.pt", dict(model.state_dict()), toy)
    with pytest.warns(UserWarning, match="trained with QuickGELU"):
        encoder = load_encoder(registered, tmp_path / "w.pt")
    _assert_same_features(encoder, model)


def test_a_bare_state_dict_takes_the_activation_of_the_name(toy, tmp_path, registered):
    """It cannot tell; the name decides, without a warning."""
    torch.save(toy.model().state_dict(), tmp_path / "w.pt")
    for suffix, quick_gelu in (("", False), ("-quickgelu", True)):
        _assert_same_features(load_encoder(registered + suffix, tmp_path / "w.pt"), toy.model(quick_gelu=quick_gelu))


def test_tags_that_need_quickgelu_are_loaded_with_it(monkeypatch, tmp_path, reachable):
    """open_clip 3.3 warns of `ViT-B-32` with `openai` and goes on with GELU."""
    asked = []

    def create(name, pretrained, **options):
        asked.append((name, pretrained, options["force_quick_gelu"]))
        raise OSError("no network in tests")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    for name, tag in (("ViT-B/32", "OpenAI"), ("ViT-B-32-quickgelu", "openai"), ("ViT-B-32", "laion2b_s34b_b79k")):
        with pytest.raises(ConfigError):
            load_encoder(name, tag)
    assert asked == [
        ("ViT-B-32-quickgelu", "openai", False),
        ("ViT-B-32-quickgelu", "openai", False),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
    ]


def test_every_published_quickgelu_tag_leads_to_a_quickgelu_model():
    """The choice rests on open_clip's table; this holds it to what the loader assumes."""
    names = open_clip.list_models()
    for name, tag in open_clip.list_pretrained():
        if open_clip.get_pretrained_cfg(name, tag).get("quick_gelu") and name in names:
            quick = name if name.endswith("-quickgelu") else f"{name}-quickgelu"
            if not open_clip.get_model_config(name).get("quick_gelu"):
                assert quick in names
                assert open_clip.get_model_config(quick)["quick_gelu"]


def test_torchscript_archives_of_others_are_refused(tmp_path, registered):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=r"TorchScript archive, but not one of OpenAI's.*save the state dict"):
        load_encoder(registered, tmp_path / "other.pt")
    with zipfile.ZipFile(tmp_path / "hollow.pt", "w") as archive:
        archive.writestr("hollow/code/__torch__.py", "")
        archive.writestr("hollow/constants.pkl", b"\x80\x02).")
    with pytest.raises(ConfigError, match="TorchScript archive that cannot be read"):
        load_encoder(registered, tmp_path / "hollow.pt")


def test_without_torch_jit_an_archive_is_refused_with_the_remedy(toy, tmp_path, registered, monkeypatch):
    path = _archive(tmp_path / "archive.pt", toy.model(quick_gelu=True))
    monkeypatch.delattr(torch.jit, "load")
    with pytest.raises(ConfigError, match="no longer reads: in an environment whose torch reads it"):
        load_encoder(registered, path)


@pytest.mark.slow
def test_a_real_architecture_from_a_local_checkpoint(tmp_path):
    """ViT-B-32 with random weights, as safetensors and as .pt."""
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms("ViT-B-32", pretrained=None)
    model.eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{n}": t for n, t in model.state_dict().items()}}, tmp_path / "w.pt")
    image = Image.effect_noise((300, 250), 80).convert("RGB")
    expected = _features(model, transform(image)[None])
    digests = set()
    for name in ("w.safetensors", "w.pt"):
        encoder = load_encoder("ViT-B-32", tmp_path / name)
        torch.testing.assert_close(encoder.encode_images(encoder.transform(image)[None]), expected, atol=1e-5, rtol=0)
        digests.add(encoder.digest)
    assert len(digests) == 1
    with pytest.raises(ConfigError, match=r"does not fit ViT-B-16: .* It looks like ViT-B-32: --backbone ViT-B-32"):
        load_encoder("ViT-B-16", tmp_path / "w.pt")
