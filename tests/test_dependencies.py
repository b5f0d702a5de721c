"""Whatever the package imports is declared: as a dependency, or in the extra that brings it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DISTRIBUTIONS = {
    "cv2": "opencv-python-headless",
    "yaml": "PyYAML",
    "prometheus_client": "prometheus-client",
}  # where the module has another name
OWN = {"bcmfnet", "triton"}  # torch for a GPU brings triton, in the version that it needs


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=~!; ]", requirement)[0] for requirement in requirements}


def imported(folder: str) -> set[str]:
    """Distributions of the modules that are imported anywhere in the sources of a folder."""
    modules = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.split(".")[0])
    return {DISTRIBUTIONS.get(name, name) for name in modules - OWN - sys.stdlib_module_names}


def test_what_is_imported_is_declared():
    extras = ("train", "runtimes", "int8", "serve", "video", "tiff")
    declared = names(PROJECT["dependencies"]).union(*(names(EXTRAS[extra]) for extra in extras))
    found = set.union(*map(imported, ("bcmfnet", "kernels", "benchmarks")))
    assert found - declared == set()
    assert names(PROJECT["dependencies"]) - found == set()


def test_runtimes_are_installed_by_their_extra():
    from bcmfnet.inference.runtimes import RUNTIMES

    assert {package for facts in RUNTIMES.values() for package in facts.packages} == set(EXTRAS["runtimes"])


def test_all_and_dev_hold_what_they_are_said_to():
    assert EXTRAS["all"] == ["bcmfnet[train,runtimes,int8,serve,video,tiff]"]
    assert EXTRAS["dev"][0] == "bcmfnet[all,build]"


def test_without_triton_its_tests_are_skipped():
    """No torch for CPUs brings it."""
    code = "import sys, pytest; sys.modules['triton'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    tests = ["tests/ops/test_upsample_argmax.py", "tests/kernels/test_upsample_argmax_triton.py"]
    command = [sys.executable, "-c", code, *tests, "-q", "-k", "triton", "-p", "no:cacheprovider", "-m", "not gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert re.fullmatch(r"\d+ skipped, \d+ deselected in .*", done.stdout.splitlines()[-1]), done.stdout
