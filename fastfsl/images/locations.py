"""Advice on a path that is no file of this machine: an address, a path as Windows writes it, an inline image."""

from __future__ import annotations

import os
import re

# Two letters at least: one letter before a colon is a drive of Windows. A Path has made one slash of two.
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/+(?P<rest>[^/].*)?")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_INLINE = re.compile(r"data:[\w/+.-]*[;,]")


def is_address(text: str) -> bool:
    """Whether it reads as `scheme://...`, as a URL or an address in a bucket does."""
    return _ADDRESS.match(text) is not None


def advice_on_missing(text: str) -> str:
    """What to say, after "no such file", of a path that does not exist; empty where nothing is special about it."""
    address = _ADDRESS.match(text)
    if address is not None:
        if address["scheme"].lower() == "file":
            return "; give the path itself, without file:"
        return "; it is an address, and nothing is fetched from the network: download it first and give the file"
    if _INLINE.match(text):
        return "; it is an image written as text (a data URL): decode it and pass its bytes"
    if os.sep != "\\" and (_DRIVE.match(text) or "\\" in text):
        return "; it is a path as Windows writes it: write it with / and as it is on this machine"
    return ""


def with_slashes(text: str) -> str:
    r"""The path with / for every \, which separates folders on Windows alone."""
    return text if os.sep == "\\" else text.replace("\\", "/")
