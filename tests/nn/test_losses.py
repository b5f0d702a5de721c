"""The loss as a module: it holds options and the class weight, and calls the op."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.fx.experimental.sym_node import DynamicInt

from bcmfnet.nn import BoundaryCorrectedLoss, OhemCrossEntropy, UpsampledCrossEntropy
from bcmfnet.ops import BclStats, boundary_corrected_loss
from bcmfnet.reference import bcl as reference

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
    overrides = {"jitter": 3, "boundary_weight": 0.25}
    value, stats = loss(logits, target, **overrides, return_stats=True)
    assert isinstance(stats, BclStats)
    assert torch.equal(value, boundary_corrected_loss(logits, target, **OPTIONS | overrides))
    assert not torch.equal(value, before)
    assert torch.equal(loss(logits, target), before)
    plain = boundary_corrected_loss(logits, target, ignore_index=0, boundary_weight=0.0)
    assert torch.equal(loss(logits, target, boundary_weight=0.0), plain)


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


@pytest.mark.parametrize(("loss", "options", "message"), [
    (BoundaryCorrectedLoss, {"mode": "papr"}, "mode: expected one of detect, detect0, paper, paper0, ohem, got 'papr'"),
    (OhemCrossEntropy, {"thres": 0.7}, "OhemCrossEntropy.__init__() got an unexpected keyword argument 'thres'"),
    (BoundaryCorrectedLoss, {"ignore_index": 1.0}, "ignore_index: expected an integer, got 1.0"),
    (BoundaryCorrectedLoss, {"ce_weight": -1.0}, "ce_weight: expected >= 0, got -1.0"),
    (BoundaryCorrectedLoss, {"boundary_weight": "1"}, "boundary_weight: expected a number, got '1'"),
    (BoundaryCorrectedLoss, {"alpha": None}, "alpha: expected a number, got None"),
    (BoundaryCorrectedLoss, {"beta": float("nan")}, "beta: expected >= 0, got nan"),
    (BoundaryCorrectedLoss, {"step": 1.5}, "step: expected an integer or (rows, columns), got 1.5"),
    (BoundaryCorrectedLoss, {"step": (1, 0.5)}, "step: expected an integer or (rows, columns), got (1, 0.5)"),
    (BoundaryCorrectedLoss, {"flip": "roll"}, "flip: expected one of swap, mirror, got 'roll'"),
    (BoundaryCorrectedLoss, {"nms": 2}, "nms: expected an odd window >= 1, got 2"),
    (BoundaryCorrectedLoss, {"threshold": [1]}, "threshold: expected a number, got [1]"),
    (BoundaryCorrectedLoss, {"ratio": "1/16"}, "ratio: expected a number, got '1/16'"),
    (BoundaryCorrectedLoss, {"min_kept": -1}, "min_kept: expected >= 0, got -1"),
    (BoundaryCorrectedLoss, {"max_kept": 0}, "max_kept: expected >= 1 or None, got 0"),
    (BoundaryCorrectedLoss, {"norm": "mean"}, "norm: expected one of selected, valid, got 'mean'"),
    (BoundaryCorrectedLoss, {"per_image": "no"}, "per_image: expected True or False, got 'no'"),
    (BoundaryCorrectedLoss, {"inplace_grad": None}, "inplace_grad: expected True or False, got None"),
    (BoundaryCorrectedLoss, {"validate": 1}, "validate: expected True or False, got 1"),
    (BoundaryCorrectedLoss, {"weight": [1.0, 2.0]}, "weight: expected a tensor [C] or None, got list"),
    (BoundaryCorrectedLoss, {"weight": torch.ones(1, 2)}, "weight: expected a tensor [C] or None, got [1, 2]"),
    (OhemCrossEntropy, {"thresh": "0.7"}, "thresh: expected a number, got '0.7'"),
    (OhemCrossEntropy, {"min_kept": -1}, "min_kept: expected >= 0, got -1"),
    (UpsampledCrossEntropy, {"ignore_index": "255"}, "ignore_index: expected an integer, got '255'"),
])  # fmt: skip
def test_a_wrong_option_is_refused_in_the_constructor(loss, options, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        loss(**options)
    assert str(caught.value) == message


def test_the_options_are_those_of_the_op():
    """All but what is of a call: the tensors, the size of the target, jitter and return_stats."""
    op, module = (inspect.signature(of).parameters for of in (boundary_corrected_loss, BoundaryCorrectedLoss))
    of_a_call = {"logits", "target", "size", "pixel_weight", "jitter", "return_stats"}
    assert {name: option.default for name, option in module.items()} == {
        name: option.default for name, option in op.items() if name not in of_a_call
    }


def test_the_default_selects_by_the_threshold_alone():
    """The paper's suppression and share are off: every valid pixel from tau on is selected, and no other."""
    logits, target = inputs(torch.float64)
    target[0, 0, :3] = 255
    _, stats = BoundaryCorrectedLoss()(logits, target, return_stats=True)
    maps = reference.loss(logits, target, reference.make_options(nms=1, ratio=0.0))[2]
    assert stats.selected == ((maps.q >= round(1024 * 0.3567)) & (target != 255)).sum()
    assert 0 < stats.selected < stats.valid


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


@pytest.mark.parametrize("step", [1, (2, 3)])
@pytest.mark.parametrize(("kind", "graphs"), [(int, 2), (DynamicInt, 1)])
def test_jitter_is_compiled_once_for_all_seeds(kind, graphs, step):
    """torch.compile takes the first value of any plain int for a constant; what it compiles next serves all others."""
    torch._dynamo.reset()
    counters.clear()
    logits, target = inputs()
    loss = BoundaryCorrectedLoss(step=step)
    compiled = torch.compile(lambda seed: loss(logits, target, jitter=seed), fullgraph=True, backend="aot_eager")
    for seed in range(12):
        assert torch.equal(compiled(kind(seed)), loss(logits, target, jitter=seed))
    assert counters["stats"]["unique_graphs"] == graphs
