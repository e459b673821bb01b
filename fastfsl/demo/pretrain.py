"""Make the tiny CLIP of the demo: `python -m fastfsl.demo.pretrain` (about ten minutes on two cores).

The recipe is chosen on fonts that are never trained on (`fonts.HELD_OUT_FAMILIES`). scikit-learn's digits are read
only by `--report`, after the last choice. Beside the weights stands `pretrain_report.json`: the recipe and its figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfsl.demo.digits import tiny_clip_dir

if TYPE_CHECKING:
    from collections.abc import Sequence

    from open_clip import CLIP

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
REPORT_FILE = "pretrain_report.json"
_PACKAGES = ("torch", "open_clip_torch", "numpy", "scipy", "pillow", "matplotlib", "safetensors")


def save_weights(model: CLIP, folder: Path) -> Path:
    """Write a model's weights in half precision (open_clip widens them on loading) and its configuration.

    Args:
        model: The model, in fp32.
        folder: Target folder, made if missing. Weights already there are replaced in one step.

    Returns:
        Path of the weights.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = folder / CONFIG_FILE
    if not config.exists():
        shutil.copyfile(tiny_clip_dir() / CONFIG_FILE, config)
    weights = folder / WEIGHTS_FILE
    staging = folder / f".{WEIGHTS_FILE}.part"
    save_file(
        {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, staging, {"format": "pt"}
    )
    staging.chmod(0o644)  # safetensors makes it private
    staging.replace(weights)
    return weights


def _write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the report beside the weights."""
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _train(folder: Path, steps: int | None, seed: int, threads: int) -> None:
    """Train, save, and judge the saved weights on the held-out fonts."""
    import open_clip
    import torch

    from fastfsl.demo.contrastive import Recipe, held_out_accuracy, pretrain
    from fastfsl.demo.fonts import HELD_OUT_FAMILIES, TRAIN_FAMILIES

    torch.set_num_threads(threads)
    recipe = Recipe(seed=seed) if steps is None else Recipe(seed=seed, steps=steps)
    start = time.perf_counter()
    weights = save_weights(pretrain(recipe, log=lambda line: print(line, flush=True)), folder)
    seconds = time.perf_counter() - start
    saved = open_clip.create_model(f"local-dir:{folder}").eval()
    report = {
        "recipe": dataclasses.asdict(recipe),
        "train_fonts": TRAIN_FAMILIES,
        "held_out_fonts": HELD_OUT_FAMILIES,
        "held_out_font_accuracy": held_out_accuracy(saved),
        "logit_scale": saved.logit_scale.exp().item(),
        "seconds": round(seconds, 1),
        "threads": threads,
        "weights_bytes": weights.stat().st_size,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
    }
    _write_report(folder, report)
    print(f"held-out fonts: {report['held_out_font_accuracy']:.4f}  ({seconds:.0f} s, {folder})")


def _report(folder: Path) -> None:
    """Read the real digits, once, and add the figure to the report."""
    from fastfsl.demo.contrastive import scans_accuracy

    path = folder / REPORT_FILE
    report = json.loads(path.read_text(encoding="utf-8"))
    report["digits_zero_shot_accuracy"] = scans_accuracy(folder)
    _write_report(folder, report)
    print(json.dumps(report, indent=2))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the pretraining.

    Args:
        arguments: Command line arguments; those of the process if None.
    """
    parser = argparse.ArgumentParser(prog="python -m fastfsl.demo.pretrain", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=tiny_clip_dir(), help="folder of the model (default: the package's)"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of initialisation and data")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--report", action="store_true", help="train nothing: measure zero-shot on the real digits, once"
    )
    options = parser.parse_args(arguments)
    if options.report:
        _report(options.out)
    else:
        # Before torch starts its pool: spinning workers cost a time slice per operation when the cores are shared.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        _train(options.out, options.steps, options.seed, options.threads)


if __name__ == "__main__":
    main()
