"""What a fused loss takes and refuses, and its manners under autograd, autocast and torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close

from bcmfnet.ops import segmentation_loss

GRIDS = [(8, 10), (4, 5)]
ALL_TERMS = {
    "ce": 0.7, "focal": 0.5, "dice": 1.0, "jaccard": 0.3, "tversky": 0.4, "boundary": 0.6, "distillation": 0.8,
    "label_smoothing": 0.1, "overlap_smooth": 1.0, "distillation_temperature": 2.0, "boundary_term": "focal",
}  # fmt: skip


def inputs(grid=(4, 5), classes=4, dtype=torch.float32):
    """Logits, target [2, 8, 10], and pixel_weight and teacher by name."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, *grid, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.randint(0, max(classes, 2), (2, 8, 10), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.1] = 255
    tensors = {
        "pixel_weight": torch.rand(target.shape, generator=generator).double(),
        "teacher": torch.randn(2, classes, *grid, generator=generator).to(dtype),
    }
    return logits, target, tensors


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("terms", [ALL_TERMS, {"ce": 0.0, "dice": 1.0, "overlap_log": True, "overlap_per_image": True}])
@pytest.mark.parametrize("align_corners", [False, True])
def test_gradcheck(grid, terms, align_corners):
    """With weights of classes and pixels; the selection has a margin: every candidate is in."""
    logits, target, tensors = inputs(grid, dtype=torch.float64)
    tensors = tensors if "distillation" in terms else {"pixel_weight": tensors["pixel_weight"]}
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=torch.float64)
    options = terms | tensors | {"weight": weight, "align_corners": align_corners, "threshold": 0.0}
    assert torch.autograd.gradcheck(lambda z: segmentation_loss(z, target, **options), logits, fast_mode=True)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(grid, smoothing):
    logits, target, _ = inputs(grid)
    weight = torch.tensor([1.0, 0.5, 2.0, 0.3])
    full = F.interpolate(logits, (8, 10), mode="bilinear", align_corners=True)
    expected = F.cross_entropy(full, target, weight, ignore_index=255, label_smoothing=smoothing)
    value = segmentation_loss(logits, target, weight=weight, label_smoothing=smoothing, align_corners=True)
    assert_close(value.detach(), expected.detach())
    assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (value, expected)))


def test_a_sum_of_terms_is_the_sum_of_their_losses():
    logits, target, tensors = inputs()
    together = segmentation_loss(logits, target, threshold=0.3, **tensors, **ALL_TERMS)
    weights = {name: 0.0 for name in ("ce", "focal", "dice", "jaccard", "tversky", "boundary", "distillation")}
    apart = [
        segmentation_loss(logits, target, threshold=0.3, **tensors, **ALL_TERMS | weights | {name: ALL_TERMS[name]})
        for name in weights
    ]
    assert_close(together.detach(), sum(apart).detach())
    assert_close(torch.autograd.grad(together, logits)[0], torch.autograd.grad(sum(apart), logits)[0])
    assert len({part.item() for part in apart}) == len(weights)


@pytest.mark.parametrize("grid", GRIDS)
def test_stats_are_the_terms(grid):
    logits, target, tensors = inputs(grid)
    value, stats = segmentation_loss(logits, target, **tensors, **ALL_TERMS, return_stats=True)
    terms = ("ce", "focal", "dice", "jaccard", "tversky", "boundary", "distillation")
    assert_close(value.detach(), sum(ALL_TERMS[name] * getattr(stats, name) for name in terms))
    with torch.no_grad():
        assert segmentation_loss(logits, target, **tensors, **ALL_TERMS) == value


@pytest.mark.parametrize("grid", GRIDS)
def test_binary_is_softmax_of_two_classes_of_which_the_first_has_logit_0(grid):
    logits, target, _ = inputs(grid, classes=1)
    two = torch.cat([torch.zeros_like(logits), logits], 1)
    options = {"focal": 0.5, "boundary": 0.6, "label_smoothing": 0.1}
    one, expected = segmentation_loss(logits, target, binary=True, **options), segmentation_loss(two, target, **options)
    assert_close(one.detach(), expected.detach())
    assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (one, expected)))


def test_a_teacher_is_detached():
    logits, target, tensors = inputs()
    teacher = tensors["teacher"].requires_grad_()
    with pytest.raises(ValueError, match="teacher: expected a tensor without requires_grad"):
        segmentation_loss(logits, target, distillation=1.0, teacher=teacher)
    segmentation_loss(logits, target, distillation=1.0, teacher=teacher.detach()).backward()
    assert logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_half_precision_is_computed_in_float32(dtype):
    logits, target, tensors = inputs(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = segmentation_loss(logits, target, **tensors, **ALL_TERMS)
    (gradient,) = torch.autograd.grad(value, logits)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    exact = logits.detach().double().requires_grad_()
    expected = segmentation_loss(exact, target, **wide, **ALL_TERMS)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert_close(value.detach(), expected.detach().float(), tolerance=1e-5)
    assert_close(gradient, torch.autograd.grad(expected, exact)[0].to(dtype), tolerance=1e-2)


@pytest.mark.slow
def test_compiled():
    logits, target, tensors = inputs()
    compiled = torch.compile(segmentation_loss, fullgraph=True, backend="aot_eager")
    values = [loss(logits, target, **tensors, **ALL_TERMS) for loss in (compiled, segmentation_loss)]
    assert values[0] == values[1]
    assert torch.equal(*(torch.autograd.grad(value, logits)[0] for value in values))


WRONG = [
    ({"dise": 1}, TypeError, "options of the loss: expected one of .* got 'dise'; did you mean 'dice'?"),
    ({"mode": "papr"}, ValueError, "mode: expected one of detect, .* got 'papr'"),
    ({"dice": -1}, ValueError, "dice: expected >= 0, got -1"),
    ({"ce": float("nan")}, ValueError, "^ce: expected >= 0, got nan"),
    ({"label_smoothing": 1.0}, ValueError, "label_smoothing: expected 0 <= label_smoothing < 1, got 1.0"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing: expected 0 <= label_smoothing < 1, got -0.1"),
    ({"focal_gamma": -1}, ValueError, "focal_gamma: expected >= 0, got -1"),
    ({"distillation_temperature": 0}, ValueError, "distillation_temperature: expected > 0, got 0"),
    ({"overlap_absent": "none"}, ValueError, "overlap_absent: expected one of skip, zero, count, got 'none'"),
    ({"distillation_where": "some"}, ValueError, "distillation_where: expected one of valid, all, got 'some'"),
    ({"boundary_term": "dice"}, ValueError, "boundary_term: expected one of ce, focal, got 'dice'"),
    ({"overlap_log": 1}, TypeError, "overlap_log: expected True or False, got 1"),
    ({"pos_weight": 2.0}, ValueError, "pos_weight: expected 1 without binary, got 2.0"),
    ({"pos_weight": 0, "binary": True}, ValueError, "pos_weight: expected > 0, got 0"),
    ({"distillation": 1.0}, ValueError, "teacher: expected logits of another network for distillation, got None"),
    ({"teacher": torch.zeros(2, 3, 4, 5)}, ValueError, r"teacher: .* with N, C = \[2, 4\], got \[2, 3, 4, 5\]"),
    ({"teacher": torch.zeros(1, 4, 4, 5)}, ValueError, r"teacher: .* with N, C = \[2, 4\], got \[1, 4, 4, 5\]"),
    ({"teacher": torch.zeros(2, 4, 9, 5)}, ValueError, r"teacher: .* at most the target's \[8, 10\], got \[9, 5\]"),
    ({"teacher": torch.zeros(2, 4, 0, 5)}, ValueError, r"teacher: expected one pixel and at most .* got \[0, 5\]"),
    ({"teacher": torch.zeros(2, 4, 4, 5).int()}, TypeError, "teacher: expected .*float.* got int32"),
    ({"pixel_weight": torch.ones(2, 8, 9)}, ValueError, r"pixel_weight: .* shape \[2, 8, 10\], got \[2, 8, 9\]"),
    ({"pixel_weight": torch.ones(2, 8, 10).int()}, TypeError, "pixel_weight: expected .*float.* got int32"),
    ({"pixel_weight": -torch.ones(2, 8, 10)}, ValueError, "pixel_weight: expected finite numbers >= 0"),
    ({"pixel_weight": torch.full((2, 8, 10), torch.nan)}, ValueError, "pixel_weight: expected finite numbers >= 0"),
    ({"pixel_weight": torch.ones(2, 8, 10).requires_grad_()}, ValueError, "pixel_weight"),
    ({"binary": True}, ValueError, "logits: expected one class with binary, got 4"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_what_is_wrong_is_named(options, error, message):
    logits, target, _ = inputs()
    with pytest.raises(error, match=message):
        segmentation_loss(logits, target, **options)


@pytest.mark.parametrize(("options", "message"), [
    ({}, "logits: expected two classes and more, or binary=True, got one class"),
    ({"binary": True, "weight": torch.ones(1)}, "weight: expected None with binary"),
])  # fmt: skip
def test_what_is_wrong_of_one_class_is_named(options, message):
    logits, target, _ = inputs(classes=1)
    with pytest.raises(ValueError, match=message):
        segmentation_loss(logits, target, **options)


def test_a_label_that_is_neither_background_nor_foreground_is_named():
    logits, target, _ = inputs(classes=1)
    target[1, 2, 3] = 2
    with pytest.raises(IndexError, match=r"labels in \[0, 2\) or ignore_index, got 2 at .* = \(1, 2, 3\)"):
        segmentation_loss(logits, target, binary=True)


@pytest.mark.parametrize("classes", [2, 150, 511, 512, 1000, 4096])
def test_class_counts(classes):
    """Labels of the last class, of which nothing is ignored."""
    logits = torch.randn(1, classes, 2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = torch.randint(0, classes, (1, 4, 6), generator=torch.Generator().manual_seed(1))
    target[0, 0] = classes - 1
    full = F.interpolate(logits, (4, 6), mode="bilinear")
    expected = F.cross_entropy(full, target, label_smoothing=0.1)
    value = segmentation_loss(logits, target, ignore_index=-1, label_smoothing=0.1)
    assert_close(value.detach(), expected.detach())
    assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (value, expected)))
