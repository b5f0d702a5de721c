"""Every derivative that can be asked for is right or refused: by each tensor of each op, in reverse and forward mode.

Arguments are taken from schemas and signatures, so that a new one is asked for too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap

from bcmfnet.nn import LMFM, BoundaryCorrectedLoss
from bcmfnet.ops import (
    PyramidWeights,
    _derivatives,
    boundary_corrected_loss,
    lmfm,
    pyramid_pool,
    segmentation_loss,
    stem_conv,
    upsample_add_relu,
    upsample_argmax,
)
from bcmfnet.ops._op import LIBRARY
from bcmfnet.reference import bcl as reference

torch.manual_seed(0)
TARGET = torch.randint(0, 3, (2, 8, 12))
PACKED = LMFM(4, 3, branch_channels=2).eval().pyramid_weights(torch.float32)


def packed_lmfm(x: torch.Tensor, **tensors: torch.Tensor) -> torch.Tensor:
    return lmfm(x, PyramidWeights(**PACKED._asdict() | tensors))


CALLS: dict[str, tuple[Callable[..., Any], dict[str, torch.Tensor]]] = {
    "bcl_forward": (
        lambda logits, target, **tensors: segmentation_loss(logits, target.long(), dice=1, distillation=1, **tensors),
        {
            "logits": torch.randn(2, 3, 4, 6), "target": TARGET, "weight": torch.ones(3),
            "pixel_weight": torch.ones(2, 8, 12), "teacher": torch.randn(2, 3, 4, 6),
        },
    ),
    "lmfm": (packed_lmfm, {"x": torch.randn(1, 4, 5, 6)} | dict(zip(PACKED._fields[:6], PACKED[:6], strict=True))),
    "pyramid_pool": (lambda x: pyramid_pool(x, [(3, 2, 1)])[0], {"x": torch.randn(1, 2, 5, 6)}),
    "stem_conv": (
        stem_conv, {"images": torch.randn(1, 3, 5, 6), "weight": torch.randn(2, 3, 3, 3), "bias": torch.randn(2)},
    ),
    "upsample_add_relu": (
        upsample_add_relu, {"high": torch.randn(1, 2, 6, 8), "low": torch.randn(1, 2, 3, 4)},
    ),
    "upsample_argmax": (
        lambda logits: upsample_argmax(logits, (6, 8), return_confidence=True)[1], {"logits": torch.randn(1, 3, 3, 4)},
    ),
}  # fmt: skip
"""For each op the call that a user makes, and its tensors by their names in the schema."""
HAVE_A_GRADIENT = [
    ("bcl_forward", "logits"), ("pyramid_pool", "x"), ("upsample_add_relu", "high"), ("upsample_add_relu", "low")
]  # fmt: skip
ARGUMENTS = [
    (op, argument.name)
    for op in CALLS
    for argument in getattr(torch.ops.bcmfnet, op).default._schema.arguments
    if "Tensor" in str(argument.type) and argument.name not in ("target", "shared_slopes")  # integers; ours alone
]


def of_one(op: str, name: str) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """An op as a function of one of its tensors, and that tensor."""
    call, tensors = CALLS[op]
    return lambda tensor: call(**tensors | {name: tensor}), tensors[name].clone()


def test_every_op_is_here():
    defined = {name.removeprefix("bcmfnet::").removesuffix(".default") for name in LIBRARY._op_defs}
    assert {name.removesuffix("_forward") for name in defined if "backward" not in name} == {
        name.removesuffix("_forward") for name in CALLS
    }
    for op, (_, tensors) in CALLS.items():
        assert set(tensors) >= {name for of, name in ARGUMENTS if of == op}


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_reverse_mode_gives_a_gradient_or_names_the_argument(op, name):
    call, tensor = of_one(op, name)
    tensor.requires_grad_()
    if (op, name) in HAVE_A_GRADIENT:
        assert torch.autograd.grad(call(tensor).sum(), tensor)[0].abs().sum() > 0
        return
    with pytest.raises(ValueError) as caught:
        call(tensor)
    assert str(caught.value) == f"{name}: expected a tensor without requires_grad, it has no gradient; detach it"
    with pytest.raises(ValueError, match=f"^{name}: "):
        grad(lambda x: vmap(lambda y: call(x) * y)(torch.ones(2)).sum())(tensor.detach())
    with torch.no_grad():
        assert not call(tensor).requires_grad


def with_a_tangent(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
    with forward_ad.dual_level():
        call(forward_ad.make_dual(x, torch.ones_like(x)))


FORWARD = {
    "make_dual": with_a_tangent,
    "jvp": lambda call, x: jvp(call, (x,), (torch.ones_like(x),)),
    "jvp of vmap": lambda call, x: jvp(lambda x: vmap(lambda y: call(x) * y)(torch.ones(2)), (x,), (x,)),
    "vmap of jvp": lambda call, x: vmap(lambda y: jvp(call, (x,), (x * y,))[1])(torch.ones(2)),
    "jvp of grad": lambda call, x: jvp(grad(lambda x: call(x).sum()), (x,), (torch.ones_like(x),)),
    "hessian": lambda call, x: hessian(lambda x: call(x).sum())(x),
}


@pytest.mark.parametrize("way", FORWARD)
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_forward_mode_is_refused(op, name, way):
    call, tensor = of_one(op, name)
    with pytest.raises((NotImplementedError, ValueError)) as caught:  # ValueError: reverse mode asks first
        FORWARD[way](call, tensor)
    public = op.replace("bcl_forward", "loss")
    forward = f"{public}: expected derivatives in reverse mode, got forward mode for {name} "
    assert str(caught.value).startswith(forward) or ("grad" in way or way == "hessian") and name in str(caught.value)


@pytest.mark.parametrize(("op", "name"), HAVE_A_GRADIENT)
def test_forward_mode_over_a_backward_is_refused(op, name):
    call, tensor = of_one(op, name)
    value = call(tensor.requires_grad_()).sum()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="got forward mode for grad "):
        torch.autograd.grad(value, tensor, forward_ad.make_dual(torch.ones(()), torch.ones(())))


def test_tensors_without_a_tangent_are_served_in_forward_mode():
    call, tensor = of_one("bcl_forward", "logits")
    value, tangent = jvp(lambda x: call(tensor) * x, (torch.tensor(2.0),), (torch.tensor(3.0),))
    assert value == 2 * call(tensor)
    assert tangent == 3 * call(tensor)


def test_a_context_module_is_right_in_forward_mode():
    module, x = LMFM(4, 3, branch_channels=2).double().eval(), torch.randn(2, 4, 24, 32).double()
    v = torch.randn_like(x)
    _, tangent = jvp(module, (x,), (v,))
    step = 1e-6
    torch.testing.assert_close(
        tangent, (module(x + step * v) - module(x - step * v)) / (2 * step), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("size", [(4, 6), (8, 12)])
def test_gradients_through_vmap_are_those_of_the_calls(size):
    logits, target = torch.randn(3, 2, 3, *size, requires_grad=True), torch.randint(0, 3, (3, 2, 8, 12))
    (batched,) = torch.autograd.grad(vmap(boundary_corrected_loss)(logits, target).sum(), logits)
    losses = [reference.loss(z, y, reference.make_options())[0] for z, y in zip(logits, target, strict=True)]
    torch.testing.assert_close(batched, torch.autograd.grad(sum(losses), logits)[0])


OPTIONS = [
    name
    for name, option in inspect.signature(boundary_corrected_loss).parameters.items()
    if name not in ("logits", "target", "weight", "pixel_weight")
]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_parameter_as_an_option_is_refused_by_name(name):
    option = torch.nn.Parameter(torch.tensor(1.0))
    logits = torch.randn(2, 3, 4, 6, requires_grad=True)
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected .*, got a tensor$"):
        boundary_corrected_loss(logits, TARGET, **{name: option})


def test_a_learned_class_weight_is_refused_in_the_constructor():
    with pytest.raises(ValueError, match="^weight: expected a tensor without requires_grad"):
        BoundaryCorrectedLoss(weight=torch.nn.Parameter(torch.ones(3)))


def test_no_call_outside_of_transforms_looks_for_tangents(monkeypatch):
    monkeypatch.setattr(_derivatives, "_has_tangent", lambda tensor: pytest.fail("looked for"))
    boundary_corrected_loss(torch.randn(2, 3, 4, 6), TARGET)
