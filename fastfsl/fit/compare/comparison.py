"""The comparison itself: every method on every episode, each finished cell kept at once."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastfsl.data.audit import audit
from fastfsl.devices import resolve_device
from fastfsl.errors import DataError, FastFSLError, ResourceError
from fastfsl.fit.compare.cell import Cell, CellSpec
from fastfsl.fit.compare.fitting import BATCH_SIZE, run_cell
from fastfsl.fit.compare.leaderboard import leaderboard
from fastfsl.fit.compare.noise import CONFIDENCE
from fastfsl.fit.compare.pool import Pool, load_pool
from fastfsl.fit.compare.results import Comparison, Failure
from fastfsl.fit.compare.tunings import Tunings
from fastfsl.fit.comparison_plan import CELLS, TUNING, check_folder, check_plan, default_methods, shots_label
from fastfsl.fit.config import TrainConfig, check_params
from fastfsl.fit.methods import find_method, find_source, make_estimator, make_source, own_params
from fastfsl.fit.run import installed_versions, now
from fastfsl.fit.train import Reporter, SilentReporter


def compare(
    data: Path,
    *,
    methods: Sequence[str] | None = None,
    shots: Sequence[int | None] = (1, 4, 16),
    seeds: int = 3,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    split: str = "test",
    out: Path | None = None,
    force: bool = False,
    config: TrainConfig | None = None,
    reporter: Reporter | None = None,
    cache_dir: Path | None = None,
) -> Comparison:
    """Fit every method on every episode of a data set and score it on the test split.

    The test split's labels are read to score, never before: nothing fitted or chosen sees them.

    Args:
        data: an image folder, a CoOp split file, a table of paths and labels or a feature file.
        methods: names of the registry; default those on frozen features but `SLOW`. Of methods that tune the encoder
            (images only) those with the same source and options share its training: `mps` and `mps+fma`.
        shots: samples a class; None stands for all there are.
        seeds: episodes of each, seeds 0 .. seeds - 1; the same ones for every method.
        params: parameters of methods, by method and name; of a source and an estimator as `load_config` takes them:
            `{"mps+fma": {"mps": {"epochs": 5}, "fma": {"epochs": 20}}}`.
        split: what is scored on, `test` or `val`.
        out: folder that keeps finished cells and the progress of a tuning, and in the end the results; cells that it
            holds already are not computed again. None keeps nothing.
        force: compute them again nevertheless.
        config: its device, its classes, whether shots are exact, and for images its backbone, pretrained, templates,
            num_views, augmentation and how the data are read are used.
        reporter: hears of progress and warnings.
        cache_dir: where features of images are kept; by default the user's cache folder.

    Returns:
        The comparison. A method that fails on an episode is among its `failures`.

    Raises:
        DataError: the data cannot be used, or a class has fewer samples than an episode asks for.
        ConfigError: an option cannot be used; an unknown method or parameter, for one, or a method that tunes the
            encoder on a feature file.
    """
    reporter = reporter or SilentReporter()
    names = tuple(methods) if methods is not None else default_methods()
    check_plan(names, shots, seeds)
    config = config or TrainConfig()
    device = str(resolve_device(config.device))
    resolved = {name: _resolved(name, (params or {}).get(name, {})) for name in names}
    if out is not None:
        check_folder(out)
    pool = load_pool(
        data, names, shots, range(seeds), split=split, config=config, reporter=reporter, cache_dir=cache_dir
    )
    looked_over = audit(
        pool.class_names,
        pool.train.as_classified,
        pool.train.labels,
        pool.test.features,
        pool.test.labels,
        train_items=pool.train_items,
        test_items=pool.test_items,
    )
    findings = (*pool.notes, *looked_over.warnings())
    for warning in findings:
        reporter.warn(warning)
    specs = [
        CellSpec(method=name, **resolved[name], shots=number, seed=seed, device=device)
        for seed in range(seeds)
        for number in shots
        for name in names
    ]
    cells, failures = _run_all(specs, pool, out, reporter, force=force)
    comparison = Comparison(
        rows=tuple(leaderboard(cells, names, shots, range(seeds))),
        cells=tuple(cells),
        failures=tuple(failures),
        warnings=findings,
        data={
            "path": str(data),
            "classes": config.classes,
            "num_classes": len(pool.class_names),
            "num_train": len(pool.train.labels),
            "class_counts": list(looked_over.class_counts),
            "split": split,
            "num_test": len(pool.test.labels),
            "files": pool.files,
        },
        settings={
            "methods": {name: _in_sections(name, **resolved[name]) for name in names},
            "shots": [shots_label(number) for number in shots],
            "seeds": seeds,
            "device": device,
            "threads": torch.get_num_threads(),
            "batch_size": BATCH_SIZE,
            "confidence": CONFIDENCE,
        },
        versions=installed_versions(),
        created=now(),
    )
    if out is not None:
        comparison.save(out)
        shutil.rmtree(out / TUNING, ignore_errors=True)
    return comparison


def _resolved(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All own parameters of a method's estimator and source, as a spec takes them: where none is given the default."""
    params, source_params = check_params(name, given)
    estimator = make_estimator(name, params, logit_scale=100.0, seed=0, device="cpu")
    estimator.check_parameters()
    source = make_source(name, source_params, seed=0)
    every = {"params": estimator.get_params(), "source_params": {} if source is None else source.options()}
    return {part: own_params(values) for part, values in every.items()}


def _in_sections(name: str, params: dict[str, Any], source_params: dict[str, Any]) -> dict[str, Any]:
    """A method's parameters as `params` of `compare` takes them."""
    source = find_source(name)
    return params if source is None else {source.name: source_params, find_method(name).name: params}


def _run_all(
    specs: Sequence[CellSpec], pool: Pool, out: Path | None, reporter: Reporter, *, force: bool
) -> tuple[list[Cell], list[Failure]]:
    """The cells, from the folder or computed; every computed one is kept at once."""
    tuning = None if out is None else out / TUNING
    if tuning is not None and force:
        shutil.rmtree(tuning, ignore_errors=True)
    tunings = None if pool.images is None else Tunings(pool, pool.images, tuning)
    digests = {key: pool.digest(*key) for key in pool.episodes}
    cells: list[Cell] = []
    failures: list[Failure] = []
    versions = installed_versions()
    outdated = 0
    for done, spec in enumerate(specs):
        reporter.stage("cells", done, len(specs))
        path = None if out is None else out / CELLS / f"{spec.key(digests[spec.shots, spec.seed])}.json"
        cell = None if path is None or force else _kept(path, spec, reporter)
        if cell is None:
            try:
                cell = run_cell(spec, pool, tunings=tunings, reporter=_Named(spec, reporter))
            except ResourceError:  # no method's fault: the same command goes on here
                raise
            except (FastFSLError, np.linalg.LinAlgError, torch.OutOfMemoryError) as error:
                failures.append(Failure(spec, str(error)))
                reporter.warn(f"{spec}: {error}")
                continue
            if path is not None:
                cell.save(path)
        outdated += cell.versions != versions
        cells.append(cell)
    reporter.stage("cells", len(specs), len(specs))
    if outdated:
        reporter.warn(f"{outdated} of {len(specs)} cells were kept from other package versions: --force renews them")
    return cells, failures


def _kept(path: Path, spec: CellSpec, reporter: Reporter) -> Cell | None:
    if not path.exists():
        return None
    try:
        return Cell.load(path, spec)
    except DataError as error:
        reporter.warn(f"{error}: computed again")
        return None


@dataclass(frozen=True)
class _Named:
    """Tells a reporter of which cell it hears."""

    spec: CellSpec
    reporter: Reporter

    def stage(self, name: str, done: int, total: int) -> None:
        """`done` of `total` units of the cell's stage `name` are finished."""
        self.reporter.stage(f"{self.spec}: {name}", done, total)

    def warn(self, message: str) -> None:
        """Something the user should know of the cell."""
        self.reporter.warn(f"{self.spec}: {message}")
