"""The command line in this process, and one short run whose weights the tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY

from bcmfnet.cli.app import run
from bcmfnet.engine import report
from bcmfnet.models.ddrnet import DualResolutionNet


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


@pytest.fixture
def local_network(monkeypatch):
    """In place of every network: logits from the mean colours of blocks of 8x8 pixels. Evaluations are not drawn."""

    def for_inference(network, **_):
        classes = network.head.conv2.out_channels
        weight = torch.randn(classes, 3, 1, 1, generator=torch.Generator().manual_seed(classes))
        return lambda frames: F.conv2d(F.avg_pool2d(frames, 8, ceil_mode=True), weight)

    monkeypatch.setattr(DualResolutionNet, "for_inference", for_inference)
    monkeypatch.setattr(report, "draw_evaluation", lambda *_: None)
