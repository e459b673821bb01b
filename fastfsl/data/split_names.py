"""What people call the splits of a data set: `Train`, `training_set`, `valid`, `dev`, `TEST`, `val2017`."""

import re

from fastfsl.data.dataset import SPLITS

_WORDS = {
    "train": ("train", "training", "trained", "trn", "tr"),
    "val": ("val", "valid", "validation", "validate", "validating", "vld", "dev", "devel", "development"),
    "test": ("test", "testing", "tests", "tst", "te", "ts", "eval", "evaluation", "evaluate", "holdout"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}

# Said beside the word and without a meaning of their own: `train_set`, `test-images`, `data_val`.
_FILLERS = frozenset(
    {"set", "sets", "split", "data", "dataset", "images", "image", "imgs", "img", "pictures", "photos"}
)
_SEPARATORS = re.compile(r"[\s_\-.]+")
_NUMBER = re.compile(r"(?:19|20)?\d{2}$")
_JOINED = re.compile(r"(set|data|split|images|imgs)$")

# Folders that only hold others: what lies in them is meant.
_WRAPPERS = frozenset({"images", "image", "imgs", "img", "pictures", "photos", "data", "dataset", "jpegimages"})


def split_of(name: str) -> str | None:
    """The split, "train", "val" or "test", that a name means; None if it is no name of one."""
    words = [word for word in _SEPARATORS.split(name.strip().casefold()) if word and word not in _FILLERS]
    if len(words) == 2 and words[0] in {"hold", "held"} and words[1] == "out":
        return "test"
    if len(words) == 2 and words[0].isdigit():
        del words[0]
    if len(words) == 2 and _NUMBER.fullmatch(words[1]):
        del words[1]
    if len(words) != 1:
        return None
    word = words[0]
    for form in (word, _NUMBER.sub("", word), _JOINED.sub("", word)):
        if form in _SPLIT_OF:
            return _SPLIT_OF[form]
    return None


def is_wrapper(name: str) -> bool:
    """Whether a folder's name says no more than that there are images in it."""
    return name.strip().casefold() in _WRAPPERS


def assign_splits(names: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Names by the split they mean, splits in their order, and the names that mean none.

    Beside a test split `eval` and the like are the one that choices may be made on, val, if there is none other.
    """
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    others = []
    for name in names:
        split = split_of(name)
        if split is None:
            others.append(name)
        else:
            found[split].append(name)
    evaluation = [name for name in found["test"] if name.strip().casefold().startswith("eval")]
    if not found["val"] and evaluation and len(found["test"]) > len(evaluation):
        found["val"] = evaluation
        found["test"] = [name for name in found["test"] if name not in evaluation]
    return {split: members for split, members in found.items() if members}, others
