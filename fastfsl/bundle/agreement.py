"""Holding a manifest, a flow plan and the graphs against one another: what one says of a bundle the others show."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from fastfsl.bundle.manifest import FLOW_GRAPH, FLOW_PLAN, VISUAL_GRAPH, Manifest
from fastfsl.bundle.onnx_graph import GraphFacts
from fastfsl.bundle.plan import plan_sizes
from fastfsl.bundle.untrusted import AGAIN
from fastfsl.bundle.verify import read_file
from fastfsl.errors import BundleError

# Names of constants in a flow's graph: the table of each step, and what is added for a state that is read before the
# last. Every exporter since the first has written them, and int8 leaves them as they are.
_STEP = re.compile(r"step(\d{1,6})_final_a", re.ASCII)
_READ = re.compile(r"scaled_output_bias_(\d{1,6})", re.ASCII)
# Of a number that is stored as float32.
_ROUNDING = 1e-6


def check_plan(bundle_dir: str | os.PathLike[str], manifest: Manifest) -> None:
    """Refuse a flow plan that is altered, or of another flow than the manifest's. Its numbers are not looked at.

    Raises:
        BundleError: it is.
    """
    path = Path(bundle_dir) / FLOW_PLAN
    found = plan_sizes(path, read_file(bundle_dir, manifest, FLOW_PLAN))
    expected = (manifest.num_steps, manifest.embed_dim, manifest.step_size)
    if found != expected:
        raise BundleError(
            f"{path}: (steps, width, step size) are {found}, the manifest says {expected}; export the bundle again"
        )


def check_graphs(manifest: Manifest, graphs: Mapping[str, GraphFacts], bundle_dir: str | os.PathLike[str]) -> None:
    """Refuse graphs that are not what the manifest says of them.

    Args:
        manifest: the manifest.
        graphs: facts of the image tower's and the flow's graph, by their names in the bundle.
        bundle_dir: the bundle's folder, for messages.

    Raises:
        BundleError: the steps, the logit scale or the precision are others.
    """
    if FLOW_GRAPH in graphs:
        _check_flow(manifest, graphs[FLOW_GRAPH], Path(bundle_dir) / FLOW_GRAPH)
    integer = [name for name, facts in graphs.items() if facts.integer_products]
    if manifest.precision == "int8" and not integer:
        raise BundleError(
            f"{bundle_dir}: the manifest says precision int8, and no graph multiplies whole numbers; {AGAIN}"
        )
    if manifest.precision != "int8" and integer:
        raise BundleError(
            f"{Path(bundle_dir) / integer[0]}: multiplies whole numbers, and the manifest says precision "
            f"{manifest.precision}; {AGAIN}"
        )
    if manifest.precision == "fp16" and VISUAL_GRAPH in graphs and not graphs[VISUAL_GRAPH].half:
        raise BundleError(
            f"{Path(bundle_dir) / VISUAL_GRAPH}: has no float16, and the manifest says precision fp16; {AGAIN}"
        )


def _check_flow(manifest: Manifest, facts: GraphFacts, path: Path) -> None:
    steps = {int(found[1]) for name in facts.constant_names if (found := _STEP.fullmatch(name))}
    # A graph of other names shows no steps, but has a node for each.
    wrong = steps != set(range(manifest.num_steps)) if steps else manifest.num_steps > facts.num_nodes
    if wrong:
        shown = max(steps) + 1 if steps else f"at most {facts.num_nodes}"
        raise BundleError(f"{path}: has {shown} steps, the manifest says {manifest.num_steps}; {AGAIN}")
    read = {int(found[1]) for name in facts.constant_names if (found := _READ.fullmatch(name))}
    expected = set(manifest.read_steps) - {0, manifest.num_steps}
    if steps and read != expected:
        raise BundleError(
            f"{path}: reads the steps {sorted(read)[:10]} before the last, the manifest says {sorted(expected)[:10]}; "
            f"{AGAIN}"
        )
    scale = facts.scalars.get("logit_scale")
    if scale is not None and not math.isclose(scale, manifest.logit_scale, rel_tol=_ROUNDING):
        raise BundleError(f"{path}: its logit_scale is {scale}, the manifest's {manifest.logit_scale}; {AGAIN}")
