"""Classifiers on frozen features: the peers that a flow is compared and combined with."""

from fastfsl.heads.base import Head
from fastfsl.heads.blending import Selection
from fastfsl.heads.classes import ClassEmbeddings, match_classes
from fastfsl.heads.form import KernelForm, LinearForm
from fastfsl.heads.from_logits import FromLogits, UnfittedError, also_named
from fastfsl.heads.gda import GDA
from fastfsl.heads.linear_probe import LinearProbe
from fastfsl.heads.lp_plus_plus import LPPlusPlus
from fastfsl.heads.nearest_mean import NearestMean, unit_class_means
from fastfsl.heads.proker import ProKeR
from fastfsl.heads.tip_adapter import TipAdapter
from fastfsl.heads.tip_adapter_f import TipAdapterF
from fastfsl.heads.zero_shot import ZeroShot

__all__ = [
    "GDA",
    "ClassEmbeddings",
    "FromLogits",
    "Head",
    "KernelForm",
    "LPPlusPlus",
    "LinearForm",
    "LinearProbe",
    "NearestMean",
    "ProKeR",
    "Selection",
    "TipAdapter",
    "TipAdapterF",
    "UnfittedError",
    "ZeroShot",
    "also_named",
    "match_classes",
    "unit_class_means",
]
