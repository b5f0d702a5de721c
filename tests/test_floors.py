"""Imports point down only, read from the source text."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    {"errors"},
    {"reference", "kernels"},
    {"ops"},
    {"nn"},
    {"models", "data", "metrics", "viz"},
    {"inference"},
    {"integrations", "export"},
    {"engine", "benchmarks"},
    {"serve"},
    {"cli"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SHARED = {"bcmfnet.data.labels"}  # label tables, numpy only: its own floor's rooms may use them


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in names if name.split(".")[0] == "bcmfnet"}


def violations(room: str, names: set[str]) -> list[str]:
    bad = []
    for name in sorted(names):
        target = room_of(name)
        if target not in FLOOR or target == room or any(name.startswith(shared) for shared in SHARED):
            continue
        if FLOOR[target] >= FLOOR[room]:
            bad.append(name)
    return bad


def sources() -> list[tuple[str, Path]]:
    package = [(path.relative_to(ROOT / "bcmfnet").parts[0].removesuffix(".py"), path)
               for path in (ROOT / "bcmfnet").rglob("*.py")]  # fmt: skip
    mapped = [(room, path) for room in ("kernels", "benchmarks") for path in (ROOT / room).rglob("*.py")]
    return [(room, path) for room, path in package + mapped if room in FLOOR]


@pytest.mark.parametrize(("room", "path"), sources(), ids=lambda value: str(value).removeprefix(str(ROOT)))
def test_imports_point_down(room, path):
    assert violations(room, imported_modules(path)) == []


def test_reference_imports_torch_and_the_standard_library_alone():
    for path in (ROOT / "bcmfnet" / "reference").glob("*.py"):
        tops = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert tops <= {
            "torch",
            "__future__",
            "typing",
            "dataclasses",
            "math",
            "collections",
            "contextlib",
            "bcmfnet",
        }, path


def private_imports(room: str, stem: str, tree: ast.Module) -> list[str]:
    """Private names of other ops that the file of an op takes; what a room's own private modules hold is common to it.

    Found are `from bcmfnet.ops.bcl import _packed` and, of a module under any name, `bcl._packed`.
    """
    modules, found = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                if node.module == f"bcmfnet.{room}":
                    modules[alias.asname or alias.name] = alias.name
                elif node.module.startswith(f"bcmfnet.{room}.") and alias.name.startswith("_"):
                    found.append((node.module.split(".")[2], alias.name))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr.startswith("_"):
            found.append((modules.get(node.value.id, stem), node.attr))
    return sorted(f"{op}.{name}" for op, name in found if op != stem and not op.startswith("_"))


def test_no_file_of_a_kernel_is_longer_than_600_lines():
    paths = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "kernels").rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert len(lengths) > 50 and {name: length for name, length in lengths.items() if length > 600} == {}


def ops_files() -> list[tuple[str, Path]]:
    folders = {"ops": ROOT / "bcmfnet" / "ops", "kernels": ROOT / "kernels"}
    return [(room, path) for room, folder in folders.items() for path in folder.rglob("*.py")]


@pytest.mark.parametrize(("room", "path"), ops_files(), ids=lambda value: str(value).removeprefix(str(ROOT)))
def test_an_op_takes_no_private_name_of_another(room, path):
    folder = ROOT / ("bcmfnet/ops" if room == "ops" else "kernels")
    stem = path.relative_to(folder).parts[0].removesuffix(".py")
    assert private_imports(room, stem, ast.parse(path.read_text())) == []


def test_private_imports_are_seen():
    tree = ast.parse(
        "from bcmfnet.kernels import _common, autotune, upsample_argmax as argmax\n"
        "from bcmfnet.kernels.bcl.full import _score\n"
        "from bcmfnet.kernels.lmfm import _between, plan\n"
        "argmax._load(argmax.kernel, _common._x, self._own)\n"
    )
    assert private_imports("kernels", "bcl", tree) == ["lmfm._between", "upsample_argmax._load"]


def test_violations_are_seen():
    assert violations("nn", {"bcmfnet.models.ddrnet"}) == ["bcmfnet.models.ddrnet"]
    assert violations("viz", {"bcmfnet.metrics", "bcmfnet.data.labels.LabelTable"}) == ["bcmfnet.metrics"]
    assert violations("cli", {"bcmfnet.engine.train"}) == []
