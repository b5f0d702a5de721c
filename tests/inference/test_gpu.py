"""`for_inference` on a GPU: cuDNN's fused convolutions and CUDA graphs, and as much of them as runs without one."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from compare import assert_close, relative_error
from gpu_manners import assert_never_waits, assert_uses_the_current_stream
from networks import BF16_ERROR, eager_logits, frames
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bcmfnet.data import IMAGENET_MEAN, IMAGENET_STD, normalize
from bcmfnet.inference import cuda_graphs, folding, for_inference, layers
from bcmfnet.inference.cuda_graphs import CUDAGraphs


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


def test_a_frame_of_bytes_is_as_many_launches(cudnn, model, monkeypatch):
    """The normalisation is none of its own."""
    monkeypatch.setattr(folding, "_device", lambda network: "cuda")
    images = torch.zeros(1, 3, 128, 192, dtype=torch.uint8)
    for network, given in (
        (for_inference(model), frames((128, 192))),
        (for_inference(model, mean=IMAGENET_MEAN, std=IMAGENET_STD), images),
    ):
        assert network.network.stem.as_op
        with Launches() as launches:
            network(given)
        assert launches.count == 68


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
@pytest.mark.parametrize("dtype", GPU_ERROR)
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_frames_as_cameras_give_them(on_gpu, dtype, cuda_graph):
    options = {"dtype": dtype, "cuda_graph": cuda_graph, "output": "logits"}
    network = for_inference(on_gpu, mean=IMAGENET_MEAN, std=IMAGENET_STD, **options)
    assert network.network.stem.as_op
    for seed, size in enumerate([(64, 96), (97, 131), (64, 96)]):
        pixels = (64 * frames(size, batch=2, seed=seed).permute(0, 2, 3, 1).abs()).byte().cuda()
        images = pixels.permute(0, 3, 1, 2)
        assert relative_error(network(images), on_gpu(normalize(images)).logits) < GPU_ERROR[dtype]


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
