"""Who serves an op: the table, the two ways to ask for a backend, and why the native library is not there."""

from __future__ import annotations

import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch

from bcmfnet.ops import _cpu, _extension, backends, boundary_corrected_loss, upsample_argmax
from bcmfnet.ops._op import LIBRARY


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """An op of two devices, alone in the table; nothing asked for."""
    monkeypatch.setattr(backends, "_table", {})
    monkeypatch.delenv("BCMFNET_BACKEND", raising=False)
    backends.register("blur", "cuda", "triton", "by triton")
    backends.register("blur", "cuda", "reference", "by reference on a GPU")
    backends.register("blur", "cpu", "reference", "by reference")


def test_the_first_that_was_registered_serves():
    assert backends.choose("blur", "cuda") == ("triton", "the default")
    assert backends.choose("blur", "cpu") == ("reference", "the default")
    assert backends.available("blur", "cuda") == ["triton", "reference"]
    assert backends.implementation("blur", "cuda") == "by triton"
    assert backends.implementation("blur", "cpu") == "by reference"


def test_one_that_cannot_serve_says_why():
    backends.register("sharpen", "cpu", "cpp", "by C++", lambda: "not built: no compiler")
    backends.register("sharpen", "cpu", "triton", "by triton", lambda: "triton is not installed")
    backends.register("sharpen", "cpu", "reference", "by reference")
    assert backends.choose("sharpen", "cpu") == (
        "reference",
        "cpp: not built: no compiler; triton: triton is not installed",
    )
    assert backends.available("sharpen", "cpu") == ["reference"]
    with backends.use_backend("cpp"), pytest.raises(RuntimeError) as caught:
        backends.implementation("sharpen", "cpu")
    assert str(caught.value) == "sharpen on cpu: use_backend asks for 'cpp'; not built: no compiler"


@pytest.mark.parametrize(
    ("installed", "interpreted", "on_a_gpu", "on_a_cpu"),
    [
        (False, "1", "triton is not installed", "triton is not installed"),
        (True, "", None, "only under TRITON_INTERPRET=1"),
        (True, "0", None, "only under TRITON_INTERPRET=1"),
        (True, "1", "TRITON_INTERPRET is set", None),
    ],
)
def test_triton_runs_compiled_or_interpreted(monkeypatch, installed, interpreted, on_a_gpu, on_a_cpu):
    monkeypatch.setattr(backends, "find_spec", lambda name: name if installed else None)
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    assert backends.no_triton.__wrapped__() == on_a_gpu
    assert backends.no_interpreter.__wrapped__() == on_a_cpu


def test_registering_again_replaces_and_keeps_the_place():
    backends.register("blur", "cuda", "triton", "anew")
    assert backends.implementation("blur", "cuda") == "anew"


def test_register_refuses_an_unknown_backend():
    with pytest.raises(ValueError) as caught:
        backends.register("blur", "cpu", "numba", None)
    assert str(caught.value) == "backend: expected one of cpp, cuda, triton, reference, got 'numba'"


def test_use_backend_serves_inside_and_ends_with_it(monkeypatch):
    with backends.use_backend("reference"):
        assert backends.choose("blur", "cuda") == ("reference", "use_backend")
        assert backends.implementation("blur", "cuda") == "by reference on a GPU"
        with backends.use_backend("triton"):
            assert backends.implementation("blur", "cuda") == "by triton"
        assert backends.choose("blur", "cuda")[0] == "reference"
    with pytest.raises(KeyError), backends.use_backend("reference"):
        raise KeyError
    assert backends.choose("blur", "cuda")[0] == "triton"


def test_use_backend_refuses_an_unknown_name():
    with pytest.raises(ValueError) as caught, backends.use_backend("C++"):
        pytest.fail("entered")
    assert str(caught.value) == "backend: expected one of cpp, cuda, triton, reference, got 'C++'"


def test_environment_asks_and_use_backend_overrules(monkeypatch):
    monkeypatch.setenv("BCMFNET_BACKEND", "reference")
    assert backends.choose("blur", "cuda") == ("reference", "BCMFNET_BACKEND")
    with backends.use_backend("triton"):
        assert backends.choose("blur", "cuda") == ("triton", "use_backend")
    monkeypatch.setenv("BCMFNET_BACKEND", "")
    assert backends.choose("blur", "cuda")[0] == "triton"


def test_environment_with_an_unknown_name(monkeypatch):
    monkeypatch.setenv("BCMFNET_BACKEND", "fast")
    message = "BCMFNET_BACKEND: expected one of cpp, cuda, triton, reference, got 'fast'"
    with pytest.raises(ValueError) as caught:
        backends.choose("blur", "cpu")
    assert str(caught.value) == message
    assert [row["reason"] for row in backends.describe()] == [message] * 2


@pytest.mark.parametrize("by_environment", [True, False])
def test_a_backend_that_does_not_serve_says_who_does(monkeypatch, by_environment):
    if by_environment:
        monkeypatch.setenv("BCMFNET_BACKEND", "cpp")
        source = "BCMFNET_BACKEND"
        with pytest.raises(RuntimeError) as caught:
            backends.implementation("blur", "cuda")
    else:
        source = "use_backend"
        with backends.use_backend("cpp"), pytest.raises(RuntimeError) as caught:
            backends.implementation("blur", "cuda")
    assert str(caught.value) == f"blur on cuda: {source} asks for 'cpp'; it is served by triton, reference"


WITHOUT = "built without CUDA: nvcc fatal   : no licence"


@pytest.fixture
def lost():
    """Two ops whose native kernels are not there."""
    backends._warn_once.cache_clear()
    for op in ("blur", "sharpen"):
        backends._table.pop((op, "cpu"), None), backends._table.pop((op, "cuda"), None)
        backends.register(op, "cpu", "cpp", "by C++", lambda: "not built: no cmake on PATH")
        backends.register(op, "cpu", "reference", "by reference")
        backends.register(op, "cuda", "cuda", "by CUDA", lambda: WITHOUT)
        backends.register(op, "cuda", "triton", "by triton")
    yield
    backends._warn_once.cache_clear()


def test_the_first_call_that_loses_its_kernel_warns(lost):
    with pytest.warns(UserWarning) as caught:
        for _ in range(2):
            for op in ("blur", "sharpen"):
                assert backends.implementation(op, "cpu") == "by reference"
                assert backends.implementation(op, "cuda") == "by triton"
    assert [str(warning.message) for warning in caught] == [
        "bcmfnet: ops on cpu are served by plain PyTorch, several times slower (cpp: not built: no cmake on PATH); "
        "see `bcmfnet env`",
        f"bcmfnet: ops on cuda are served by triton (cuda: {WITHOUT}); see `bcmfnet env`",
    ]


def test_what_was_asked_for_warns_of_nothing(lost, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.choose("blur", "cpu")
        backends.has_kernel("blur", "cpu")
        backends.describe()
        with backends.use_backend("reference"):
            assert backends.implementation("blur", "cpu") == "by reference"
        monkeypatch.setenv("BCMFNET_BACKEND", "reference")
        assert backends.implementation("blur", "cpu") == "by reference"


def test_the_warning_does_not_break_a_compiled_graph(monkeypatch, recwarn):
    monkeypatch.undo()
    monkeypatch.delenv("BCMFNET_BACKEND", raising=False)
    entry = backends._table["upsample_argmax", "cpu"]["cpp"]
    monkeypatch.setitem(backends._table["upsample_argmax", "cpu"], "cpp", entry._replace(unavailable=lambda: "lost"))
    backends._warn_once.cache_clear()
    compiled = torch.compile(lambda x: upsample_argmax(x, (4, 4)), fullgraph=True, backend="aot_eager")
    logits = torch.eye(2).reshape(1, 2, 2, 1).repeat(1, 1, 1, 2)
    assert torch.equal(compiled(logits), upsample_argmax(logits, (4, 4)))
    assert [str(w.message).partition(";")[0] for w in recwarn if "bcmfnet" in str(w.message)] == [
        "bcmfnet: ops on cpu are served by plain PyTorch, several times slower (cpp: lost)"
    ]
    backends._warn_once.cache_clear()


def test_describe_has_a_row_for_each_op_and_device(monkeypatch):
    assert backends.describe() == [
        {"op": "blur", "device": "cpu", "backend": "reference", "reason": "the default"},
        {"op": "blur", "device": "cuda", "backend": "triton", "reason": "the default"},
    ]
    with backends.use_backend("triton"):
        assert backends.describe() == [
            {
                "op": "blur",
                "device": "cpu",
                "backend": "none",
                "reason": "blur on cpu: use_backend asks for 'triton'; it is served by reference",
            },
            {"op": "blur", "device": "cuda", "backend": "triton", "reason": "use_backend"},
        ]


def test_the_loss_asks_the_table(monkeypatch):
    monkeypatch.undo()
    monkeypatch.delenv("BCMFNET_BACKEND", raising=False)
    assert ("bcl", "cpu") in backends._table
    assert ("bcl", "cuda") in backends._table
    logits, target = torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.uint8)
    with backends.use_backend("reference"):
        boundary_corrected_loss(logits, target)
    with backends.use_backend("cuda"), pytest.raises(RuntimeError, match="bcl on cpu: use_backend asks for 'cuda'"):
        boundary_corrected_loss(logits, target)


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A package folder without a library; what is loaded from it is forgotten afterwards."""
    monkeypatch.setattr(_extension, "PACKAGE", tmp_path)
    _extension.load.cache_clear(), _extension.load_cuda.cache_clear()
    yield tmp_path
    _extension.load.cache_clear(), _extension.load_cuda.cache_clear()


def not_loaded(reason: str) -> dict:
    return {"loaded": False, "reason": reason, "build": None}


def test_a_source_tree_has_no_library(package):
    assert _extension.load() == "not built: this is a source tree that was not installed"
    assert _extension.describe() == not_loaded("not built: this is a source tree that was not installed")


def test_the_builds_record_says_why_there_is_no_library(package):
    (package / "_build.json").write_text(json.dumps({"reason": "no C++ compiler was found"}))
    assert _extension.load() == "not built: no C++ compiler was found"
    assert _extension.describe() == not_loaded("not built: no C++ compiler was found")


def test_the_builds_record_says_why_cuda_is_missing(package, monkeypatch):
    reason = 'op_cuda.cu(1): error: identifier "unheard_of" is undefined'
    (package / "_build.json").write_text(json.dumps({"native": True, "reason": None, "cuda": reason}))
    monkeypatch.setattr(_extension, "load", cache(lambda: None))
    monkeypatch.setattr(_extension, "_build_info", lambda: {"cpu": "plain", "cuda": None})
    assert _extension.load_cuda() == f"built without CUDA: {reason}"
    assert _extension.describe()["build"] == {"cpu": "plain", "cuda": None, "without": reason}
    monkeypatch.setattr(_extension, "_build_info", lambda: {"cpu": "plain", "cuda": "13.0 for 9.0"})
    _extension.load_cuda.cache_clear()
    assert _extension.load_cuda() is None


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF\x02\x01\x01" + bytes(200)])
def test_a_broken_library_is_a_reason_and_no_crash(package, content):
    library = package / "_C.so"
    library.write_bytes(content)
    reason = _extension.load()
    assert reason.startswith("cannot be loaded: ")
    assert os.fspath(library) in reason
    assert "\n" not in reason
    assert _extension.describe() == not_loaded(reason)


def test_the_library_is_looked_for_once(package):
    first = _extension.load()
    (package / "_C.so").write_bytes(b"too late")
    assert _extension.load() == first


@pytest.mark.parametrize(
    ("built", "card", "runs"),
    [
        ("8.0 9.0 10.0 12.0+PTX", (8, 0), True),
        ("8.0 9.0 10.0 12.0+PTX", (8, 9), True),  # machine code of its generation
        ("8.0 9.0 10.0 12.0+PTX", (7, 5), False),
        ("8.0 9.0 10.0 12.0+PTX", (13, 0), True),  # PTX, which the driver compiles
        ("8.6 9.0", (8, 0), False),
        ("8.0 9.0", (10, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("10.0f", (10, 3), True),
        ("10.0f", (12, 0), False),
    ],
)
def test_a_card_that_the_library_was_not_built_for_is_left_to_the_next_backend(package, monkeypatch, built, card, runs):
    """Its calls would raise "no kernel image", though Triton and plain PyTorch serve it."""
    monkeypatch.setattr(_extension, "load", cache(lambda: None))
    monkeypatch.setattr(_extension, "_build_info", lambda: {"cpu": "plain", "cuda": f"13.0 for {built}"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Some Card")
    reason = f"built for {built}, not for Some Card ({card[0]}.{card[1]})"
    assert _extension.load_cuda() == (None if runs else reason)
    backends.register("op", "cuda", "cuda", None, _extension.load_cuda)
    backends.register("op", "cuda", "triton", None)
    assert backends.choose("op", "cuda") == (("cuda", "the default") if runs else ("triton", f"cuda: {reason}"))


def test_threads_started_inside_use_backend_see_it():
    def ask() -> str:
        return backends.choose("blur", "cuda")[0]

    def choose() -> tuple[str, str]:
        with backends.use_backend("triton"):
            return ask(), backends.choose("blur", "cuda")[1]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(ask).result() == "triton"  # the default, by a thread that started before
        with backends.use_backend("reference"):
            assert pool.submit(ask).result() == "reference"
            with ThreadPoolExecutor(1) as inner:
                assert inner.submit(ask).result() == "reference"
                assert inner.submit(choose).result() == ("triton", "use_backend")
            assert ask() == "reference"
        assert pool.submit(ask).result() == "triton"


@pytest.mark.parametrize("key", ["CPU", "CUDA", "MPS", "XPU", "HPU", "PrivateUse1"])
def test_every_op_has_a_kernel_on_every_device(key):
    ops = sorted({name.removesuffix(".default") for name in LIBRARY._op_defs})
    assert ops
    for op in ops:
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(op, key), op


@pytest.mark.parametrize("op", ["bcl", "lmfm", "pyramid_pool", "stem_conv", "upsample_add_relu", "upsample_argmax"])
def test_plain_pytorch_serves_device_types_without_kernels(op, recwarn, monkeypatch):
    monkeypatch.undo()
    assert backends.choose(op, "mps") == ("reference", "the default")
    assert backends.implementation(op, "xpu") is backends._table[op, "cpu"]["reference"].implementation
    assert backends.available(op, "hpu") == ["reference"]
    with backends.use_backend("cpp"), pytest.raises(RuntimeError, match="asks for 'cpp'; it is served by reference"):
        backends.implementation(op, "mps")


def test_a_level_leaves_out_what_is_above_it(monkeypatch):
    monkeypatch.setattr(_cpu, "FEATURES", dict.fromkeys(_cpu.FEATURES, lambda: True))
    left = {}
    for level in ("plain", "v3", "v4", "amx", ""):
        monkeypatch.setenv("BCMFNET_CPU_LEVEL", level)
        left[level] = set(_cpu.FEATURES) - _cpu.features.__wrapped__()
    assert left == {"plain": {"avx2", "amx"}, "v3": {"amx"}, "v4": {"amx"}, "amx": set(), "": set()}


def test_an_unknown_level_is_named(monkeypatch):
    monkeypatch.setenv("BCMFNET_CPU_LEVEL", "avx512")
    if not (_extension.PACKAGE / "_C.so").exists():
        pytest.skip("the native library is not built")
    with pytest.raises(ValueError, match="^BCMFNET_CPU_LEVEL: expected one of plain, v3, v4, amx, got 'avx512'$"):
        _extension.load.__wrapped__()
