"""The faces of the fused loss: against torch's losses and segmentation_models_pytorch's, and what they take."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close

from bcmfnet.models.ddrnet import SegmentationOutput
from bcmfnet.nn import (
    BinaryCrossEntropy,
    DiceLoss,
    DistillationLoss,
    FocalLoss,
    JaccardLoss,
    SegmentationLoss,
    TverskyLoss,
    UpsampledCrossEntropy,
)

SIZE = (12, 18)


def inputs(classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, 3, 6, generator=generator)
    target = torch.randint(0, max(classes, 2), (2, *SIZE), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.1] = 255
    return logits.requires_grad_(), target


def upsampled(logits):
    return F.interpolate(logits, SIZE, mode="bilinear")


def assert_same(value, expected, logits):
    """Two losses and their gradients."""
    assert_close(value.detach(), expected.detach(), tolerance=1e-5)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (value, expected)]
    assert_close(*gradients, tolerance=1e-5)


@pytest.mark.parametrize(("name", "loss", "options"), [
    ("Dice", DiceLoss(absent="zero"), {}),
    ("Dice", DiceLoss(absent="zero", smooth=2.0, log=True), {"smooth": 1.0, "log_loss": True}),
    ("Jaccard", JaccardLoss(absent="zero", smooth=1.0), {"smooth": 1.0}),
    ("Tversky", TverskyLoss(0.3, 0.8, absent="zero", smooth=1.0), {"smooth": 1.0, "alpha": 0.3, "beta": 0.8}),
])  # fmt: skip
def test_overlap_is_smps(smp_losses, name, loss, options):
    logits, target = inputs()
    target[target == 3] = 255  # a class that no pixel has
    stock = getattr(smp_losses, f"{name}Loss")("multiclass", ignore_index=255, **options)
    assert_same(loss(logits, target), stock(upsampled(logits), target), logits)


@pytest.mark.parametrize(("name", "loss"), [
    ("Dice", DiceLoss(binary=True)), ("Jaccard", JaccardLoss(binary=True)), ("Focal", FocalLoss(binary=True)),
])  # fmt: skip
def test_sigmoid_losses_are_smps(smp_losses, name, loss):
    logits, target = inputs(classes=1)
    stock = getattr(smp_losses, f"{name}Loss")("binary", ignore_index=255)
    assert_same(loss(logits, target), stock(upsampled(logits), target), logits)


@pytest.mark.parametrize("pos_weight", [1.0, 3.0])
def test_binary_cross_entropy_is_torchs(pos_weight):
    logits, target = inputs(classes=1)
    valid = target != 255
    expected = F.binary_cross_entropy_with_logits(
        upsampled(logits)[:, 0][valid], target[valid].float(), pos_weight=torch.tensor(pos_weight)
    )
    assert_same(BinaryCrossEntropy(pos_weight)(logits, target), expected, logits)


def test_label_smoothing_is_torchs():
    logits, target = inputs()
    expected = F.cross_entropy(upsampled(logits), target, ignore_index=255, label_smoothing=0.2)
    assert_same(UpsampledCrossEntropy(label_smoothing=0.2)(logits, target), expected, logits)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal_is_its_formula(gamma):
    logits, target = inputs()
    ce = F.cross_entropy(upsampled(logits), target, ignore_index=255, reduction="none")
    expected = ((1 - torch.exp(-ce)) ** gamma * ce).sum() / (target != 255).sum()
    assert_same(FocalLoss(gamma)(logits, target), expected, logits)


@pytest.mark.parametrize("where", ["valid", "all"])
def test_distillation_is_torchs(where):
    logits, target = inputs()
    teacher = inputs(seed=1)[0].detach()
    divergence = F.kl_div(
        (upsampled(logits) / 2).log_softmax(1), (upsampled(teacher) / 2).softmax(1), reduction="none"
    ).sum(1)
    counted = target != 255 if where == "valid" else torch.ones_like(target, dtype=torch.bool)
    expected = 4 * divergence[counted].mean()
    assert_same(DistillationLoss(2, where)(logits, target, teacher=teacher), expected, logits)


HEADS = {
    "list": lambda main, aux: [main, aux, aux],
    "tuple": lambda main, aux: (main, aux),
    "named": SegmentationOutput,
    "dict of torchvision": lambda main, aux: OrderedDict(out=main, aux=aux),
    "dict of logits": lambda main, aux: {"logits": main, "aux": aux, "features": main},
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    logits, target = inputs()
    aux = inputs(seed=1)[0]
    loss = SegmentationLoss(dice=1, aux=0.3)
    value, stats = loss(HEADS[name](logits, aux), target, return_stats=True)
    expected = loss(logits, target) + (0.6 if name == "list" else 0.3) * loss(aux, target)
    assert_close(value.detach(), expected.detach())
    assert stats.dice == loss(logits, target, return_stats=True)[1].dice
    value.backward()
    assert aux.grad.any() and logits.grad.any()


@pytest.mark.parametrize("output", [SegmentationOutput(inputs()[0], None), [inputs()[0]], {"out": inputs()[0]}])
def test_one_head(output):
    logits, target = inputs()
    assert SegmentationLoss(dice=1)(output, target) == SegmentationLoss(dice=1)(logits, target)


@pytest.mark.parametrize(("output", "got"), [
    (None, "NoneType"), ([], "list"), ([None], "list"), ({"masks": 1}, r"dict of \['masks'\]"), ("logits", "str"),
])  # fmt: skip
def test_an_output_without_logits_is_named(output, got):
    with pytest.raises(TypeError, match=f"output: expected logits, .* got {got}"):
        SegmentationLoss()(output, inputs()[1])


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: SegmentationLoss(dise=1), TypeError, "expected one of .* got 'dise'; did you mean 'dice'?"),
    (lambda: SegmentationLoss(mode="papr"), ValueError, "mode: .* got 'papr'"),
    (lambda: SegmentationLoss(aux=-1), ValueError, "aux: expected >= 0, got -1"),
    (lambda: SegmentationLoss(boundary=-1), ValueError, "boundary: expected >= 0, got -1"),
    (lambda: SegmentationLoss(weight=[1.0]), TypeError, "weight: expected a tensor"),
    (lambda: FocalLoss(gamma=-1), ValueError, "^gamma: expected >= 0, got -1"),
    (lambda: DiceLoss(smooth=-1), ValueError, "^smooth: expected >= 0, got -1"),
    (lambda: DiceLoss(absent="no"), ValueError, "^absent: expected one of skip, zero, count, got 'no'"),
    (lambda: TverskyLoss(alpha=-1), ValueError, "^alpha: expected >= 0, got -1"),
    (lambda: DistillationLoss(temperature=0), ValueError, "^temperature: expected > 0, got 0"),
    (lambda: DistillationLoss(where="any"), ValueError, "^where: expected one of valid, all, got 'any'"),
    (lambda: BinaryCrossEntropy(pos_weight=-1), ValueError, "^pos_weight: expected >= 0, got -1"),
    (lambda: UpsampledCrossEntropy(label_smoothing=1), ValueError, "^label_smoothing: expected"),
])  # fmt: skip
def test_wrong_options_are_named_in_the_constructor(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_it_moves_its_weight_and_saves_nothing():
    loss = SegmentationLoss(dice=1, label_smoothing=0.1, weight=torch.ones(5), step=(2, 1))
    assert loss.state_dict() == {} and loss.double().weight.dtype == torch.float64
    assert repr(loss) == "SegmentationLoss(dice=1, label_smoothing=0.1, step=(2, 1))"


def test_a_boundary_weight_follows_a_schedule():
    logits, target = inputs()
    scheduled, fixed = SegmentationLoss(boundary=1), SegmentationLoss(boundary=0.25)
    assert scheduled(logits, target, boundary=0.25) == fixed(logits, target) != scheduled(logits, target)
