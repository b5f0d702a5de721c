"""One call of each op, or one frame of the network, for a profiler.

python -m bcmfnet.benchmarks.once [--device cuda] [--smallest]           between cudaProfilerStart and Stop, for ncu
python -m bcmfnet.benchmarks.once frame [--device cuda] [--size H W]     a table of the time in each kernel of a frame
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bcmfnet.benchmarks import harness
from bcmfnet.benchmarks.network import Case, _model, make_inputs
from bcmfnet.inference import for_inference
from bcmfnet.ops import backends


def ops(device: torch.device, smallest: bool) -> None:
    """The first case of each op, or the smallest, after a call that is not profiled."""
    served = {row["op"] for row in backends.describe() if row["device"] == device.type}
    for name, benchmark in harness.find().items():
        if name not in served:
            continue
        cases = [case for case in benchmark.CASES if getattr(case, "device", None) in (None, device.type)]
        case = min(cases, key=benchmark.bytes_moved) if smallest else cases[0]
        inputs, calls = benchmark.make_inputs(case, device), benchmark.providers(case, device)
        for backend in backends.BACKENDS:
            call = calls[backend]
            if backend != "reference" and not isinstance(call, harness.Unavailable):
                call(*inputs)
                with profiled(device):
                    call(*inputs)
                print(f"{name} {case.name} {backend}", flush=True)


def frame(device: torch.device, size: tuple[int, int], passes: int = 3) -> str:
    """The passes of a network that makes no graph, by kernel on a GPU and by operator on a CPU."""
    case = Case("bcmfnet", size, 19)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    network = for_inference(
        _model(case).to(device), dtype=dtype, cuda_graph=False if device.type == "cuda" else None, output="labels"
    )
    (frames,) = make_inputs(case, device)
    network(frames)
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profile:
        for _ in range(passes):
            network(frames)
    kind = "device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=kind, row_limit=60, max_name_column_width=90)


@contextmanager
def profiled(device: torch.device) -> Iterator[None]:
    """What `ncu --profile-from-start off` looks at."""
    if device.type == "cpu":
        yield
        return
    runtime: Any = torch.cuda.cudart()
    torch.cuda.synchronize()
    runtime.cudaProfilerStart()
    yield
    torch.cuda.synchronize()
    runtime.cudaProfilerStop()


def main() -> None:
    """Prints each op as it was called, or the table of a frame."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("ops", "frame"), default="ops")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smallest", action="store_true", help="of each op the case that moves the fewest bytes")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048), help="of a frame")
    given = parser.parse_args()
    device = torch.device(given.device)
    todo: dict[str, Callable[[], Any]] = {
        "ops": lambda: ops(device, given.smallest),
        "frame": lambda: print(frame(device, tuple(given.size))),
    }
    todo[given.what]()


if __name__ == "__main__":
    main()
