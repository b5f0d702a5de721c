"""The package as a stranger gets it: a wheel, built where there is a compiler and where there is none."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import bcmfnet

ROOT = Path(__file__).parents[1]
REASON = "no no-such-compiler on PATH"


def install(*command: object) -> None:
    """Run a pip command with a PATH that has no compiler."""
    env = os.environ | {"CXX": "no-such-compiler", "BCMFNET_CUDA": "auto"}
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, timeout=280)
    if done.returncode and "No matching distribution found for" in done.stderr:
        pytest.skip("the build requirements cannot be had here (no network)")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    install(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
    return next(folder.glob("bcmfnet-*.whl"))


@pytest.mark.exhaustive
def test_editable_install_without_compiler(tmp_path):
    """Also over a library of an earlier build, which must not stay beside the new record."""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__", "_build.json")
    shutil.copytree(ROOT, tree, ignore=ignored)
    (tree / "bcmfnet" / "_C.so").write_bytes(b"of an earlier build")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install(python, "-m", "pip", "install", "-q", "--no-deps", "-e", tree)
    record = json.loads((tree / "bcmfnet" / "_build.json").read_text())
    assert (record["native"], record["reason"]) == (False, REASON)
    assert not (tree / "bcmfnet" / "_C.so").exists()
    code = "import bcmfnet.kernels, bcmfnet.benchmarks; print(bcmfnet.kernels.__file__)"
    done = subprocess.run([python, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(tree / "kernels" / "__init__.py"), done.stderr


@pytest.mark.slow
def test_wheel_without_compiler_says_what_was_not_built(wheel):
    assert wheel.name.split("-", 2)[2] == "py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        build = json.loads(archive.read("bcmfnet/_build.json"))
    assert (build["native"], build["reason"]) == (False, REASON)
    assert {"bcmfnet/kernels/__init__.py", "bcmfnet/benchmarks/__init__.py", "bcmfnet/engine/train.py"} <= names
    assert "bcmfnet/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"bcmfnet"}


@pytest.mark.slow
def test_wheel_imports_on_its_own(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import bcmfnet, bcmfnet.kernels, bcmfnet.benchmarks; print(bcmfnet.__file__, bcmfnet.create_model.__name__)"
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.split() == [str(tmp_path / "site" / "bcmfnet" / "__init__.py"), "create_model"], done.stderr


def test_every_folder_of_the_package_is_in_the_explicit_list():
    rooms = {path.parent.name for path in (ROOT / "bcmfnet").glob("*/*.py")}
    assert rooms == {path.parent.name for path in (ROOT / "bcmfnet").glob("*/__init__.py")}


def test_every_folder_of_the_mapped_packages_is_in_the_explicit_list():
    mapped = re.search(r"^MAPPED = (.*)$", (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
    folders = [path.parent for room in ("kernels", "benchmarks") for path in ROOT.glob(f"{room}/**/__init__.py")]
    assert sorted(ast.literal_eval(mapped)) == sorted(".".join(path.relative_to(ROOT).parts) for path in folders)


def test_kernels_refuses_its_top_level_name():
    code = "import kernels"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "ImportError: expected to be imported as bcmfnet.kernels, got kernels" in done.stderr


def test_command_line_starts_without_torch():
    code = "import sys, bcmfnet.cli.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0


def test_mapped_packages_are_the_folders_at_the_top():
    """In an editable install bcmfnet.kernels is kernels/; in a wheel it lies in the package."""
    import bcmfnet.benchmarks
    import bcmfnet.kernels

    for module, folder in ((bcmfnet.kernels, "kernels"), (bcmfnet.benchmarks, "benchmarks")):
        assert Path(module.__file__).parent.name == folder
        assert Path(module.__file__).read_text() == (ROOT / folder / "__init__.py").read_text()


def test_changelog_and_citation_are_of_this_version_and_packed():
    (newest, *_) = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert newest == citation["version"] == bcmfnet.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what its schema requires
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= paper.keys() and paper["url"] in (ROOT / "README.md").read_text()
    packed = (ROOT / "MANIFEST.in").read_text().split()
    assert {"CHANGELOG.md", "CITATION.cff"} <= set(packed)
