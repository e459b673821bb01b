"""Which Gram loss a training takes, by its device; no card is needed to ask."""

import importlib.util

import numpy as np
import pytest
import torch

from fastfsl import manifold
from fastfsl.encoders import load_encoder
from fastfsl.fit import mps_objective
from fastfsl.fit.kernel_choice import gram_loss_for
from fastfsl.fit.mps_objective import MPSObjective
from fastfsl.kernels import gram_loss

CUDA = torch.device("cuda", 0)


def give_card(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_a_card_runs_the_kernel(monkeypatch, capability):
    give_card(monkeypatch, capability)
    assert gram_loss_for(CUDA) is gram_loss.gram_alignment_loss


def test_torch_computes_elsewhere(monkeypatch):
    assert gram_loss_for(torch.device("cpu")) is manifold.gram_alignment_loss
    give_card(monkeypatch, (7, 5))
    assert gram_loss_for(CUDA) is manifold.gram_alignment_loss
    give_card(monkeypatch, (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gram_loss_for(CUDA) is manifold.gram_alignment_loss


def test_the_objective_takes_what_suits_its_device_unless_it_is_given_one(monkeypatch):
    encoder = load_encoder("tiny-clip")
    texts = np.eye(3, 128, dtype=np.float32)
    assert MPSObjective(encoder, texts, texts).gram_loss is manifold.gram_alignment_loss
    asked = []

    def choose(device):
        asked.append(device)
        return gram_loss.gram_alignment_loss

    monkeypatch.setattr(mps_objective, "gram_loss_for", choose)
    assert MPSObjective(encoder, texts, texts).gram_loss is gram_loss.gram_alignment_loss
    assert asked == [encoder.device]
    given = manifold.gram_alignment_loss
    assert MPSObjective(encoder, texts, texts, gram_loss=given).gram_loss is given
    assert len(asked) == 1
