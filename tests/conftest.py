"""Small runs that the engine's and the command line's tests share."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bcmfnet.engine.config import DataConfig, OptimConfig, TrainConfig

if "PYTEST_XDIST_WORKER" in os.environ:  # each core has a worker: more threads spin while they wait for each other
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
else:
    torch.set_num_threads(min(2, torch.get_num_threads()))
torch.backends.cudnn.allow_tf32 = False  # the modules that kernels are compared with convolve in float32
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is imported

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from interpreted import skip_what_a_launch_has_done

    skip_what_a_launch_has_done()


COMPILED = (("cpu", "cuda"), ("cpu", "sass"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tail of a grid is exhaustive but on a backend whose code is its own and not interpreted. The first test of
    one whose sources are compiled for it waits for the compiler, over 300 s under sanitizers.
    """
    for item in items:
        device = item.callspec.params.get("device") if hasattr(item, "callspec") else None
        if item.get_closest_marker("tail") and (device is None or not {"triton", "reference"}.isdisjoint(device)):
            item.add_marker("exhaustive")
        if device in COMPILED:
            item.add_marker("cuda_on_cpu")
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(autouse=True)
def untouched_logger() -> Iterator[None]:
    """Take back the level and the handlers that a command line gave the package's logger."""
    yield
    logger = logging.getLogger("bcmfnet")
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()


@pytest.fixture(scope="session")
def camvid() -> Path:
    """Real frames, where the environment says that there are any."""
    root = os.environ.get("BCMFNET_CAMVID")
    if not root:
        pytest.skip("BCMFNET_CAMVID names no folder with the CamVid frames")
    return Path(root)


@pytest.fixture(scope="session")
def smp_losses() -> Iterator[ModuleType]:
    """The losses of segmentation_models_pytorch, without the package around them, which needs torchvision."""
    found = importlib.util.find_spec("segmentation_models_pytorch")
    if found is None:
        pytest.skip("segmentation_models_pytorch is not installed")
    folder = Path(found.submodule_search_locations[0]) / "losses"
    spec = importlib.util.spec_from_file_location(
        "smp_losses", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = sys.modules["smp_losses"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["smp_losses"]


@pytest.fixture
def tiny_config() -> TrainConfig:
    """Six steps of two small generated frames: a run of a few seconds that touches everything."""
    return TrainConfig(
        data=DataConfig(name="synthetic", crop=(64, 96), batch_size=2, workers=0, length=8),
        optim=OptimConfig(name="adamw", lr=1e-3, steps=6),
        amp="off",
        device="cpu",
        log_every=1,
    )
