"""`for_inference`: the same labels as the model's, and a model that is left as it was."""

from __future__ import annotations

import copy
import pickle
import re
import shutil
from importlib.util import find_spec

import pytest
import torch
from compare import assert_close, relative_error
from grids import grid
from networks import BF16_ERROR, assert_labels, eager_scores, frames, trained
from torch import nn
from torch.nn.functional import interpolate, relu
from torch.utils._python_dispatch import TorchDispatchMode

from bcmfnet.data import IMAGENET_MEAN, IMAGENET_STD, normalize
from bcmfnet.inference import folding, for_inference, layers, runtimes
from bcmfnet.inference.folding import folded
from bcmfnet.inference.folding import fused as with_fused_layers
from bcmfnet.models import list_models
from bcmfnet.ops import _cpu, upsample_argmax

SIZES = [
    (64, 64),  # the smallest: the last map is 1x1
    (97, 131),  # odd everywhere
    (360, 480),  # CamVid
    (130, 2100),  # wide: more than one strip of the stem, the last of two rows
]
OPTIONS = [
    ("bcmfnet", {}),
    ("ddrnet23_slim", {}),
    ("bcmfnet", {"norm_order": "post", "root_conv": "3x3"}),
    ("bcmfnet", {"shortcut": False, "identity_branch": False, "direction": "forward", "interval": 1}),
]
FUSION = torch.ops.bcmfnet.upsample_add_relu


@grid({
    "name, options": OPTIONS, "memory_format": [torch.channels_last, torch.contiguous_format],
    "size": [(64, 64), (97, 131)],
})  # fmt: skip
def test_folding_is_exact(monkeypatch, name, options, memory_format, size):
    monkeypatch.setattr(layers, "STRIP_PIXELS", 2 * 131 * 32)  # of (97, 131) four strips, the last of one row
    model = trained(name, **options).double()
    images = frames(size, batch=2).double()
    network = folded(model, torch.float64, memory_format)
    expected = model(images).logits
    assert_close(network(images), expected, "folded", tolerance=1e-12)
    assert_close(with_fused_layers(network)(images), expected, "with fused layers", tolerance=1e-12)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_the_three_upsamplings_take_their_sums_and_relus(name, options):
    network = folded(trained(name, **options), torch.float32, torch.channels_last)
    assert _calls(network, interpolate) == 3 and _calls(network, FUSION) == 0
    with_fused_layers(network)
    assert _calls(network, interpolate) == 0 and _calls(network, FUSION) == 3
    assert _calls(network, getattr) == 0  # of the size that the map was upsampled to


def test_a_sum_that_is_read_before_its_relu_stays():
    class Net(nn.Module):
        def forward(self, high, low):
            total = high + interpolate(low, high.shape[-2:], mode="bilinear", align_corners=False)
            return relu(total) - total

    network = torch.fx.symbolic_trace(Net())
    (upsampling,) = (node for node in network.graph.nodes if node.target is interpolate)
    folding._join_upsampling(network, upsampling)
    assert _calls(network, interpolate) == 1 and _calls(network, FUSION) == 0


@pytest.mark.parametrize(
    ("dtype", "features", "one_op"),
    [
        (torch.float32, {"avx2", "avx512_bf16"}, True),
        (torch.bfloat16, {"avx2", "avx512_bf16"}, False),
        (torch.bfloat16, {"avx2", "avx512_bf16", "amx"}, True),
        (torch.float32, set(), False),
    ],
)
def test_the_context_module_is_one_op_where_the_cpu_makes_it_faster(monkeypatch, model, dtype, features, one_op):
    monkeypatch.setattr(_cpu, "features", lambda: frozenset(features))
    context = for_inference(model, dtype=dtype).network.model.context
    assert type(context) is (layers.ContextOp if one_op else type(model.context))
    x = torch.randn(1, 512, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = folded(model, torch.float64, torch.channels_last).model.context(x.double())
    assert_close(context(x), expected, tolerance=1e-5 if dtype == torch.float32 else BF16_ERROR)


def test_a_context_module_that_was_changed_is_left_to_its_modules(model, monkeypatch):
    monkeypatch.setattr(_cpu, "features", lambda: frozenset({"avx2"}))
    changed = copy.deepcopy(model)
    changed.context.scale["1"].relu = nn.ReLU6()
    assert type(for_inference(changed).network.model.context) is type(model.context)


def _calls(network: torch.fx.GraphModule, function: object) -> int:
    return sum(node.target is function for node in network.graph.nodes)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_no_batch_norm_is_left_outside_the_context_module(name, options):
    network = folded(trained(name, **options), torch.float32, torch.channels_last)
    left = [key for key, module in network.named_modules() if isinstance(module, nn.BatchNorm2d | nn.Identity)]
    assert [key for key in left if not key.startswith("model.context.")] == []


def test_folded_statistics_are_not_rounded_before_they_are_folded(model):
    """bfloat16 weights are within half a unit of the last of 8 bits of those that float64 gives."""
    exact = dict(folded(model, torch.float64, torch.channels_last).named_parameters())
    rounded = dict(folded(model, torch.bfloat16, torch.channels_last).named_parameters())
    for name in exact:
        if "norm" not in name:
            assert (rounded[name] == exact[name].bfloat16()).all(), name


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model = trained(aux=True).train(training)
    called = []
    model.head.register_forward_hook(lambda *_: called.append("hook"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [(key, type(module), module.training) for key, module in model.named_modules()]
    layouts = [(p.data_ptr(), p.stride(), p.dtype, p.requires_grad) for p in model.parameters()]
    network = for_inference(model, dtype=torch.bfloat16)
    network(frames((64, 64)))
    assert called == []  # hooks belong to the model
    assert [(key, type(module), module.training) for key, module in model.named_modules()] == modules
    assert [(p.data_ptr(), p.stride(), p.dtype, p.requires_grad) for p in model.parameters()] == layouts
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in network.parameters()}
    assert shared == set()


@grid({"name": list_models(), "memory_format": [torch.channels_last, torch.contiguous_format], "size": SIZES})
def test_labels_are_those_of_the_model(name, memory_format, size):
    model = trained(name)
    images = frames(size)
    labels = for_inference(model, memory_format=memory_format)(images)
    assert labels.shape == (1, *size)
    assert_labels(labels, eager_scores(model, images))


def test_sizes_and_batches_in_turn(model):
    """What is kept from one size must not serve another."""
    network = for_inference(model)
    for seed, (size, batch) in enumerate([((64, 64), 1), ((97, 131), 2), ((64, 64), 3), ((97, 131), 2)]):
        images = frames(size, batch, seed)
        before = images.clone()
        labels = network(images)
        assert_labels(labels, eager_scores(model, images))
        assert torch.equal(images, before)


def test_results_are_the_callers_own(model):
    for output in ("labels", "logits"):
        network = for_inference(model, output=output)
        first = network(frames((64, 64)))
        kept = first.clone()
        network(frames((64, 64), seed=1))
        assert torch.equal(first, kept)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_frames_of_either_memory_format(model, memory_format):
    network, images = for_inference(model, memory_format=memory_format), frames((97, 131))
    last = network(images.contiguous(memory_format=torch.channels_last))
    assert torch.equal(last, network(images))


def camera_frames(size, batch=1):
    return torch.randint(0, 256, (batch, 3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@grid({"size": SIZES, "memory_format": [torch.channels_last, torch.contiguous_format]})
def test_frames_as_cameras_give_them(model, size, memory_format):
    images = camera_frames(size, batch=2)
    network = for_inference(model, memory_format=memory_format, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    labels = network(images)
    assert_labels(labels, eager_scores(model, normalize(images)))
    interleaved = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(network(interleaved), labels)
    assert torch.equal(network(interleaved.flip(1).contiguous().flip(1)), labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_convolution_normalises(model, dtype):
    """In the same numbers as `normalize` before it, and with no pass of its own."""
    images = camera_frames((97, 131))
    network = for_inference(model, dtype=dtype, output="logits", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    served = [
        network.network.stem._convolve(images),
        for_inference(model, dtype=dtype).network.stem._convolve(normalize(images)),
    ]
    assert_close(*served, tolerance=1e-6 if dtype == torch.float32 else 4e-3)
    with OpsCalled() as called:
        network(images)
    assert called.names.count("bcmfnet::stem_conv") == 1
    assert not {"aten::mul_", "aten::add_"} & set(called.names)


class OpsCalled(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(function.name().removesuffix(".default").removesuffix(".Tensor"))
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("size", SIZES)
def test_logits(model, size):
    images = frames(size, batch=2)
    logits = for_inference(model, output="logits")(images)
    assert logits.dtype == torch.float32 and not logits.requires_grad
    assert_close(logits, model(images).logits, tolerance=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_is_within_its_error(model, size):
    images = frames(size)
    expected = model(images).logits
    logits = for_inference(model, dtype=torch.bfloat16, output="logits")(images)
    assert logits.dtype == torch.bfloat16
    assert 1e-4 < relative_error(logits, expected) < BF16_ERROR
    labels = for_inference(model, dtype=torch.bfloat16)(images)
    assert_labels(labels, eager_scores(model, images), band=0.1)


def test_without_onednn(model, monkeypatch):
    """What serves a GPU and other CPUs: sums and ReLUs in place on the convolution's result."""
    monkeypatch.setattr(layers, "_onednn_serves", lambda x: False)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, BF16_ERROR)):
        logits = for_inference(model, dtype=dtype, output="logits")(frames((97, 131)))
        assert relative_error(logits, model(frames((97, 131))).logits) < tolerance


def test_it_stays_in_evaluation_mode(model):
    network = for_inference(model)
    assert not any(module.training for module in network.train().modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("used", [False, True])
def test_copies_and_pickles(model, used):
    network, images = for_inference(model, dtype=torch.bfloat16), frames((64, 96))
    expected = for_inference(model, dtype=torch.bfloat16)(images)
    if used:
        network(images)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(images), expected)


def test_in_inference_mode_and_out_of_it(model):
    """Weights that were put in order in inference mode serve outside of it too."""
    network, images = for_inference(model), frames((64, 96))
    with torch.inference_mode():
        inside = network(images)
    assert torch.equal(network(images.requires_grad_()), inside)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, "dtype: expected one of torch.float32, torch.bfloat16, torch.float16, got torch.f"),
        ({"dtype": "bf16"}, "dtype: expected one of torch.float32, torch.bfloat16, torch.float16, got 'bf16'"),
        ({"dtype": torch.float16}, "dtype: expected torch.float32 or torch.bfloat16 on a CPU, got torch.float16"),
        ({"memory_format": torch.preserve_format}, "memory_format: expected one of torch.channels_last, torch.con"),
        ({"compile": 1}, "compile: expected True or False, got 1"),
        ({"cuda_graph": 0}, "cuda_graph: expected True or False, got 0"),
        ({"cuda_graph": True}, "cuda_graph: expected a model on a CUDA device, got one on cpu"),
        ({"quantized": [torch.zeros(1, 3, 64, 64)]}, "runtime: expected 'openvino' with quantized, got None"),
        ({"runtime": "tensorrt"}, "runtime: expected one of None, onnxruntime, openvino, got 'tensorrt'"),
        ({"mean": IMAGENET_MEAN}, "std: expected three numbers, got None"),
        ({"mean": 0.5, "std": IMAGENET_STD}, "mean: expected three numbers, got 0.5"),
        ({"mean": IMAGENET_MEAN, "std": (1, 1, 0)}, "std: expected three numbers above 0, got (1.0, 1.0, 0.0)"),
        ({"output": "mask"}, "output: expected one of labels, logits, got 'mask'"),
        (
            {"runtime": "openvino", "compile": True},
            "compile: expected False with a runtime, got True and runtime='openvino'",
        ),
        (
            {"runtime": "onnxruntime", "dtype": torch.bfloat16},
            "dtype: expected torch.float32 with runtime='onnxruntime', got torch.bfloat16",
        ),
    ],
)
def test_options_that_cannot_be(model, options, message):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        for_inference(model, **options)


@pytest.mark.parametrize("camera", [False, True])
def test_traced_exported_and_compiled(model, camera):
    network, images = for_inference(model), frames((64, 96))
    if camera:
        network, images = for_inference(model, mean=IMAGENET_MEAN, std=IMAGENET_STD), camera_frames((64, 96))
    expected = network(images)
    assert torch.equal(torch.jit.trace(network, images)(images), expected)
    assert torch.equal(torch.export.export(network, (images,)).module()(images), expected)
    assert torch.equal(torch.compile(network, fullgraph=True, backend="eager")(images), expected)
    with pytest.raises(TypeError, match="^images: expected a tensor, got Proxy$"):
        torch.fx.symbolic_trace(network)


def test_an_engine_that_is_not_installed(model, monkeypatch):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="^runtime: 'openvino' needs openvino: pip install openvino$"):
        for_inference(model, runtime="openvino")
    with pytest.raises(ImportError, match="pip install onnxruntime onnx onnxscript$"):
        for_inference(model, runtime="onnxruntime")


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 63, 64), torch.zeros(3, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)]
)
def test_unusable_frames(model, images):
    with pytest.raises(ValueError, match=r"^images: expected float \[N, 3, H, W\], H and W >= 64, got "):
        for_inference(model)(images)


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 63, dtype=torch.uint8)])
def test_unusable_frames_of_a_camera(model, images):
    with pytest.raises(ValueError, match=r"^images: expected uint8 \[N, 3, H, W\], H and W >= 64, got "):
        for_inference(model, mean=IMAGENET_MEAN, std=IMAGENET_STD)(images)


def test_frames_on_another_device(model):
    with pytest.raises(ValueError, match="^images: expected them on cpu, got meta$"):
        for_inference(model)(torch.zeros(1, 3, 64, 64, device="meta"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
@pytest.mark.exhaustive
def test_compiled(model):
    network = for_inference(model, compile=True)
    assert_labels(network(frames((97, 131))), eager_scores(model, frames((97, 131))))
    assert_labels(network(frames((97, 131), seed=1)), eager_scores(model, frames((97, 131), seed=1)))
    pickle.loads(pickle.dumps(network))
    network = for_inference(model, compile=True, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert_labels(network(camera_frames((97, 131))), eager_scores(model, normalize(camera_frames((97, 131)))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runtime", "dtype"),
    [
        pytest.param("onnxruntime", torch.float32, marks=pytest.mark.exhaustive),
        pytest.param("openvino", torch.float32, marks=pytest.mark.exhaustive),
        pytest.param("openvino", torch.bfloat16, marks=pytest.mark.exhaustive),
    ],
)
def test_engines(model, runtime, dtype):
    missing = [package for package in runtimes.RUNTIMES[runtime].packages if find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    band = 1e-5 if dtype == torch.float32 else 0.1
    signal_stack = runtimes.SignalStack.current().start
    network = for_inference(model, runtime=runtime, dtype=dtype)
    for size, batch in (((64, 96), 1), ((97, 131), 2), ((64, 96), 1)):
        assert_labels(network(frames(size, batch)), eager_scores(model, frames(size, batch)), band)
    cameras = for_inference(model, runtime=runtime, dtype=dtype, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert_labels(cameras(camera_frames((64, 96))), eager_scores(model, normalize(camera_frames((64, 96)))), band)
    del cameras
    scores = for_inference(model, runtime=runtime, dtype=dtype, output="logits")
    first = scores(frames((64, 96)))
    kept = first.clone()
    assert relative_error(first, model(frames((64, 96))).logits) < (1e-5 if dtype == torch.float32 else BF16_ERROR)
    scores(frames((64, 96), seed=1))
    assert torch.equal(first, kept)
    assert runtimes.SignalStack.current().start == signal_stack
    del network, scores  # in the order in which they were made
    assert runtimes.SignalStack.current().start == signal_stack


@pytest.mark.exhaustive
def test_quantized(model):
    for package in ("nncf", "openvino"):
        pytest.importorskip(package)
    network = for_inference(model, runtime="openvino", quantized=frames((64, 96), 4).split(1))
    for images in (frames((64, 96), seed=1), frames((97, 131), 2)):  # quantised once for all sizes
        own, given = for_inference(model).logits(images), network.logits(images)
        assert 1e-4 < relative_error(given, own) < 0.3
        assert torch.equal(network(images), upsample_argmax(given, images.shape[-2:]))


@pytest.mark.parametrize(
    ("quantized", "message"),
    [
        ([], "quantized: expected a list of images, got []"),
        ([1], "quantized: expected a tensor, got int"),
        ([torch.zeros(1, 3, 32, 64)], "quantized: expected float [N, 3, H, W], H and W >= 64, got float32 [1, 3, 32"),
        ([torch.zeros(2, 3, 64, 64)], "quantized: expected images [1, 3, H, W], got one of [2, 3, 64, 64]"),
    ],
)
def test_images_that_cannot_calibrate(model, quantized, message):
    pytest.importorskip("openvino")
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        for_inference(model, runtime="openvino", quantized=quantized)
