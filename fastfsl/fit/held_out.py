"""What a training can say of itself: held-out accuracy beside chance, majority class and zero-shot."""

import numpy as np

from fastfsl.data.baselines import Standing, standing
from fastfsl.fit.run import Run


def held_out_standing(run: Run) -> Standing | None:
    """How a run that was just trained stands on the samples that were held out; None of one read from a folder.

    Zero-shot is judged by all samples: the class texts have seen none of them.
    """
    support = run.support
    if support is None:
        return None
    return standing(
        run.held_out_accuracy,
        num_held_out(run),
        support.labels,
        run.record.class_names,
        support.zero_shot_accuracy,
    )


def num_held_out(run: Run) -> int:
    """Samples behind the held-out accuracy of a run that was just trained."""
    kept = getattr(run.estimator, "held_out_", None)  # of auto
    if kept is not None:
        return len(kept[1])
    logits = getattr(getattr(run.estimator, "selection_", None), "held_out", None)
    if logits is not None:
        return int(np.isfinite(logits).reshape(len(logits), -1).all(axis=1).sum())
    return run.record.num_support
