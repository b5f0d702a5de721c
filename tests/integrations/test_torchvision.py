"""Models of torchvision: loss and gradients from the logits of their heads, as from those that they upsample."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from bcmfnet.integrations.torchvision import low_resolution
from bcmfnet.nn import UpsampledCrossEntropy

LABELS = 5


def make(name):
    segmentation = pytest.importorskip("torchvision.models.segmentation", exc_type=ImportError)
    torch.manual_seed(0)
    aux = {} if name.startswith("lraspp") else {"aux_loss": True}
    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=LABELS, **aux)


@pytest.fixture(params=["deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large"])
def model(request):
    return make(request.param).train()


def loss_of(output, criterion, labels):
    loss = criterion(output["out"], labels)
    return loss + 0.5 * criterion(output["aux"], labels) if "aux" in output else loss


def test_loss_and_gradients_are_those_of_upsampled_logits(model):
    images, labels = torch.randn(2, 3, 64, 96), torch.randint(0, LABELS, (2, 64, 96))
    labels[:, :9] = 255
    changed = low_resolution(copy.deepcopy(model))
    results = []
    stock = lambda logits, labels: F.cross_entropy(logits, labels, ignore_index=255)  # noqa: E731
    for network, criterion in ((model, stock), (changed, UpsampledCrossEntropy(255))):
        torch.manual_seed(1)
        output = network(images)
        loss = loss_of(output, criterion, labels)
        loss.backward()
        results.append((output, loss, [parameter.grad for parameter in network.parameters()]))
    (full, expected, stock_gradients), (low, ours, gradients) = results
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
    assert list(low) == list(full) and low["out"].shape[-1] < full["out"].shape[-1] == 96
    largest = max(gradient.abs().max() for gradient in stock_gradients)
    for gradient, own in zip(gradients, stock_gradients, strict=True):
        torch.testing.assert_close(gradient, own, rtol=1e-4, atol=1e-5 * float(largest))


def test_evaluation_is_as_before(model):
    images = torch.randn(1, 3, 64, 96)
    expected = model.eval()(images)["out"]
    assert torch.equal(low_resolution(model)(images)["out"], expected)


def test_a_copy_computes_with_its_own_parameters():
    model = low_resolution(make("lraspp_mobilenet_v3_large").train())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.classifier.parameters():
            parameter.zero_()
    images = torch.randn(2, 3, 64, 64)
    assert model(images)["out"].any() and not twin(images)["out"].any()


def test_other_models_are_refused():
    with pytest.raises(TypeError, match=r"^model: expected a segmentation model of torchvision .*, got Conv2d$"):
        low_resolution(torch.nn.Conv2d(3, 7, 1))
