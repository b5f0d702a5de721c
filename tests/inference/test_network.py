"""`for_inference`: the same labels as the model's, and a model that is left as it was."""

from __future__ import annotations

import copy
import pickle
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from compare import assert_close, relative_error
from gpu_manners import assert_never_waits, assert_uses_the_current_stream
from grids import grid
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu
from torch.utils._python_dispatch import TorchDispatchMode

from bcmfnet.inference import cuda_graphs, folding, for_inference, layers, runtimes
from bcmfnet.inference.cuda_graphs import CUDAGraphs
from bcmfnet.inference.folding import folded
from bcmfnet.inference.folding import fused as with_fused_layers
from bcmfnet.models import create_model, list_models
from bcmfnet.ops import _cpu

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
BF16_ERROR = 2e-2
"""Relative, of logits from maps that are rounded to 8 bits some forty times on their way; measured: 5e-3 to 9e-3."""


def trained(name: str = "bcmfnet", classes: int = 7, **options) -> nn.Module:
    """A model whose batch norms are those of no fresh one: statistics of their own, scales of either sign."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = create_model(name, num_classes=classes, **options)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    model(torch.randn(4, 3, 128, 192, generator=generator))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            shape = norm.weight.shape
            norm.weight.data = torch.rand(shape, generator=generator) * 1.5 - 0.5
            norm.bias.data = torch.randn(shape, generator=generator) * 0.5
            norm.running_mean += norm.running_var.sqrt() * torch.randn(shape, generator=generator) * 0.2
            norm.running_var *= torch.rand(shape, generator=generator) + 0.5
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained()


def frames(size: tuple[int, int], batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def eager_scores(model: nn.Module, images: Tensor) -> Tensor:
    """At full resolution, in float64."""
    return interpolate(eager_logits(model, images), images.shape[-2:], mode="bilinear", align_corners=False)


def eager_logits(model: nn.Module, images: Tensor) -> Tensor:
    """In float64."""
    with torch.no_grad():
        return copy.deepcopy(model).eval().double()(images.double()).logits


def assert_labels(labels: Tensor, scores: Tensor, band: float = 1e-5) -> None:
    """Labels are those of the scores wherever the winner leads by more than a share of the largest score."""
    assert labels.dtype == torch.uint8
    best = scores.topk(2, dim=1)
    wrong = labels != best.indices[:, 0]
    assert not (wrong & (best.values[:, 0] - best.values[:, 1] > band * scores.abs().max())).any()


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


@pytest.fixture
def cudnn(monkeypatch) -> Iterator[torch.library.Library]:
    """A CPU that counts as a GPU: there, cuDNN's fused convolutions are stand-ins that compute what they say."""

    def convolved(x, weight, bias, *geometry):
        return torch.conv2d(x, weight, bias, *geometry).relu_()

    def convolved_and_added(x, weight, other, alpha, bias, *geometry):
        assert other.stride() == torch.conv2d(x, weight, bias, *geometry).stride()
        return (torch.conv2d(x, weight, bias, *geometry) + alpha * other).relu_()

    monkeypatch.setattr(layers, "_onednn_serves", lambda x: False)
    monkeypatch.setattr(layers, "_cudnn_serves", lambda x: True)
    monkeypatch.setattr(layers, "STRIP_PIXELS", 2**40)
    monkeypatch.setattr(folding, "has_kernel", lambda op, device: True)
    monkeypatch.setattr(folding, "beats_modules", lambda *_: True)
    library = torch.library.Library("aten", "IMPL")
    library.impl("cudnn_convolution_relu", convolved, "CPU")
    library.impl("cudnn_convolution_add_relu", convolved_and_added, "CPU")
    yield library
    library._destroy()


class Launches(TorchDispatchMode):
    """Kernels that a GPU would run: one for each op that computes, unless said otherwise."""

    SEVERAL = {"aten::promote_types": 0, "bcmfnet::lmfm": 5}

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if not function.is_view:
            self.count += self.SEVERAL.get(function.name(), 1)
        if function is torch.ops.aten.convolution.default and arguments[2] is not None:
            self.count += 1  # cuDNN's plain convolution leaves the bias to torch
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_cudnns_fused_convolutions(cudnn, model, memory_format):
    network = for_inference(model, memory_format=memory_format, output="logits")
    assert_close(network(frames((97, 131), batch=2)), eager_logits(model, frames((97, 131), batch=2)), tolerance=1e-5)


def test_launches_of_a_frame_on_a_gpu(cudnn, model, monkeypatch):
    network, images = for_inference(model), frames((128, 192))
    with Launches() as fused:
        network(images)
    monkeypatch.setattr(layers, "_cudnn_serves", lambda x: False)
    with Launches() as apart:
        network(images)
    assert (fused.count, apart.count) == (69, 143)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, AttributeError])
def test_what_cudnn_refuses_is_left_to_torch_from_then_on(cudnn, model, monkeypatch, error):
    calls = []

    def refuse(*_):
        calls.append(1)
        raise error("no engine")

    monkeypatch.setattr(layers.ConvAddReLU, "_cudnn", refuse)
    network, images = for_inference(model, output="logits"), frames((64, 96))
    for _ in range(2):
        assert_close(network(images), eager_logits(model, images), tolerance=1e-5)
    assert len(calls) == sum(layer.relu for layer in network.modules() if isinstance(layer, layers.ConvAddReLU)) == 30


def test_a_gpu_without_memory_is_no_refusal(cudnn, model, monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(layers.ConvAddReLU, "_cudnn", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        for_inference(model)(frames((64, 96)))


def test_cudnn_times_its_algorithms_while_a_graph_warms_up():
    for before in (False, True):
        torch.backends.cudnn.benchmark = before
        try:
            with pytest.raises(KeyError), cuda_graphs.measured_algorithms():
                assert torch.backends.cudnn.benchmark
                raise KeyError
            assert torch.backends.cudnn.benchmark is before
        finally:
            torch.backends.cudnn.benchmark = False


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
        ({"runtime": "tensorrt"}, "runtime: expected one of None, onnxruntime, openvino, got 'tensorrt'"),
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


def test_traced_exported_and_compiled(model):
    network, images = for_inference(model), frames((64, 96))
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
    scores = for_inference(model, runtime=runtime, dtype=dtype, output="logits")
    first = scores(frames((64, 96)))
    kept = first.clone()
    assert relative_error(first, model(frames((64, 96))).logits) < (1e-5 if dtype == torch.float32 else BF16_ERROR)
    scores(frames((64, 96), seed=1))
    assert torch.equal(first, kept)
    assert runtimes.SignalStack.current().start == signal_stack
    del network, scores  # in the order in which they were made
    assert runtimes.SignalStack.current().start == signal_stack


class Recorded(cuda_graphs.Graph):
    """In the place of a captured graph where there is no GPU."""

    def __init__(self, function, frames, *_):
        self.shape = frames.shape

    def __call__(self, frames):
        assert frames.shape == self.shape
        return frames + 1


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "Graph", Recorded)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())


@pytest.mark.parametrize(("at_once", "captured"), [(True, [1, 1, 1]), (False, [0, 1, 1])])
def test_when_a_size_is_captured(without_gpu, at_once, captured):
    graphs = CUDAGraphs(lambda x: x, torch.float32, torch.channels_last, at_once)
    assert [graphs(torch.zeros(1, 3, 4, 4)).max().item() for _ in range(3)] == captured


def test_the_graphs_of_the_last_sizes_are_kept(without_gpu):
    graphs = CUDAGraphs(lambda x: x, torch.float32, torch.channels_last, at_once=True)
    widths = [1, 2, 3, 4, 1, 5]  # the fifth size pushes out 2, since 1 was used again
    for width in widths:
        graphs(torch.zeros(1, 3, 4, width))
    assert [shape[-1] for shape in graphs.graphs] == [3, 4, 1, 5]


class OneBuffer(Recorded):
    """What a replay is: copied in, computed, copied out, on one set of buffers."""

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        self.frames = frames
        time.sleep(0.01)
        return self.frames.clone()


def test_threads_take_turns_with_a_graph(without_gpu, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "Graph", OneBuffer)
    graphs = CUDAGraphs(lambda x: x, torch.float32, torch.channels_last, at_once=True)
    with ThreadPoolExecutor(4) as threads:
        results = threads.map(lambda i: graphs(torch.full((1, 3, 4, 4), float(i))), range(16))
        assert [result.max().item() for result in results] == list(range(16))


def test_a_capture_on_the_device_of_the_frames_is_the_one_that_counts(without_gpu, monkeypatch):
    """The caller captures on the frames' device while another one is current: the pass joins the caller's graph."""
    current = ["another"]

    @contextmanager
    def switched(device):
        current.append(str(device))
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", switched)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == "cpu")
    graphs = CUDAGraphs(lambda x: x + 7, torch.float32, torch.channels_last, at_once=True)
    assert graphs(torch.zeros(1, 3, 4, 4)).max().item() == 7
    assert not graphs.graphs


@pytest.fixture
def on_gpu(model) -> nn.Module:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return copy.deepcopy(model).cuda()


GPU_ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: BF16_ERROR}
"""Relative, of logits on a GPU."""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_ERROR)
@pytest.mark.parametrize("cuda_graph", [False, None, True])
def test_graphs_serve_new_frames_of_two_sizes(on_gpu, dtype, cuda_graph):
    network = for_inference(on_gpu, dtype=dtype, cuda_graph=cuda_graph, output="logits")
    for seed, size in enumerate([(64, 96), (97, 131), (64, 96), (64, 96), (97, 131)]):
        images = frames(size, seed=seed).cuda()
        assert relative_error(network(images), on_gpu(images).logits) < GPU_ERROR[dtype]
    captured = [graph for graph in network._graphs.graphs.values() if graph] if network._graphs else []
    assert len(captured) == (0 if cuda_graph is False else 2)


@pytest.mark.gpu
def test_a_graph_gives_what_the_same_pass_gives_without(on_gpu):
    eager, graphed = (for_inference(on_gpu, dtype=torch.float16, cuda_graph=value) for value in (False, True))
    for seed in range(3):
        images = frames((128, 192), batch=2, seed=seed).cuda()
        labels = graphed(images)
        kept = labels.clone()
        graphed(images.flip(-1))
        assert torch.equal(labels, kept)  # not written over
        assert (labels != eager(images)).float().mean() < 1e-2  # another algorithm may round ties apart


@pytest.mark.gpu
def test_graph_in_and_out_of_inference_mode(on_gpu):
    network, images = for_inference(on_gpu, cuda_graph=True), frames((64, 96)).cuda()
    with torch.inference_mode():
        inside = network(images)
    assert torch.equal(network(images), inside)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("check", [assert_never_waits, assert_uses_the_current_stream])
def test_manners_on_a_gpu(on_gpu, cuda_graph, check):
    network = for_inference(on_gpu, dtype=torch.float16, cuda_graph=cuda_graph)
    network(frames((64, 96)).cuda())
    check(lambda images: (network(images),), frames((64, 96)).cuda())


@pytest.mark.gpu
def test_two_streams_take_turns(on_gpu):
    """A graph has one set of buffers: a call on a second stream must not write over frames still being read."""
    network = for_inference(on_gpu, dtype=torch.float16, cuda_graph=True)
    batch = [frames((256, 256), seed=seed).cuda() for seed in range(8)]
    expected = [network(images) for images in batch]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    actual = []
    for number, images in enumerate(batch):
        with torch.cuda.stream(streams[number % 2]):
            actual.append(network(images))
    torch.cuda.synchronize()
    assert all(map(torch.equal, actual, expected))


@pytest.mark.gpu
def test_inside_a_graph_of_the_callers(on_gpu):
    network, images = for_inference(on_gpu, dtype=torch.float16, cuda_graph=True), frames((64, 96)).cuda()
    expected = network(images)
    static = torch.zeros_like(images)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        labels = network(static)
    static.copy_(images)
    graph.replay()
    assert torch.equal(labels, expected)


@pytest.mark.gpu
@pytest.mark.slow
def test_compiled_in_a_graph(on_gpu):
    network = for_inference(on_gpu, dtype=torch.float16, compile=True, cuda_graph=True, output="logits")
    for seed in range(3):
        images = frames((64, 96), seed=seed).cuda()
        assert relative_error(network(images), on_gpu(images).logits) < GPU_ERROR[torch.float16]
