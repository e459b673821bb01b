"""What is wrong with a command's input, told before torch, open_clip, onnx or scikit-learn are imported.

These imports take seconds (on a busy machine twenty); a mistyped path is answered at once. What passes here is checked
again where it is used: the same functions hold, or stricter ones.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastfsl.errors import BundleError, ConfigError, DataError, DeviceError

if TYPE_CHECKING:
    from fastfsl.data import ClassSelection, FeatureDataset, ImageDataset
    from fastfsl.data.table_columns import Columns
    from fastfsl.fit.config import TrainConfig

RUN_FILE, MANIFEST = "run.json", "manifest.json"
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def check_data(data: Path) -> None:
    """Refuse data that are not there, before even the configuration is read.

    Raises:
        DataError: as `load_dataset` tells it.
    """
    try:
        there = data.exists()
    except (OSError, ValueError):
        there = False
    if not there:
        from fastfsl.data import load_dataset

        load_dataset(data)


def check_training(data: Path, config: "TrainConfig") -> "ImageDataset | FeatureDataset":
    """Refuse data, an episode, a backbone or prompts that no training can begin with.

    Returns:
        The data set, of the classes that are to be learnt.
    """
    from fastfsl.data import draw_episode

    dataset = config.dataset(data)
    _check_inputs(dataset, config, [config.method])
    draw_episode(dataset, config.shots, config.seed, exact=config.exact_shots)
    return dataset


def check_comparison(
    data: Path, config: "TrainConfig", methods: Sequence[str], shots: Iterable[int | None], split: str
) -> None:
    """Refuse data, episodes, a split or a backbone that no comparison can begin with."""
    from fastfsl.data import draw_episode
    from fastfsl.fit.comparison_plan import check_split

    dataset = config.dataset(data)
    check_split(split, data, dataset.splits)
    _check_inputs(dataset, config, methods)
    for number in shots:
        draw_episode(dataset, number, 0, exact=config.exact_shots)


def _check_inputs(dataset: "ImageDataset | FeatureDataset", config: "TrainConfig", methods: Iterable[str]) -> None:
    from fastfsl.data import ImageDataset, resolve_templates
    from fastfsl.fit.methods import check_takes_features

    if isinstance(dataset, ImageDataset):
        dataset.skipped.check(strict=config.strict)
        resolve_templates(config.templates)
        check_encoder(config.backbone, config.pretrained)
    else:
        for method in methods:
            check_takes_features(method)


def check_encoder(backbone: str, pretrained: str | None) -> None:
    """Refuse a backbone or weights that there are not, or that cannot be had without a network."""
    from fastfsl.backbones import HUB, check_backbone, clean_tag, installed_catalogue, model_name
    from fastfsl.downloads import require_repository, require_weights

    catalogue = installed_catalogue()
    if catalogue is None:  # another open_clip than is known here: it is asked itself, later
        return
    check_backbone(backbone, pretrained, catalogue)
    if backbone.startswith(HUB):
        require_repository(backbone, with_weights=pretrained is None)
        return
    tags, tag = catalogue.tags(model_name(backbone)), clean_tag(pretrained or "")
    if tag in tags:
        require_weights(model_name(backbone), tag, tags[tag])


def check_device(device: str) -> None:
    """Refuse a device of another name.

    Raises:
        DeviceError: it is none of auto, cpu and cuda.
    """
    if not _DEVICE.fullmatch(device):
        raise DeviceError(f"expected device auto, cpu or cuda, got {device!r}")


def kind_of_model(model: Path) -> Literal["run", "bundle"]:
    """Whether a folder is a run or a bundle.

    Raises:
        BundleError: it is neither.
    """
    if (model / MANIFEST).is_file():
        return "bundle"
    if (model / RUN_FILE).is_file():
        return "run"
    raise BundleError(f"expected a run folder ({RUN_FILE}) or a bundle ({MANIFEST}), got {model}{_instead(model)}")


def check_is_bundle(bundle: Path) -> None:
    """Refuse a run where a bundle is expected, with the command that makes one of it.

    Raises:
        BundleError: it is a run, or there is nothing.
    """
    if not (bundle / MANIFEST).is_file() and (bundle / RUN_FILE).is_file():
        raise BundleError(f"{bundle} is a run, not a bundle: fastfsl export {bundle} BUNDLE, then take BUNDLE")


def check_evaluation(
    model: Path,
    kind: Literal["run", "bundle"],
    data: Path,
    *,
    split: str,
    classes: "ClassSelection",
    image_root: Path | None,
    columns: "Columns",
    transfer: bool,
    expected_digest: str | None = None,
) -> "ImageDataset | FeatureDataset":
    """Refuse data that a model cannot be scored on.

    Returns:
        The data set, of the classes asked for.
    """
    from fastfsl.data import SPLITS, FeatureDataset, load_dataset, select_classes
    from fastfsl.data.scoring import features_to_score, label_map

    if kind == "run":
        record = read_run(model)
        names, width = record.get("class_names"), record.get("embed_dim")
    else:
        from fastfsl.bundle import read_manifest

        manifest = read_manifest(model, expected_digest)
        names, width = list(manifest.class_names), manifest.embed_dim
    if split not in SPLITS:
        raise ConfigError(f"expected --split to be one of {', '.join(SPLITS)}, got {split!r}")
    dataset = select_classes(load_dataset(data, image_root, columns), classes)
    if not isinstance(names, list) or not isinstance(width, int) or transfer:
        return dataset
    if isinstance(dataset, FeatureDataset):
        features_to_score(dataset, split, names, width)
        return dataset
    label_map(dataset.class_names, names)
    if set(dataset.splits) != {"train"}:
        dataset.split(split)
    return dataset


def check_export(run: Path, *, text: bool) -> None:
    """Refuse what is no run, and texts that the run's method cannot be extended by.

    Raises:
        BundleError: it is no run folder.
        ConfigError: --text, and the method is fitted to images of each class.
    """
    from fastfsl.fit.methods import METHODS, extensible, find_source

    if not (run / RUN_FILE).is_file() and (run / MANIFEST).is_file():
        raise BundleError(
            f"{run} is a bundle already, and export takes the run folder that it was made from: for another "
            f"--precision, --arch or --text give that run; to use the bundle: fastfsl predict {run} IMAGE"
        )
    if not (run / RUN_FILE).is_file():
        raise BundleError(
            f"expected a run folder, but {run / RUN_FILE} is missing{_instead(run)}: train one with "
            "`fastfsl train DATA --out RUN`"
        )
    record = read_run(run)
    method = record.get("config", {}).get("method")
    if not text or not isinstance(method, str):
        return
    if record.get("encoder") is None:
        raise ConfigError("--text needs an encoder, and this run was trained on features: export it without --text")
    if not extensible(method, record.get("selection", {}).get("weights")):
        known = ", ".join(name for name in METHODS if extensible(name))
        others = "" if find_source(method) is not None else " (or a tuned encoder by itself, such as mps)"
        raise ConfigError(
            f"--text: a class without images cannot be added to {method}, part of which is fitted to images of each "
            f"class. Export without --text, or train one of {known}{others}: fastfsl train DATA --out RUN --method fma"
        )


def read_run(run: Path) -> dict[str, Any]:
    """The record of a run, as far as it can be read without the packages that made it.

    Raises:
        BundleError: it is damaged.
    """
    try:
        record = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{run} is not a readable run ({error}): train it again") from error
    if not isinstance(record, dict) or not isinstance(record.get("config", {}), dict):
        raise BundleError(f"{run / RUN_FILE} holds no record of a run: train it again")
    return record


def check_images(images: Iterable[Path]) -> None:
    """Refuse images that are not there.

    Raises:
        DataError: naming the first.
    """
    from fastfsl.images import advice_on_missing

    for path in images:
        try:
            there = path.exists()
        except (OSError, ValueError):  # the reader says what is wrong with such a name
            continue
        if not there:
            raise DataError(f"{path}: no such image file{advice_on_missing(str(path))}")


def _instead(path: Path) -> str:
    """What was given in the place of a folder, for a message."""
    try:
        if not path.exists():
            return ", which does not exist"
        return "" if path.is_dir() else f", and {path} is a file"
    except (OSError, ValueError) as error:
        return f" ({getattr(error, 'strerror', None) or error})"
