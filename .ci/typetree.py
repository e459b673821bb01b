"""Lay the sources out in the wheel's shape, as a git-ignored `typetree/` of links.

Tools that read sources instead of importing them (mypy, import-linter, an editor) look for `fastfsl.kernels` below
`fastfsl/`, while `[tool.setuptools.package-dir]` maps it to `kernels/`. Point them at `typetree/` and they see every
room: without it `mypy -p fastfsl` skips the mapped rooms and reports success.
"""

import os
import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "typetree"
BESIDE = ("tests", "benchmarks")  # not part of the wheel, but checked with it


def main() -> None:
    """Bring `typetree/` in line with the mapping in pyproject.toml; links that are right already stay."""
    mapped: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    package = TREE / "fastfsl"
    links = {TREE / name: ROOT / name for name in BESIDE if (ROOT / name).is_dir()}
    links |= {TREE / room.replace(".", "/"): ROOT / folder for room, folder in mapped.items()}
    for entry in (ROOT / "fastfsl").iterdir():
        if entry.suffix in {".py", ".typed"} or (entry / "__init__.py").is_file():
            links[package / entry.name] = entry

    package.mkdir(parents=True, exist_ok=True)
    for stale in {*TREE.iterdir(), *package.iterdir()} - {package, *links}:
        if stale.is_dir() and not stale.is_symlink():  # a tool's cache
            shutil.rmtree(stale)
        else:
            stale.unlink()
    for link, source in links.items():
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(source, link.parent))


if __name__ == "__main__":
    main()
