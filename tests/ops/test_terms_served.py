"""No backend leaves a sum of terms to plain PyTorch, and each gives the same bits at every run."""

from __future__ import annotations

import pytest
import torch

from bcmfnet.ops import backends, segmentation_loss
from bcmfnet.reference import bcl as reference

OP = "bcl"
KERNELS = [
    ("cpu", "cpp"),
    ("cpu", "cuda"),
    pytest.param(("cpu", "triton"), marks=pytest.mark.exhaustive),
    *(pytest.param(("cuda", backend), marks=pytest.mark.gpu) for backend in ("cuda", "triton")),
]
SIZE = (24, 40)
OPTIONS = {
    "ce": 1.0, "focal": 0.5, "dice": 1.0, "tversky": 0.3, "boundary": 0.5, "distillation": 0.2, "label_smoothing": 0.1,
    "align_corners": True, "boundary_term": "focal", "distillation_temperature": 2.0,
}  # fmt: skip


def value_and_gradient(device, classes, grid, teacher) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, classes, *grid), (2, classes, *teacher), (2, *SIZE)]
    logits, of_teacher, weight = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    target = torch.randint(0, max(classes, 2), (2, *SIZE), generator=generator).to(device)
    z, options = logits.requires_grad_(), OPTIONS | {"binary": classes == 1}
    value = segmentation_loss(z, target, pixel_weight=weight.relu(), teacher=of_teacher, **options)
    return [value.detach(), *torch.autograd.grad(value, z)]


@pytest.mark.parametrize("device", KERNELS, indirect=True, ids="-".join)
@pytest.mark.parametrize("classes", [1, 5, 25, 40])
@pytest.mark.parametrize(("grid", "teacher"), [(SIZE, SIZE), ((6, 9), (6, 9)), (SIZE, (5, 7)), ((6, 9), (5, 7))])
def test_no_call_is_left_to_plain_pytorch(device, monkeypatch, classes, grid, teacher):
    """With a teacher of another size only CUDA C++ does not."""
    if grid != teacher and backends.choose("bcl", device)[0] != "cuda":
        pytest.skip("upsampled by the reference")

    def refuse(*arguments):
        raise AssertionError("expected the kernels to compute it, got the reference")

    monkeypatch.setattr(reference, "_loss", refuse)
    monkeypatch.setattr(reference, "_gradient", refuse)
    first, second = (value_and_gradient(device, classes, grid, teacher) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)
