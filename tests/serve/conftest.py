"""A small network behind the application in this process."""

from __future__ import annotations

import pytest
import torch
from served import TABLE

from bcmfnet.engine.inference import LabelPredictor
from bcmfnet.models import create_model
from bcmfnet.serve import PACKAGES
from bcmfnet.serve.limits import Limits


@pytest.fixture(scope="session")
def predictor() -> LabelPredictor:
    """A network of random weights."""
    torch.manual_seed(3)
    model = create_model("bcmfnet", num_classes=19).eval()
    return LabelPredictor(model, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), torch.device("cpu"), None)


@pytest.fixture
def client(predictor):
    """Make a client of the application of a network, under limits; without a rate where none is given."""
    for module in (*PACKAGES, "httpx"):
        pytest.importorskip(module)
    from fastapi.testclient import TestClient

    from bcmfnet.serve.app import create_app

    opened = []

    def make(network=predictor, batch=8, wait=0.005, **limits):
        app = create_app(network, TABLE, "weights", Limits(**{"rate": 1e6} | limits), batch, wait)
        opened.append(TestClient(app))
        return opened[-1].__enter__()

    yield make
    for each in opened:
        each.__exit__(None, None, None)
