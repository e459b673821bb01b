"""Small image folders, made on the spot."""

from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def make_images(tmp_path):
    """Write one small image per relative path and return the folder."""

    def make(*relative_paths: str, root: Path = tmp_path) -> Path:
        for number, relative in enumerate(relative_paths):
            path = root / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (6, 5), (number * 7 % 256, 10, 20)).save(path, "PNG")
        return root

    return make
