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
from bcmfnet.data import normalize
from bcmfnet.engine import inference, report
from bcmfnet.ops import upsample_argmax


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

    class LocalNetwork:
        def __init__(self, network, mean, std, **_):
            self.normalization = mean, std
            classes = network.head.conv2.out_channels
            self.weight = torch.randn(classes, 3, 1, 1, generator=torch.Generator().manual_seed(classes))

        def __call__(self, images):
            return upsample_argmax(self.logits(images), images.shape[-2:])

        def logits(self, images):
            images = normalize(images, *self.normalization)
            return F.conv2d(F.avg_pool2d(images, 8, ceil_mode=True), self.weight)

    monkeypatch.setattr(inference, "for_inference", LocalNetwork)
    monkeypatch.setattr(report, "draw_evaluation", lambda *_: None)
