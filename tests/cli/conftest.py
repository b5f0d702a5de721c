"""The command line in this process, and one short run whose weights the tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny import TINY

from bcmfnet.cli.app import run


class Outcome(NamedTuple):
    """Exit code, standard output and standard error of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def bcmfnet(capfd) -> Callable[..., Outcome]:
    """Run a command line as a user would."""

    def call(*argv: object) -> Outcome:
        capfd.readouterr()
        code = run([str(word) for word in argv])
        return Outcome(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """Folder of a run of two steps on generated streets."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run(["train", *TINY, "--optim.steps", "2", "--output-dir", str(folder), "-q"]) == 0
    return folder
