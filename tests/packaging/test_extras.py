"""What the doctor says about optional parts is what pyproject.toml brings."""

import re

from fastfsl.cli.parts import PARTS


def test_the_parts_are_the_extras(pyproject):
    extras = pyproject["project"]["optional-dependencies"]
    for extra, (_, distributions) in PARTS.items():
        lines = [*extras[extra], *(extras["train"] if extra == "export" else ())]  # export stands on train
        assert set(distributions) <= {re.split(r"[\[<>=;]", line)[0] for line in lines}, extra
