"""The loss where training puts it: autocast, GradScaler, accumulation, DDP, checkpointing, torch.compile."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compare import TOLERANCE, assert_close, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

from bcmfnet.nn import BoundaryCorrectedLoss, OhemCrossEntropy
from bcmfnet.ops import backends

SIZE = (24, 40)
SCALES = pytest.mark.parametrize("stride", [1, 4])  # full resolution, and the upsampling inside


class Network(nn.Module):
    """Two convolutions; logits at 1/stride of the resolution."""

    def __init__(self, stride, classes=4):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(3, 8, stride, stride)
        self.head = nn.Conv2d(8, classes, 1)

    def forward(self, images):
        return self.head(F.relu(self.body(images)))


def batch(count=2, size=SIZE):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, *size, generator=generator)
    target = torch.randint(0, 4, (count, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.1] = 255
    return images, target.to(torch.uint8)


def gradients(network, value):
    """Of the network's parameters."""
    return torch.autograd.grad(value, list(network.parameters()))


@SCALES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_gives_the_loss_of_the_half_precision_logits(dtype, stride):
    network, (images, target) = Network(stride), batch()
    criterion = BoundaryCorrectedLoss()
    with torch.autocast("cpu", dtype=dtype):
        logits = network(images)
        value = criterion(logits, target)
    assert logits.dtype == dtype
    assert value.dtype == torch.float32
    exact = logits.detach().float().requires_grad_()
    expected = criterion(exact, target)
    assert torch.equal(value, expected)
    (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(expected, exact)[0].to(dtype))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(network, value))


@SCALES
def test_grad_scaler_keeps_small_gradients(stride):
    """1/131072 times a probability is rounded to a multiple of 6e-8 in float16; its product with the scale is not."""
    network, (images, target) = Network(stride), batch(size=(256, 256))
    criterion = BoundaryCorrectedLoss(norm="valid", nms=3, ratio=1 / 16)  # most pixels have the cross-entropy's alone
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    with torch.autocast("cpu", dtype=torch.float16):
        logits = network(images)
        loss = criterion(logits, target)
    logits.retain_grad()
    scaler.scale(loss).backward()
    exact = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(criterion(exact, target), exact)
    assert_close(logits.grad, 65536 * expected)
    assert relative_error(65536 * expected.half().double(), 65536 * expected) > 2 * TOLERANCE[torch.float16]
    before = [parameter.detach().clone() for parameter in network.parameters()]
    scaler.unscale_(optimizer)
    steps = [0.1 * parameter.grad for parameter in network.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 65536.0  # no overflow was found
    for parameter, old, step in zip(network.parameters(), before, steps, strict=True):
        assert step.isfinite().all() and (step != 0).any()
        assert_close(parameter, old - step)


@SCALES
def test_accumulated_halves_are_the_batch_where_the_selection_is_by_image(stride):
    """Exact if both halves have as many valid pixels, the selection is by image, and it divides by the valid."""
    network, (images, target) = Network(stride).double(), batch(4)
    images, target = images.double(), target.masked_fill(target == 255, 0)
    criterion = BoundaryCorrectedLoss(per_image=True, norm="valid")
    for start in (0, 2):
        (criterion(network(images[start : start + 2]), target[start : start + 2]) / 2).backward()
    expected = gradients(network, criterion(network(images), target))
    for parameter, wanted in zip(network.parameters(), expected, strict=True):
        assert_close(parameter.grad, wanted)


@SCALES
def test_accumulated_halves_are_the_mean_of_two_losses(stride):
    """With the default each half selects its own pixels and divides by their number."""
    network, (images, target) = Network(stride), batch(4)
    criterion = BoundaryCorrectedLoss()
    parts = [gradients(network, criterion(network(images[i : i + 2]), target[i : i + 2])) for i in (0, 2)]
    for i in (0, 2):
        (criterion(network(images[i : i + 2]), target[i : i + 2]) / 2).backward()
    for parameter, first, second in zip(network.parameters(), *parts, strict=True):
        assert_close(parameter.grad, (first.double() + second.double()) / 2)
    whole = gradients(network, criterion(network(images), target))
    assert not torch.allclose(whole[0], (parts[0][0] + parts[1][0]) / 2, rtol=1e-3)


@SCALES
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("criterion", [BoundaryCorrectedLoss(), OhemCrossEntropy()], ids=["bcl", "ohem"])
def test_activation_checkpointing(criterion, use_reentrant, stride):
    """Of head and loss: forward runs twice, the second time for the gradient, and decides the same."""
    network, (images, target) = Network(stride), batch()
    features = F.relu(network.body(images))
    expected = criterion(network.head(features), target)
    value = checkpoint(lambda x: criterion(network.head(x), target), features, use_reentrant=use_reentrant)
    assert torch.equal(value, expected)
    expected.backward(retain_graph=True)
    wanted = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    value.backward()
    for parameter, gradient in zip(network.parameters(), wanted, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_the_gradient_in_place(use_reentrant):
    """The logits that the second forward made are overwritten, nobody else's."""
    if backends.choose("bcl", "cpu")[0] == "reference":
        pytest.skip("the reference cannot write the gradient in place")
    network, (images, target) = Network(1), batch()
    features = F.relu(network.body(images))
    trained = []
    for inplace_grad in (False, True):
        criterion = BoundaryCorrectedLoss(inplace_grad=inplace_grad)
        value = checkpoint(lambda x, of=criterion: of(network.head(x), target), features, use_reentrant=use_reentrant)
        value.backward(retain_graph=not inplace_grad)
        trained.append([parameter.grad.clone() for parameter in network.parameters()])
        network.zero_grad()
    for actual, expected in zip(*trained, strict=True):
        assert torch.equal(actual, expected)


class NetworkAndLoss(nn.Module):
    """What a training step compiles."""

    def __init__(self, stride):
        super().__init__()
        self.network, self.criterion = Network(stride), BoundaryCorrectedLoss(weight=torch.tensor([1.0, 0.5, 2.0, 1.0]))

    def forward(self, images, target):
        return self.criterion(self.network(images), target)


@SCALES
def test_a_compiled_step_has_the_eager_gradients(stride):
    step, (images, target) = NetworkAndLoss(stride), batch()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    value, expected = compiled(images, target), step(images, target)
    assert torch.equal(value, expected)
    for actual, wanted in zip(gradients(step, value), gradients(step, expected), strict=True):
        assert torch.equal(actual, wanted)


WORKER = """
    import sys
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    sys.path[:0] = ["{here}", "{tests}"]
    from test_loss_in_training import BoundaryCorrectedLoss, Network, batch

    rank, meeting, result = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=2)
    images, target = (tensor[2 * rank : 2 * rank + 2] for tensor in batch(4))
    found = []
    for stride in (1, 4):
        network = DistributedDataParallel(Network(stride))
        BoundaryCorrectedLoss()(network(images), target).backward()
        found.append([parameter.grad for parameter in network.parameters()])
    torch.save(found, result)
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
def test_ddp_averages_the_gradients_of_its_processes(tmp_path):
    here = Path(__file__).parent
    script = textwrap.dedent(WORKER).format(here=here, tests=here.parent)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), tmp_path / "meeting", tmp_path / f"{rank}.pt"],
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for worker in workers:
            message = worker.communicate(timeout=120)[1]
            assert worker.returncode == 0, message
    finally:
        for worker in workers:
            worker.kill()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    images, target = batch(4)
    criterion = BoundaryCorrectedLoss()
    for number, stride in enumerate((1, 4)):
        network = Network(stride)
        alone = [gradients(network, criterion(network(images[i : i + 2]), target[i : i + 2])) for i in (0, 2)]
        for rank in range(2):
            for actual, first, second in zip(found[rank][number], *alone, strict=True):
                assert_close(actual, (first.double() + second.double()) / 2)
