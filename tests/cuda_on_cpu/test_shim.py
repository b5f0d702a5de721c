"""The stand-in for CUDA on a CPU: what it computes, and the faults that it must catch.

The tests of features also run on a GPU (`-m gpu`), compiled by nvcc: it is the judge of what the stand-in claims to be.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_on_cpu import build as building
from cuda_on_cpu.build import ALWAYS, CSRC, Library, build
from sass import build as machine_code

pytestmark = pytest.mark.cuda_on_cpu
KERNELS = Path(__file__).parent / "kernels"
FEATURES = [KERNELS / name for name in ("warp.cu", "block.cu", "arithmetic.cu", "mma.cu", "faults.cu")]
LANES = np.arange(64)


class Case:
    """The kernels on one device; arrays go in and come out as numpy arrays."""

    def __init__(self, library: Library, device: str) -> None:
        self.library, self.device = library, device

    def call(self, name: str, *arguments: object) -> None:
        """Call a launcher; arrays are updated in place."""
        moved = [torch.from_numpy(a).to(self.device) if isinstance(a, np.ndarray) else a for a in arguments]
        self.library.call(name, *moved)
        for array, tensor in zip(arguments, moved, strict=True):
            if isinstance(array, np.ndarray):
                array[...] = tensor.cpu().numpy()


@pytest.fixture(scope="session")
def shim() -> Case:
    return Case(Library(build(FEATURES)), "cpu")


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Case:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    library = tmp_path_factory.mktemp("gpu") / "features.so"
    cuda = [path for path in [*FEATURES, *ALWAYS] if path.suffix == ".cu"]
    options = ["-std=c++17", "-arch=native", "-shared", "-Xcompiler", "-fPIC", f"-I{CSRC}"]
    subprocess.run([nvcc, *options, *cuda, "-o", library], check=True)
    return Case(Library(library), "cuda")


@pytest.fixture(scope="session")
def sass() -> Case:
    return Case(machine_code.Library(machine_code.build(FEATURES)), "cpu")


GPU = pytest.param("gpu", marks=pytest.mark.gpu)


@pytest.fixture(params=["shim", pytest.param("sass", marks=pytest.mark.exhaustive), GPU])
def case(request: pytest.FixtureRequest) -> Case:
    return request.getfixturevalue(request.param)


def normal(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def integers(*shape: int, low: int = -(2**31), high: int = 2**31) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, shape).astype(np.int32)


def source_lane(kind: int, argument: int, width: int) -> np.ndarray:
    """The thread that each of two warps' threads reads, from the table in the CUDA programming guide."""
    lane = LANES % 32
    first, last = lane // width * width, lane // width * width + width - 1
    source = [first + argument % width, lane - argument, lane + argument, lane ^ argument][kind]
    stays = [lane < 0, source < first, source > last, source > last][kind]
    return LANES - lane + np.where(stays, lane, source)


@pytest.mark.parametrize("width", [32, 16, 4, 2])
@pytest.mark.parametrize("kind", range(4), ids=["index", "up", "down", "xor"])
def test_shuffles(case, kind, width):
    given = integers(64)
    for argument in (0, 1, 2, 5, 16, 31):  # within a part of the warp, its bounds, and beyond it
        got = np.zeros_like(given)
        case.call("shuffle_int32", given, got, 64, kind, argument, width)
        np.testing.assert_array_equal(got, given[source_lane(kind, argument, width)], str(argument))


@pytest.mark.parametrize("dtype", ["int64", "float32", "float64"])
def test_shuffles_of_other_types(case, dtype):
    given = normal(64, dtype="float64").view("int64") if dtype == "int64" else normal(64, dtype=dtype)
    got = np.zeros_like(given)
    case.call(f"shuffle_{dtype}", given, got, 64, 3, 1, 32)
    np.testing.assert_array_equal(got, given[LANES ^ 1])


def test_parts_of_a_warp_call_on_their_own(case):
    given = integers(64, low=0, high=10)
    got = np.zeros_like(given)
    case.call("parted_halves", given, got)
    expected = given.reshape(2, 32).copy()
    largest = expected[:, 16:].max(1)
    expected[:, 0:16:2] = expected[:, 0:16:2].sum(1, keepdims=True)
    expected[:, 16:] = largest[:, None]
    np.testing.assert_array_equal(got.reshape(2, 32), expected + 1000 * largest[:, None])


def test_votes_of_a_warp(case):
    given = integers(256, low=0, high=2)
    given[:64] = [0] * 32 + [1] * 32  # none and all
    ballot, any_, all_ = (np.zeros(256, dtype) for dtype in ("uint32", "int32", "int32"))
    case.call("vote_warp", given, ballot, any_, all_, 256)
    warps = given.reshape(-1, 32)
    expected = (warps.astype("uint64") << np.arange(32, dtype="uint64")).sum(1)
    np.testing.assert_array_equal(ballot.reshape(-1, 32), np.broadcast_to(expected[:, None], warps.shape))
    np.testing.assert_array_equal(any_ != 0, np.repeat(warps.any(1), 32))
    np.testing.assert_array_equal(all_ != 0, np.repeat(warps.all(1), 32))


def test_reductions_of_a_warp(case):
    given = integers(32, low=-(2**25), high=2**25)
    got = np.zeros((32, 7), "int32")
    case.call("reduce_warp", given, got)
    bits = given.view("uint32")
    signed = [given.sum(), given.min(), given.max()]
    unsigned = [bits.min(), *(getattr(np, f"bitwise_{name}").reduce(bits) for name in ("and", "or", "xor"))]
    np.testing.assert_array_equal(got, [[*signed, *np.array(unsigned, "uint32").view("int32")]] * 32)


def test_a_warp_meets_in_shared_memory(case):
    given, got = integers(64), np.zeros(64, "int32")
    case.call("turn_warp", given, got, True)
    np.testing.assert_array_equal(got, given[LANES ^ 31])


def test_a_missing_syncwarp_shows(shim):
    """The first lane reads what the last has not written: 0xff bytes."""
    given, got = integers(64), np.zeros(64, "int32")
    shim.call("turn_warp", given, got, False)
    assert (got[:16] == -1).all()


@pytest.mark.parametrize(
    ("grid", "block"), [((3, 4, 5), (2, 3, 4)), ((1, 1, 2), (1, 33, 1)), ((70000, 1, 1), (1, 1, 1))]
)
def test_indices(case, grid, block):
    """Three dimensions; a block of a warp and one thread; more blocks than the other two dimensions allow."""
    got = np.zeros((*grid[::-1], *block[::-1], 12), "int32")
    case.call("write_indices", got, *grid, *block)
    for position, size in enumerate((*block, *grid)):
        axis = (5, 4, 3, 2, 1, 0)[position]
        index = np.arange(size).reshape([-1 if at == axis else 1 for at in range(6)])
        np.testing.assert_array_equal(got[..., position], np.broadcast_to(index, got.shape[:-1]))
        assert (got[..., 6 + position] == size).all()


@pytest.mark.parametrize("case", ["shim", GPU], indirect=True)  # the emulator has no variables of a module
def test_a_launch_without_arguments(case):
    got = np.zeros(1, "int32")
    case.call("count_launches", 7, got)
    assert got == 7 * 32


@pytest.mark.parametrize("blocks", [1, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-13)])
def test_block_reduction(case, dtype, tolerance, blocks):
    given, got = normal(10_001, dtype=dtype) ** 2, np.zeros(blocks, dtype)
    case.call(f"sums_{dtype}", given, got, given.size, blocks)
    np.testing.assert_allclose(got.sum(dtype="float64"), given.sum(dtype="float64"), rtol=tolerance)


@pytest.mark.parametrize("stay", [96, 40])
def test_votes_of_a_block_count_who_is_left(case, stay):
    given, got = integers(4 * 96, low=0, high=2), np.full((4 * 96, 3), 7, "int32")
    given[:192] = [0] * 96 + [1] * 96  # none and all
    case.call("vote_block", given, got, given.size, stay)
    left = given.reshape(4, 96)[:, :stay]
    count, any_, all_ = np.moveaxis(got.reshape(4, 96, 3), -1, 0)
    np.testing.assert_array_equal(count[:, :stay], np.repeat(left.sum(1)[:, None], stay, 1))
    np.testing.assert_array_equal(any_[:, :stay] != 0, np.repeat(left.any(1)[:, None], stay, 1))
    np.testing.assert_array_equal(all_[:, :stay] != 0, np.repeat(left.all(1)[:, None], stay, 1))
    assert (got.reshape(4, 96, 3)[:, stay:] == 7).all()


def test_dynamic_shared_memory(case):
    given, got = normal(480, dtype="float64"), np.zeros(480)
    case.call("turn_blocks", given, got, 480)
    np.testing.assert_array_equal(got.reshape(3, 160), given.reshape(3, 160)[:, ::-1])


def test_shared_memory_is_poisoned_before_each_block(shim):
    got = np.zeros(6, "float32")
    shim.call("read_unwritten", got, 3)
    assert np.isnan(got).all()


def test_constant_memory(case):
    given, got = normal(1000), np.zeros(1000, "float32")
    case.call("smooth_row", given, got, given.size)
    wide = np.pad(given.astype("float64"), 1, "edge")
    np.testing.assert_allclose(got, (wide[:-2] + 2 * wide[1:-1] + wide[2:]) / 4, atol=1e-6)


def test_histogram(case):
    given, got = integers(100_000, low=0, high=200).astype("uint8"), np.full(256, 9, "uint32")
    case.call("histogram_of", given, got, given.size)
    np.testing.assert_array_equal(got, np.bincount(given, minlength=256))


def test_atomics(case):
    given = integers(1024, low=-(2**20), high=2**20)
    bits = given.view("uint32")
    ints = np.array([5, 0, -(2**31), 2**31 - 1, 11], "int32")
    words = np.array([2**32 - 1, 0, 0, 0, 2**32 - 1], "uint32")
    wide, single, full = np.zeros(1, "uint64"), np.zeros(1, "float32"), np.zeros(1)
    old = np.zeros(1024, "int32")
    case.call("all_atomics", given, given.size, ints, words, wide, single, full, old)
    np.testing.assert_array_equal(ints, [5 + 1024, given.sum(), given.max(), given.min(), 11 + given.sum()])
    folded = [getattr(np, f"bitwise_{name}").reduce(bits) for name in ("and", "or", "xor")]
    np.testing.assert_array_equal(words, [*folded, bits.max(), bits.min()])
    assert (wide, single, full) == (1024 << 33, 512, 256)
    np.testing.assert_array_equal(np.sort(old), 5 + np.arange(1024))


def test_copies(case):
    given, got = normal(100), np.zeros(100, "float32")
    case.call("copy_bytes", given, got, given.nbytes)
    np.testing.assert_array_equal(got, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_widens(case, dtype):
    patterns = np.arange(65536).astype("uint16")
    expected, got = torch.from_numpy(patterns).view(dtype).float().numpy(), np.zeros(65536, "float32")
    case.call(f"widen_{str(dtype).removeprefix('torch.')}", patterns, got, got.size)
    np.testing.assert_array_equal(got, expected)  # NaN equals NaN
    np.testing.assert_array_equal(np.signbit(got)[~np.isnan(got)], np.signbit(expected)[~np.isnan(got)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floats_narrow_to_the_nearest_even(case, dtype):
    """Every 16-bit number, the midpoint to its neighbour, the floats beside that, and any bits at all."""
    exact = torch.arange(65536).to(torch.uint16).view(dtype).float().numpy().view("uint32")
    half_a_unit = np.uint32(1 << (12 if dtype == torch.float16 else 15))
    beside = [exact + half_a_unit + np.uint32(step) for step in (0, 1, 2**32 - 1)]
    subnormal = ((np.arange(4096) + 0.5) * 2.0**-25).astype("float32").view("uint32")
    given = np.concatenate([exact, *beside, subnormal, integers(100_000).view("uint32")]).view("float32")
    expected, got = torch.from_numpy(given).to(dtype).float().numpy(), np.zeros(given.size, "uint16")
    case.call(f"narrow_{str(dtype).removeprefix('torch.')}", given, got, given.size)
    np.testing.assert_array_equal(torch.from_numpy(got).view(dtype).float().numpy(), expected)


def test_pairs_of_16_bit_numbers(case):
    given, half, brain = (normal(33, 2), *np.zeros((2, 33, 2), "float32"))
    case.call("swap_pairs", given, half, brain, 33)
    turned = torch.from_numpy(given[:, ::-1].copy())
    np.testing.assert_array_equal(half, turned.half().float().numpy())
    np.testing.assert_array_equal(brain, turned.bfloat16().float().numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_product_of_a_warp(case, dtype):
    a, b, c = (torch.from_numpy(normal(*shape)) for shape in ((16, 16), (8, 16), (16, 8)))
    a, b = a.to(dtype), b.flip(1).T.contiguous().to(dtype)
    got = c.numpy().copy()
    bits = [matrix.view(torch.int16).numpy() for matrix in (a, b)]
    case.call(f"multiply_{str(dtype).removeprefix('torch.')}", *bits, got)
    np.testing.assert_allclose(got, c + a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_bits(case):
    given = np.concatenate([integers(60), np.array([0, 1, -1, -(2**31)], "int32")])
    got = np.zeros((64, 8), "int32")
    case.call("bits_of", given, got, 64)
    for x, row in zip(given.tolist(), got.tolist(), strict=True):
        narrow, wide = f"{x % 2**32:032b}", f"{((x << 20) ^ x) % 2**64:064b}"
        reverse = int(narrow[::-1], 2)
        expected = [narrow.count("1"), (narrow + "1").index("1"), 1 + narrow[::-1].find("1")]
        expected += [reverse - 2**32 if reverse >= 2**31 else reverse]
        expected += [wide.count("1"), (wide + "1").index("1"), 1 + wide[::-1].find("1"), x & 0x3FFFFFFF]
        assert row == expected, x


def test_functions_of_device_code(case):
    """Errors of the fast functions are the hardware's; 1e-5 holds for both."""
    x, y, got = normal(64) * 3, np.abs(normal(2, 64)[1]) + 0.1, np.zeros((64, 12), "float32")
    x[:2] = 1 + 2.0**-12, 0.5
    y[:2] = 1 + 2.0**-12, 2
    case.call("functions_of", x, y, got, 64)
    product, thread = x.astype("float64") * y, np.arange(64)
    np.testing.assert_array_equal(got[:, 0], (product - 1).astype("float32"))
    np.testing.assert_array_equal(got[:, 1], x * y - np.float32(1))
    assert got[0, 0] != got[0, 1]
    expected = [x - y, np.exp(x), np.log(y), np.exp2(x), 1 / np.sqrt(y), np.minimum(x, y), x, x / y, x.clip(0, 1)]
    expected.append(np.maximum(7, thread) + np.minimum(3, thread))
    np.testing.assert_allclose(got[:, 2:], np.stack(expected, 1), rtol=1e-5, atol=1e-6)


def test_vectors(case):
    given, small = normal(20, 4), integers(20, 4, low=0, high=2**16).astype("uint16")
    got, sums = np.zeros_like(given), np.zeros((20, 4), "int32")
    case.call("vectors_of", given, got, small, sums, 20)
    np.testing.assert_array_equal(got, given[:, ::-1])
    wide = small.astype("int32")
    np.testing.assert_array_equal(
        sums, np.stack([wide[:, 0] + wide[:, 3], wide[:, 1], wide[:, 2], 0 * wide[:, 0] + 8], 1)
    )


def in_loop(given: np.ndarray) -> np.ndarray:
    return 4 * np.roll(given[0], -64) + 6


@pytest.mark.parametrize(
    ("name", "blocks", "out", "expected"),
    [
        ("missing_barrier", 2, 2, lambda given: given.sum(1)),
        ("missing_barrier_after_first_warp", 2, 256, lambda given: np.repeat(given[:, 0], 128)),
        ("missing_barrier_in_loop", 1, 128, in_loop),
    ],
    ids=["before a read", "after the first warp", "in a loop"],
)
def test_a_missing_barrier_shows_at_every_run(shim, name, blocks, out, expected):
    given, right = integers(blocks, 128, low=0, high=100).astype("float32"), np.zeros(out, "float32")
    shim.call(f"run_{name}", given, right, blocks, False)
    np.testing.assert_array_equal(right, expected(given))
    runs = np.zeros((5, out), "float32")
    for wrong in runs:
        shim.call(f"run_{name}", given, wrong, blocks, True)
        assert not np.array_equal(wrong, right)
    np.testing.assert_array_equal(runs, np.broadcast_to(runs[0], runs.shape))


def line_of(text: str) -> int:
    lines = (KERNELS / "faults.cu").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def waiting(threads: str, call: str, line: int) -> str:
    return rf"threads {threads} wait at {call} \(\S*faults.cu:{line}\)"


WAITS = {
    "divergent_barrier": (
        "divergent barrier",
        [
            waiting("0-39", "__syncthreads", line_of("kFault && threadIdx.x < 40") + 1),
            waiting("40-127", "__syncthreads", line_of("kFault && threadIdx.x < 40") + 3),
        ],
    ),
    "barrier_and_shuffle": (
        "divergent barrier",
        [
            waiting("0-4", "__shfl_xor_sync of mask 0xffffffff", line_of("__shfl_xor_sync")),
            waiting("5-5", "__syncthreads", line_of("kFault && threadIdx.x % 32 == 5") + 1),
        ],
    ),
    "exited_lane": (
        "a mask names lanes that have exited or never were",
        [
            "threads 0-63 have exited",
            waiting("64-76", "__shfl_down_sync of mask 0xffffffff", line_of("__shfl_down_sync")),
            "threads 77-77 have exited",
            waiting("78-95", "__shfl_down_sync of mask 0xffffffff", line_of("__shfl_down_sync")),
            "threads 96-127 have exited",
        ],
    ),
    "mask_without_caller": (
        "a mask does not name its caller",
        [
            "threads 0-1 have exited",
            waiting("2-2", "__ballot_sync of mask 0x00000000", line_of("__ballot_sync")),
            "threads 3-33 have exited",
        ],
    ),
    "masks_differ": (
        "a mask names lanes that have exited or never were",
        [waiting("0-15", "__all_sync of mask 0xffffffff", line_of("0xffff0000u : kAll")), "threads 16-31 have exited"],
    ),
    "calls_differ": (
        "divergent barrier",
        [
            waiting("0-0", "__all_sync of mask 0xffffffff", line_of("__any_sync")),
            waiting("1-1", "__any_sync of mask 0xffffffff", line_of("__any_sync")),
        ],
    ),
}


@pytest.mark.parametrize("name", WAITS)
def test_threads_that_wait_for_ever_are_reported(shim, name):
    reason, groups = WAITS[name]
    got = np.zeros(128, "float32")
    shim.call(f"run_{name}", got, False)
    assert (got == 1).all()
    with pytest.raises(RuntimeError, match=rf"^{name}<true>, block \(0, 0, 0\): {reason}: {'; '.join(groups)}(;|$)"):
        shim.call(f"run_{name}", got, True)
    shim.call(f"run_{name}", got, False)  # the error does not stay


@pytest.mark.parametrize(("grid_y", "threads"), [(0, 128), (65536, 128), (1, 0), (1, 1025)])
def test_a_launch_that_hardware_refuses(case, grid_y, threads):
    with pytest.raises(RuntimeError, match="invalid"):
        case.call("run_configuration", np.zeros(128, "float32"), grid_y, threads)


def test_a_large_shared_memory_must_be_asked_for(case):
    given, got = normal(160, dtype="float64"), np.zeros(160)
    with pytest.raises(RuntimeError, match="invalid"):
        case.call("much_shared", given, got, 64 << 10, 0)
    with pytest.raises(RuntimeError, match="invalid"):
        case.call("much_shared", given, got, 160 * 9, 1 << 20)  # more than any GPU has
    case.call("much_shared", given, got, 64 << 10, 64 << 10)
    np.testing.assert_array_equal(got, given[::-1])


@pytest.mark.parametrize(
    ("name", "shift", "report"),
    [
        ("global", 1, "heap-buffer-overflow"),
        ("static", 1, "out of bounds"),  # an index that can be seen to lie beyond its array
        ("static", 2, "global-buffer-overflow"),  # a pointer
        ("dynamic", 1, "heap-buffer-overflow"),
        ("misaligned", 1, "misaligned address"),
    ],
)
def test_sanitizers_see_the_kernels(name, shift, report):
    program = build([KERNELS / "faults.cu", KERNELS / "faults_main.cpp"], sanitize=True, executable=True)
    right = subprocess.run([program, name, "0"], capture_output=True, text=True)
    assert (right.returncode, right.stderr) == (0, "")
    assert float(right.stdout) == (6 if name == "static" else 3)
    wrong = subprocess.run([program, name, str(shift)], capture_output=True, text=True)
    assert wrong.returncode != 0
    assert report in wrong.stderr
    assert f"faults.cu:{line_of(f'LINE {name}')}" in wrong.stderr


def test_code_that_drops_an_error_does_not_compile(tmp_path, capfd):
    """So that no kernel of csrc, all of which are built here, runs on after a call of the runtime that failed."""
    source = tmp_path / "drops.cu"
    source.write_text(
        '#include "common/launch.h"\n'
        'extern "C" int clear(void* to) {\n  cudaMemsetAsync(to, 0, 4);\n  return cudaGetLastError();\n}\n'
    )
    with pytest.raises(subprocess.CalledProcessError):
        build([source])
    assert "unused-result" in capfd.readouterr().err
    source.write_text(
        source.read_text().replace("  cudaMemsetAsync(to, 0, 4);", "  BCM_TRY(cudaMemsetAsync(to, 0, 4));")
    )
    memory = np.full(1, 7, np.int32)
    Library(build([source])).call("clear", memory)
    assert memory[0] == 0


def test_of_two_that_want_the_same_library_one_makes_it(monkeypatch, tmp_path):
    """As the processes of a test run do; a file that has changed is compiled again, alone."""
    run, commands = subprocess.run, []

    def compile_nothing(command, **options):
        if "-o" not in command:
            return run(command, **options)
        commands.append(command)
        time.sleep(0.05)
        return Path(command[command.index("-o") + 1]).write_bytes(b"")

    monkeypatch.setattr(subprocess, "run", compile_nothing)
    monkeypatch.setattr(building, "_cache", lambda: tmp_path)
    source = tmp_path / "source.cu"
    source.write_text("first")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(build, [[source], [source]])
    assert first == second
    assert [command[-3] for command in commands if "-c" in command].count(str(source)) == 1
    assert len(commands) == 1 + len(ALWAYS) + 1  # and the link
    source.write_text("second")
    assert build([source]) != first
    assert [command[-3] for command in commands[len(ALWAYS) + 2 :] if "-c" in command] == [str(source)]
