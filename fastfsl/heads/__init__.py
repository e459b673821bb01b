"""Classifiers on frozen features: the peers that a flow is compared and combined with."""

from fastfsl.heads.base import FromLogits, Head
from fastfsl.heads.blending import Selection
from fastfsl.heads.form import KernelForm, LinearForm
from fastfsl.heads.gda import GDA
from fastfsl.heads.linear_probe import LinearProbe
from fastfsl.heads.lp_plus_plus import LPPlusPlus
from fastfsl.heads.nearest_mean import NearestMean
from fastfsl.heads.proker import ProKeR
from fastfsl.heads.tip_adapter import TipAdapter
from fastfsl.heads.tip_adapter_f import TipAdapterF
from fastfsl.heads.zero_shot import ZeroShot

__all__ = [
    "GDA",
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
    "ZeroShot",
]
