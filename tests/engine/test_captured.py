"""A step's passes from a CUDA graph, here from a stand-in that records every op and executes it again."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from compare import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from bcmfnet.data import Batch
from bcmfnet.engine import train as engine
from bcmfnet.engine.captured import CapturedGradients
from bcmfnet.engine.config import TrainConfig
from bcmfnet.engine.learner import Learner
from bcmfnet.errors import ConfigError

WAITS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"}
"""Ops that wait for the device: a capture fails at them."""


class Recording(TorchDispatchMode):
    """In place of torch.cuda.CUDAGraph. A replay writes each op's results where the recorded one's are."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op._schema.name not in WAITS
        result = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, result))
        return result

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():
            for op, args, kwargs, recorded in self.calls:
                for to, value in zip(tree_flatten(recorded)[0], tree_flatten(op(*args, **kwargs))[0], strict=True):
                    if isinstance(to, torch.Tensor) and to.data_ptr() != value.data_ptr():
                        to.copy_(value)


@pytest.fixture
def recorded(monkeypatch):
    class Stream:
        def wait_stream(self, other):
            pass

    replacements = {
        "Stream": Stream, "current_stream": Stream, "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Recording, "graph": lambda graph, capture_error_mode: graph,
    }  # fmt: skip
    for name, value in replacements.items():
        monkeypatch.setattr(torch.cuda, name, value)


class Stop(Exception):
    pass


@pytest.fixture
def learner(tiny_config, tmp_path, monkeypatch):
    """Makes the learner of a run, which is not trained."""

    def make(**optim):
        def backward(self, step, batches):
            made.append(self)
            raise Stop

        made = []
        tiny_config.loss.jitter, tiny_config.loss.class_weights = False, "enet"
        tiny_config.loss.class_weights_until = 0.9
        for name, value in optim.items():
            setattr(tiny_config.optim, name, value)
        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(Learner, "backward", backward)
            (folder := tmp_path / str(len(list(tmp_path.iterdir())))).mkdir()
            engine.train(copy.deepcopy(tiny_config), folder)
        return made[0]

    return make


def batch(seed, size, frames=2):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (frames, 3, *size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(3, (frames, *size), generator=generator, dtype=torch.uint8)
    return Batch(images, labels, [], [])


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_gradients_and_statistics_are_those_of_the_passes(learner, recorded, accumulate):
    """Over steps with two crops, weights that change, and class weights that fade."""
    plain, captured = learner(accumulate=accumulate), learner(accumulate=accumulate)
    captured.config.cuda_graph = True
    for step, size in enumerate([(64, 64), (64, 96), (64, 64)]):
        batches = [batch(10 * step + part, size) for part in range(accumulate)]
        expected, actual = plain.backward(step, batches), captured.backward(step, batches)
        assert_close(actual, expected, tolerance=1e-5)
        for ours, theirs in zip(captured.model.parameters(), plain.model.parameters(), strict=True):
            assert_close(ours.grad, theirs.grad, tolerance=1e-4)
        for ours, theirs in zip(captured.model.buffers(), plain.model.buffers(), strict=True):
            assert_close(ours.double(), theirs.double(), tolerance=1e-5)
        for one in (plain, captured):
            one.optimizer.step()
    assert len(captured.captured.graphs) == 2


def test_a_function_that_waits_for_the_device_is_not_captured(learner, recorded):
    model = torch.nn.BatchNorm2d(3)
    waiting = CapturedGradients(lambda images, labels: images.float() * images.float().max().item(), model)
    with pytest.raises(AssertionError):
        waiting(*batch(0, (64, 64))[:2])


def test_where_there_is_no_graph(learner, tiny_config, tmp_path):
    with pytest.raises(ConfigError, match="^cuda_graph: expected loss.jitter off, which changes from step to step"):
        TrainConfig(cuda_graph=True)
    tiny_config.cuda_graph, tiny_config.loss.jitter = True, False
    with pytest.raises(ConfigError, match="^cuda_graph: expected a CUDA device and one process, got cpu, 1 process$"):
        engine.train(tiny_config, tmp_path)
