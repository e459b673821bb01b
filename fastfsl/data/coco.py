"""COCO files as labels of whole images: every image has one category."""

import json
from pathlib import Path
from typing import Any

from fastfsl.data.table_file import Table, from_objects
from fastfsl.errors import DataError, resource_error


def is_coco(path: Path) -> bool:
    """Whether it is a JSON file with `images`, `annotations` and `categories`; what cannot be read is none."""
    if path.suffix.lower() != ".json":
        return False
    content = _content(path)
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def read_coco(path: Path) -> Table:
    """The images with the name of their category; those without an annotation have None.

    Raises:
        DataError: the file is not as COCO has it, or images have several categories, as for detection.
    """
    content = _content(path)
    try:
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        found: dict[Any, set[str]] = {image["id"]: set() for image in content["images"]}
        for annotation in content["annotations"]:
            found[annotation["image_id"]].add(names[annotation["category_id"]])
        rows = [
            {"file_name": image["file_name"], "label": next(iter(found[image["id"]]), None)}
            for image in content["images"]
        ]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: expected images, annotations and categories as COCO has them ({error!r})") from error
    several = [image["file_name"] for image in content["images"] if len(found[image["id"]]) > 1]
    if several:
        raise DataError(
            f"{path}: {len(several)} of {len(rows)} images have several categories, such as {several[0]}; a classifier "
            "needs one per image: crop the objects, or list the images with one label each"
        )
    return from_objects(path, enumerate(rows, start=1))


def _content(path: Path) -> Any:  # noqa: ANN401 - any JSON
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        fault = resource_error(error, f"read {path}")
        if fault is not None:
            raise fault from error
        return None
    except (ValueError, RecursionError):
        return None
