"""The package is typed for its users: mypy accepts right calls of every public name and reports wrong ones."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest

import bcmfnet.ops
from bcmfnet.nn import LMFM
from bcmfnet.nn.context import ContextOptions
from bcmfnet.ops._losses import LossOptions
from bcmfnet.reference.bcl import MODES, Mode

ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).with_name("user_of_the_api.py")
PACKAGES = ("bcmfnet", "bcmfnet.data", "bcmfnet.metrics", "bcmfnet.models", "bcmfnet.nn", "bcmfnet.ops", "bcmfnet.viz")


@pytest.mark.exhaustive  # and .ci/run's
def test_mypy_accepts_right_calls_and_reports_wrong_ones():
    """Wrong calls are marked: --strict also reports a mark where there is no error.

    As from an installed package, errors inside it are not told. torch's types take 15 seconds, from the cache one.
    """
    pytest.importorskip("mypy")
    command = [sys.executable, "-P", "-m", "mypy", "--strict", "--follow-imports=silent", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert (done.stdout.strip(), done.stderr) == ("Success: no issues found in 1 source file", "")


def test_mypy_reports_the_errors_of_every_module():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert not [table for table in (options, *options["overrides"]) if "ignore_errors" in table or "exclude" in table]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_program_names_every_public_name(package):
    words = set(PROGRAM.read_text().replace("(", " ").replace(",", " ").replace(".", " ").split())
    assert set(import_module(package).__all__) <= words


def test_the_package_says_that_it_is_typed():
    assert (Path(bcmfnet.__file__).parent / "py.typed").exists()


def test_every_op_is_public():
    """The imports of bcmfnet.ops are written out for type checkers: a new op must stand there too."""
    homes = {getattr(bcmfnet.ops, name).__module__.removeprefix("bcmfnet.ops._") for name in bcmfnet.ops.__all__}
    assert {op for op, _ in bcmfnet.ops.backends._table} - {"bcl"} <= homes and "losses" in homes


@pytest.mark.parametrize("name", bcmfnet.ops.__all__)
def test_an_op_is_a_function_and_no_module(name):
    """What has both names is one or the other, by the order of imports."""
    assert find_spec(f"bcmfnet.ops.{name}") is None
    assert not inspect.ismodule(getattr(bcmfnet.ops, name))


def test_typed_keywords_are_those_of_the_signatures():
    loss = set(inspect.signature(bcmfnet.ops.boundary_corrected_loss).parameters)
    assert set(LossOptions.__annotations__) == loss - {"logits", "target", "return_stats"}
    context = list(inspect.signature(LMFM).parameters)
    assert list(ContextOptions.__annotations__) == context[2:]
    assert get_args(Mode) == tuple(MODES)
