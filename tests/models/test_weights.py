"""Weights files: round trips, half files, full disks, and official checkpoints through the key map."""

from __future__ import annotations

import argparse
import copy
import errno
import hashlib
import json
import logging
import math
import os
import random
import re
import resource
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from bcmfnet.errors import CheckpointError, ConfigError
from bcmfnet.inference import for_inference
from bcmfnet.models import BCMFNet, create_model, load_pretrained, model_from_weights, read_weights, save_weights
from bcmfnet.models import weights as weights_module

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def norm_keys(name: str) -> list[str]:
    return [f"{name}.{key}" for key in NORM]


def stage_keys(name: str, shrinks: bool) -> list[str]:
    """A stage of two basic blocks in the official files; the first has a downsample where the shape changes."""
    keys = []
    for block in (f"{name}.0", f"{name}.1"):
        keys += [f"{block}.conv1.weight", *norm_keys(f"{block}.bn1")]
        keys += [f"{block}.conv2.weight", *norm_keys(f"{block}.bn2")]
    return keys + ([f"{name}.0.downsample.0.weight", *norm_keys(f"{name}.0.downsample.1")] if shrinks else [])


def bottleneck_keys(name: str) -> list[str]:
    keys = [key for i in (1, 2, 3) for key in (f"{name}.0.conv{i}.weight", *norm_keys(f"{name}.0.bn{i}"))]
    return [*keys, f"{name}.0.downsample.0.weight", *norm_keys(f"{name}.0.downsample.1")]


def head_keys(name: str) -> list[str]:
    convs = [f"{name}.conv1.weight", f"{name}.conv2.weight", f"{name}.conv2.bias"]
    return [*norm_keys(f"{name}.bn1"), *norm_keys(f"{name}.bn2"), *convs]


def official_backbone_keys() -> list[str]:
    """As the classification and the segmentation model of ydhongHIT/DDRNet and chenjun2hao/DDRNet.pytorch name them."""
    keys = [f"conv1.{i}.{key}" for i in (0, 3) for key in ("weight", "bias")]
    keys += norm_keys("conv1.1") + norm_keys("conv1.4")
    for name, shrinks in [("layer1", False), ("layer2", True), ("layer3", True), ("layer4", True)]:
        keys += stage_keys(name, shrinks)
    keys += stage_keys("layer3_", False) + stage_keys("layer4_", False)
    keys += bottleneck_keys("layer5") + bottleneck_keys("layer5_")
    for name, convs in [("compression3", 1), ("compression4", 1), ("down3", 1), ("down4", 2)]:
        for i in range(convs):
            keys += [f"{name}.{3 * i}.weight", *norm_keys(f"{name}.{3 * i + 1}")]
    return keys


def official_context_keys() -> list[str]:
    keys = []
    for i in range(5):
        norm, conv = (0, 2) if i == 0 else (1, 3)
        keys += [*norm_keys(f"spp.scale{i}.{norm}"), f"spp.scale{i}.{conv}.weight"]
    for name in ("process1", "process2", "process3", "process4", "compression", "shortcut"):
        keys += [*norm_keys(f"spp.{name}.0"), f"spp.{name}.2.weight"]
    return keys


# Written apart from the key map under test, module by module.
OUR_MODULES = {
    "conv1.": "backbone.stem.",
    "layer1.": "backbone.layer1.",
    "layer2.": "backbone.layer2.",
    "layer3.": "backbone.layer3.",
    "layer4.": "backbone.layer4.",
    "layer5.0.": "backbone.layer5.",
    "layer3_.": "backbone.high3.",
    "layer4_.": "backbone.high4.",
    "layer5_.0.": "backbone.high5.",
    "compression3.": "backbone.compression3.",
    "compression4.": "backbone.compression4.",
    "down3.": "backbone.down3.",
    "down4.": "backbone.down4.",
    "spp.scale0.0.": "context.scale.0.norm.",
    "spp.scale0.2.": "context.scale.0.conv.",
    **{f"spp.scale{i}.1.": f"context.scale.{i}.norm." for i in (1, 2, 3, 4)},
    **{f"spp.scale{i}.3.": f"context.scale.{i}.conv." for i in (1, 2, 3, 4)},
    **{f"spp.process{i}.0.": f"context.process.{i}.norm." for i in (1, 2, 3, 4)},
    **{f"spp.process{i}.2.": f"context.process.{i}.conv." for i in (1, 2, 3, 4)},
    "spp.compression.0.": "context.compression.norm.",
    "spp.compression.2.": "context.compression.conv.",
    "spp.shortcut.0.": "context.shortcut.norm.",
    "spp.shortcut.2.": "context.shortcut.conv.",
    "final_layer.": "head.",
    "seghead_extra.": "aux_head.",
}


def our_key(official: str) -> str:
    (module,) = [module for module in OUR_MODULES if official.startswith(module)]
    return OUR_MODULES[module] + official.removeprefix(module)


def randomised_model(name: str, seed: int = 0, num_classes: int = 19, **options) -> nn.Module:
    torch.manual_seed(seed)
    model = create_model(name, num_classes=num_classes, **options)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
    return model.eval()


def cityscapes_checkpoint(source: nn.Module) -> dict[str, torch.Tensor]:
    """As published: under "model.", with the class weights of the loss; the auxiliary head included."""
    keys = official_backbone_keys() + official_context_keys()
    keys += head_keys("final_layer") + (head_keys("seghead_extra") if source.aux_head is not None else [])
    tensors = source.state_dict()
    state = {f"model.{key}": tensors[our_key(key)] for key in keys}
    return state | {"loss.criterion.weight": torch.ones(19)}


def imagenet_checkpoint(source: nn.Module) -> dict[str, torch.Tensor]:
    """As published: under "module.", with the classifier and its last downsampling instead of context and heads."""
    tensors = source.state_dict()
    state = {f"module.{key}": tensors[our_key(key)] for key in official_backbone_keys()}
    extra = {"down5.0.weight": (256, 128, 3, 3), "last_layer.0.weight": (1024, 512, 1, 1), "linear.bias": (1000,)}
    return state | {f"module.{key}": torch.zeros(shape) for key, shape in extra.items()}


def same(model: nn.Module, source: nn.Module, prefix: str) -> bool:
    ours, theirs = model.state_dict(), source.state_dict()
    return all(torch.equal(ours[key], theirs[key]) for key in ours if key.startswith(prefix))


def signed(state: dict, text: str) -> dict[str, str]:
    """Metadata of a file of ours, whose digest is computed here apart from the code under test."""
    tensors = sorted(state.items())
    head = json.dumps([text, [[key, str(tensor.dtype), list(tensor.shape)] for key, tensor in tensors]])
    data = b"".join(tensor.flatten().view(torch.uint8).numpy().tobytes() for _, tensor in tensors)
    return {"bcmfnet": text, "bcmfnet_sha256": hashlib.sha256(head.encode() + data).hexdigest()}


def test_a_file_of_two_networks_is_not_loaded(tmp_path):
    state = randomised_model("bcmfnet").state_dict()
    path = tmp_path / "w.pth"
    torch.save({f"{prefix}.{key}": tensor for prefix in ("model", "module") for key, tensor in state.items()}, path)
    expected = "expected the tensors of one network, got both model.backbone.stem.0.weight and module.backbone.stem.0."
    line = one_line_error(path, lambda path: create_model("bcmfnet", num_classes=19, pretrained=path))
    assert line == f"{path}: {expected}weight"


def test_our_own_file_comes_back_bit_for_bit(tmp_path):
    source = randomised_model("bcmfnet", num_classes=11, aux=True, root_conv="1x1").to(
        memory_format=torch.channels_last
    )
    path = tmp_path / "weights.safetensors"
    save_weights(path, source, {"mean": [0.5, 0.4, 0.3], "label_table": {"names": ["sky", "road"]}})
    state, metadata = read_weights(path)
    assert metadata == {
        "format": 1,
        "model": "bcmfnet",
        "num_classes": 11,
        "aux": True,
        "options": {"root_conv": "1x1"},
        "mean": [0.5, 0.4, 0.3],
        "label_table": {"names": ["sky", "road"]},
    }
    assert state.keys() == source.state_dict().keys()
    assert all(tensor.is_contiguous() for tensor in state.values())
    assert all(torch.equal(state[key], tensor) for key, tensor in source.state_dict().items())

    model, _ = model_from_weights(path)
    assert not model.training and model.aux_head is None
    images = torch.randn(1, 3, 64, 64)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images).logits, source(images).logits)
    assert list(tmp_path.iterdir()) == [path]


def test_pools_survive_the_way_through_json(tmp_path):
    source = randomised_model("ddrnet23_slim", pools=((3, 2, 1), (5, 4, 2)))
    save_weights(tmp_path / "w.safetensors", source)
    model, _ = model_from_weights(tmp_path / "w.safetensors")
    assert model.context.pools == ((3, 2, 1), (5, 4, 2)) and same(model, source, "")


class Wrapped(nn.Module):
    """A training wrapper, with the network under a name of its own."""

    def __init__(self, name: str, network: nn.Module, **children: nn.Module):
        super().__init__()
        self.add_module(name, network)
        for child, module in children.items():
            self.add_module(child, module)


def compiled_in_part(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.backbone = torch.compile(model.backbone)
    return model


@pytest.fixture
def process_group(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPS = {
    "compile": torch.compile,
    "compile of a part": compiled_in_part,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "AveragedModel": AveragedModel,
    "average of DataParallel": lambda model: AveragedModel(nn.DataParallel(model)),
    "compile of DistributedDataParallel": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model)),
    "a wrapper's model": lambda model: Wrapped("model", model, loss=nn.CrossEntropyLoss()),
}


@pytest.fixture(scope="module")
def source():
    return randomised_model("bcmfnet", aux=True)


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_wrapped_models_are_saved_under_their_own_names(tmp_path, process_group, source, wrap):
    save_weights(tmp_path / "w.safetensors", wrap(source), {"step": 7})
    model, metadata = model_from_weights(tmp_path / "w.safetensors")
    assert metadata == {**source.recipe, "format": 1, "step": 7} and same(model, source, "")
    assert read_weights(tmp_path / "w.safetensors")[0].keys() == source.state_dict().keys()


def pruned(model: nn.Module) -> nn.Module:
    prune.l1_unstructured(model.head.conv1, "weight", 0.3)
    return model


def normed(model: nn.Module) -> nn.Module:
    parametrizations.weight_norm(model.head.conv1)
    return model


def with_values(name: str, value: float):
    def change(model: nn.Module) -> nn.Module:
        model.state_dict()[name].view(-1)[3] = value
        return model

    return change


def with_integers(model: nn.Module) -> nn.Module:
    del model.head.conv2.bias
    model.head.conv2.register_buffer("bias", torch.zeros(19, dtype=torch.int8))
    return model


def without_head(model: nn.Module) -> nn.Module:
    del model.head
    return model


BARE = "; save what create_model made, not for_inference's copy, and without masks"
UNREADABLE = {
    "pruned": (
        pruned,
        "expected the 327 tensors of bcmfnet, got 1 missing (head.conv1.weight) and 2 more "
        f"(head.conv1.weight_mask){BARE}",
    ),
    "weight norm": (
        normed,
        "expected the 327 tensors of bcmfnet, got 1 missing (head.conv1.weight) and 2 more "
        f"(head.conv1.parametrizations.weight.original0){BARE}",
    ),
    "a part": (without_head, f"expected the 327 tensors of bcmfnet, got 13 missing (head.bn1.bias){BARE}"),
    "net": (
        lambda model: Wrapped("net", model),
        "expected the 327 tensors of bcmfnet, got 327 missing (backbone.compression3.0.weight) and 327 more "
        "(net.backbone.compression3.0.weight); save model.net",
    ),
    "student and teacher": (
        lambda model: Wrapped("student", model, teacher=copy.deepcopy(model)),
        "expected the 327 tensors of bcmfnet, got 327 missing (backbone.compression3.0.weight) and 654 more "
        "(student.backbone.compression3.0.weight); save model.student",
    ),
    "two networks": (
        lambda model: Wrapped("model", model, module=copy.deepcopy(model)),
        "expected the tensors of one network, got both model.backbone.stem.0.weight and module.backbone.stem.0.weight",
    ),
    "another head": (
        lambda _: randomised_model("bcmfnet", num_classes=5),
        "head.conv2.bias: expected float32 [19], got float32 [5] (and 1 other tensors)",
    ),
    "quantised": (with_integers, "head.conv2.bias: expected float32 [19], got int8 [19]"),
    "meta": (lambda model: model.to("meta"), "backbone.stem.0.weight: expected values, got a meta tensor"),
    "nan": (with_values("head.bn1.bias", math.nan), "head.bn1.bias: expected finite values, got nan"),
    "inf": (with_values("head.conv1.weight", -math.inf), "head.conv1.weight: expected finite values, got -inf"),
    "half overflows": (
        lambda model: with_values("head.bn1.running_var", 1e5)(model).half(),
        "head.bn1.running_var: expected finite values of at least 0, got inf",
    ),
    "float32 overflows": (
        lambda model: with_values("head.bn1.bias", -1e300)(model.double()),
        "head.bn1.bias: expected finite values, got -inf",
    ),
    "variance": (
        with_values("head.bn1.running_var", -0.5),
        "head.bn1.running_var: expected finite values of at least 0, got -0.5",
    ),
}


@pytest.mark.parametrize(("change", "expected"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_could_not_be_read_back_is_not_saved(tmp_path, change, expected):
    model = randomised_model("bcmfnet")
    recipe = model.recipe
    with pytest.raises(ValueError) as error:
        save_weights(tmp_path / "w.safetensors", change(model), recipe)
    assert str(error.value) == f"model: {expected}"
    assert not list(tmp_path.iterdir())


def test_copies_for_inference_are_not_saved(tmp_path):
    model = randomised_model("bcmfnet")
    with pytest.raises(ValueError) as error:
        save_weights(tmp_path / "w.safetensors", for_inference(model), model.recipe)
    line = str(error.value)
    assert line.startswith("model: expected the 327 tensors of bcmfnet, got 327 missing (backbone.comp")
    assert " more (network." in line and line.endswith(BARE)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"model": "pidnet"}, "metadata: model: expected bcmfnet or ddrnet23_slim, got 'pidnet'"),
        ({"num_classes": 0}, "metadata: num_classes: expected an integer in 1..256, got 0"),
        ({"aux": True}, f"model: expected the 340 tensors of bcmfnet, got 13 missing (aux_head.bn1.bias){BARE}"),
        ({"mean": torch.zeros(3)}, "metadata: expected JSON values: Object of type Tensor is not JSON serializable"),
    ],
)
def test_metadata_that_does_not_fit_is_not_saved(tmp_path, metadata, expected):
    with pytest.raises(ValueError) as error:
        save_weights(tmp_path / "w.safetensors", randomised_model("bcmfnet"), metadata)
    assert str(error.value) == expected and not list(tmp_path.iterdir())


def test_saving_leaves_the_random_numbers_as_they_are(tmp_path):
    """A run that is saved more often draws the same numbers."""
    model, before = randomised_model("bcmfnet"), torch.get_rng_state()
    save_weights(tmp_path / "w.safetensors", model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_create_model_did_not_build(tmp_path):
    source = BCMFNet(3, aux=True)
    save_weights(tmp_path / "w.safetensors", source, {"model": "bcmfnet", "num_classes": 3})
    model, metadata = model_from_weights(tmp_path / "w.safetensors")
    assert metadata["aux"] is True and same(model, source, "")


def test_tensors_that_two_modules_share(tmp_path):
    source = randomised_model("bcmfnet")
    source.backbone.layer1[0].conv1 = source.backbone.layer1[0].conv2
    save_weights(tmp_path / "w.safetensors", source)
    assert same(model_from_weights(tmp_path / "w.safetensors")[0], source, "")


def test_metadata_must_name_the_model(tmp_path):
    with pytest.raises(ValueError, match="^metadata: expected at least 'model' and 'num_classes'"):
        save_weights(tmp_path / "w.safetensors", nn.Linear(2, 2))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_torch_files_of_any_wrapping_load_whole(tmp_path, wrap, prefix):
    source = randomised_model("bcmfnet")
    path = tmp_path / "weights.pth"
    torch.save(wrap({prefix + key: tensor for key, tensor in source.state_dict().items()}), path)
    model = create_model("bcmfnet", num_classes=19)
    report = load_pretrained(model, path)
    assert report.share == 1 and report.unused == () and same(model, source, "")


def test_official_keys_are_all_of_our_network():
    """Neither list has a key that the other lacks: 5,734,342 parameters pass through the map."""
    keys = official_backbone_keys() + official_context_keys() + head_keys("final_layer") + head_keys("seghead_extra")
    model = create_model("ddrnet23_slim", num_classes=19, aux=True)
    assert {our_key(key) for key in keys} == model.state_dict().keys()
    assert len(keys) == len(set(keys)) == len(model.state_dict())


def test_official_cityscapes_checkpoint_is_the_whole_of_ddrnet(tmp_path, caplog):
    source = randomised_model("ddrnet23_slim", aux=True)
    torch.save(cityscapes_checkpoint(source), tmp_path / "best_val_smaller.pth")
    with caplog.at_level(logging.INFO, "bcmfnet.models"):
        model = create_model("ddrnet23_slim", num_classes=19, aux=True, pretrained=tmp_path / "best_val_smaller.pth")
    assert same(model, source, "")
    (record,) = caplog.records
    assert "100.0% of the keys loaded" in record.message and "1 keys of the file not used" in record.message


def test_official_dappm_in_lmfm_loads_what_they_share(tmp_path):
    source = randomised_model("ddrnet23_slim")
    torch.save(cityscapes_checkpoint(source), tmp_path / "w.pth")
    model = create_model("bcmfnet", num_classes=19)
    report = load_pretrained(model, tmp_path / "w.pth")
    for part in ("backbone", "context.scale", "context.process.1", "context.process.2", "context.compression"):
        assert same(model, source, part)
    # Of LMFM's 10 units (5 keys each) only process.0 has no counterpart.
    assert (report.loaded["context"], report.total["context"]) == (45, 50)
    assert {key.split(".")[2] for key in report.unused if key.startswith("context.process")} == {"3", "4"}
    assert "context 45 of 50" in str(report)


def test_official_imagenet_checkpoint_is_the_backbone(tmp_path, caplog):
    source = randomised_model("bcmfnet")
    torch.save(imagenet_checkpoint(source), tmp_path / "DDRNet23s_imagenet.pth")
    model = create_model("bcmfnet", num_classes=11, aux=True)
    fresh_head = model.head.conv1.weight.clone()
    report = load_pretrained(model, tmp_path / "DDRNet23s_imagenet.pth")
    assert same(model, source, "backbone")
    assert torch.equal(model.head.conv1.weight, fresh_head)
    assert report.loaded["backbone"] == report.total["backbone"]
    assert report.loaded["context"] == report.loaded["head"] == report.loaded["aux_head"] == 0
    assert not caplog.records  # nothing here deserves a warning


def test_aux_keys_are_ignored_without_an_aux_head(tmp_path):
    source = randomised_model("bcmfnet", aux=True)
    save_weights(tmp_path / "w.safetensors", source)
    model = create_model("bcmfnet", num_classes=19)
    report = load_pretrained(model, tmp_path / "w.safetensors")
    assert same(model, source, "") and report.share == 1
    assert {key.split(".")[0] for key in report.unused} == {"aux_head"}


def test_heads_of_another_class_count_start_anew_with_one_warning(tmp_path, caplog):
    source = randomised_model("bcmfnet", aux=True)
    save_weights(tmp_path / "w.safetensors", source)
    model = create_model("bcmfnet", num_classes=11, aux=True)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    load_pretrained(model, tmp_path / "w.safetensors")
    assert same(model, source, "backbone") and same(model, source, "context")
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in after if "head." in key)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.endswith("has 19 classes, the model 11: its heads start anew")


def without(state: dict, count: int) -> dict:
    """The state less its first `count` backbone keys that load_pretrained counts."""
    counted = [key for key in state if key.startswith("backbone") and "num_batches" not in key]
    return {key: state[key] for key in state if key not in counted[:count]}


def test_90_percent_of_the_backbone_is_needed(tmp_path):
    state = randomised_model("bcmfnet").state_dict()
    total = sum(key.startswith("backbone") and "num_batches" not in key for key in state)
    allowed = total // 10
    torch.save(without(state, allowed), tmp_path / "enough.pth")
    torch.save(without(state, allowed + 1), tmp_path / "short.pth")
    model = create_model("bcmfnet", num_classes=19)
    assert load_pretrained(model, tmp_path / "enough.pth").loaded["backbone"] == total - allowed
    with pytest.raises(CheckpointError, match=rf"short.pth: has {total - allowed - 1} of the {total} backbone keys"):
        load_pretrained(model, tmp_path / "short.pth")


def test_a_refused_file_changes_nothing(tmp_path):
    state = randomised_model("bcmfnet").state_dict()
    state["backbone.layer4.1.conv2.weight"] = torch.zeros(512, 256, 3, 3)
    torch.save(state, tmp_path / "wide.pth")
    model = create_model("bcmfnet", num_classes=19)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    message = r"conv2.weight: expected float32 \[256, 256, 3, 3\], got float32 \[512, 256, 3, 3\]$"
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(model, tmp_path / "wide.pth")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_files_without_step_counters_are_whole(tmp_path):
    source = randomised_model("bcmfnet")
    state = {key: tensor for key, tensor in source.state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "old.pth")
    assert load_pretrained(create_model("bcmfnet", num_classes=19), tmp_path / "old.pth").share == 1


def test_weights_of_another_network(tmp_path):
    """A ResNet-18 shares many names (layer1.0.conv1.weight) with DDRNet."""
    keys = [f"layer{i}.{j}.{k}.weight" for i in (1, 2, 3, 4) for j in (0, 1) for k in ("conv1", "bn1", "conv2", "bn2")]
    torch.save({key: torch.zeros(1) for key in ["conv1.weight", *keys, "fc.weight"]}, tmp_path / "resnet18.pth")
    with pytest.raises(CheckpointError, match="resnet18.pth: has 3.* backbone keys .*weights of another model"):
        create_model("bcmfnet", num_classes=19, pretrained=tmp_path / "resnet18.pth")


def one_line_error(path, read=read_weights) -> str:
    with pytest.raises(CheckpointError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_missing_empty_truncated_and_foreign_files(tmp_path, name):
    path = tmp_path / name
    assert one_line_error(path) == f"{path}: expected a weights file, the folder of a run or camvid11, found no file"
    path.touch()
    assert "empty" in one_line_error(path)

    source = randomised_model("bcmfnet")
    if path.suffix == ".safetensors":
        save_weights(path, source)
    else:
        torch.save(source.state_dict(), path)
    whole = path.read_bytes()
    for size in (4, 100, len(whole) // 2, len(whole) - 1):  # in the length, in the header, in the data, at the end
        path.write_bytes(whole[:size])
        assert "not a complete" in one_line_error(path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    assert "not a complete" in one_line_error(path)
    found = "found a folder without weights/best.safetensors"
    assert one_line_error(tmp_path) == f"{tmp_path}: expected a weights file, the folder of a run or camvid11, {found}"


class Trap:
    """What a pickle could run; weights_only refuses to."""

    def __reduce__(self):
        return print, ("ran",)


def test_torch_files_run_no_code(tmp_path, capsys):
    torch.save({"state_dict": Trap()}, tmp_path / "trap.pth")
    one_line_error(tmp_path / "trap.pth")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (nn.Linear(2, 2), "a pickled torch.nn.modules.linear.Linear, whose loading runs code"),
        ({"state_dict": {}, "options": argparse.Namespace()}, "a pickled argparse.Namespace, whose loading runs code"),
        (torch.jit.script(nn.Linear(2, 2)), "a TorchScript archive"),
    ],
)
def test_whole_models_are_told_from_damaged_files(tmp_path, content, what):
    path = tmp_path / "model.pth"
    torch.jit.save(content, path) if "Script" in what else torch.save(content, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be a second line
        line = one_line_error(path)
    assert line == f"{path}: expected a state dict, got {what}; torch.save(model.state_dict(), PATH) writes one"


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("text", ["version https://git-lfs.github.com/spec/v1", "<!DOCTYPE html>"])
def test_texts_in_place_of_weights(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(f"{text}\noid sha256:4d7a")
    line = one_line_error(path)
    assert line.startswith(f"{path}: expected a weights file, got a text that starts with '{text[:10]}")


def test_files_are_known_by_their_contents(tmp_path):
    model = randomised_model("bcmfnet")
    save_weights(tmp_path / "w.pth", model)
    torch.save(model.state_dict(), tmp_path / "w.safetensors")
    assert read_weights(tmp_path / "w.pth")[1]["model"] == "bcmfnet"
    assert read_weights(tmp_path / "w.safetensors")[0].keys() == model.state_dict().keys()


@pytest.fixture
def ordinary_user():
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_files_that_cannot_be_opened(tmp_path_factory, name, request):
    path = tmp_path_factory.mktemp("open") / name
    path.write_bytes(b"weights")
    path.chmod(0)
    request.getfixturevalue("ordinary_user")
    assert one_line_error(path) == f"{path}: cannot be read: Permission denied"
    path = path.with_name("n" * 300)
    assert one_line_error(path).endswith(("cannot be read: File name too long", "cannot be read: Permission denied"))


def test_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "w.safetensors")
    assert one_line_error(tmp_path / "w.safetensors").endswith("camvid11, found a device or a pipe")


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


@pytest.fixture
def small_state():
    torch.manual_seed(3)
    return {
        "conv.weight": torch.randn(8, 3, 3, 3),
        "bn.running_var": torch.rand(8),
        "bn.num_batches_tracked": torch.tensor(7),
        "half": torch.randn(6).bfloat16(),
        "eighth": torch.randn(6).to(torch.float8_e4m3fn),
        "double": torch.randn(6).double(),
        "empty": torch.zeros(0, 4),
    }


def test_every_flipped_bit_of_our_files_is_refused(tmp_path, small_state):
    path = tmp_path / "w.safetensors"
    weights_module.write_weights(path, small_state, {"model": "bcmfnet", "classes": ["Straße"]})
    assert read_weights(path)[0].keys() == small_state.keys()
    whole = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 400):
        path.write_bytes(flipped(whole, bit))
        one_line_error(path)


def test_flipped_bits_of_torch_files_change_no_tensor(tmp_path, small_state):
    """What nobody reads, such as padding, may change."""
    path = tmp_path / "w.pth"
    torch.save(small_state, path)
    whole, refused = path.read_bytes(), 0
    for bit in random.Random(0).sample(range(8 * len(whole)), 400):
        path.write_bytes(flipped(whole, bit))
        try:
            state, _ = read_weights(path)
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
        else:
            assert state.keys() == small_state.keys()
            assert all(torch.equal(state[key], tensor) for key, tensor in small_state.items())
    assert refused > 100


def test_an_entry_of_a_torch_file_that_became_a_folder_is_refused(tmp_path, small_state):
    """torch gives such a tensor the memory that it finds, which may even hold the right numbers."""
    path = tmp_path / "w.pth"
    torch.save(small_state, path)
    whole = path.read_bytes()
    entries = [match.start() for match in re.finditer(re.escape(b"PK\x01\x02"), whole)]
    assert len(entries) > len(small_state)
    for start in entries:
        path.write_bytes(flipped(whole, 8 * (start + 38) + 4))  # the folder's bit of the external attributes
        assert "is damaged, a folder" in one_line_error(path, read_weights)


def pretrained(path) -> nn.Module:
    return create_model("bcmfnet", num_classes=19, pretrained=path)


@pytest.mark.parametrize("read", [model_from_weights, pretrained])
def test_a_flipped_bit_is_found_by_all_that_read_weights(saved, read):
    path, whole = saved
    path.write_bytes(flipped(whole, 8 * (len(whole) // 2)))
    assert one_line_error(path, read) == f"{path}: damaged: its contents are not those that were saved (SHA-256)"


def test_files_of_ours_have_both_metadata_and_digest(tmp_path, small_state):
    path, whole = tmp_path / "w.safetensors", signed(small_state, "{}")
    for key, expected in (("bcmfnet", "metadata"), ("bcmfnet_sha256", "the digest of what the file holds")):
        save_file(small_state, path, {other: value for other, value in whole.items() if other != key})
        assert one_line_error(path) == f"{path}: {key}: expected {expected}, got nothing"


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("conv.weight", math.nan, "finite values, got nan"),
        ("conv.weight", math.inf, "finite values, got inf"),
        ("half", -math.inf, "finite values, got -inf"),
        ("eighth", math.nan, "finite values, got nan"),
        ("double", 1e300, "finite values, got inf"),
        ("bn.running_var", -1.0, "finite values of at least 0, got -1.0"),
        ("bn.running_var", math.inf, "finite values of at least 0, got inf"),
    ],
)
def test_values_that_no_network_has_are_refused(tmp_path, small_state, name, key, value, expected):
    path = tmp_path / name
    small_state[key].view(-1)[2] = value
    if name == "w.pth":
        torch.save(small_state, path)
    else:
        save_file(small_state, path, signed(small_state, '{"format": 1}'))
    assert one_line_error(path) == f"{path}: {key}: expected {expected}"


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {}}, torch.zeros(3)])
def test_torch_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    assert "expected a state dict" in one_line_error(tmp_path / "other.pth")


def test_files_that_do_not_say_what_they_are(tmp_path):
    source = randomised_model("bcmfnet")
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    save_file(source.state_dict(), tmp_path / "bare.safetensors")
    for name, first in (("bare.pth", "backbone.stem.0.weight"), ("bare.safetensors", "backbone.compression3.0.weight")):
        assert read_weights(tmp_path / name)[1] == {}
        assert one_line_error(tmp_path / name, model_from_weights) == (
            f"{tmp_path / name}: expected weights that save_weights or a training wrote, got 327 tensors "
            f"('{first}', ...) without a model's name; "
            "to start from them: --model.pretrained, create_model(..., pretrained=path)"
        )


def fitting(entry: str) -> str:
    """Metadata of the 19 classes model, with an entry that overrules."""
    return f'{{"format": 1, "model": "bcmfnet", "num_classes": 19, {entry}}}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "its metadata is not JSON"),
        ("[]", "format: expected 1, got nothing"),
        ('{"format": 2}', "format: expected 1, got 2"),
        ('{"format": true}', "format: expected 1, got True"),
        ('{"format": 1}', "model: expected bcmfnet or ddrnet23_slim, got nothing"),
        ('{"format": 1, "model": "pidnet"}', "model: expected bcmfnet or ddrnet23_slim, got 'pidnet'"),
        ('{"format": 1, "model": ["bcmfnet"]}', "model: expected bcmfnet or ddrnet23_slim, got ['bcmfnet']"),
        ('{"format": 1, "model": "bcmfnet"}', "num_classes: expected an integer in 1..256, got nothing"),
        (
            '{"format": 1, "model": "bcmfnet", "num_classes": "19"}',
            "num_classes: expected an integer in 1..256, got '19'",
        ),
        (fitting('"options": 3'), "options: expected keywords of the model, got 3"),
        (fitting('"options": {"depth": 3}'), "options: model option 'depth': bcmfnet has "),
        (
            fitting('"num_classes": 11'),
            "head.conv2.bias: expected float32 [11], got float32 [19] (and 1 other tensors)",
        ),
        (fitting('"model": "ddrnet23_slim"'), "context.process.0.conv.weight: expected "),
    ],
)
def test_metadata_that_does_not_fit(tmp_path, text, expected):
    path = tmp_path / "w.safetensors"
    state = randomised_model("bcmfnet").state_dict()
    save_file(state, path, signed(state, text))
    assert one_line_error(path, model_from_weights).startswith(f"{path}: {expected}")


def test_tensors_that_do_not_fit(tmp_path):
    model = randomised_model("bcmfnet")
    path, text = tmp_path / "w.safetensors", fitting('"options": {}')
    for change, expected in (
        ({"head.conv2.bias": None}, "head.conv2.bias: expected float32 [19], got nothing"),
        ({"head.conv3.bias": torch.zeros(19)}, "head.conv3.bias: expected nothing, got float32 [19]"),
        (
            {"head.conv2.bias": torch.zeros(19, dtype=torch.int64)},
            "head.conv2.bias: expected float32 [19], got int64 [19]",
        ),
    ):
        tensors = {key: tensor for key, tensor in (model.state_dict() | change).items() if tensor is not None}
        save_file(tensors, path, signed(tensors, text))
        assert one_line_error(path, model_from_weights) == f"{path}: {expected}"


def test_the_folder_of_a_run_stands_for_its_best_weights(tmp_path):
    model = randomised_model("bcmfnet")
    (tmp_path / "weights").mkdir()
    save_weights(tmp_path / "weights" / "best.safetensors", model, {"step": 7})
    read, metadata = model_from_weights(tmp_path)
    assert metadata["step"] == 7 and same(read, model, "")
    assert same(create_model("bcmfnet", num_classes=19, pretrained=tmp_path), model, "")


@pytest.mark.parametrize("pretrained", [True, False, 1])
def test_pretrained_is_a_path(pretrained):
    with pytest.raises(ConfigError) as error:
        create_model("bcmfnet", num_classes=19, pretrained=pretrained)
    expected = "expected the path of a weights file, none can be downloaded"
    assert str(error.value) == f"pretrained: {expected}; got {pretrained}"


@pytest.fixture
def saved(tmp_path):
    """A good file in an otherwise empty folder, and its bytes."""
    path = tmp_path / "best.safetensors"
    save_weights(path, randomised_model("bcmfnet", seed=1))
    return path, path.read_bytes()


def assert_former_file_stays(path, before: bytes) -> None:
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_full_keeps_the_former_file(saved, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights_module.os, call, full)
    path, before = saved
    with pytest.raises(CheckpointError, match="best.safetensors: cannot be written: No space left on device$"):
        save_weights(path, randomised_model("bcmfnet", seed=2))
    assert_former_file_stays(path, before)


def test_a_real_write_error_keeps_the_former_file(saved):
    """The system itself stops the write half-way, at 1 MB of 22."""
    path, before = saved
    model = randomised_model("bcmfnet", seed=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(CheckpointError, match="best.safetensors: cannot be written: File too large$"):
            save_weights(path, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_former_file_stays(path, before)


def test_interrupt_while_writing_keeps_the_former_file(saved, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights_module.os, "fsync", interrupt)
    path, before = saved
    with pytest.raises(KeyboardInterrupt):
        save_weights(path, randomised_model("bcmfnet", seed=2))
    assert_former_file_stays(path, before)


def test_folder_that_does_not_exist(tmp_path):
    model = randomised_model("bcmfnet")
    with pytest.raises(CheckpointError, match="cannot be written: No such file or directory"):
        save_weights(tmp_path / "none" / "w.safetensors", model)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        save_weights(tmp_path / "file" / "w.safetensors", model)


def test_metadata_is_read_without_our_library(saved):
    from safetensors import safe_open

    path, _ = saved
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["bcmfnet"])["model"] == "bcmfnet"
