"""Cases x providers: each provider must first agree with the reference, and is then timed in turn with the others.

python -m bcmfnet.benchmarks.harness [NAMES] --device cuda --output CSV: briefly, for a script; exits with 1 where a
provider disagrees or fails. `bcmfnet benchmark` is the same for people.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import bcmfnet.benchmarks
from bcmfnet.benchmarks import _machine, _memory, _results, _timing
from bcmfnet.benchmarks._results import Row
from bcmfnet.errors import ConfigError
from bcmfnet.inference.runtimes import Runtime, check_runtime
from bcmfnet.ops import backends

log = logging.getLogger(__name__)

Inputs = tuple[Tensor, ...]
Provider = Callable[..., Any]
"""One of the ways to compute a case: called with its inputs, it gives the output. It writes to none of its inputs."""


class Unavailable(NamedTuple):
    """In the place of a provider that cannot run here."""

    reason: str


class Case(Protocol):
    """What a benchmark varies; its fields are the benchmark's own."""

    name: str
    """Unique in its benchmark."""


class Benchmark(Protocol):
    """The names that make a module of this folder a benchmark, which is called as its file is.

    It may also define `operations(case) -> int`, the arithmetic that no arrangement can avoid, and
    `baseline(provider) -> str`, where not all providers are compared with `BASELINE`.
    """

    CASES: Sequence[Case]
    BASELINE: str
    """The provider that speedups are over: the best form in eager PyTorch that was found."""

    def make_inputs(self, case: Case, device: torch.device) -> Inputs:
        """Inputs of a case, the same values each time."""

    def providers(self, case: Case, device: torch.device) -> dict[str, Provider | Unavailable]:
        """Every way to compute a case, by name."""

    def expected(self, case: Case, *inputs: Tensor) -> Any:
        """What `disagreement` compares with, from float64."""

    def disagreement(self, case: Case, provider: str, output: Any, expected: Any) -> str | None:
        """What is wrong with an output in one line, or None."""

    def bytes_moved(self, case: Case) -> int:
        """Compulsory bytes: each input read once, each output written once."""


REQUIRED = ("CASES", "BASELINE", "make_inputs", "providers", "expected", "disagreement", "bytes_moved")


def find() -> dict[str, Benchmark]:
    """The benchmarks of this folder by name."""
    names = [module.name for module in iter_modules(bcmfnet.benchmarks.__path__) if not module.name.startswith("_")]
    modules = {name: import_module(f"bcmfnet.benchmarks.{name}") for name in names}
    return {name: module for name, module in modules.items() if all(hasattr(module, need) for need in REQUIRED)}


def op_backends(op: str, device: torch.device, function: Provider) -> dict[str, Provider | Unavailable]:
    """A provider for each backend of one of our ops; choosing it costs about a microsecond of each call."""
    return {name: _served_by(op, device, name, function) for name in backends.BACKENDS}


def _served_by(op: str, device: torch.device, backend: str, function: Provider) -> Provider | Unavailable:
    if (device.type, backend) == ("cpu", "triton"):
        return Unavailable("on a CPU Triton only interprets, which is not timed")
    with backends.use_backend(backend):
        try:
            backends.choose(op, device.type)
        except RuntimeError as error:
            return Unavailable(str(error).partition("; ")[2])

    def call(*inputs: Tensor) -> Any:
        with backends.use_backend(backend):
            return function(*inputs)

    return call


def compiled(function: Provider, mode: str | None = None, fullgraph: bool = True) -> Provider | Unavailable:
    """torch.compile for one shape alone; what it made for earlier cases is dropped, its cache has few places."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return Unavailable("torch.compile needs a C++ compiler")
    torch.compiler.reset()
    return torch.compile(function, fullgraph=fullgraph, dynamic=False, mode=mode)


def in_tf32(provider: Provider) -> Provider:
    """A provider whose float32 products are TF32, as cuDNN's are unless one asks for more."""

    def call(*inputs: Tensor) -> Any:
        with tf32(True):
            return provider(*inputs)

    return call


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products are rounded to TF32 on a GPU inside, by the settings that exporters read too."""
    settings = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [setting.allow_tf32 for setting in settings]
    try:
        for setting in settings:
            setting.allow_tf32 = allowed
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


def through_runtime(
    name: str, network: torch.nn.Module, dtype: torch.dtype, device: torch.device
) -> Provider | Unavailable:
    """A network's pass through a runtime for CPUs."""
    if device.type != "cpu":
        return Unavailable("runtimes are for the CPU")
    try:
        check_runtime(name, dtype)
    except ImportError as error:
        return Unavailable(str(error))
    return Runtime(name, network, dtype)


def word(value: torch.dtype | torch.memory_format) -> str:
    """Its name, for that of a case."""
    return str(value).removeprefix("torch.")


def run(
    names: Sequence[str] = (),
    *,
    device: str = "cpu",
    case: str = "*",
    smallest: bool = False,
    providers: Sequence[str] = (),
    without: Sequence[str] = (),
    threads: Sequence[int] = (),
    seconds: float = 1.0,
    output: Path | None = None,
) -> list[Row]:
    """Measure benchmarks; the rows have the columns of `_results.COLUMNS`, those that do not apply left out.

    Args:
        names: benchmarks; all where there are none.
        device: cpu, cuda or cuda:N.
        case: pattern (as of file names) of the cases.
        smallest: of each benchmark only the case that moves the fewest bytes.
        providers: providers; all where there are none.
        without: patterns of those to leave out.
        threads: numbers of threads on a CPU; without them one, and as many as torch uses.
        seconds: least time to measure for each provider of a case.
        output: CSV file that gets each row as soon as it is there, see `_results.update`; in a folder, the machine's.

    Raises:
        ConfigError: an argument that names nothing here, or is out of range.
    """
    place = find_device(device)
    work = _select(find(), names, case, place.type)
    if smallest:
        ordered = sorted(work, key=lambda entry: entry[1].bytes_moved(entry[2]), reverse=True)
        work = list({entry[0]: entry for entry in ordered}.values())
    return run_cases(work, place, providers=providers, without=without, threads=threads, seconds=seconds, output=output)


def run_cases(
    work: Sequence[tuple[str, Benchmark, Case]],
    place: torch.device,
    *,
    providers: Sequence[str] = (),
    without: Sequence[str] = (),
    threads: Sequence[int] = (),
    seconds: float = 1.0,
    output: Path | None = None,
) -> list[Row]:
    """The same for cases of benchmarks with their names."""
    if seconds <= 0:
        raise ConfigError(f"seconds: expected > 0, got {seconds}")
    if output is not None:
        _results.check_output(output)
    counts = _thread_counts(place, threads)
    if providers:
        _check_providers(work, place, providers)
    machine = _machine.describe(place)
    copies = {count: _copy_bandwidth(place, count) for count in counts}
    rows: list[Row] = []
    for name, benchmark, chosen in work:
        log.info("%s %s", name, chosen.name)
        with tf32(False):  # a provider that takes it is named for it, see `in_tf32`
            for row in measure(benchmark, chosen, place, providers, counts, seconds, without):
                row |= {"benchmark": name, "case": chosen.name, "copy_gb_per_s": copies[row["threads"]]} | machine
                _add_rates(row)
                if output is not None:
                    _results.update(_results.file_for(output, [row]), [row])
                rows.append(row)
    return rows


def measure(
    benchmark: Benchmark,
    case: Case,
    device: torch.device,
    wanted: Sequence[str],
    thread_counts: Sequence[int | None],
    seconds: float,
    without: Sequence[str] = (),
) -> Iterator[Row]:
    """A row for each number of threads and provider of one case.

    On a CPU all of them are timed in turn, so that what disturbs the machine disturbs all alike. On a GPU each is as
    soon as it is verified, the baselines first: what is slow to compile keeps no other from its row.
    """
    inputs = benchmark.make_inputs(case, device)
    expected = benchmark.expected(case, *inputs)
    offered = benchmark.providers(case, device)
    offered = {name: provider for name, provider in offered.items() if not wanted or name in wanted}
    offered = {name: p for name, p in offered.items() if not any(fnmatchcase(name, pattern) for pattern in without)}
    operations = getattr(benchmark, "operations", None)
    baseline_of = getattr(benchmark, "baseline", lambda provider: benchmark.BASELINE)
    floors = {"bytes_moved": benchmark.bytes_moved(case), "operations": operations(case) if operations else None}
    baselines = {baseline_of(name) for name in offered}
    turns = (
        [list(offered)] if device.type == "cpu" else [[n] for n in sorted(offered, key=lambda n: n not in baselines)]
    )
    for count in thread_counts:
        figures: dict[str, Row] = {}
        for names in turns:
            with _timing.threads(count):
                verdicts = {n: _verdict(benchmark, case, n, offered[n], inputs, expected) for n in names}
                sound = {name: offered[name] for name in names if verdicts[name]["status"] == "ok"}
                figures |= _figures(sound, inputs, device, floors["bytes_moved"], seconds)
            for name, verdict in verdicts.items():
                known = {"provider": name, "threads": count, "baseline": baseline_of(name)}
                row = known | floors | verdict | figures.get(name, {})
                if row["baseline"] in figures and name in figures:
                    row["speedup"] = figures[row["baseline"]]["time_us_50"] / row["time_us_50"]
                yield row


def _copy_bandwidth(device: torch.device, threads: int | None) -> float:
    with _timing.threads(threads):
        return _timing.copy_bandwidth(device)


def _verdict(
    benchmark: Benchmark, case: Case, name: str, provider: Provider | Unavailable, inputs: Inputs, expected: Any
) -> Row:
    if isinstance(provider, Unavailable):
        return {"status": "unavailable", "reason": provider.reason}
    try:
        wrong = benchmark.disagreement(case, name, provider(*inputs), expected)
    except Exception as error:
        return {"status": "failed", "reason": _one_line(error)}
    return {"status": "disagrees", "reason": wrong} if wrong else {"status": "ok", "reason": None}


def _figures(
    providers: dict[str, Provider], inputs: Inputs, device: torch.device, bytes_moved: int, seconds: float
) -> dict[str, Row]:
    """Quantiles of every time, number of rounds and memory of providers that are sound."""
    if not providers:
        return {}
    calls = {name: partial(provider, *inputs) for name, provider in providers.items()}
    rounds = _timing.on_cpu(calls, seconds) if device.type == "cpu" else _timing.on_cuda(calls, seconds)
    figures: dict[str, Row] = _timing.quantiles(rounds)
    for name, call in calls.items():
        figures[name] |= {"rounds": len(rounds), "extra_bytes": _memory.extra_bytes(call, device)}
    if device.type == "cuda":
        for name, more in _cuda_figures(providers, calls, inputs, bytes_moved, seconds).items():
            figures[name] |= more
    return figures


def _cuda_figures(
    providers: dict[str, Provider], calls: dict[str, Provider], inputs: Inputs, bytes_moved: int, seconds: float
) -> dict[str, Row]:
    """Host time of a launch, and time in a CUDA graph or the reason why there is none."""
    figures: dict[str, Row] = _timing.quantiles(_timing.launches(calls))
    number = _timing.copies_beyond_cache(bytes_moved, torch.cuda.get_device_properties().L2_cache_size)
    copies = [tuple(_copy(tensor) for tensor in inputs) for _ in range(number)]
    replays = {}
    for name, provider in providers.items():
        try:
            replays[name] = _timing.capture(provider, copies)
        except RuntimeError as error:
            figures[name]["reason"] = f"not in a CUDA graph: {_one_line(error)}"
    if replays:
        for name, times in _timing.quantiles(_timing.in_graphs(replays, number, seconds)).items():
            figures[name] |= times
    return figures


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _add_rates(row: Row) -> None:
    """Rates from the time in a graph where there is one: that is the time which the device itself needs."""
    median = row.get("graph_us_50") or row.get("time_us_50")
    if median is not None:
        row["gb_per_s"] = row["bytes_moved"] / median / 1e3
        row["copy_share"] = row["gb_per_s"] / row["copy_gb_per_s"]
        row["gop_per_s"] = row["operations"] and row["operations"] / median / 1e3


def _select(
    found: dict[str, Benchmark], names: Sequence[str], pattern: str, device: str
) -> list[tuple[str, Benchmark, Case]]:
    for name in names:
        if name not in found:
            raise ConfigError(f"names: expected some of {', '.join(found)}, got {name!r}")
    cases = [(name, found[name], case) for name in names or found for case in found[name].CASES]
    cases = [entry for entry in cases if getattr(entry[2], "device", None) in (None, device)]
    chosen = [entry for entry in cases if fnmatchcase(entry[2].name, pattern)]
    if not chosen:
        raise ConfigError(f"case: expected a pattern of {', '.join(case.name for *_, case in cases)}; got {pattern!r}")
    return chosen


def _check_providers(work: Sequence[tuple[str, Benchmark, Case]], device: torch.device, wanted: Sequence[str]) -> None:
    offered = {name: None for _, benchmark, case in work for name in benchmark.providers(case, device)}
    for name in wanted:
        if name not in offered:
            raise ConfigError(f"providers: expected some of {', '.join(offered)}, got {name!r}")


def find_device(name: str) -> torch.device:
    """The device of a name, which is the current one then. Raises ConfigError where it is not here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"device: {name!r} is not here, torch sees {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device.index or 0)
    return device


def _thread_counts(device: torch.device, threads: Sequence[int]) -> list[int | None]:
    if device.type == "cuda":
        return [None]
    for number in threads:
        if number < 1:
            raise ConfigError(f"threads: expected >= 1, got {number}")
    return sorted(set(threads or (1, torch.get_num_threads())))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def main(argv: Sequence[str] | None = None) -> None:
    """Exits with 1 where a provider disagrees or fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="benchmarks; all where none is named")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--case", default="*", help="pattern of the cases")
    parser.add_argument("--smallest", action="store_true", help="the smallest case of each")
    parser.add_argument("--threads", type=int, nargs="+", default=())
    parser.add_argument("--but", nargs="+", default=(), help="benchmarks to leave out")
    parser.add_argument("--providers", nargs="+", default=(), help="what to time of what each case has")
    parser.add_argument("--without", nargs="+", default=(), help="patterns of providers to leave out")
    parser.add_argument("--seconds", type=float, default=0.2, help="least time for each provider of a case")
    parser.add_argument("--output", type=Path, help="CSV file")
    given = vars(parser.parse_args(argv))
    but = given.pop("but")
    given["names"] = given["names"] or [name for name in find() if name not in but]
    rows = run(**given)
    print(*_results.remarks(rows), sep="\n")
    sys.exit(_results.failed(rows))


if __name__ == "__main__":
    from bcmfnet.benchmarks import harness  # which the benchmarks know; this copy of it has classes of its own

    harness.main()
