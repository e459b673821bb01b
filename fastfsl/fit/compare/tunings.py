"""Methods that tune the encoder: their trainings, which methods share, and the data as the tuned encoder sees them."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from fastfsl.data import ImageSample
from fastfsl.fit.compare.cell import CellSpec
from fastfsl.fit.compare.pool import Images, Pool, ScoredSplit, Support
from fastfsl.fit.config import TrainConfig
from fastfsl.fit.estimator import Estimator
from fastfsl.fit.methods import find_source, make_source
from fastfsl.fit.run import tuned_for
from fastfsl.fit.source import ClassTexts, Source
from fastfsl.fit.train import Reporter, encode_plain, source_support, support_features


class Tunings:
    """Sources trained on a pool's episodes: each once, for all methods that begin with it and its options.

    Args:
        pool: the data.
        images: the pool's.
        folder: where trainings keep their progress, so that one that was interrupted goes on; each removes it when the
            next episode begins, the last episode's are the caller's to remove. None: nothing is kept.
    """

    def __init__(self, pool: Pool, images: Images, folder: Path | None) -> None:
        self._pool = pool
        self._images = images
        self._folder = folder
        self._episode: tuple[int | None, int] | None = None
        self._trained: dict[str, Source] = {}

    def source(self, spec: CellSpec, reporter: Reporter) -> Source | None:
        """The source of a cell, trained; None where its method has none.

        Raises:
            ConfigError: the encoder has no place for it, or the training diverges.
        """
        method = find_source(spec.method)
        source = make_source(spec.method, spec.source_params, seed=spec.seed)
        if method is None or source is None:
            return None
        episode = spec.shots, spec.seed
        if episode != self._episode:  # no cell to come needs these
            for key in self._trained:
                if self._folder is not None:
                    shutil.rmtree(self._folder / key, ignore_errors=True)
            self._trained.clear()
            self._episode = episode
        key = spec.model_copy(update={"method": method.name, "params": {}}).key(self._pool.digest(*episode))
        if key not in self._trained:
            support = source_support(
                self._images.encoder,
                self._images.texts,
                self._samples(spec),
                self._config(spec),
                reporter=reporter,
                cache_dir=self._images.cache_dir,
            )
            self._trained[key] = source.fit(
                support,
                on_stage=reporter.stage,
                on_warning=reporter.warn,
                checkpoints=None if self._folder is None else self._folder / key,
            )
        return self._trained[key]

    def tuned_pool(self, spec: CellSpec, source: Source, estimator: Estimator, reporter: Reporter) -> Pool:
        """The cell's episode and what is scored on, as features of the tuned encoder for the estimator."""
        texts = self._texts(source)
        encoder = tuned_for(estimator, source, self._images.encoder, texts)
        cache_dir = self._images.cache_dir
        plain, views = support_features(
            estimator, encoder, self._samples(spec), self._config(spec), reporter=reporter, cache_dir=cache_dir
        )
        test = encode_plain(
            encoder,
            self._images.test,
            cache_dir=cache_dir,
            progress=lambda done, total: reporter.stage("encoding what is scored on", done, total),
        )
        return replace(
            self._pool,
            class_embeddings=texts.embeddings,
            train=Support(views, self._pool.support(spec.shots, spec.seed).labels, plain),
            episodes={(spec.shots, spec.seed): np.arange(len(views))},
            test=ScoredSplit(test, self._pool.test.labels),
        )

    def conditional_probabilities(self, source: Source, features: NDArray[np.float32]) -> NDArray[Any]:
        """Class probabilities (n, C) of features (n, d), each by its own class embeddings."""
        logits = source.conditional_logits(self._images.encoder, self._texts(source), features)
        probabilities: NDArray[Any] = softmax(logits, axis=1)
        return probabilities

    def _texts(self, source: Source) -> ClassTexts:
        return replace(self._images.texts, embeddings=source.class_embeddings_)

    def _samples(self, spec: CellSpec) -> tuple[ImageSample, ...]:
        return tuple(self._images.train[row] for row in self._pool.episodes[spec.shots, spec.seed])

    def _config(self, spec: CellSpec) -> TrainConfig:
        """With the cell's method, of which the views depend."""
        return self._images.config.model_copy(update={"method": spec.method})
