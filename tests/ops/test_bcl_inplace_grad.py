"""inplace_grad: the same bits in the logits' own memory, and a refusal wherever that would be wrong."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from torch import nn

from bcmfnet.nn import BoundaryCorrectedLoss
from bcmfnet.ops import backends, boundary_corrected_loss

OP = "bcl"
AUTOGRADS_OWN = "modified by an inplace operation"


@pytest.fixture
def cpp():
    """The kernels, where they are built; the reference cannot write in place."""
    if backends.choose("bcl", "cpu")[0] != "cpp":
        pytest.skip(backends.choose("bcl", "cpu")[1])


def features_and_target(size=(9, 70), device="cpu"):
    """Rows of one chunk of 64 pixels and a rest; some labels ignored."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 8, *size, generator=generator).to(device)
    target = torch.randint(0, 5, (2, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.1] = 255
    return features, target.to(device)


def new_head(device="cpu"):
    torch.manual_seed(1)
    return nn.Conv2d(8, 5, 1).to(device)


def loss_and_gradient(logits, target, **options):
    """Loss, and the gradient tensor that autograd hands to whatever made the logits."""
    seen = []
    logits.register_hook(seen.append)
    value = boundary_corrected_loss(logits, target, **options)
    (3 * value).backward()
    return value.detach(), seen[0]


@pytest.mark.tail
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_same_bits_in_the_logits_memory(device, layout, dtype):
    """`paper0` writes every label's gradient; rows of one chunk of 64 pixels and a rest of 1, and of three and 8."""
    if backends.choose("bcl", device)[0] == "reference":
        pytest.skip("the reference refuses")
    head, weight = new_head(device), torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0], device=device)
    for mode, size in (("detect", (9, 65)), ("paper0", (9, 65)), ("detect", (3, 200))):
        features, target = features_and_target(size, device)
        results = []
        for inplace_grad in (False, True):
            logits = head(features).to(dtype).contiguous(memory_format=layout) * 1
            before, place, version = logits.detach().clone(), logits.data_ptr(), logits._version
            results.append(loss_and_gradient(logits, target, mode=mode, weight=weight, inplace_grad=inplace_grad))
            gradient = results[-1][1]
            assert (gradient.data_ptr() == place) is inplace_grad
            assert logits._version - version == inplace_grad
            assert torch.equal(logits, gradient if inplace_grad else before)
            assert gradient.stride() == logits.stride()
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)


def test_training_a_head_ends_with_the_same_weights(cpp):
    features, target = features_and_target()
    trained = []
    for inplace_grad in (False, True):
        head = new_head()
        criterion = BoundaryCorrectedLoss(inplace_grad=inplace_grad)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
        for step in range(5):
            optimizer.zero_grad()
            criterion(head(features), target, jitter=step).backward()
            optimizer.step()
        trained.append(head)
    for actual, expected, initial in zip(*(head.parameters() for head in (*trained, new_head())), strict=True):
        assert torch.equal(actual, expected)
        assert not torch.equal(actual, initial)


def test_a_second_backward_fails(cpp):
    features, target = features_and_target()
    value = boundary_corrected_loss(new_head()(features), target, inplace_grad=True)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=AUTOGRADS_OWN):
        value.backward()


def test_a_second_backward_fails_where_saved_tensors_hooks_switch_autograds_check_off(cpp):
    features, target = features_and_target()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        value = boundary_corrected_loss(new_head()(features), target, inplace_grad=True)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_grad: expected one backward, got another"):
        value.backward()


@pytest.mark.parametrize("others", [
    lambda logits, target: boundary_corrected_loss(logits, target),
    lambda logits, target: boundary_corrected_loss(logits, target, inplace_grad=True),
    lambda logits, target: logits.square().mean(),
    lambda logits, target: logits[:, :2].square().mean(),
], ids=["plain", "in place too", "an op that saves", "a view"])  # fmt: skip
def test_other_readers_of_the_logits_fail(cpp, others):
    """In the order of the backward: what came last in forward is differentiated first."""
    features, target = features_and_target()
    logits = new_head()(features)
    other = others(logits, target)
    value = boundary_corrected_loss(logits, target, inplace_grad=True)
    with pytest.raises(RuntimeError, match=AUTOGRADS_OWN):
        (other + value).backward()


def test_a_producer_that_saved_its_output_fails(cpp):
    features, target = features_and_target()
    value = boundary_corrected_loss(new_head()(features).sigmoid(), target, inplace_grad=True)
    with pytest.raises(RuntimeError, match=AUTOGRADS_OWN):
        value.backward()


def test_readers_that_saved_nothing_get_their_gradients(cpp):
    """Two gradients of the logits are added: not into the memory that one of them is in."""
    features, target = features_and_target()
    gradients = []
    for inplace_grad in (False, True):
        head = new_head()
        logits = head(features)
        (logits.sum() + boundary_corrected_loss(logits, target, inplace_grad=inplace_grad) + logits.mean()).backward()
        gradients.append(head.weight.grad)
    assert torch.equal(*gradients)


def test_with_create_graph_nothing_is_overwritten(cpp):
    features, target = features_and_target()
    logits = new_head()(features)
    before = logits.detach().clone()
    value = boundary_corrected_loss(logits, target, inplace_grad=True)
    (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
    assert torch.equal(logits, before)
    with pytest.raises(RuntimeError, match="loss: expected a first derivative"):
        gradient.sum().backward()


class Expand(torch.autograd.Function):
    """An output of overlapping memory that is no view."""

    @staticmethod
    def forward(ctx, x):
        result = torch.empty_strided(x.shape, (0, *x.stride()[1:]))
        result[0] = x[0]
        return result

    @staticmethod
    def backward(ctx, grad):
        return grad


LEAF = "logits that an op made, got a leaf, whose values would be lost"
VIEW = "logits that own their memory, got a view"
DOUBLE = "float16, bfloat16 or float32 logits, got float64, which the reference serves"
LOW = "logits of the target's [9, 70] pixels, got [3, 35]: their gradient is computed in forward already"
REFUSED = {
    "leaf": (lambda head, x: head(x).detach().requires_grad_(), LEAF),
    "parameter": (lambda head, x: nn.Parameter(head(x).detach()), LEAF),
    "slice": (lambda head, x: head(torch.cat([x, x]))[:2], VIEW),
    "reshaped": (lambda head, x: head(x).reshape(2, 5, 630).reshape(2, 5, 9, 70), VIEW),
    "expanded": (lambda head, x: head(x[:1]).expand(2, -1, -1, -1), VIEW),
    "overlapping": (lambda head, x: Expand.apply(head(x)), "dense logits, got strides [0, 630, 70, 1]"),
    "low resolution": (lambda head, x: head(nn.functional.avg_pool2d(x, (3, 2))), LOW),
    "float64": (lambda head, x: head(x).double(), DOUBLE),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(cpp, make, message):
    features, target = features_and_target()
    logits = make(new_head(), features)
    with pytest.raises(ValueError, match=f"^inplace_grad: expected {re.escape(message)}$"):
        boundary_corrected_loss(logits, target, inplace_grad=True)
    boundary_corrected_loss(logits, target).backward()


def test_a_backend_without_kernels_is_refused():
    features, target = features_and_target()
    message = "^inplace_grad: expected a backend that writes into given memory, got one that allocates the gradient$"
    with backends.use_backend("reference"), pytest.raises(ValueError, match=message):
        boundary_corrected_loss(new_head()(features), target, inplace_grad=True)


@pytest.mark.parametrize("gradients", [torch.no_grad, contextlib.nullcontext])
def test_without_a_gradient_it_is_no_matter(gradients):
    """A criterion made for training also measures: under no_grad, and of logits that need no gradient."""
    features, target = features_and_target()
    with gradients():
        logits = new_head().requires_grad_(False)(features)
        expected = boundary_corrected_loss(logits, target)
        for given in (logits, logits[:, :], logits.double().float()):
            before = given.clone()
            assert torch.equal(boundary_corrected_loss(given, target, inplace_grad=True), expected)
            assert torch.equal(given, before)


class HeadAndLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.criterion = new_head(), BoundaryCorrectedLoss(inplace_grad=True)

    def forward(self, features, target):
        return self.criterion(self.head(features), target)


def test_a_traced_call_is_refused(cpp):
    """torch.compile without fullgraph leaves the call to eager, where it is served."""
    module, arguments = HeadAndLoss(), features_and_target()
    with pytest.raises(ValueError, match="inplace_grad: expected an eager call, got a traced one"):
        torch.export.export(module, arguments, strict=False)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="inplace_grad: expected an eager call"):
        torch.compile(module, backend="aot_eager", fullgraph=True)(*arguments)
    torch._dynamo.reset()
    torch.compile(module, backend="aot_eager")(*arguments).backward()
    actual = module.head.weight.grad.clone()
    module.zero_grad()
    module(*arguments).backward()
    assert torch.equal(actual, module.head.weight.grad)
