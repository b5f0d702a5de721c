import pytest
from networks import trained
from torch import nn


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained()
