"""The eleven standard sets of few-shot CLIP work: where their files lie, and how their class names read as words.

Their prompts are in `fastfsl.data.prompts.TEMPLATES` under the same keys. Nine of the sets come with a split file of
the CoOp convention, whose class names are words already. The rules here turn the names that the sets themselves use
(folder names such as `AnnualCrop`, car models that end in their year) into the same.

Source: Zhou et al., "Learning to Prompt for Vision-Language Models" (data layout, class names, prompts).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from fastfsl.data.prompts import fill, resolve_templates


@dataclass(frozen=True)
class Preset:
    """One standard set.

    Attributes:
        folder: What the community calls its folder.
        split_file: Its split file there; None: the set has lists of its own (see `fastfsl.data.layouts`).
        rename: A class name as found, underscores being blanks already, as the words of a prompt.
    """

    folder: str
    split_file: str | None
    rename: Callable[[str], str] = str


def _by_table(table: dict[str, str]) -> Callable[[str], str]:
    return lambda name: table.get(name, name)


def _split_camel_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)


def _year_first(name: str) -> str:
    return re.sub(r"^(.*\S) ((?:19|20)[0-9]{2})$", r"\2 \1", name)


def _reverse_path(name: str) -> str:
    """`a/apartment building/outdoor`, the first part being an initial, as `outdoor apartment building`."""
    initial, *parts = name.strip("/").split("/")
    return " ".join(reversed(parts)) if parts and len(initial) == 1 else name


def _without_wordnet_id(name: str) -> str:
    return re.sub(r" \(n[0-9]{8}\)$", "", name)


PRESETS = MappingProxyType(
    {
        "imagenet": Preset("imagenet", None, _without_wordnet_id),
        "caltech101": Preset(
            "caltech-101",
            "split_zhou_Caltech101.json",
            _by_table({"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}),
        ),
        "oxford-pets": Preset("oxford_pets", "split_zhou_OxfordPets.json", str.lower),
        "stanford-cars": Preset("stanford_cars", "split_zhou_StanfordCars.json", _year_first),
        "flowers102": Preset("oxford_flowers", "split_zhou_OxfordFlowers.json"),
        "food101": Preset("food-101", "split_zhou_Food101.json"),
        "fgvc-aircraft": Preset("fgvc_aircraft", None),
        "sun397": Preset("sun397", "split_zhou_SUN397.json", _reverse_path),
        "dtd": Preset("dtd", "split_zhou_DescribableTextures.json"),
        "eurosat": Preset(
            "eurosat",
            "split_zhou_EuroSAT.json",
            _by_table(
                {
                    "AnnualCrop": "Annual Crop Land",
                    "HerbaceousVegetation": "Herbaceous Vegetation Land",
                    "Highway": "Highway or Road",
                    "Industrial": "Industrial Buildings",
                    "Pasture": "Pasture Land",
                    "PermanentCrop": "Permanent Crop Land",
                    "Residential": "Residential Buildings",
                    "SeaLake": "Sea or Lake",
                }
            ),
        ),
        "ucf101": Preset("ucf101", "split_zhou_UCF101.json", _split_camel_case),
    }
)


def prompt_names(class_names: Sequence[str], templates: str | Sequence[str]) -> tuple[str, ...]:
    """The class names as prompts say them: by the rules of the standard set whose prompts are asked for, if any.

    Args:
        class_names: Names as found in the data.
        templates: As for `resolve_templates`; a key of `PRESETS` chooses its rules.

    Returns:
        As many names; unchanged if `templates` is no such key.
    """
    preset = PRESETS.get(templates) if isinstance(templates, str) else None
    if preset is None:
        return tuple(class_names)
    return tuple(preset.rename(" ".join(name.replace("_", " ").split())) for name in class_names)


def class_prompts(class_names: Sequence[str], templates: str | Sequence[str]) -> list[str]:
    """Every class in every template, class by class.

    Args:
        class_names: C names as found in the data.
        templates: As for `resolve_templates`.

    Returns:
        C times as many prompts as there are templates.

    Raises:
        ConfigError: Unknown preset, or a template without exactly one "{}".
        DataError: A class name without a word.
    """
    resolved = resolve_templates(templates)
    return [prompt for name in prompt_names(class_names, templates) for prompt in fill(resolved, name)]
