"""Training the base: what its seed decides."""

from __future__ import annotations

import torch

from experiments.base import new_tiny_vlm, train_base


def test_training_the_base_follows_its_seed():
    weights = []
    for seed in (0, 0, 1):
        model = new_tiny_vlm()
        train_base(model, steps=2, seed=seed)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
