"""Models of segmentation_models_pytorch: loss and gradients from the logits of their heads, as from upsampled ones."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bcmfnet.integrations.segmentation_models_pytorch import low_resolution
from bcmfnet.nn import SegmentationLoss

CLASSES = 5


def library():
    return pytest.importorskip("segmentation_models_pytorch", exc_type=ImportError)


@pytest.fixture(params=["FPN", "DeepLabV3Plus", "PSPNet", "Segformer"])
def model(request):
    smp = library()
    torch.manual_seed(0)
    return getattr(smp, request.param)("resnet18", encoder_weights=None, classes=CLASSES).train()


def test_loss_and_gradients_are_those_of_upsampled_logits(model):
    """Cross-entropy and the library's own Dice loss, of one network with and without its upsampling."""
    dice = library().losses.DiceLoss("multiclass", ignore_index=255)
    images, labels = torch.randn(2, 3, 64, 96), torch.randint(0, CLASSES, (2, 64, 96))
    labels[:, :9] = 255
    changed = low_resolution(copy.deepcopy(model))
    fused = SegmentationLoss(ce=1, dice=1, overlap_absent="zero", align_corners=True)
    results = []
    for network, criterion in (
        (model, lambda logits, labels: F.cross_entropy(logits, labels, ignore_index=255) + dice(logits, labels)),
        (changed, fused),
    ):
        torch.manual_seed(1)
        logits = network(images)
        loss = criterion(logits, labels)
        loss.backward()
        results.append((logits, loss, [parameter.grad for parameter in network.parameters()]))
    (full, expected, stock_gradients), (low, ours, gradients) = results
    assert low.shape[-1] < full.shape[-1] == 96
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
    largest = max(gradient.abs().max() for gradient in stock_gradients if gradient is not None)
    for gradient, own in zip(gradients, stock_gradients, strict=True):
        if own is not None:
            torch.testing.assert_close(gradient, own, rtol=1e-4, atol=1e-5 * float(largest))


def test_evaluation_and_state_dict_are_as_before(model):
    images, before = torch.randn(1, 3, 64, 96), model.state_dict()
    expected = model.eval()(images)
    assert torch.equal(low_resolution(model)(images), expected)
    assert model.state_dict().keys() == before.keys()


def test_a_decoder_that_ends_at_full_resolution_is_left_as_it_is():
    model = library().Unet("resnet18", encoder_weights=None, classes=CLASSES).train()
    head = model.segmentation_head[1]
    assert low_resolution(model).segmentation_head[1] is head


def stand_in(*head):
    """A model with a head such as the library's: convolution, upsampling, activation."""
    model = nn.Module()
    model.segmentation_head = nn.Sequential(nn.Conv2d(3, CLASSES, 1), *head)
    return model


def test_a_stand_in_upsamples_in_evaluation_alone():
    """Without the library: a head of the same make."""
    model = stand_in(nn.Upsample(scale_factor=4, mode="bilinear", align_corners=True), nn.Identity())
    head, x = low_resolution(model).segmentation_head, torch.randn(1, 3, 4, 6)
    assert head.train()(x).shape[-2:] == (4, 6) and head.eval()(x).shape[-2:] == (16, 24)


@pytest.mark.parametrize(("model", "error", "message"), [
    (nn.Conv2d(3, 5, 1), TypeError, "model: expected a model of segmentation_models_pytorch .* got Conv2d"),
    (stand_in(nn.Identity(), nn.Softmax(1)), ValueError, "model: expected activation=None, .* got Softmax"),
])  # fmt: skip
def test_what_cannot_be_changed_is_named(model, error, message):
    with pytest.raises(error, match=message):
        low_resolution(model)
