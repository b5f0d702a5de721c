"""Where the time of `for_inference` goes: stage by stage, beside what memory and arithmetic alone would take.

python -m bcmfnet.benchmarks.stages [--model M] [--size H W] [--classes C] [--dtype D] [--device cpu] [--output CSV]
"""

from __future__ import annotations

import argparse
import csv
import operator
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx, nn

from bcmfnet.benchmarks import _timing
from bcmfnet.benchmarks.lmfm import Modules
from bcmfnet.benchmarks.network import BestLabels, Case, _model, make_inputs
from bcmfnet.benchmarks.upsample_argmax import best_labels
from bcmfnet.inference import for_inference
from bcmfnet.models.count import multiply_adds_by_module
from bcmfnet.ops import upsample_argmax

ROUNDS = 15
SIDE = 2048
"""Of the square matrices whose product measures the arithmetic that the device can do."""


class Stopwatch(fx.Interpreter):
    """Runs a network node by node and notes for each stage its seconds and the bytes that its nodes read and write."""

    def __init__(self, network: fx.GraphModule, device: torch.device):
        super().__init__(network, garbage_collect_values=False)
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, int] = defaultdict(int)

    def run_node(self, node: fx.Node) -> Any:
        if node.op in ("placeholder", "output") or node.target in (getattr, operator.getitem):
            return super().run_node(node)
        result, seconds = clocked(lambda: super(Stopwatch, self).run_node(node), self.device)
        stage = stage_of(node)
        self.seconds[stage] += seconds
        values = [self.env[argument] for argument in node.all_input_nodes if argument in self.env] + [result]
        if node.op == "call_module":
            module = self.module.get_submodule(node.target)
            values += [*module.parameters(), *module.buffers()]
        self.bytes[stage] += sum(value.numel() * value.itemsize for value in values if isinstance(value, Tensor))
        return result


def stage_of(node: fx.Node) -> str:
    """The part of the network that a node belongs to, or what it does between two."""
    if node.op == "call_module":
        return node.target.removeprefix("model.").removeprefix("backbone.").split(".")[0]
    return str(getattr(node.target, "__name__", node.target))


def clocked(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """A call's result and its seconds, on a GPU between two events."""
    if device.type == "cpu":
        start = time.perf_counter()
        return call(), time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = call()
    end.record()
    end.synchronize()
    return result, start.elapsed_time(end) / 1e3


class EagerLogits(nn.Module):
    """Frames to logits in the best eager form, for tracing: without the checks of `forward`."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = BestLabels(model, dtype).model, dtype

    def forward(self, frames):
        frames = frames.to(self.dtype, memory_format=torch.channels_last)
        _, high, low = self.model.backbone(frames)
        return self.model.decode(high, low)


class Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, Modules) or super().is_leaf_module(module, name)


def eager_network(model: nn.Module, dtype: torch.dtype) -> fx.GraphModule:
    """The best eager form from frames to logits, node by node."""
    root = EagerLogits(model, dtype)
    return fx.GraphModule(root, Tracer().trace(root))


def peak(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a matrix product, the best of some."""
    a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    return 2 * SIDE**3 / min(clocked(lambda: a @ b, device)[1] for _ in range(8))


def multiply_adds(model: nn.Module, size: tuple[int, ...]) -> dict[str, int]:
    """Those of the convolutions of each stage."""
    counts: dict[str, int] = defaultdict(int)
    for name, count in multiply_adds_by_module(model, size).items():
        counts[name.removeprefix("backbone.").split(".")[0]] += count
    return counts


@torch.no_grad()
def measure(case: Case, dtype: torch.dtype, device: torch.device) -> list[dict[str, Any]]:
    """A row for each stage in order of execution: milliseconds, share of the sum, multiply-adds, floor, share of that,
    and milliseconds of the best eager form, run in turn with it, whose sums and ReLUs are stages of their own.

    The floor is the longer of a stage's bytes at the bandwidth of a copy and its operations at those of a matrix
    product, both measured here.
    """
    model = _model(case).to(device)
    network = for_inference(model, dtype=dtype, cuda_graph=False if device.type == "cuda" else None, output="logits")
    (frames,) = make_inputs(case, device)
    counts = multiply_adds(model, tuple(frames.shape))
    bandwidth, operations = 1e9 * _timing.copy_bandwidth(device), peak(dtype, device)
    seconds: dict[str, list[float]] = defaultdict(list)
    eager, eager_seconds = eager_network(model, dtype), defaultdict(list)
    moved: dict[str, int] = {}
    for round_number in range(ROUNDS + 1):
        watch = Stopwatch(network.network, device)
        logits = watch.run(frames)
        labels, last = clocked(partial(upsample_argmax, logits, frames.shape[-2:]), device)
        eager_watch = Stopwatch(eager, device)
        _, eager_last = clocked(partial(best_labels, eager_watch.run(frames), frames.shape[-2:]), device)
        if round_number:  # the first one puts weights in order and compiles
            for stage, value in {**eager_watch.seconds, "upsample_argmax": eager_last}.items():
                eager_seconds[stage].append(value)
            for stage, value in {**watch.seconds, "upsample_argmax": last}.items():
                seconds[stage].append(value)
        moved = {**watch.bytes, "upsample_argmax": logits.numel() * logits.itemsize + labels.numel()}
    total = sum(median(values) for values in seconds.values())
    rows = []
    for stage in [*seconds, *(stage for stage in eager_seconds if stage not in seconds)]:
        time, count, copy = median(seconds[stage] or [0.0]), counts.get(stage, 0), moved.get(stage, 0) / bandwidth
        row = _row(stage, time, total, count, copy, operations)
        rows.append(row | {"eager_best_ms": round(1e3 * median(eager_seconds[stage] or [0.0]), 3)})
    return rows


def _row(stage: str, seconds: float, total: float, count: int, copy: float, operations: float) -> dict[str, Any]:
    floor = max(copy, 2 * count / operations)
    return {
        "stage": stage,
        "ms": round(1e3 * seconds, 3),
        "share": round(seconds / total, 3),
        "multiply_adds": count,
        "floor_ms": round(1e3 * floor, 3),
        "of_floor": round(floor / seconds, 3) if seconds else 0.0,
    }


def launches(case: Case, dtype: torch.dtype) -> int:
    """Kernels that a GPU runs for one frame, without a CUDA graph."""
    device = torch.device("cuda")
    network = for_inference(_model(case).to(device), dtype=dtype, cuda_graph=False)
    (frames,) = make_inputs(case, device)
    network(frames)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        network(frames)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def main() -> None:
    """Print the table, and write it to a file where one is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bcmfnet")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048))
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    case, dtype = Case(arguments.model, tuple(arguments.size), arguments.classes), getattr(torch, arguments.dtype)
    device = torch.device(arguments.device)
    rows = measure(case, dtype, device)
    for row in rows:
        line = "{stage:16} {ms:9.3f} ms {share:6.1%}  floor {floor_ms:8.3f} ms {of_floor:6.1%}"
        print(f"{line}  eager {{eager_best_ms:9.3f}} ms".format(**row))
    for column in ("ms", "eager_best_ms"):
        print(f"sum of {column:14} {sum(row[column] for row in rows):9.3f} ms")
    if device.type == "cuda":
        print(f"{launches(case, dtype)} launches")
    if arguments.output is not None:
        with arguments.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
