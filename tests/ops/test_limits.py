"""What the kernels' formats hold: right up to a limit, one line beyond it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, relative_error

from bcmfnet.ops import _limits, boundary_corrected_loss, pyramid_pool, stem_conv, upsample_add_relu, upsample_argmax
from bcmfnet.ops.backends import use_backend
from bcmfnet.reference import bcl as reference
from bcmfnet.reference.bcl import make_options

OP = "bcl"
CSRC = Path(__file__).parents[2] / "csrc"
SIDE, PIXELS = _limits.MAX_SIDE, _limits.MAX_PIXELS

# Labels in 5 bits, in 9, one past them, in 13, all of those, and any number where labels are not packed.
CLASSES = (31, 511, 512, 600, _limits.MAX_LOSS_CLASSES)
GRIDS = {"full": (4, 34), "upsampled": (2, 5)}


def many_classes(classes: int, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and a target [1, 4, 34] of the last 200 classes, with some pixels that do not count (-1)."""
    generator = torch.Generator().manual_seed(classes)
    target = torch.randint(max(0, classes - 200), classes, (1, 4, 34), generator=generator)
    target[0, 0, :5] = -1
    return 2 * torch.randn(1, classes, *grid, generator=generator), target


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("classes", CLASSES)
def test_any_number_of_classes(device, request, classes, grid):
    """Cross-entropy against torch's own; the boundary term, whose flipped labels are packed too, against float64."""
    if "cpu-triton" in request.node.name:
        pytest.skip("labels are not packed there, and the interpreter takes minutes; 150 classes are tested elsewhere")
    logits, target = many_classes(classes, grid)
    z, exact = logits.to(device).requires_grad_(), logits.double().requires_grad_()
    value = boundary_corrected_loss(z, target.to(device), boundary_weight=0.0, ignore_index=-1)
    upsampled = F.interpolate(exact, target.shape[1:], mode="bilinear")
    expected = F.cross_entropy(upsampled, target, ignore_index=-1)
    assert_close(value.detach().cpu(), expected.detach(), "cross-entropy", 2e-6)
    gradients = torch.autograd.grad(value, z)[0].cpu(), torch.autograd.grad(expected, exact)[0]
    assert relative_error(*gradients) < 5e-6

    options = {"mode": "paper0", "ignore_index": -1, "threshold": 0.0}
    value = boundary_corrected_loss(z, target.to(device), **options)
    expected, _, maps = reference.loss(exact, target, make_options(**options | {"step": (1, 1)}))
    assert maps.selected.sum() > 0
    assert_close(value.detach().cpu(), expected.detach(), "boundary corrected loss", 5e-6)
    gradients = torch.autograd.grad(value, z)[0].cpu(), torch.autograd.grad(expected, exact)[0]
    assert relative_error(*gradients) < 5e-6


def test_more_classes_are_refused_or_right(device, request):
    """A backend that packs labels says how many it holds; the others are right with more."""
    if "cpu-triton" in request.node.name:
        pytest.skip("the interpreter takes minutes")
    logits, target = many_classes(_limits.MAX_LOSS_CLASSES + 1, (1, 1))
    target = torch.full((1, 1, 2), _limits.MAX_LOSS_CLASSES)
    call = lambda: boundary_corrected_loss(logits.to(device), target.to(device), boundary_weight=0.0, ignore_index=-1)  # noqa: E731
    if any(backend in request.node.name for backend in ("cpp", "cuda", "sass")) and "triton" not in request.node.name:
        with pytest.raises(ValueError, match="^logits: expected at most 4096 classes, got 4097; use_backend"):
            call()
    else:
        assert_close(call().cpu(), -F.log_softmax(logits.double(), 1)[0, -1, 0, 0], "cross-entropy", 2e-6)


@pytest.mark.parametrize("classes", [256, 300])
def test_the_default_ignore_index_hides_no_class(classes):
    """From 256 classes on 255 is one of them: whoever means it as void has to say so."""
    logits, target = torch.zeros(1, classes, 2, 2), torch.full((1, 2, 2), 255)
    message = f"^ignore_index: expected it to be passed with {classes} classes, one of which is the default 255"
    with pytest.raises(ValueError, match=message):
        boundary_corrected_loss(logits, target)
    assert boundary_corrected_loss(logits, target, ignore_index=255).item() == 0.0
    counted = boundary_corrected_loss(logits, target, ignore_index=-1, boundary_weight=0.0)
    assert counted.item() == pytest.approx(torch.tensor(classes).log().item())


def test_255_classes_leave_the_default_free():
    logits, target = torch.zeros(1, 255, 2, 2), torch.full((1, 2, 2), 255)
    assert boundary_corrected_loss(logits, target).item() == 0.0


@pytest.mark.parametrize(("classes", "dtype", "largest"), [(257, torch.uint8, 255), (32769, torch.int16, 32767)])
def test_a_label_type_that_holds_not_every_class_is_refused(classes, dtype, largest):
    logits, target = torch.zeros(1, classes, 1, 1), torch.zeros(1, 1, 1, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    message = f"^target: expected a type that holds the labels of {classes} classes, got {name} up to {largest}$"
    with pytest.raises(TypeError, match=message):
        boundary_corrected_loss(logits, target, ignore_index=-1)
    with use_backend("reference"):  # the only one that takes so many
        assert boundary_corrected_loss(logits[:, 1:], target, ignore_index=0).item() == 0.0


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of any size in the memory of one element."""
    return torch.zeros((), dtype=dtype).expand(shape)


def bcl(*size: int, **options):
    batch, *rest = size if len(size) == 3 else (1, *size)
    return boundary_corrected_loss(zeros(batch, 2, 1, 1), zeros(batch, *rest, dtype=torch.uint8), **options)


SQUARE = (SIDE // 2, SIDE // 2)  # 2^32 pixels
BEYOND = {
    "loss: side": (lambda: bcl(1, SIDE + 1), f"target: expected at most {SIDE} pixels on a side"),
    "loss: pixels": (lambda: bcl(*SQUARE), f"target: expected at most {PIXELS} pixels in a batch"),
    "loss: step": (lambda: bcl(2, 2, step=(1, SIDE + 1)), f"step: expected at most {SIDE}, got {SIDE + 1}"),
    "loss: window": (lambda: bcl(2, 2, nms=2 * SIDE + 3), f"nms: expected at most {2 * SIDE + 1}, got"),
    "loss: min_kept": (lambda: bcl(2, 2, min_kept=2**63), f"min_kept: expected at most {2**63 - 1}, got"),
    "loss: max_kept": (lambda: bcl(2, 2, max_kept=2**63), f"max_kept: expected at most {2**63 - 1}, got"),
    "loss: ignore_index": (lambda: bcl(2, 2, ignore_index=2**63), f"ignore_index: expected at most {2**63 - 1}, got"),
    "loss: negative": (lambda: bcl(2, 2, ignore_index=-(2**63) - 1), "ignore_index: expected at least -9"),
    "argmax: classes": (lambda: upsample_argmax(zeros(1, 2**15 + 1, 1, 1), (1, 1)), "logits: expected .* 32768"),
    "argmax: side": (lambda: upsample_argmax(zeros(1, 2, 1, 1), (1, SIDE + 1)), "size: expected at most"),
    "argmax: pixels": (lambda: upsample_argmax(zeros(1, 2, 1, 1), SQUARE), "size: expected at most"),
    "stem: side": (
        lambda: stem_conv(zeros(1, 3, SIDE + 1, 1), zeros(1, 3, 3, 3), torch.zeros(1)), "images: expected at most",
    ),
    "stem: channels": (
        lambda: stem_conv(zeros(1, 3, 1, 1), zeros(SIDE + 1, 3, 3, 3), torch.zeros(SIDE + 1)),
        "weight: expected at most 131072 channels",
    ),
    "sum: side": (lambda: upsample_add_relu(zeros(1, 1, SIDE + 1, 1), zeros(1, 1, 1, 1)), "high: expected at most"),
    "sum: channels": (
        lambda: upsample_add_relu(zeros(1, SIDE + 1, 1, 1), zeros(1, SIDE + 1, 1, 1)),
        "high: expected at most 131072 channels",
    ),
    "pools: pixels": (lambda: pyramid_pool(zeros(1, 1, *SQUARE), [(3, 2, 1)]), "x: expected at most"),
    "pools: number": (lambda: pyramid_pool(zeros(1, 1, 1, 1), [(3, 2, 1)] * 7), "pools: expected at most 6, got 7"),
    "pools: window": (
        lambda: pyramid_pool(zeros(1, 1, 1, 1), [(2 * SIDE + 3, 2, SIDE + 1)]),
        f"pools: expected at most {2 * SIDE + 1}, got",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BEYOND)
def test_beyond_a_limit_is_one_line(name):
    call, message = BEYOND[name]
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        call()
    assert "\n" not in str(caught.value)


def test_at_the_limits_a_call_is_served():
    """The largest side, step and window, where little memory is needed."""
    options = {"step": SIDE, "nms": 2 * SIDE + 1, "min_kept": 2**63 - 1, "max_kept": 2**63 - 1}
    target = torch.zeros(1, 1, SIDE, dtype=torch.uint8)
    loss = boundary_corrected_loss(torch.zeros(1, 2, 1, SIDE), target, **options)
    assert loss.item() == pytest.approx(2 * torch.tensor(2.0).log().item())  # every pixel is selected
    assert upsample_argmax(zeros(1, 2, 1, 1), (1, SIDE)).shape == (1, 1, SIDE)


def test_the_native_kernels_have_the_same_limits():
    header = "".join(path.read_text() for path in CSRC.glob("*/*.h"))
    for name, limit in {"kMaxClasses": _limits.MAX_LOSS_CLASSES, "kMaxPools": _limits.MAX_POOLS}.items():
        assert re.findall(rf"constexpr \w+ {name} = (\d+);", header) == [str(limit)]
