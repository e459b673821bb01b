"""Every kernel and dtype against float64, beside plain torch in the same dtype: at most twice its error.

A case is a process of its own, several at a time: compiling takes most of the time, and a fault of one kernel does not
reach the others. Inputs are rounded to the dtype first, so that errors are those of arithmetic; whatever is allocated
holds NaN until a kernel writes it; each flow runs twice on different rows, the second time from its captured graph.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any, Literal, cast

import torch
from torch import Tensor

from benchmarks.gpu_bounds import LEAST_NORMALISED_AGREEMENT, LEAST_SIGN_AGREEMENT, MOST_TIMES_PLAIN_ERROR
from benchmarks.gpu_inputs import (
    DTYPES,
    Precision,
    distance,
    flow_options,
    manifold_gram_loss,
    plain_gram_loss,
    poisoned,
    random_features,
    random_plan,
    random_tokens,
    tf32,
)
from benchmarks.gpu_processes import NO_TIME, run_each
from benchmarks.gpu_record import Options, Record

Kind = Literal["flow", "persistent", "gram", "signs"]
Row = dict[str, Any]
DIMS = (512, 768, 128, 640, 1024, 1152, 1280)
ROWS = (1, 3, 17, 64, 130, 1000, 3000, 9000)
PERSISTENT_ROWS, PERSISTENT_DIMS = (1, 17, 64), (512, 768, 1280)
NUM_BLOCKS, NUM_STEPS = 2, 3
GRAMS = ((3, 5, 768), (4, 197, 768), (2, 257, 512), (2, 2304, 1024), (5, 1, 512))
GRAM_KINDS: tuple[Literal["l1", "squared"], ...] = ("l1", "squared")
# Where training starts, the signs of S - S' are of this mean magnitude; where it has gone on, of the other.
START_DRIFT, DRIFT = 4e-5, 1e-2
SIGNS = (8, 197, 768)
# Of plain torch: the error of a single number, the loss, can be next to none by chance. Float32 rounds by this much.
LEAST_ERROR = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Case:
    """What one process computes.

    Args:
        kind: which kernels.
        precision: of the products' operands, or of the features.
        shapes: (rows, d) of flows, (B, N, d) of Gram matrices.
        device: where.
    """

    kind: Kind
    precision: Precision
    shapes: tuple[tuple[int, ...], ...]
    device: str


def run(options: Options) -> None:
    """All cases, each in a process of its own; in this one where the interpreter runs them."""
    record = Record(
        "correctness", "errors against float64, as multiples of those of plain torch in the same dtype", options
    )
    waiting = list(cases(options))
    answers = (
        _here(waiting) if options.interpret else run_each("gpu_correctness", list(map(asdict, waiting)), record.left)
    )
    for index, found, error in answers:
        case = waiting[index]
        if error == NO_TIME:
            record.skip(f"{case.kind} {case.precision} {case.shapes}", error)
        elif error is not None:  # a case that raises or never ends is a wrong result
            record.add({**_about(case), "ok": False, "error": error})
        else:
            for row in found or ():
                record.add(row)
    if options.interpret:
        record.skip("bf16", "Triton's interpreter computes bf16 products wrongly")
    record.finish()


def cases(options: Options) -> Iterator[Case]:
    """The cases, those first that tell most."""
    if options.interpret:
        for precision in ("fp32", "fp16"):
            yield Case("flow", precision, ((1, 128), (17, 128)), "cpu")
            yield Case("persistent", precision, ((3, 128),), "cpu")
            yield Case("gram", precision, ((2, 5, 128),), "cpu")
        yield Case("signs", "fp16", ((1, 17, 128),), "cpu")
        return
    precisions = cast("tuple[Precision, ...]", ("bf16", "fp16", "fp32", "tf32"))
    for precision in precisions[:2]:
        yield Case("signs", precision, (SIGNS,), "cuda")
    for precision in precisions:
        for shape in GRAMS[:3] if options.quick else GRAMS:
            yield Case("gram", precision, (shape,), "cuda")
    for dim in DIMS[:1] if options.quick else DIMS:
        for precision in precisions:
            if dim in PERSISTENT_DIMS:
                yield Case("persistent", precision, tuple((rows, dim) for rows in PERSISTENT_ROWS), "cuda")
            yield Case("flow", precision, tuple((rows, dim) for rows in ROWS), "cuda")


def _here(waiting: list[Case]) -> Iterator[tuple[int, list[Row] | None, str | None]]:
    for index, case in enumerate(waiting):
        try:
            yield index, list(rows(case)), None
        except Exception as error:  # noqa: BLE001 - kept as that of another process is
            yield index, None, f"{type(error).__name__}: {error}"


def rows(case: Case) -> Iterator[Row]:
    """Compute a case."""
    compute = {"flow": _flow_rows, "persistent": _flow_rows, "gram": _gram_rows, "signs": _sign_rows}[case.kind]
    with tf32(case.precision):
        yield from compute(case)


def _flow_rows(case: Case) -> Iterator[Row]:
    from fastfsl.flow import run_plan
    from fastfsl.kernels.flow_step import euler_flow

    dim = case.shapes[0][1]
    plan = random_plan(dim, NUM_BLOCKS, NUM_STEPS, seed=dim, precision=case.precision).to(case.device)
    how, persistent = flow_options(case.precision), case.kind == "persistent"
    exact_plan, plain_plan = plan.to(dtype=torch.float64), plan.to(dtype=DTYPES[case.precision])
    for count, _ in case.shapes:
        first, x = (random_features(count, dim, seed, case.precision).to(case.device) for seed in (count, count + 1))
        exact = run_plan(exact_plan, x.double())
        plain_error = distance(run_plan(plain_plan, x.to(DTYPES[case.precision])), exact, x)
        with poisoned():
            euler_flow(plan, first, **how, persistent=persistent)
            out = euler_flow(plan, x, **how, persistent=persistent)
        name = "flow in one launch" if persistent else "flow"
        yield _judged(name, case.precision, [count, dim], distance(out, exact, x), plain_error)
    if not persistent:
        yield _fewer_steps(case, plan)


def _fewer_steps(case: Case, plan: Any) -> Row:
    from fastfsl.flow import plan_states
    from fastfsl.kernels.flow_step import euler_flow

    x = random_features(5, plan.dim, 3, case.precision).to(case.device)
    exact = plan_states(plan.to(dtype=torch.float64), x.double(), (1,))[0]
    plain = plan_states(plan.to(dtype=DTYPES[case.precision]), x.to(DTYPES[case.precision]), (1,))[0]
    with poisoned():
        out = euler_flow(plan, x, 1, **flow_options(case.precision))
    return _judged("flow, 1 step", case.precision, [5, plan.dim], distance(out, exact, x), distance(plain, exact, x))


def _gram_rows(case: Case) -> Iterator[Row]:
    from fastfsl.kernels import gram_loss

    dtype = DTYPES[case.precision]
    for (batch, count, dim), kind, normalize in product(case.shapes, GRAM_KINDS, (False, True)):
        features, reference = random_tokens((batch, count, dim), DRIFT, count, dtype, case.device)
        if not normalize:  # lengths of their own, so that a kernel that normalises all the same is found out
            lengths = 0.5 + torch.rand(batch, count, 1, device=case.device)
            features, reference = (features * lengths).to(dtype), (reference * lengths.flip(1)).to(dtype)
        options: dict[str, Any] = {"kind": kind, "normalize": normalize}
        kernel: Callable[..., Tensor] = partial(
            gram_loss.gram_alignment_loss, **options, allow_tf32=case.precision == "tf32"
        )
        exact = _step(partial(manifold_gram_loss, **options), features, reference, torch.float64)
        plain = _step(partial(plain_gram_loss, **options), features, reference, dtype)
        with poisoned():
            ours = _step(kernel, features, reference, dtype)
            with torch.no_grad():
                alone = kernel(features, reference)
        about = [batch, count, dim, kind, "normalised" if normalize else "as given"]
        parts = (
            ("loss", ours[0], plain[0], exact[0]),
            ("loss without gradient", alone, plain[0], exact[0]),
            ("gradient", ours[1], plain[1], exact[1]),
        )
        for part, mine, torchs, true in parts:
            # A single normalised row has S = S' = 1: loss and gradient are 0, and must be.
            scale = true if float(true.norm()) > 0 else torch.ones_like(true)
            errors = [float((out.double() - true).norm() / scale.norm()) for out in (mine, torchs)]
            yield _judged(f"gram, {part}", case.precision, about, *errors)


def _step(
    loss: Callable[..., Tensor], features: Tensor, reference: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from benchmarks.gpu_gram import loss_and_gradient

    return loss_and_gradient(loss)(features.to(dtype).requires_grad_(), reference.to(dtype))


def _sign_rows(case: Case) -> Iterator[Row]:
    from fastfsl.kernels import gram_loss

    for shape in case.shapes:
        batch, count, dim = shape
        for normalize in (False, True):
            features, reference = random_tokens(
                (batch, count, dim), START_DRIFT, 7, DTYPES[case.precision], case.device
            )
            rows, others = features.double(), reference.double()
            if normalize:
                rows, others = (torch.nn.functional.normalize(x, dim=-1) for x in (rows, others))
            exact = rows @ rows.mT - others @ others.mT
            with poisoned():
                found = gram_loss.gram_difference(features, reference, normalize=normalize)
            off = ~torch.eye(count, dtype=torch.bool, device=case.device).expand(batch, -1, -1)
            agreement = float((found.sign() == exact.sign())[off].float().mean())
            least = LEAST_NORMALISED_AGREEMENT if normalize else LEAST_SIGN_AGREEMENT
            zero_diagonal = not normalize or bool((found.diagonal(dim1=-2, dim2=-1) == 0).all())
            yield {
                "name": "signs, normalised" if normalize else "signs",
                "precision": case.precision,
                "case": list(shape),
                "agreement": agreement,
                "mean_difference": float(exact[off].abs().mean()),
                "zero_diagonal": zero_diagonal,
                "ok": zero_diagonal and agreement >= least,
            }


def _judged(name: str, precision: Precision, case: list[Any], error: float, plain_error: float) -> Row:
    times = error / max(plain_error, LEAST_ERROR)
    row = {"name": name, "precision": precision, "case": case, "error": error, "plain_error": plain_error}
    return {**row, "times_plain": times, "ok": times <= MOST_TIMES_PLAIN_ERROR}


def _about(case: Case) -> Row:
    return {"name": case.kind, "precision": case.precision, "case": [list(shape) for shape in case.shapes]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = json.loads(sys.argv[1])
    print(json.dumps(list(rows(Case(**{**given, "shapes": tuple(map(tuple, given["shapes"]))})))))
