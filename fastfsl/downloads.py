"""Published weights: whether they are on this machine, and whether they could be fetched. Answers within seconds.

Without a network huggingface_hub retries for minutes and then names no file. So a machine is asked once whether it
reaches the host; if not, what is cached is loaded as it is, and what is not is refused with the file's name and place.
"""

import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastfsl.backbones import HUB, LOCAL, QUICK
from fastfsl.errors import ConfigError

# A network that has not answered by then is taken for none. Proxies and slow lines need one or two seconds.
_ANSWER_SECONDS = 8.0
_CONFIG = "open_clip_config.json"
# What open_clip looks for in a repository, in this order.
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Published:
    """Files of a repository of the hub, or a file behind an address.

    Attributes:
        repository: "org/name" on the hub; "" for an address.
        files: Names of files, each of which would do.
        url: The address.
    """

    repository: str
    files: tuple[str, ...]
    url: str = ""

    @property
    def address(self) -> str:
        """Where the first of the files lies on the network."""
        return self.url or f"{_endpoint()}/{self.repository}/resolve/main/{self.files[0]}"

    @property
    def place(self) -> Path:
        """The folder of this machine in which the files are looked for."""
        if not self.repository:
            return Path("~/.cache/clip").expanduser()
        return _hub_cache() / f"models--{self.repository.replace('/', '--')}"

    def is_cached(self) -> bool:
        """Whether one of the files is on this machine."""
        if not self.repository:
            return (self.place / self.files[0]).is_file()
        from huggingface_hub import try_to_load_from_cache

        return any(isinstance(try_to_load_from_cache(self.repository, file), str) for file in self.files)


def weights_of(where: Mapping[str, Any]) -> Published | None:
    """The weights of a tag, as open_clip would fetch them.

    Args:
        where: The tag's entry in a `Catalogue`.
    """
    hub, url = str(where.get("hf_hub", "")), str(where.get("url", ""))
    if hub:
        repository, _, file = hub.rpartition("/")
        if not file:
            return Published(repository, _WEIGHTS)
        stem, dot, suffix = file.rpartition(".")
        return Published(repository, (f"{stem}.safetensors", file) if dot and suffix in {"bin", "pth"} else (file,))
    return Published("", (url.rpartition("/")[2],), url) if url else None


def require_weights(model: str, tag: str, where: Mapping[str, Any]) -> None:
    """Refuse a tag's weights that are neither on this machine nor can be fetched.

    Args:
        model: open_clip's name of the model.
        tag: The tag.
        where: Its entry in a `Catalogue`.

    Raises:
        ConfigError: Naming the file, where it is looked for, and how it comes here.
    """
    published = weights_of(where)
    if published is None or published.is_cached() or (reason := unreachable(published.address)) is None:
        return
    old = _openai_file(where)
    if old is not None:
        raise ConfigError(
            f"weights {tag!r} of {model} are not in {published.place}, and {reason}. Their older file is on this "
            f"machine: --backbone {model} --pretrained {old}"
        )
    quick = bool(where.get("quick_gelu"))
    name = f"{model.removesuffix(QUICK)}{QUICK}" if quick else model
    note = " (a bare state dict does not say that it needs QuickGELU: the name has to)" if quick else ""
    raise ConfigError(
        f"weights {tag!r} of {model} are not on this machine, and {reason}. {_looked_for(published)} "
        f"{_fetch(published)} Then, here: --backbone {name} --pretrained weights/{published.files[0]}{note}"
    )


def require_repository(backbone: str, *, with_weights: bool = True) -> None:
    """Refuse a repository of the hub that is neither on this machine nor can be fetched.

    Args:
        backbone: "hf-hub:ORG/REPO".
        with_weights: Whether its weights are needed too, and not its configuration alone.

    Raises:
        ConfigError: Naming the files, where they are looked for, and how they come here.
    """
    repository = backbone.removeprefix(HUB).partition("@")[0]
    needed = [Published(repository, (_CONFIG,)), *([Published(repository, _WEIGHTS)] if with_weights else [])]
    missing = [published for published in needed if not published.is_cached()]
    if not missing or (reason := unreachable(missing[0].address)) is None:
        return
    files = " and ".join(" or ".join(published.files) for published in missing)
    raise ConfigError(
        f"{backbone} is not on this machine, and {reason}. Looked for {files} of {repository} in {missing[0].place}. "
        f"Where there is a network: hf download {repository} --local-dir FOLDER; copy the folder here. "
        f"Then: --backbone {LOCAL}FOLDER"
    )


def unreachable(address: str) -> str | None:
    """Why an address cannot be reached, for a message; None if it can, whatever it answers."""
    if _told_to_stay_offline():
        return "HF_HUB_OFFLINE forbids to fetch them"
    host = address.split("/")[2] if "//" in address else address
    return _no_answer(host, address)


@contextmanager
def cached_only_if_offline() -> Iterator[None]:
    """While the block runs, huggingface_hub takes what is cached if its host cannot be reached, without retrying."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not before and unreachable(f"{_endpoint()}/") is not None:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _openai_file(where: Mapping[str, Any]) -> Path | None:
    """The archive that OpenAI's own package leaves; it says itself that it needs QuickGELU."""
    url = str(where.get("url", ""))
    file = Path("~/.cache/clip").expanduser() / url.rpartition("/")[2]
    return file if "openaipublic" in url and file.is_file() else None


def _looked_for(published: Published) -> str:
    of = f" of {published.repository}" if published.repository else ""
    return f"Looked for {' or '.join(published.files)}{of} in {published.place}."


def _fetch(published: Published) -> str:
    if published.repository:
        by_hand = f"hf download {published.repository} {published.files[0]} --local-dir weights"
        return f"Where there is a network: {by_hand} (or {published.address}); copy the folder weights here."
    return f"Where there is a network: fetch {published.address} into a folder weights; copy it here."


@cache
def _no_answer(host: str, address: str) -> str | None:
    """Asked in a thread of its own: looking up a name may block for longer than any timeout of a connection."""
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(_ask(address)), daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    if not found:
        return f"{host} did not answer within {_ANSWER_SECONDS:g} s"
    return None if found[0] is None else f"{host} cannot be reached ({found[0]})"


def _ask(address: str) -> str | None:
    """Why there is no answer; None if there is one. By urllib, which knows the system's proxies."""
    if not address.startswith(("https://", "http://")):
        return None  # another kind of endpoint: leave it to huggingface_hub
    request = urllib.request.Request(address, method="HEAD")  # noqa: S310  # the scheme was checked
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS):  # noqa: S310
            return None
    except urllib.error.HTTPError:  # an answer
        return None
    except urllib.error.URLError as error:
        # The host was reached; which certificates are to be trusted is settled elsewhere.
        if isinstance(error.reason, ssl.SSLError):
            return None
        return str(getattr(error.reason, "strerror", "") or error.reason)
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__


def _told_to_stay_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT).rstrip("/")


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
