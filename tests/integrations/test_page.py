"""The examples of docs/integrations.md run, where the libraries are installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from bcmfnet import create_model

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()


def run_example(library, **names):
    """Names that the example of a library defines."""
    pytest.importorskip(library, exc_type=ImportError)
    (code,) = re.findall(rf"## {library}\n\n```python\n(.*?)```", PAGE, re.DOTALL | re.IGNORECASE)
    exec(code, names)
    return names


def test_transformers():
    names = run_example("transformers")
    assert names["loss"].isfinite() and names["model"].decode_head.classifier.weight.grad.any()
    assert [tuple(labels.shape) for labels in names["maps"]] == [(128, 128), (480, 640)]


def test_torchvision():
    from bcmfnet import BoundaryCorrectedLoss

    images, labels = torch.randn(2, 3, 128, 128), torch.randint(0, 19, (2, 128, 128))
    names = run_example("torchvision", BoundaryCorrectedLoss=BoundaryCorrectedLoss, images=images, labels=labels)
    assert names["output"]["out"].shape == (2, 19, 8, 8) and names["loss"].isfinite()


def test_lightning(tmp_path, monkeypatch):
    from bcmfnet import BoundaryCorrectedLoss

    lightning = pytest.importorskip("lightning", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    names = run_example("lightning", BoundaryCorrectedLoss=BoundaryCorrectedLoss, torch=torch)
    model = create_model("bcmfnet", num_classes=5)
    before = model.head.conv2.weight.clone()
    data = TensorDataset(torch.randn(4, 3, 64, 64), torch.randint(0, 5, (4, 64, 64)))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    lightning.Trainer(max_epochs=1, **quiet).fit(names["Segmentation"](model), DataLoader(data, batch_size=2))
    assert not torch.equal(model.head.conv2.weight, before)


def test_segmentation_models_pytorch():
    images, labels = torch.randn(2, 3, 128, 128), torch.randint(0, 19, (2, 128, 128))
    names = run_example("segmentation_models_pytorch", images=images, labels=labels)
    assert names["model"](images).shape == (2, 19, 32, 32) and names["loss"].isfinite()
