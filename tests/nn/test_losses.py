"""The loss as a module: it holds options and the class weight, and calls the op."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bcmfnet.nn import BoundaryCorrectedLoss
from bcmfnet.ops import BclStats, boundary_corrected_loss

OPTIONS = {"mode": "paper", "step": (2, 1), "nms": 1, "boundary_weight": 0.5, "ignore_index": 0}


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 6, generator=generator).to(dtype).requires_grad_()
    return logits, torch.randint(0, 3, (2, 8, 12), generator=generator)


def test_options_and_weight_reach_the_op():
    logits, target = inputs()
    weight = torch.tensor([1.0, 2.0, 0.5])
    value = BoundaryCorrectedLoss(weight=weight, **OPTIONS)(logits, target)
    assert torch.equal(value, boundary_corrected_loss(logits, target, weight=weight, **OPTIONS))
    assert not torch.equal(value, boundary_corrected_loss(logits, target, **OPTIONS))
    assert not torch.equal(value, BoundaryCorrectedLoss(weight=weight)(logits, target))


def test_overrides_are_for_one_call():
    logits, target = inputs()
    loss = BoundaryCorrectedLoss(**OPTIONS)
    before = loss(logits, target)
    value, stats = loss(logits, target, jitter=3, nms=3, return_stats=True)
    assert isinstance(stats, BclStats)
    assert torch.equal(value, boundary_corrected_loss(logits, target, **OPTIONS | {"jitter": 3, "nms": 3}))
    assert torch.equal(loss(logits, target), before)
    assert loss.options == OPTIONS


def test_the_class_weight_moves_with_the_module_and_is_not_saved():
    loss = BoundaryCorrectedLoss(weight=torch.tensor([1.0, 2.0, 0.5]))
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == []
    nn.Sequential(loss).load_state_dict({})  # strict
    assert loss.double().weight.dtype == torch.float64
    assert loss.to("meta").weight.device.type == "meta"
    assert BoundaryCorrectedLoss().to("meta").weight is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_weight_of_any_precision(dtype):
    logits, target = inputs(dtype)
    loss = BoundaryCorrectedLoss(weight=torch.tensor([1.0, 2.0, 0.5]))
    assert torch.equal(loss(logits, target), loss.double()(logits, target))


def test_errors_are_those_of_the_op():
    logits, target = inputs()
    with pytest.raises(ValueError, match="nms: expected an odd window >= 1, got 2"):
        BoundaryCorrectedLoss(nms=2)(logits, target)
    with pytest.raises(TypeError, match="gamma"):
        BoundaryCorrectedLoss(gamma=2)(logits, target)


def test_repr_shows_the_options():
    shown = repr(BoundaryCorrectedLoss(weight=torch.ones(3), mode="paper", step=(2, 1)))
    assert shown == "BoundaryCorrectedLoss(mode='paper', step=(2, 1))"


@pytest.mark.parametrize("mode", ["detect", "ohem"])
def test_training_at_low_resolution_learns_the_picture(mode):
    """A 1x1 network on a half-resolution picture of its labels: what is left is the blur of edges."""
    target = torch.zeros(1, 16, 16, dtype=torch.uint8)
    target[:, 4:12, 4:] = 1
    target[:, :, 14:] = 2
    picture = torch.nn.functional.one_hot(target[:, ::2, ::2].long(), 3).movedim(-1, 1).float()
    network = nn.Conv2d(3, 3, 1)
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    target[0, 0, :4] = 255
    loss = BoundaryCorrectedLoss(mode=mode, weight=torch.tensor([1.0, 2.0, 1.0]))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.2)
    values, cross_entropies = [], []
    for step in range(30):
        value, stats = loss(network(picture), target, jitter=step, return_stats=True)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
        cross_entropies.append(stats.ce.item())
    assert cross_entropies[0] == pytest.approx(1.0986, abs=1e-4)  # log 3: nothing is known
    assert values[-1] < 0.7 * values[0]
    assert cross_entropies[-1] < 0.4 * cross_entropies[0]
    up = nn.functional.interpolate(network(picture), target.shape[1:], mode="bilinear").argmax(1)
    valid = target != 255
    assert (up == target)[valid].float().mean() > 0.9
