"""A clone's own folder, imported in place of what was installed, says in one line what it lacks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bcmfnet

ROOT = Path(__file__).parents[1]


def import_from(folder: Path, *options: str) -> str:
    """What `import bcmfnet` prints on standard error where Python looks into a folder first."""
    code = f"import bcmfnet; assert bcmfnet.__file__.startswith({str(folder)!r}), bcmfnet.__file__"
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-P", *options, "-c", code], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture
def clone(tmp_path) -> Path:
    unbuilt = shutil.ignore_patterns("__pycache__", "_C.so", "_build.json")
    shutil.copytree(ROOT / "bcmfnet", tmp_path / "bcmfnet", ignore=unbuilt)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=unbuilt)
    return tmp_path


def message(clone: Path, missing: str) -> str:
    return (
        f"<string>:1: UserWarning: bcmfnet: imported from {clone / 'bcmfnet'}, and {missing}; "
        "run pip install -e . in its checkout, or start Python elsewhere\n"
    )


def test_a_clone_that_was_not_installed(clone):
    assert import_from(clone) == message(clone, "no native code was built in this folder")


@pytest.mark.parametrize("left", ["_build.json", "_C.so"])
def test_a_clone_whose_editable_install_was_replaced(clone, left):
    """What an earlier build left lies beside the sources; bcmfnet.kernels would be another copy's, or nobody's."""
    (clone / "bcmfnet" / left).touch()
    assert import_from(clone) == message(clone, "it has no bcmfnet.kernels")


def test_a_whole_package_says_nothing(clone):
    """As in a wheel, where bcmfnet.kernels lies in the package."""
    (clone / "bcmfnet" / "_build.json").touch()
    shutil.copytree(clone / "kernels", clone / "bcmfnet" / "kernels")
    assert import_from(clone, "-W", "error") == ""


def test_the_installed_package_says_nothing():
    assert import_from(Path(bcmfnet.__file__).parents[1], "-W", "error") == ""
