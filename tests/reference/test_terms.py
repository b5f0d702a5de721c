"""Each term against torch's own losses and those of segmentation_models_pytorch; its gradient against autograd."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from bcmfnet.reference import terms
from bcmfnet.reference.bilinear import upsample

N, C, H, W = 2, 5, 6, 7
IGNORE = 255
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def inputs(classes=C, seed=0, absent=None):
    """Logits [N, C, H, W], labels with ignored ones in them, and which are valid; class `absent` has no pixel."""
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(N, classes, H, W, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, max(classes, 2), (N, H, W), generator=generator)
    if absent is not None:
        labels[labels == absent] = (absent + 1) % classes
    valid = torch.rand(N, H, W, generator=generator) > 0.2
    return z.requires_grad_(), torch.where(valid, labels, IGNORE), valid


def cross_entropy(z, target):
    return F.cross_entropy(z, target, ignore_index=IGNORE, reduction="none")


@pytest.mark.parametrize("smoothing", [0.1, 0.9])
@pytest.mark.parametrize("weighted", [False, True])
def test_smoothing_is_torchs(smoothing, weighted):
    z, target, valid = inputs()
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 3.0], dtype=torch.float64) if weighted else None
    own = torch.where(valid, (weight if weighted else torch.ones(C).double())[target.clamp(max=C - 1)], 0.0)
    part = terms.smoothed_part(z.log_softmax(1), weight, smoothing)
    values = (1 - smoothing) * own * cross_entropy(z, target) + part
    expected = F.cross_entropy(z, target, weight, ignore_index=IGNORE, label_smoothing=smoothing)
    torch.testing.assert_close(values[valid].sum() / own.sum(), expected, **EXACT)


def test_a_class_of_weight_0_does_not_count_where_its_logit_is_infinite():
    z, *_ = inputs()
    log_p = z.detach().index_fill(1, torch.tensor(2), -torch.inf).log_softmax(1)
    weight = torch.ones(C, dtype=torch.float64).index_fill(0, torch.tensor(2), 0.0)
    assert terms.smoothed_part(log_p, weight, 0.1).isfinite().all()
    assert terms.smoothed_part(log_p, weight + 1, 0.1).isinf().all()


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0, 5.5])
def test_slope_of_the_focal_loss(gamma):
    ce = torch.tensor([0.0, 1e-12, 1e-3, 0.5, 3.0, 50.0, 800.0], dtype=torch.float64, requires_grad=True)
    terms.focal(ce, gamma).sum().backward()
    torch.testing.assert_close(terms.focal_slope(ce.detach(), gamma), ce.grad, rtol=1e-9, atol=0)
    assert terms.focal_slope(ce.detach(), gamma)[0] == (1 if gamma == 0 else 0)
    assert terms.focal_slope(torch.tensor([torch.inf]), gamma) == 1


def test_focal_loss_of_a_sigmoid_is_smps(smp_losses):
    z, target, valid = inputs(classes=1)
    expected = smp_losses.FocalLoss("binary", gamma=2.0, ignore_index=IGNORE)(z, target)
    ce = cross_entropy(terms.with_background(z), target)
    torch.testing.assert_close(terms.focal(ce, 2.0)[valid].mean(), expected, **EXACT)


def test_cross_entropy_of_a_sigmoid_is_torchs():
    z, target, valid = inputs(classes=1)
    ce = cross_entropy(terms.with_background(z), target)
    weight = torch.where(target == 1, 3.0, 1.0)
    expected = F.binary_cross_entropy_with_logits(
        z[:, 0][valid], target[valid].double(), pos_weight=torch.tensor(3.0, dtype=torch.float64)
    )
    torch.testing.assert_close((weight * ce)[valid].mean(), expected, **EXACT)


def sums_of(z, target, valid, weight=None, per_image=False):
    weight = valid.double() if weight is None else torch.where(valid, weight, 0.0)
    return terms.overlap_sums(z.softmax(1), target.where(valid, 0), weight, per_image), weight


@pytest.mark.parametrize("name, smooth, log, absent, weighted", [
    *product(["Dice", "Jaccard"], [0.0, 1.5], [False, True], [None, 3], [False]),
    *product(["Tversky"], [0.0, 1.5], [False, True], [None, 3], [False]),
    *product(["Dice"], [0.0], [False], [None, 3], [True]),
])  # fmt: skip
def test_overlap_is_smps(smp_losses, name, smooth, log, absent, weighted):
    z, target, valid = inputs(absent=absent)
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0], dtype=torch.float64) if weighted else None
    keywords = {"alpha": 0.3, "beta": 0.8} if name == "Tversky" else {}
    keywords |= {"class_weights": weight.tolist()} if weighted else {}
    stock = getattr(smp_losses, f"{name}Loss")(
        "multiclass", smooth=smooth, log_loss=log, ignore_index=IGNORE, **keywords
    )
    score = {"Dice": terms.DICE, "Jaccard": terms.JACCARD, "Tversky": terms.tversky(0.3, 0.8)}[name]
    options = terms.OverlapOptions(2 * smooth if name == "Dice" else smooth, log, "zero")
    sums, _ = sums_of(z, target, valid)
    value, *_ = terms.overlap_loss(sums, score, options, weight)
    torch.testing.assert_close(value, stock(z, target), **EXACT)


@pytest.mark.parametrize("name", ["Dice", "Jaccard", "Tversky"])
def test_overlap_of_a_sigmoid_is_smps(smp_losses, name):
    z, target, valid = inputs(classes=1)
    keywords = {"alpha": 0.3, "beta": 0.8} if name == "Tversky" else {}
    stock = getattr(smp_losses, f"{name}Loss")("binary", ignore_index=IGNORE, **keywords)
    score = {"Dice": terms.DICE, "Jaccard": terms.JACCARD, "Tversky": terms.tversky(0.3, 0.8)}[name]
    sums, _ = sums_of(terms.with_background(z), target, valid)
    value, *_ = terms.overlap_loss(sums, score, terms.OverlapOptions(), None, first=1)
    torch.testing.assert_close(value, stock(z, target), **EXACT)


OVERLAPS = pytest.mark.parametrize("score", [terms.DICE, terms.JACCARD, terms.tversky(0.3, 0.8)])


@OVERLAPS
@pytest.mark.parametrize("smooth", [0.0, 1.5])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("absent", ["skip", "zero", "count"])
@pytest.mark.parametrize("per_image", [False, True])
def test_gradient_of_overlap(score, smooth, log, absent, per_image):
    z, target, valid = inputs(absent=3)
    if per_image:
        valid = valid & (torch.arange(N).reshape(-1, 1, 1) > 0)  # the first image has no valid pixel
    u = torch.rand(N, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sums, weight = sums_of(z, target, valid, u, per_image)
    class_weight = torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    options = terms.OverlapOptions(smooth, log, absent, per_image)
    value, of_predicted, of_hits = terms.overlap_loss(sums, score, options, class_weight)
    (expected,) = torch.autograd.grad(value, z)
    with torch.no_grad():
        gradient = terms.overlap_gradient(z.softmax(1), target.where(valid, 0), weight, of_predicted, of_hits)
    torch.testing.assert_close(gradient, expected, **EXACT)
    assert expected[~valid.unsqueeze(1).expand_as(z)].eq(0).all() and expected.abs().sum() > 0


@OVERLAPS
def test_overlap_of_images_is_the_mean_over_those_with_a_valid_pixel(score):
    z, target, valid = inputs()
    valid[0] = False
    options = terms.OverlapOptions(per_image=True)
    value, *_ = terms.overlap_loss(sums_of(z, target, valid, per_image=True)[0], score, options, None)
    alone, *_ = terms.overlap_loss(sums_of(z[1:], target[1:], valid[1:])[0], score, terms.OverlapOptions(), None)
    torch.testing.assert_close(value, alone, **EXACT)


@OVERLAPS
@pytest.mark.parametrize("absent", ["skip", "zero", "count"])
def test_overlap_without_a_valid_pixel(score, absent):
    z, target, valid = inputs()
    valid = torch.zeros_like(valid)
    sums, weight = sums_of(z, target, valid)
    value, *derivatives = terms.overlap_loss(sums, score, terms.OverlapOptions(absent=absent), None)
    assert value == 0 and not any(derivative.any() for derivative in derivatives)


@pytest.mark.parametrize("size", [(H, W), (3, 4)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_is_torchs(size, temperature):
    z, *_ = inputs()
    teacher = 2 * torch.randn(N, C, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    full = upsample(teacher, (H, W))
    expected = temperature**2 * F.kl_div(
        (z / temperature).log_softmax(1), (full / temperature).softmax(1), reduction="none"
    ).sum(1)
    log_p, log_t = z.log_softmax(1), (full / temperature).log_softmax(1)
    torch.testing.assert_close(terms.distillation(log_p, log_t, temperature), expected, **EXACT)
    gradient = terms.distillation_gradient(log_p, log_t, temperature)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), z)[0], **EXACT)
