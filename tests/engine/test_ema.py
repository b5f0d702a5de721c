"""The moving average against its formula in float64."""

import pytest
import torch
from torch import nn

from bcmfnet.engine.ema import MovingAverage


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_it_follows_parameters_and_statistics(decay):
    model = network()
    average = MovingAverage(model, decay)
    names = ("0.weight", "1.weight", "1.running_mean", "1.running_var")
    expected = {name: model.state_dict()[name].double() for name in names}
    for step in range(1, 30):
        model(torch.randn(4, 2, 3, 3))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(step)
        share = 1 - min(decay, step / (9 + step))
        for name in names:
            expected[name] += share * (model.state_dict()[name].double() - expected[name])
    ours = average.model.state_dict()
    for name in names:
        torch.testing.assert_close(ours[name].double(), expected[name], rtol=1e-5, atol=1e-6)
    assert ours["1.num_batches_tracked"] == 29


def test_it_is_no_part_of_the_training():
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    average = MovingAverage(model, 0.9)
    average.update(1)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
