"""The weights that come with the package: their names, what they say of themselves, and half precision."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from bcmfnet.data import IMAGENET_MEAN, IMAGENET_STD, get_label_table
from bcmfnet.engine.config import ModelConfig, TrainConfig
from bcmfnet.engine.inference import label_table, trained_on
from bcmfnet.errors import CheckpointError, ConfigError
from bcmfnet.models import create_model, list_weights, model_from_weights, read_weights, save_weights
from bcmfnet.models.weights import SHIPPED

NAMES = list_weights()


def test_their_names():
    assert NAMES == ["camvid11"]


@pytest.mark.parametrize("name", NAMES)
def test_they_say_what_they_are(name):
    state, metadata = read_weights(name)
    assert (SHIPPED / f"{name}.safetensors").stat().st_size < 12e6
    assert label_table(metadata, name) == get_label_table(name)
    assert (metadata["mean"], metadata["std"]) == (list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert trained_on(metadata, name).name == "camvid11-segnet"
    assert metadata["val_miou"] > 0.66 and metadata["total_steps"] >= 11_000
    assert metadata["config"]["select"] == "last", "chosen by a look at the validation split"
    assert {tensor.dtype for tensor in state.values() if tensor.ndim > 1} == {torch.float16}
    card = (SHIPPED / f"{name}.md").read_text()
    for figure in (f"{100 * metadata['val_miou']:.1f} %", f"{metadata['total_steps']:,} steps", metadata["commit"]):
        assert figure in card
    assert "research" in (SHIPPED / f"{name}-LICENSE.txt").read_text()


def test_a_name_is_a_path_wherever_weights_are_asked_for(tmp_path, monkeypatch, caplog):
    """Also beside a folder of that name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "camvid11").mkdir()
    model = create_model("bcmfnet", pretrained="camvid11", aux=True)
    stored = read_weights("camvid11")[0]
    assert model.recipe["num_classes"] == 11
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[key].to(tensor.dtype)) or key.endswith("num_batches_tracked")
    assert model_from_weights("camvid11")[0].recipe["num_classes"] == 11
    config = TrainConfig(model=ModelConfig(pretrained="camvid11")).with_absolute_paths()
    assert config.model.pretrained == "camvid11"
    with caplog.at_level(logging.WARNING, "bcmfnet.models"):
        other = create_model("bcmfnet", pretrained="camvid11", num_classes=3)
    assert caplog.messages == ["camvid11: has 11 classes, the model 3: its heads start anew"]
    assert torch.equal(other.backbone.stem[0].weight, model.backbone.stem[0].weight)


def test_an_unknown_name():
    line = "camvid12: expected a weights file, the folder of a run or camvid11, found no file; did you mean 'camvid11'?"
    for read in (read_weights, model_from_weights, lambda name: create_model("bcmfnet", pretrained=name)):
        with pytest.raises(CheckpointError) as error:
            read("camvid12")
        assert str(error.value) == line


def test_no_class_count_without_weights_that_have_one(tmp_path):
    with pytest.raises(ConfigError, match=r"^num_classes: expected an integer in 1..256, got None$"):
        create_model("bcmfnet")
    torch.save(create_model("bcmfnet", num_classes=5).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"^num_classes: expected an integer in 1..256, got None$"):
        create_model("bcmfnet", pretrained=tmp_path / "w.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_for_kernels_alone_and_comes_back_as_float32(tmp_path, dtype):
    torch.manual_seed(0)
    model = create_model("bcmfnet", num_classes=3)
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    save_weights(whole, model)
    save_weights(half, model, dtype=dtype)
    assert 0.5 < half.stat().st_size / whole.stat().st_size < 0.51
    stored = read_weights(half)[0]
    for key, tensor in model_from_weights(half)[0].state_dict().items():
        kernel = tensor.ndim > 1
        assert stored[key].dtype == (dtype if kernel else tensor.dtype)
        assert torch.equal(tensor, model.state_dict()[key].to(dtype).float() if kernel else model.state_dict()[key])


def test_a_value_beyond_half_precision_is_refused(tmp_path):
    model = create_model("bcmfnet", num_classes=3)
    with torch.no_grad():
        model.head.conv2.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"^model: head.conv2.weight: expected finite values, got inf$"):
        save_weights(tmp_path / "w.safetensors", model, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_fine_tuning_a_new_head(tiny_config, tmp_path, monkeypatch, caplog):
    from bcmfnet.engine import train as engine

    monkeypatch.setattr(engine.report, "draw_run", lambda *arguments: None)
    config = dataclasses.replace(tiny_config, model=ModelConfig(pretrained="camvid11"))
    config.optim.steps = 1
    with caplog.at_level(logging.WARNING, "bcmfnet.models"):
        engine.train(config, tmp_path)
    assert caplog.messages == ["camvid11: has 11 classes, the model 10: its heads start anew"]
    assert 'pretrained = "camvid11"' in (tmp_path / "config.toml").read_text()
