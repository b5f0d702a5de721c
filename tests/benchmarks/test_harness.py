"""The harness measures what it says, on calls and clocks whose figures are known."""

from __future__ import annotations

import csv
import ctypes
import subprocess
import threading
import time
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bcmfnet.benchmarks import _machine, _memory, _results, _timing, harness
from bcmfnet.errors import ConfigError
from bcmfnet.ops import _cpu
from bcmfnet.reference.bilinear import downsample

CPU = torch.device("cpu")
MIB = 2**20
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


class FakeCuda:
    """A device whose clock a call moves by hand, in milliseconds; `log` has what happened in order."""

    def __init__(self):
        self.now, self.log, self.capturing = 0.0, [], False
        self.CUDAGraph = lambda: SimpleNamespace(replay=self.work("replay", 4.0))
        self.Stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.current_stream = self.Stream
        self.stream = nullcontext

    def work(self, name, milliseconds):
        def call():
            self.log.append(name)
            self.now += milliseconds

        return call

    def Event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def synchronize(self):
        self.log.append("synchronize")

    def graph(self, graph):
        return self

    def __enter__(self):
        self.capturing = True

    def __exit__(self, *error):
        self.capturing = False


def rounds_of(samples):
    return [{"call": {"time": sample}} for sample in samples]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (range(1, 22), (5.0, 11.0, 17.0, 20.0)),  # each quantile is a sample
        ((8, 1, 4, 2), (1.6, 3.0, 5.6, 7.4)),  # none is: linear between neighbours, whatever the order
        ((5,), (5.0, 5.0, 5.0, 5.0)),
    ],
)
def test_quantiles(samples, expected):
    found = _timing.quantiles(rounds_of(samples))["call"]
    assert tuple(found) == ("time_us_20", "time_us_50", "time_us_80", "time_us_95")
    assert tuple(found.values()) == pytest.approx(expected)


def test_providers_take_turns_until_the_time_is_spent():
    order, clock = [], iter(range(100))
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    rounds = _timing.on_cpu(calls, 3, clock=lambda: next(clock))
    assert len(rounds) == _timing.LEAST_ROUNDS + 8  # 3 s each for 3 calls; the clock is not read in the first rounds
    assert order == list("abc") * (_timing.WARM_UP + len(rounds))
    assert all(times["time"] >= 0 and times["cpu"] >= 0 for one in rounds for times in one.values())


def test_a_slow_call_is_still_measured_a_few_times():
    assert len(_timing.repeat(lambda: [{}], 0.0, time.perf_counter)) == _timing.LEAST_ROUNDS


def test_cpu_time_counts_the_other_threads_at_once():
    finished, leave, burnt = threading.Event(), threading.Event(), []

    def burn():
        while time.thread_time_ns() < 20_000_000:
            pass
        burnt.append(time.thread_time_ns())
        finished.set()
        leave.wait()

    before = _timing.cpu_time()
    thread = threading.Thread(target=burn)
    thread.start()
    finished.wait()
    spent = _timing.cpu_time() - before
    leave.set()
    thread.join()
    assert spent >= burnt[0]


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), _timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_events_are_around_the_call_alone_and_waited_for_once():
    cuda = FakeCuda()
    calls = {"a": cuda.work("a", 0.5), "b": cuda.work("b", 2.0)}
    rounds = _timing.events(calls, 3, cuda.work("flush", 60.0), cuda)
    assert cuda.log == ["flush", "a", "flush", "b"] * 3 + ["synchronize"]
    assert rounds == [{"a": {"time": pytest.approx(500)}, "b": {"time": pytest.approx(2000)}}] * 3


def test_time_in_a_graph_is_that_of_one_of_its_calls():
    cuda = FakeCuda()
    rounds = _timing.in_graphs({"a": cuda.work("a", 4.0)}, 8, 0.0, cuda)
    assert len(rounds) == _timing.LEAST_ROUNDS and rounds[0] == {"a": {"graph": pytest.approx(500)}}


def test_a_graph_calls_on_each_copy_and_keeps_every_output_until_it_is_captured():
    cuda, seen, outputs = FakeCuda(), [], []

    def function(x):
        output = x + 1
        if cuda.capturing:
            seen.append(x)
            outputs.append(weakref.ref(output))
            assert all(reference() is not None for reference in outputs)
        return output

    copies = [(torch.zeros(2),) for _ in range(5)]
    replay = _timing.capture(function, copies, cuda)
    assert [x.data_ptr() for x in seen] == [inputs[0].data_ptr() for inputs in copies]
    assert all(reference() is None for reference in outputs)
    replay()
    assert cuda.log == ["replay"]


def test_launches_start_on_an_idle_device():
    cuda = FakeCuda()
    rounds = _timing.launches({"a": cuda.work("a", 1.0), "b": cuda.work("b", 1.0)}, cuda)
    assert cuda.log == ["synchronize", "a", "synchronize", "b"] * _timing.LAUNCHES + ["synchronize"]
    assert len(rounds) == _timing.LAUNCHES and rounds[0].keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("bytes_moved", "copies"),
    [(4_587_520, 22), (291_600, 343), (159_000_000, 10)],  # the goal's case, CamVid's, and one over L2 by itself
)
def test_copies_exceed_the_cache_twice(bytes_moved, copies):
    assert _timing.copies_beyond_cache(bytes_moved, 50_000_000) == copies


def scratch(size):
    """What a C++ kernel does: malloc, touch, free."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = (ctypes.c_size_t,)
    libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    libc.free.argtypes = (ctypes.c_void_p,)
    block = libc.malloc(size)
    libc.memset(block, 1, size)
    libc.free(block)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: torch.ones(16 * MIB).sum(), 64 * MIB),  # a temporary of torch, mapped by itself
        (lambda: (torch.ones(16 * MIB) + 1).sum(), 128 * MIB),  # two at a time
        (lambda: torch.ones(MIB // 2).sum(), 2 * MIB),  # one from the heap, which keeps it resident when freed
        (lambda: scratch(64 * MIB), 64 * MIB),
        (lambda: scratch(2 * MIB), 2 * MIB),
        (lambda: (torch.ones(16 * MIB), [torch.ones(MIB)]), 0),  # outputs
        (lambda: None, 0),
    ],
)
def test_memory_on_a_cpu(call, expected):
    call()
    found = _memory.extra_bytes(call, CPU)
    if found is None:
        pytest.skip("this system cannot reset the peak of a process's memory")
    assert found == pytest.approx(expected, abs=MIB)


def test_memory_is_unknown_where_the_peak_cannot_be_reset(monkeypatch, tmp_path):
    monkeypatch.setattr(_memory, "PROCESS", tmp_path / "none")
    assert _memory.extra_bytes(lambda: None, CPU) is None


def test_memory_on_a_gpu_is_the_peak_less_inputs_and_outputs():
    cuda = SimpleNamespace(synchronize=lambda: None, reset_peak_memory_stats=lambda: None)
    cuda.memory_allocated, cuda.max_memory_allocated = lambda: 1000, lambda: 1000 + 4096 + 700
    assert _memory._on_cuda(lambda: torch.zeros(1024), cuda) == 700


def double(x):
    return 2 * x


def broken(x):
    raise ValueError("no such\nluck")


class Doubling:
    """A benchmark of 2 * x, with a provider of every fate; `calls` counts them."""

    CASES = (SimpleNamespace(name="small"), SimpleNamespace(name="large"))
    BASELINE = "right"

    def __init__(self):
        self.calls = {"right": 0, "also": 0, "wrong": 0}

    def make_inputs(self, case, device):
        return (torch.arange(4.0, device=device),)

    def providers(self, case, device):
        def counted(name, function):
            def call(x):
                self.calls[name] += 1
                return function(x)

            return call

        return {
            "right": counted("right", double),
            "also": counted("also", lambda x: x + x),
            "wrong": counted("wrong", lambda x: x),
            "broken": broken,
            "absent": harness.Unavailable("nobody built it"),
        }

    def expected(self, case, x):
        return 2 * x.double()

    def disagreement(self, case, provider, output, expected):
        return None if torch.equal(output.double(), expected) else "not doubled"

    def bytes_moved(self, case):
        return 32


@pytest.fixture
def doubling(monkeypatch):
    benchmark = Doubling()
    monkeypatch.setattr(harness, "find", lambda: {"doubling": benchmark})
    monkeypatch.setattr(_timing, "COPY_BYTES", MIB)
    return benchmark


def test_a_provider_is_timed_only_when_it_agrees(doubling):
    rows = harness.run(case="small", threads=[1], seconds=1e-6)
    fates = {row["provider"]: (row["status"], row["reason"]) for row in rows}
    assert fates == {
        "right": ("ok", None),
        "also": ("ok", None),
        "wrong": ("disagrees", "not doubled"),
        "broken": ("failed", "ValueError: no such"),
        "absent": ("unavailable", "nobody built it"),
    }
    assert {row["provider"] for row in rows if "time_us_50" in row} == {"right", "also"}
    assert doubling.calls["wrong"] == 1
    assert doubling.calls["right"] == 1 + _timing.WARM_UP + _timing.LEAST_ROUNDS + 1  # agreement, ..., memory


def test_providers_compute_in_float32_unless_they_are_named_for_less(doubling, monkeypatch):
    """cuDNN would take TF32 unasked, and no such provider would agree with float64."""
    seen = {}

    def seeing(name):
        def call(x):
            downsample(torch.ones(1, 1, 4, 4), (2, 2))  # the reference's settings leave these as they are
            seen.setdefault(name, set()).add((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=True):
                return double(x)  # as exporters do

        return call

    found = {"right": seeing("right"), "right_tf32": harness.in_tf32(seeing("right_tf32"))}
    monkeypatch.setattr(doubling, "providers", lambda case, device: found)
    with harness.tf32(True):  # torch's own default of convolutions on a GPU
        rows = harness.run(case="small", threads=[1], seconds=1e-6)
    assert seen == {"right": {(False, False)}, "right_tf32": {(True, True)}}
    assert [row["status"] for row in rows] == ["ok", "ok"] and torch._C._get_mkldnn_enabled()


def test_rows_and_their_rates(doubling, monkeypatch):
    samples = {"right": {"time": 8.0, "cpu": 16.0}, "also": {"time": 2.0, "cpu": 2.0}}
    monkeypatch.setattr(_timing, "on_cpu", lambda calls, seconds: [samples] * 3)
    monkeypatch.setattr(_timing, "copy_bandwidth", lambda device: 10.0 * torch.get_num_threads())
    monkeypatch.setattr(doubling, "operations", lambda case: 4000, raising=False)
    rows = harness.run(["doubling"], case="l*", providers=["also", "right"], threads=[2, 1])
    assert [(row["threads"], row["provider"], row["copy_gb_per_s"]) for row in rows] == [
        (1, "right", 10.0),
        (1, "also", 10.0),
        (2, "right", 20.0),
        (2, "also", 20.0),
    ]
    fast = rows[1]
    assert (fast["benchmark"], fast["case"], fast["baseline"], fast["speedup"]) == ("doubling", "large", "right", 4.0)
    assert (fast["time_us_80"], fast["cpu_us_50"], fast["rounds"]) == (2.0, 2.0, 3)
    assert fast["gb_per_s"] == pytest.approx(32e-9 / 2e-6)
    assert fast["copy_share"] == pytest.approx(0.016 / 10)
    assert fast["gop_per_s"] == pytest.approx(4000e-9 / 2e-6)
    assert set(fast) <= set(_results.COLUMNS)


def test_rows_are_written_after_each_case(doubling, monkeypatch, tmp_path):
    path, inputs = tmp_path / "all.csv", doubling.make_inputs

    def make_inputs(case, device):
        if case.name == "large":
            raise MemoryError
        return inputs(case, device)

    monkeypatch.setattr(doubling, "make_inputs", make_inputs)
    with pytest.raises(MemoryError):
        harness.run(providers=["right", "also"], threads=[1], seconds=1e-6, output=path)
    assert [(row["case"], row["provider"]) for row in read(path)] == [("small", "right"), ("small", "also")]


def test_on_a_gpu_each_is_timed_as_soon_as_it_is_verified_the_baseline_first(doubling, monkeypatch):
    """What is slow to compile, or ends the run, keeps no other from its row."""
    order, offered = [], doubling.providers

    def providers(case, device):
        def fails(*inputs):
            raise KeyboardInterrupt

        return {"endless": fails} | {
            name: (lambda *inputs, name=name, call=call: order.append(name) or call(*inputs))
            if callable(call)
            else call
            for name, call in reversed(offered(case, torch.device("cpu")).items())
        }

    monkeypatch.setattr(doubling, "providers", providers)
    monkeypatch.setattr(harness, "_figures", lambda sound, *others: {name: {"time_us_50": 1.0} for name in sound})
    gpu = torch.device("cuda")
    monkeypatch.setattr(doubling, "make_inputs", lambda case, device, make=doubling.make_inputs: make(case, CPU))
    rows = []
    with pytest.raises(KeyboardInterrupt):
        for row in harness.measure(doubling, doubling.CASES[0], gpu, (), [None], 0.1):
            rows.append(row)
    assert order[0] == doubling.BASELINE and [row["provider"] for row in rows] == [doubling.BASELINE]
    for row in harness.measure(doubling, doubling.CASES[0], gpu, (), [None], 0.1, ["end*", "a*"]):
        rows.append(row)
    assert "endless" not in {row["provider"] for row in rows} and not any(row["provider"][0] == "a" for row in rows)
    assert all(row["speedup"] == 1.0 for row in rows if row["status"] == "ok")


def test_a_script_is_told_what_was_not_measured_and_exits_with_one(doubling, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        harness.main(["--device", "cpu", "--output", str(tmp_path / "all.csv")])
    assert end.value.code == 1
    assert "absent unavailable: nobody built it\n" in capsys.readouterr().out
    assert len({(row["case"], row["provider"]) for row in read(tmp_path / "all.csv")}) == 10


@pytest.mark.parametrize(
    ("names", "measured"), [((), ["a", "b", "c"]), (("--but", "b"), ["a", "c"]), (("b", "c"), ["b", "c"])]
)
def test_a_script_names_benchmarks_or_leaves_some_out(monkeypatch, names, measured):
    asked = []
    monkeypatch.setattr(harness, "find", lambda: dict.fromkeys("abc"))
    monkeypatch.setattr(harness, "run", lambda names, **options: asked.append(names) or [])
    with pytest.raises(SystemExit):
        harness.main(names)
    assert asked == [measured]


@pytest.mark.parametrize(
    ("features", "capability"),
    [(set(), "AVX512"), ({"avx2", "avx512_bf16"}, "AVX512+AVX512_BF16"),
     ({"avx512_bf16", "amx"}, "AVX512+AVX512_BF16+AMX")],
)  # fmt: skip
def test_a_cpu_with_amx_is_told_from_one_without(monkeypatch, features, capability):
    monkeypatch.setattr(_cpu, "features", lambda: frozenset(features))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert _machine.describe(CPU)["capability"] == capability


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_committed_rows_of_a_cpu_say_whether_it_has_amx(path):
    rows = [row for row in read(path) if "capability" in row]
    no_amx, avx2 = {"AVX512+AVX512_BF16"}, {"AVX2"}
    expected = {"intel-xeon-processor": {"AVX512+AVX512_BF16+AMX"}, "amd-epyc": no_amx, "amd-epyc-steps": no_amx}
    expected["amd-epyc-avx2"] = avx2  # another processor of the same name
    assert expected.get(path.stem, set()) == {row["capability"] for row in rows}
    assert all(path.stem in (stem := _machine.slug(row["machine"]), f"{stem}-steps", f"{stem}-avx2") for row in rows)


def test_every_benchmark_is_compared_with_the_best_eager_form():
    assert {benchmark.BASELINE for benchmark in harness.find().values()} == {"eager_best"}


def test_a_speedup_is_over_the_providers_own_baseline(doubling, monkeypatch):
    samples = {"right": {"time": 8.0}, "also": {"time": 2.0}}
    monkeypatch.setattr(_timing, "on_cpu", lambda calls, seconds: [samples] * 3)
    monkeypatch.setattr(_timing, "copy_bandwidth", lambda device: 10.0)
    baselines = {"right": "also", "also": "right"}
    monkeypatch.setattr(doubling, "baseline", lambda name: baselines.get(name, "right"), raising=False)
    rows = harness.run(case="small", providers=["also", "right"], threads=[1])
    assert {row["provider"]: (row["baseline"], row["speedup"]) for row in rows} == {
        "right": ("also", 0.25), "also": ("right", 4.0)
    }  # fmt: skip


def test_a_speedup_needs_its_baseline(doubling):
    (row,) = harness.run(case="small", providers=["also"], threads=[1], seconds=1e-6)
    assert "speedup" not in row and row["time_us_50"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["halving"]}, "names: expected some of doubling, got 'halving'"),
        ({"case": "huge"}, "case: expected a pattern of small, large; got 'huge'"),
        ({"providers": ["nvidia"]}, "providers: expected some of right, also, wrong, broken, absent, got 'nvidia'"),
        ({"device": "tpu"}, "device: expected cpu, cuda or cuda:N, got 'tpu'"),
        ({"device": "cuda:99"}, "device: 'cuda:99' is not here"),
        ({"threads": [0]}, "threads: expected >= 1, got 0"),
        ({"seconds": 0.0}, "seconds: expected > 0, got 0.0"),
    ],
)
def test_arguments_that_name_nothing(doubling, arguments, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        harness.run(**arguments)
    assert doubling.calls == {"right": 0, "also": 0, "wrong": 0}


def test_benchmarks_are_found_by_what_they_define():
    found = harness.find()
    assert "upsample_argmax" in found
    assert not found.keys() & {"harness", "record_run", "_timing"}


def test_rates_on_a_gpu_are_from_the_graph():
    row = {
        "time_us_50": 40.0,
        "graph_us_50": 10.0,
        "bytes_moved": 1_000_000,
        "operations": None,
        "copy_gb_per_s": 400.0,
    }
    harness._add_rates(row)
    assert (row["gb_per_s"], row["copy_share"], row["gop_per_s"]) == (100.0, 0.25, None)


def test_figures_on_a_gpu(monkeypatch):
    """A provider that no graph can capture keeps its other times, and says why."""
    captured = []

    def capture(function, copies):
        if function is broken:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        captured.append(copies)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(L2_cache_size=600))
    monkeypatch.setattr(_memory, "extra_bytes", lambda call, device: 7)
    monkeypatch.setattr(_timing, "on_cuda", lambda calls, seconds: [{name: {"time": 40.0} for name in calls}])
    monkeypatch.setattr(_timing, "launches", lambda calls: [{name: {"launch": 9.0} for name in calls}])
    monkeypatch.setattr(_timing, "capture", capture)
    monkeypatch.setattr(
        _timing, "in_graphs", lambda replays, number, seconds: [{name: {"graph": 1.0 * number} for name in replays}]
    )
    inputs = (torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last), torch.ones(2, requires_grad=True))
    figures = harness._figures({"a": double, "b": broken}, inputs, SimpleNamespace(type="cuda"), 100, 1.0)
    common = {"time_us_50": 40.0, "launch_us_50": 9.0, "rounds": 1, "extra_bytes": 7}
    assert common.items() <= figures["a"].items() and common.items() <= figures["b"].items()
    assert figures["a"]["graph_us_50"] == 12.0  # twice the cache takes 12 calls of 100 bytes
    assert figures["b"]["reason"] == "not in a CUDA graph: RuntimeError: operation not permitted"
    assert "graph_us_50" not in figures["b"] and "reason" not in figures["a"]
    (copies,) = captured
    assert len({x.data_ptr() for x, _ in copies} | {inputs[0].data_ptr()}) == len(copies) + 1 == 13
    assert all(x.stride() == inputs[0].stride() and y.requires_grad for x, y in copies)


def row_of(provider, time, **other):
    row = {"machine": "NVIDIA H200", "benchmark": "bcl", "case": "small", "provider": provider, "threads": None}
    return row | {"status": "ok", "reason": None, "time_us_50": time} | other


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_of_the_same_thing_are_replaced_and_others_kept(tmp_path):
    path = tmp_path / "results" / "all.csv"
    _results.update(path, [row_of("a", 1.0), row_of("b", 2.0), row_of("a", 3.0, threads=1)])
    others = {"machine": "CPU", "benchmark": "lmfm", "case": "large", "threads": 2}
    _results.update(path, [row_of("b", 5.25), *(row_of("a", 6.0, **{name: value}) for name, value in others.items())])
    rows = read(path)
    assert [(row["provider"], row["time_us_50"]) for row in rows[:3]] == [("a", "1"), ("b", "5.25"), ("a", "3")]
    assert [row[name] for row, name in zip(rows[3:], others, strict=True)] == ["CPU", "lmfm", "large", "2"]
    assert path.read_text().splitlines()[0] == ",".join(_results.COLUMNS)
    assert [file.name for file in path.parent.iterdir()] == ["all.csv"]


def test_a_folder_means_the_file_of_the_machine(tmp_path):
    rows = [row_of("a", 1.0)]
    assert _results.file_for(tmp_path, rows) == tmp_path / "nvidia-h200.csv"
    assert _results.file_for(tmp_path / "some.csv", rows) == tmp_path / "some.csv"
    assert _machine.slug("Intel(R) Core(TM) i7-9700K @ 3.60GHz") == "intel-core-i7-9700k-3-60ghz"


def test_table_has_the_columns_that_have_figures():
    rows = [row_of("a", 7.94, extra_bytes=0), row_of("b", 20_600.0, speedup=1.0), row_of("c", None, status="failed")]
    assert _results.tables(rows) == [
        (
            "bcl small",
            [
                ["provider", "time", "speedup", "extra memory"],
                ["a", "7.94 us", "", "0.0 MB"],
                ["b", "20.6 ms", "1.00x", ""],
            ],
        )
    ]


def test_remarks_name_the_cases_where_they_are_not_all():
    missing = {"status": "unavailable", "reason": "not built"}
    rows = [row_of("a", None, **missing), row_of("b", None, status="disagrees", reason="is 3"), row_of("c", 1.0)]
    rows += [row_of("a", None, case="large", **missing), row_of("c", 1.0, case="large", reason="not in a CUDA graph")]
    assert _results.remarks(rows) == [
        "a unavailable: not built",
        "b disagrees in bcl small: is 3",
        "c in bcl large: not in a CUDA graph",
    ]


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_commit(tmp_path):
    folder, installed = tmp_path / "benchmarks", tmp_path / "venv" / "benchmarks"
    for place in (folder / "results", installed):
        place.mkdir(parents=True)
    assert _machine.commit(folder) is None
    (folder / "code.py").write_text("1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    (folder / "results" / "cpu.csv").write_text("")
    assert _machine.commit(folder) == commit  # its own results do not make a tree dirty
    assert _machine.commit(installed) is None  # inside another project's checkout
    (folder / "code.py").write_text("2\n")
    assert _machine.commit(folder) == f"{commit}+dirty"


def test_machine_on_a_cpu():
    facts = _machine.describe(CPU)
    assert facts["torch"] == torch.__version__ and facts["capability"].startswith(
        torch.backends.cpu.get_cpu_capability()
    )
    assert facts["machine"] and set(facts) <= set(_results.COLUMNS)
