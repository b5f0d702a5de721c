"""LMFM and DAPPM against their equations, written out with functional calls in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from bcmfnet.nn import context
from bcmfnet.nn.context import DAPPM, LMFM
from bcmfnet.ops import lmfm, pyramid_pool, upsample_add_relu

# The map of a 1024x2048 and of a 360x480 frame (the 17-pool gives 1x1 there), an odd one, and the smallest.
MAP_SIZES = [(16, 32), (6, 8), (17, 9), (1, 1)]
POOLS = {1: (5, 2, 2), 2: (9, 4, 4), 3: (17, 8, 8)}


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms with nothing left at 0 or 1; some gammas are negative, which a wrong fold would show."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data.normal_(generator=generator)
            norm.bias.data.normal_(generator=generator)
            norm.running_mean.normal_(generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
    return module


def random_map(channels: int, size: tuple[int, int], batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)


def pre(unit: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """BN, ReLU, conv from a unit's tensors, in eval mode."""
    norm, weight = unit.norm, unit.conv.weight
    x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)
    return F.conv2d(x.clamp(min=0), weight, padding=weight.shape[-1] // 2)


def equation_scales(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    def up(y):
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)

    pooled = [F.avg_pool2d(x, *pool, count_include_pad=True) for pool in POOLS.values()]
    s0 = pre(module.scale["0"], x)
    s1, s2, s3 = (up(pre(module.scale[str(i)], y)) for i, y in enumerate(pooled, start=1))
    s4 = pre(module.scale["4"], x.mean(dim=(2, 3), keepdim=True)).expand_as(s0)
    return [s0, s1, s2, s3, s4]


def equation_out(module: nn.Module, x: torch.Tensor, y: list[torch.Tensor]) -> torch.Tensor:
    return pre(module.compression, torch.cat(y, dim=1)) + pre(module.shortcut, x)


@pytest.mark.parametrize("size", MAP_SIZES)
def test_lmfm_is_its_equation(size):
    lmfm = randomised(LMFM(24, 16, branch_channels=8)).eval()
    x = random_map(24, size)
    s0, s1, s2, s3, s4 = equation_scales(lmfm, x)
    y4, y3 = s4, s3
    y2 = pre(lmfm.process["2"], s2 + y4)
    y1 = pre(lmfm.process["1"], s1 + y3)
    y0 = pre(lmfm.process["0"], s0 + y2)
    torch.testing.assert_close(lmfm(x), equation_out(lmfm, x, [y0, y1, y2, y3, y4]))


@pytest.mark.parametrize("size", MAP_SIZES)
def test_dappm_is_its_equation(size):
    dappm = randomised(DAPPM(24, 16, branch_channels=8)).eval()
    x = random_map(24, size)
    scales = equation_scales(dappm, x)
    y = scales[:1]
    for i in (1, 2, 3, 4):
        y.append(pre(dappm.process[str(i)], scales[i] + y[i - 1]))
    torch.testing.assert_close(dappm(x), equation_out(dappm, x, y))


@pytest.mark.parametrize("training", [False, True])
def test_forward_lmfm_of_interval_1_is_dappm(training):
    dappm = randomised(DAPPM(24, 16, branch_channels=8)).train(training)
    lmfm = LMFM(24, 16, branch_channels=8, direction="forward", interval=1).double().train(training)
    lmfm.load_state_dict(dappm.state_dict())
    x = random_map(24, (9, 7))
    assert torch.equal(lmfm(x), dappm(x))


def fused_from(lmfm: LMFM) -> dict[int, set[int]]:
    """Branches that each fused branch depends on, found by gradients."""
    scaled = {i: torch.ones(2, 8, 3, 3, requires_grad=True) for i in lmfm.branches}
    sources = {}
    for i, y in zip(lmfm.branches, lmfm.eval().fuse(scaled), strict=True):
        grads = torch.autograd.grad(y.sum(), list(scaled.values()), allow_unused=True, retain_graph=True)
        sources[i] = {j for j, grad in zip(scaled, grads, strict=True) if grad is not None}
    return sources


@pytest.mark.parametrize(
    ("options", "sources"),
    [
        ({}, {0: {0, 2, 4}, 1: {1, 3}, 2: {2, 4}, 3: {3}, 4: {4}}),
        ({"direction": "forward"}, {0: {0}, 1: {1}, 2: {0, 2}, 3: {1, 3}, 4: {0, 2, 4}}),
        ({"interval": 1}, {0: {0, 1, 2, 3, 4}, 1: {1, 2, 3, 4}, 2: {2, 3, 4}, 3: {3, 4}, 4: {4}}),
        ({"identity_branch": False}, {1: {1, 3}, 2: {2, 4}, 3: {3}, 4: {4}}),
        ({"pools": ((5, 2, 2),)}, {0: {0, 2}, 1: {1}, 2: {2}}),
    ],
)
def test_options_choose_which_branches_meet(options, sources):
    assert fused_from(LMFM(24, 16, branch_channels=8, **options)) == sources


PATHS = [{}, {"root_conv": "1x1"}, {"identity_branch": False, "shortcut": False}, {"interval": 1, "pools": ()}]


@pytest.mark.parametrize(
    ("layout", "size", "gradient", "op"),
    [
        (torch.channels_last, (2, 16, 31), True, False),  # 992 pixels
        (torch.channels_last, (2, 16, 32), True, True),
        (torch.channels_last, (2, 16, 32), False, False),
        (torch.contiguous_format, (1, 15, 17), True, False),  # 255 pixels
        (torch.contiguous_format, (1, 16, 16), True, True),
        (torch.contiguous_format, (1, 16, 16), False, True),
    ],
)
def test_pools_are_one_op_where_that_is_faster(monkeypatch, layout, size, gradient, op):
    calls = []

    def noted(x, pools):
        calls.append(x.device.type)
        return pyramid_pool(x, pools)

    monkeypatch.setattr(context, "pyramid_pool", noted)
    batch, height, width = size
    x = torch.randn(batch, 24, height, width).to(memory_format=layout).requires_grad_(gradient)
    pooled = context._pooled(x, context.DEFAULT_POOLS)
    assert calls == ["cpu"] * op
    for actual, expected in zip(pooled, pyramid_pool(x, context.DEFAULT_POOLS), strict=True):
        assert_close(actual, expected, tolerance=1e-6)
    with FakeTensorMode():
        assert len(context._pooled(torch.empty(size[0], 24, *size[1:], device="cuda"), ())) == 1
    assert calls[op:] == ["cuda"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("low_dtype", [torch.float32, torch.float64])
def test_a_fusion_is_one_op_in_training(monkeypatch, training, low_dtype):
    calls = []

    def noted(high, low):
        calls.append(low.dtype)
        return upsample_add_relu(high, low)

    def fuse(high_dtype, low_dtype, training):
        maps = [random_map(6, size).to(dtype) for size, dtype in (((9, 14), high_dtype), ((5, 7), low_dtype))]
        out = context.fuse_relu(*(x.requires_grad_() for x in maps), training)
        out.backward(random_map(6, (9, 14)).to(out.dtype))
        return [out, *(x.grad for x in maps)]

    expected = fuse(torch.float64, torch.float64, training=False)
    monkeypatch.setattr(context, "upsample_add_relu", noted)
    for actual, value in zip(fuse(torch.float32, low_dtype, training), expected, strict=True):
        assert_close(actual, value, tolerance=1e-6)
    assert calls == [torch.float32] * (training and low_dtype is torch.float32)


@pytest.mark.parametrize("size", MAP_SIZES)
@pytest.mark.parametrize(("module_class", "options"), [*((LMFM, options) for options in PATHS), (DAPPM, {})])
def test_the_op_and_the_modules_agree(module_class, options, size):
    """In float64 and in what the kernels compute."""
    module = randomised(module_class(24, 16, branch_channels=8, **options)).eval()
    module.compression.norm.eps = 1e-3
    x = random_map(24, size)
    expected = module(x)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        for layout in (torch.contiguous_format, torch.channels_last):
            with torch.no_grad():
                actual = lmfm(x.to(dtype, memory_format=layout), module.to(dtype).pyramid_weights(dtype))
            assert actual.is_contiguous(memory_format=layout)
            assert_close(actual, expected, tolerance=tolerance)
        module.double()


def test_the_op_has_no_weights_of_post_norm_order():
    with pytest.raises(ValueError, match="^norm_order: expected 'pre' for bcmfnet.ops.lmfm, got 'post'$"):
        LMFM(24, 16, branch_channels=8, norm_order="post").pyramid_weights(torch.float32)


def test_exported_programs_have_torchs_own_ops_alone():
    module, x = LMFM(24, 16, branch_channels=8).eval().requires_grad_(False), random_map(24, (6, 8)).float()
    program = torch.export.export(module, (x,))
    assert "bcmfnet" not in str(program.graph)
    assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("module_class", [LMFM, DAPPM])
def test_compiled_whole(module_class):
    module, x = module_class(24, 16, branch_channels=8), random_map(24, (16, 32)).float()
    for training in (True, False):
        module.train(training)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with torch.set_grad_enabled(training):
            assert_close(compiled(x), copy.deepcopy(module)(x))


@pytest.mark.parametrize("gradient", [False, True])
def test_sizes_are_compiled_once(gradient):
    """But for the map of one pixel, which torch compiles apart."""
    torch._dynamo.reset()
    counters.clear()
    module = LMFM(8, 6, branch_channels=4).eval()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    for size in ((9, 10), (10, 11), (24, 33), (33, 48)):  # about the size from which one op is faster
        x = random_map(8, size).float().requires_grad_(gradient)
        torch.testing.assert_close(compiled(x), module(x))
    assert counters["stats"]["unique_graphs"] == 1


def unit_parameters(in_channels: int, out_channels: int, kernel: int) -> int:
    return 2 * in_channels + in_channels * out_channels * kernel**2


LMFM_PARAMETERS = 925_696  # network.md


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, LMFM_PARAMETERS),
        ({"direction": "forward"}, LMFM_PARAMETERS),
        ({"interval": 1}, LMFM_PARAMETERS + unit_parameters(128, 128, 3)),
        ({"root_conv": "1x1"}, LMFM_PARAMETERS + 2 * unit_parameters(128, 128, 1)),
        ({"root_conv": "3x3"}, LMFM_PARAMETERS + 2 * unit_parameters(128, 128, 3)),
        (
            {"identity_branch": False},
            LMFM_PARAMETERS
            - unit_parameters(512, 128, 1)
            - unit_parameters(128, 128, 3)
            - unit_parameters(128, 128, 1),
        ),
        (
            {"branch_channels": 64},
            5 * unit_parameters(512, 64, 1)
            + 3 * unit_parameters(64, 64, 3)
            + unit_parameters(5 * 64, 128, 1)
            + unit_parameters(512, 128, 1),
        ),
        # without one pool: its 1x1, one 3x3 and its part of the compression
        (
            {"pools": ((5, 2, 2), (9, 4, 4))},
            LMFM_PARAMETERS
            - unit_parameters(512, 128, 1)
            - unit_parameters(128, 128, 3)
            - unit_parameters(128, 128, 1),
        ),
        # BN after the conv has its width: 5 scales and the shortcut go 512 -> 128, the compression 640 -> 128
        ({"norm_order": "post"}, LMFM_PARAMETERS - 6 * 2 * (512 - 128) - 2 * (640 - 128)),
        ({"shortcut": False}, LMFM_PARAMETERS - unit_parameters(512, 128, 1)),
    ],
)
def test_parameters_of_each_option(options, parameters):
    lmfm = LMFM(512, 128, **options)
    assert sum(parameter.numel() for parameter in lmfm.parameters()) == parameters


def test_parameters_of_each_part():
    lmfm = LMFM(512, 128)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in lmfm.named_children()}
    assert parts == {"scale": 332_800, "process": 443_136, "compression": 83_200, "shortcut": 66_560}
    assert sum(parameter.numel() for parameter in DAPPM(512, 128).parameters()) == 1_073_408


def test_post_norm_order_leaves_the_sum_without_relu():
    lmfm = randomised(LMFM(24, 16, branch_channels=8, norm_order="post")).eval()
    x = random_map(24, (6, 8))

    def post(unit, x):
        norm, weight = unit.norm, unit.conv.weight
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)

    torch.testing.assert_close(lmfm.process["0"](x[:, :8]), post(lmfm.process["0"], x[:, :8]).relu())
    y = torch.cat(lmfm.fuse(lmfm.scaled(x)), dim=1)
    torch.testing.assert_close(lmfm(x), post(lmfm.compression, y) + post(lmfm.shortcut, x))


def test_without_shortcut_only_the_compression_is_left():
    lmfm = randomised(LMFM(24, 16, branch_channels=8, shortcut=False)).eval()
    x = random_map(24, (6, 8))
    y = torch.cat(lmfm.fuse(lmfm.scaled(x)), dim=1)
    torch.testing.assert_close(lmfm(x), pre(lmfm.compression, y))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("direction", "backward"),
        ("interval", 3),
        ("interval", True),
        ("root_conv", "5x5"),
        ("identity_branch", "yes"),
        ("branch_channels", 0),
        ("branch_channels", 64.0),
        ("pools", ((4, 2, 2),)),
        ("pools", (5, 2, 2)),
        ("pools", "597"),
        ("norm_order", "none"),
        ("shortcut", 1),
    ],
)
def test_unknown_values_are_refused_in_one_line(option, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{option}: expected .*got ") as error:
        LMFM(24, 16, **{option: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("module_class", [LMFM, DAPPM])
def test_batch_of_1_in_training(module_class):
    module = module_class(24, 16, branch_channels=8)
    x = random_map(24, (6, 8), batch=1).float()
    with pytest.raises(ValueError, match="^images: expected a batch of at least 2 in training, got 1"):
        module(x)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    frozen = module(x)
    assert torch.equal(frozen, module.eval()(x))
