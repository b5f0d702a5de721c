"""The networks: published counts, shapes at any size, memory format, the aux tap, and how errors read."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from compare import assert_close
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bcmfnet.errors import ConfigError
from bcmfnet.models import (
    SegmentationOutput,
    count_multiply_adds,
    count_parameters,
    create_model,
    list_models,
    multiply_adds_by_module,
)

# Parameters without and with the auxiliary head; multiply-adds at 1x3x1024x2048, of all and of the
# context module alone.
COUNTS = {
    "ddrnet23_slim": (5_695_987, 5_734_342, 36_281_319_424, 422_117_376),
    "bcmfnet": (5_548_275, 5_586_630, 36_205_821_952, 346_619_904),
}


def meta_model(name: str = "bcmfnet", **options) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, num_classes=19, **options)


def small_batch(batch: int = 2, size: tuple[int, int] = (64, 96)) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_multiply_adds(name):
    plain, with_aux, multiply_adds, context = COUNTS[name]
    model = meta_model(name)
    by_module = multiply_adds_by_module(model)
    assert count_parameters(model) == plain
    assert count_parameters(meta_model(name, aux=True)) == with_aux
    assert count_multiply_adds(model) == multiply_adds
    assert sum(count for key, count in by_module.items() if key.startswith("context.")) == context


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("size", [(1, 3, 1024, 2048), (2, 3, 65, 127)])  # the published one; odd, batched
def test_multiply_adds_agree_with_torch(name, size):
    model = meta_model(name).eval()
    with FlopCounterMode(display=False) as torch_counter, torch.no_grad():
        model(torch.empty(size, device="meta"))
    assert torch_counter.get_total_flops() == 2 * count_multiply_adds(model, size)


def test_counting_leaves_the_model_as_it_was():
    model = create_model("bcmfnet", num_classes=5)
    count_multiply_adds(model, (1, 3, 64, 64))
    assert model.training and next(model.parameters()).device.type == "cpu"
    assert not any(module._forward_hooks for module in model.modules())


def test_lmfm_with_a_1x1_at_its_roots():
    assert count_parameters(meta_model(root_conv="1x1")) == 5_581_555  # 5.58 M in network.md


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("size", [(64, 64), (65, 127), (1023, 1025), (1024, 2048)])  # smallest, odd, real
def test_shapes_at_any_size(name, size):
    images = torch.empty(2, 3, *size, device="meta")
    logits, aux = meta_model(name, aux=True)(images)
    assert logits.shape == aux.shape == (2, 19, math.ceil(size[0] / 8), math.ceil(size[1] / 8))


@pytest.mark.parametrize("size", [(64, 64), (65, 127), (360, 480)])
def test_channels_last_is_kept_and_changes_nothing(size):
    torch.manual_seed(0)
    model = create_model("bcmfnet", num_classes=11, aux=True).double()
    images = small_batch(size=size).double()
    expected = copy.deepcopy(model)(images)
    model.to(memory_format=torch.channels_last)
    output = model(images.to(memory_format=torch.channels_last))
    for got, want in zip(output, expected, strict=True):
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("size", [(64, 64), (128, 192)])  # at 64 the last map is 1x1: both formats at once
def test_every_hidden_map_keeps_channels_last(size):
    """A map that falls back to NCHW on the way costs a copy."""
    model = create_model("bcmfnet", num_classes=11).eval().to(memory_format=torch.channels_last)
    seen = []

    def note(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
    for layer in layers:
        layer.register_forward_pre_hook(note)
    model(small_batch(size=size).to(memory_format=torch.channels_last))
    assert seen == [True] * len(layers)


def test_output_is_named_and_aux_answers_in_training_only():
    model = create_model("bcmfnet", num_classes=7, aux=True)
    images = small_batch()
    output = model(images)
    assert isinstance(output, SegmentationOutput) and output.aux.shape == (2, 7, 8, 12)
    assert model.eval()(images).aux is None
    assert create_model("bcmfnet", num_classes=7)(images).aux is None


def test_aux_head_taps_the_first_fusion():
    """Its gradient reaches what that map is made of (high3, compression3, layer3), and nothing after it."""
    model = create_model("bcmfnet", num_classes=7, aux=True)
    model(small_batch()).aux.sum().backward()
    parts = model.backbone.named_children()
    reached = {name for name, part in parts if next(part.parameters()).grad is not None}
    assert reached == {"stem", "layer1", "layer2", "layer3", "high3", "compression3"}
    assert model.context.scale["0"].conv.weight.grad is None


def test_every_parameter_learns_from_the_logits():
    model = create_model("bcmfnet", num_classes=7)
    model(small_batch()).logits.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_fusions_read_the_maps_before_the_relu_and_before_fusion():
    """The backbone's equations (network.md, steps 3 to 9), written out over its own stages."""
    model = create_model("ddrnet23_slim", num_classes=7).double().eval()
    images = small_batch(size=(96, 130)).double()
    b, relu = model.backbone, torch.relu

    def up(x, like):
        return nn.functional.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)

    x2 = b.layer2(relu(b.layer1(b.stem(images))))
    x3, h3 = b.layer3(relu(x2)), b.high3(relu(x2))
    x = x3 + b.down3(relu(h3))
    h = fused = h3 + up(b.compression3(relu(x3)), h3)
    x4, h4 = b.layer4(relu(x)), b.high4(relu(h))
    x = x4 + b.down4(relu(h4))
    h = h4 + up(b.compression4(relu(x4)), h4)
    assert x2.min() < 0 and h4.min() < 0  # else the order of ReLU and fusion would not show
    h, x = b.high5(relu(h)), b.layer5(relu(x))
    for got, want in zip(b(images), (fused, h, x), strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(model(images).logits, model.head(up(model.context(x), h) + h))


def test_eval_is_deterministic_and_leaves_the_input():
    model = create_model("bcmfnet", num_classes=7).eval()
    images = small_batch(batch=1)
    before = images.clone()
    assert torch.equal(model(images).logits, model(images).logits)
    assert torch.equal(images, before)


def test_an_image_does_not_depend_on_its_batch():
    model = create_model("bcmfnet", num_classes=7).double().eval()
    images = small_batch(batch=2).double()
    torch.testing.assert_close(model(images).logits[1:], model(images[1:]).logits)


@pytest.mark.parametrize("size", [(64, 64), (128, 128)])  # at 64 the last stage is 1x1 too
def test_batch_of_1_in_training(size):
    model = create_model("bcmfnet", num_classes=7)
    with pytest.raises(ValueError, match="^images: expected a batch of at least 2 in training, got 1"):
        model(small_batch(batch=1, size=size))
    assert model.eval()(small_batch(batch=1, size=size)).logits.isfinite().all()


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 63, 64),
        torch.zeros(3, 64, 64),
        torch.zeros(2, 4, 64, 64),
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
    ],
    ids=["small", "no batch", "channels", "dtype"],
)
def test_unusable_images(images):
    model = create_model("bcmfnet", num_classes=7)
    with pytest.raises(ValueError, match=r"^images: expected float \[N, 3, H, W\], H and W >= 64, got "):
        model(images)


def test_list_models():
    assert list_models() == ["bcmfnet", "ddrnet23_slim"]


def test_unknown_name_names_the_nearest():
    message = "model: expected bcmfnet or ddrnet23_slim, got 'bmcfnet'; did you mean 'bcmfnet'?"
    with pytest.raises(ConfigError, match=re.escape(message)):
        create_model("bmcfnet", num_classes=19)


@pytest.mark.parametrize("num_classes", [0, 257, -1, 19.0, "19", True, None])
def test_class_counts_out_of_range(num_classes):
    with pytest.raises(ConfigError, match=r"^num_classes: expected an integer in 1..256, got "):
        create_model("bcmfnet", num_classes=num_classes)


@pytest.mark.parametrize("num_classes", [1, 256])
def test_class_counts_at_the_ends(num_classes):
    with torch.device("meta"):
        model = create_model("bcmfnet", num_classes=num_classes).eval()
    assert model(torch.empty(1, 3, 64, 64, device="meta")).logits.shape == (1, num_classes, 8, 8)


def test_unknown_options():
    with pytest.raises(ConfigError, match="option 'drection': bcmfnet has .*did you mean 'direction'"):
        create_model("bcmfnet", num_classes=19, drection="forward")
    with pytest.raises(ConfigError, match="option 'direction': ddrnet23_slim has "):
        create_model("ddrnet23_slim", num_classes=19, direction="forward")
    with pytest.raises(ValueError, match="^direction: expected"):
        create_model("bcmfnet", num_classes=19, direction="up")


def test_weights_start_kaiming_normal_by_fan_out():
    torch.manual_seed(0)
    model = create_model("bcmfnet", num_classes=19)
    conv = model.backbone.layer4[1].conv1
    fan_out = conv.out_channels * 9
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.01)
    assert abs(conv.weight.mean().item()) < 1e-3
    assert not model.head.conv2.bias.any()
    with_bias = {name.removesuffix(".bias") for name, _ in model.named_parameters() if name.endswith(".bias")}
    convs = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert convs & with_bias == {"backbone.stem.0", "backbone.stem.3", "head.conv2"}
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}


def test_autocast_bfloat16():
    torch.manual_seed(0)
    model = create_model("bcmfnet", num_classes=7, aux=True)
    images = small_batch(size=(128, 192))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images)
        assert output.logits.dtype == output.aux.dtype == torch.bfloat16
        (output.logits.float().square().mean() + output.aux.float().square().mean()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    # Values are compared in eval mode: a batch norm over two values makes a sign of any rounding.
    model.eval()
    expected = model(images).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = (model(images).logits.float() - expected).norm() / expected.norm()
    assert error < 0.03


@pytest.mark.exhaustive
@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph(training):
    model = create_model("bcmfnet", num_classes=7, aux=True).train(training).double()
    images = small_batch(size=(65, 127)).double()  # statistics over few pixels multiply a rounding
    expected = copy.deepcopy(model)(images)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    torch.testing.assert_close(compiled.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert (compiled.aux is not None) == training


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="before 2.13 torch ties a dynamic size that it pools to the stride"
)
def test_exports_with_dynamic_size():
    model = create_model("bcmfnet", num_classes=7).eval()
    # Up to 512 pixels the 17-pool's map is one pixel, which torch.export takes for a constant.
    height, width = (torch.export.Dim(name, min=513, max=4096) for name in ("height", "width"))
    dynamic_shapes = ({2: height, 3: width},)
    program = torch.export.export(model, (small_batch(1, (576, 640)),), dynamic_shapes=dynamic_shapes)
    images = small_batch(1, (513, 1025))
    assert_close(program.module()(images).logits, model(images).logits, tolerance=1e-5)


def test_exports_at_one_size():
    model = create_model("bcmfnet", num_classes=7).eval()
    images = small_batch(1, (65, 127))
    program = torch.export.export(model, (images,))
    assert_close(program.module()(images).logits, model(images).logits, tolerance=1e-5)
