"""The bundle on disk: manifest, checks, plan, read-out, atomic writer. Standard library, numpy and safetensors only.

A bundle is a folder; ``manifest.json`` lists the sha256 and size of every other file in it but the model card, which
its readers may edit. Links of hub caches and mounted volumes are followed (``links``). It is treated as coming
from a stranger: sizes are bounded before anything is parsed, no listed path can leave the folder, every value is
checked by hand, and nothing is ever unpickled. Whatever is wrong with it is a ``BundleError`` that names the file and
the remedy. It is written into a sibling folder and renamed, so it is never half there.
"""

from fastfsl.bundle.agreement import check_graphs, check_plan
from fastfsl.bundle.class_places import ClassPlaces, read_class_places, write_class_places
from fastfsl.bundle.flow_kernels import (
    LOGITS,
    MAX_DIM,
    MIN_DIM,
    PERSISTENT,
    PTX_TARGET,
    ArgumentKind,
    CompiledKernel,
    KernelSet,
    KernelTarget,
    KernelTile,
    kernel_arguments,
    read_flow_kernels,
    read_kernel,
    write_flow_kernels,
)
from fastfsl.bundle.flow_weights import WEIGHT_NAMES, FlowWeights, narrow, read_flow_weights, widen, write_flow_weights
from fastfsl.bundle.int8_weights import Int8Products, check_int8_record, int8_products, read_int8_products
from fastfsl.bundle.manifest import (
    FLOW_GRAPH,
    FLOW_KERNELS_FOLDER,
    FLOW_KERNELS_INDEX,
    FLOW_KERNELS_WEIGHTS,
    FLOW_PLAN,
    FORMAT_VERSION,
    KERNEL_DTYPES,
    PRECISIONS,
    READOUT,
    VISUAL_GRAPH,
    Manifest,
    bundle_digest,
    read_manifest,
    read_pinned,
)
from fastfsl.bundle.paths import CARD, MANIFEST_NAME
from fastfsl.bundle.plan import PlanArrays, read_plan, write_plan
from fastfsl.bundle.readout import KernelArrays, Readout, load_readout, read_readout, write_readout
from fastfsl.bundle.text_record import TEXT_CLASSES, TEXT_CLEANING, TEXT_GRAPH, TOKENIZER
from fastfsl.bundle.verify import check_bundle, check_file, read_file, unlisted_files, unverified_files
from fastfsl.bundle.write import seal_bundle, staging_folder

__all__ = [
    "CARD",
    "FLOW_GRAPH",
    "FLOW_KERNELS_FOLDER",
    "FLOW_KERNELS_INDEX",
    "FLOW_KERNELS_WEIGHTS",
    "FLOW_PLAN",
    "FORMAT_VERSION",
    "KERNEL_DTYPES",
    "LOGITS",
    "MANIFEST_NAME",
    "MAX_DIM",
    "MIN_DIM",
    "PERSISTENT",
    "PRECISIONS",
    "PTX_TARGET",
    "READOUT",
    "TEXT_CLASSES",
    "TEXT_CLEANING",
    "TEXT_GRAPH",
    "TOKENIZER",
    "VISUAL_GRAPH",
    "WEIGHT_NAMES",
    "ArgumentKind",
    "ClassPlaces",
    "CompiledKernel",
    "FlowWeights",
    "Int8Products",
    "KernelArrays",
    "KernelSet",
    "KernelTarget",
    "KernelTile",
    "Manifest",
    "PlanArrays",
    "Readout",
    "bundle_digest",
    "check_bundle",
    "check_file",
    "check_graphs",
    "check_int8_record",
    "check_plan",
    "int8_products",
    "kernel_arguments",
    "load_readout",
    "narrow",
    "read_class_places",
    "read_file",
    "read_flow_kernels",
    "read_flow_weights",
    "read_int8_products",
    "read_kernel",
    "read_manifest",
    "read_pinned",
    "read_plan",
    "read_readout",
    "seal_bundle",
    "staging_folder",
    "unlisted_files",
    "unverified_files",
    "widen",
    "write_class_places",
    "write_flow_kernels",
    "write_flow_weights",
    "write_plan",
    "write_readout",
]
