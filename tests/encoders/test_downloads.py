"""Published weights without a network: an answer in seconds that names the file, its place and the right backbone."""

import http.server
import ssl
import threading
import time
import urllib.error
from pathlib import Path

import huggingface_hub
import open_clip
import pytest

from fastfsl import downloads
from fastfsl.backbones import installed_catalogue
from fastfsl.encoders import load_encoder
from fastfsl.errors import ConfigError

OPENAI = "timm/vit_base_patch32_clip_224.openai"


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path):
    """An empty cache, and no word that forbids the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HOME", str(tmp_path))
    downloads._no_answer.cache_clear()
    yield tmp_path / "hub"
    downloads._no_answer.cache_clear()


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(downloads, "_ask", lambda _: "Name or service not known")


def _place(hub, repository, *files):
    """Files in a hub's cache, as a download leaves them."""
    snapshot = hub / f"models--{repository.replace('/', '--')}" / "snapshots" / "0"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    snapshot.mkdir(parents=True)
    for file in files:
        (snapshot / file).write_bytes(b"x")
    return snapshot


@pytest.mark.parametrize("backbone", ["ViT-B-32", "ViT-B/32", "ViT-B-32-quickgelu"])
def test_offline_a_tag_names_the_file_its_place_and_the_quickgelu_backbone(no_network, hub, backbone):
    start = time.monotonic()
    with pytest.raises(ConfigError) as refused:
        load_encoder(backbone, "openai")
    assert time.monotonic() - start < 5
    message = str(refused.value)
    for word in (
        "huggingface.co cannot be reached (Name or service not known)",
        f"open_clip_model.safetensors or open_clip_pytorch_model.bin of {OPENAI}",
        str(hub / "models--timm--vit_base_patch32_clip_224.openai"),
        f"hf download {OPENAI} open_clip_model.safetensors",
        "--backbone ViT-B-32-quickgelu --pretrained weights/open_clip_model.safetensors",
    ):
        assert word in message


def test_offline_weights_for_gelu_keep_the_plain_backbone(no_network):
    with pytest.raises(ConfigError, match=r"--backbone ViT-B-32 --pretrained \S+$"):
        load_encoder("ViT-B-32", "laion2b_s34b_b79k")


def test_offline_the_file_of_openais_own_package_is_pointed_at(no_network, tmp_path):
    old = tmp_path / ".cache" / "clip" / "ViT-B-32.pt"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"x")
    with pytest.raises(ConfigError, match=f"--backbone ViT-B-32 --pretrained {old}"):
        load_encoder("ViT-B-32", "openai")


def test_offline_a_hub_model_names_its_files_and_the_folder_to_pass(no_network, hub):
    with pytest.raises(ConfigError) as refused:
        load_encoder("hf-hub:some/model")
    for word in ("open_clip_config.json", "open_clip_model.safetensors", str(hub / "models--some--model")):
        assert word in str(refused.value)
    assert "hf download some/model --local-dir FOLDER" in str(refused.value)
    assert str(refused.value).endswith("--backbone local-dir:FOLDER")


def test_offline_what_is_cached_is_loaded_without_asking_again(no_network, hub, monkeypatch):
    _place(hub, OPENAI, "open_clip_pytorch_model.bin")
    offline = []

    def create(*args, **options):
        offline.append(huggingface_hub.constants.HF_HUB_OFFLINE)
        raise OSError("far enough")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    with pytest.raises(ConfigError, match="far enough"):
        load_encoder("ViT-B-32", "openai")
    assert offline == [True]
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_a_network_that_answers_is_used(monkeypatch):
    monkeypatch.setattr(downloads, "_ask", lambda _: None)
    offline = []

    def create(*args, **options):
        offline.append(huggingface_hub.constants.HF_HUB_OFFLINE)
        raise OSError("far enough")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    with pytest.raises(ConfigError, match="far enough"):
        load_encoder("ViT-B-32", "openai")
    assert offline == [False]


def test_hf_hub_offline_is_obeyed_without_a_question(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(downloads, "_ask", lambda _: pytest.fail("the network was asked"))
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE forbids"):
        load_encoder("ViT-B-32", "openai")


def test_a_network_that_swallows_everything_is_given_up(monkeypatch):
    monkeypatch.setattr(downloads, "_ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(downloads, "_ask", lambda _: time.sleep(5))
    start = time.monotonic()
    assert "did not answer within 0.2 s" in str(downloads.unreachable("https://example.org/a"))
    assert time.monotonic() - start < 3
    assert downloads.unreachable("https://example.org/a")  # kept, not asked again


def test_any_answer_means_that_there_is_a_network(monkeypatch):
    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):  # the library's name
            self.send_error(404)

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    try:
        assert downloads.unreachable(f"http://127.0.0.1:{server.server_port}/a") is None
    finally:
        server.shutdown()
        server.server_close()
    downloads._no_answer.cache_clear()
    assert "cannot be reached" in str(downloads.unreachable(f"http://127.0.0.1:{server.server_port}/a"))


def test_a_certificate_that_is_not_trusted_here_is_left_to_the_download(monkeypatch):
    def refuse(*args, **options):
        raise urllib.error.URLError(ssl.SSLCertVerificationError("self-signed"))

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    assert downloads.unreachable("https://example.org/a") is None


def test_weights_behind_an_address_are_looked_for_where_open_clip_keeps_them(tmp_path):
    published = downloads.weights_of({"url": "https://example.org/v/w-1.pt"})
    assert published is not None
    assert not published.is_cached()
    assert published.place == Path("~/.cache/clip").expanduser()
    published.place.mkdir(parents=True)
    (published.place / "w-1.pt").write_bytes(b"x")
    assert published.is_cached()
    assert downloads.weights_of({}) is None


def test_the_catalogue_read_without_an_import_is_open_clips_own():
    catalogue = installed_catalogue()
    assert catalogue is not None
    assert set(catalogue.models) <= set(open_clip.list_models())  # tests may have registered some more
    assert "ViT-B-32" in catalogue.models
    for name in catalogue.models:
        tags = open_clip.list_pretrained_tags_by_model(name)
        assert list(catalogue.tags(name)) == tags
        for tag in tags:
            theirs = open_clip.get_pretrained_cfg(name, tag)
            for key in ("url", "hf_hub", "quick_gelu"):
                assert (catalogue.tags(name)[tag].get(key) or None) == (theirs.get(key) or None)
