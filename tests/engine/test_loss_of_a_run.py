"""The loss of a run: how it is configured, what its rows tell, class weights, terms and a teacher."""

from __future__ import annotations

import dataclasses
import inspect
import json
import signal

import pytest
import torch
from training import TIMES, rows_of, stop_after

from bcmfnet.engine import build
from bcmfnet.engine import train as engine
from bcmfnet.engine.checkpoint import LAST
from bcmfnet.engine.config import PRESETS, LossConfig
from bcmfnet.engine.runtime import Interrupted
from bcmfnet.errors import ConfigError
from bcmfnet.models import create_model, save_weights
from bcmfnet.nn import SegmentationLoss
from bcmfnet.ops import boundary_corrected_loss
from bcmfnet.ops._losses import CallOptions, SegmentationLossOptions
from bcmfnet.reference import bcl as reference


@pytest.fixture(autouse=True)
def nothing_is_drawn(monkeypatch):
    """Pictures take a second a run."""
    monkeypatch.setattr(engine.report, "draw_run", lambda *arguments: None)


@pytest.mark.parametrize(
    "mode", ["detect", *(pytest.param(mode, marks=pytest.mark.exhaustive) for mode in ("ohem", "plain"))]
)
def test_rows_say_what_the_loss_selects(tiny_config, tmp_path, monkeypatch, mode):
    """Of the main head, the mean over the steps since the last row; plain cross-entropy selects nothing."""
    tiny_config.optim.steps, tiny_config.log_every = 2, 2
    tiny_config.loss = LossConfig(mode=mode, threshold=1.5, nms=3 if mode == "detect" else 1, jitter=False)
    calls = []
    original = SegmentationLoss.forward

    def forward(loss, output, target, **options):
        calls.append((loss, output.logits.detach().double(), target))
        return original(loss, output, target, **options)

    monkeypatch.setattr(SegmentationLoss, "forward", forward)
    engine.train(tiny_config, tmp_path)
    (row,) = (row for row in map(json.loads, (tmp_path / "metrics.jsonl").open()) if "loss" in row)
    if mode == "plain":
        assert list(row) == ["step", "epoch", "loss", "lr", "images_per_s", *TIMES]
        return
    expected = []
    for loss, logits, target in calls:
        _, stats, maps = reference.loss(logits, target, loss.checked_options)
        share = maps.selected.sum() / (target != 255).sum()
        expected.append([maps.ce[target != 255].mean(), share, stats.threshold / 1024, maps.ce[maps.selected].mean()])
    assert len(expected) == 2
    means = torch.tensor(expected).mean(0).tolist()
    assert [row[key] for key in ("ce", "selected", "threshold", "selected_loss")] == pytest.approx(means, rel=1e-3)
    assert 0 < row["selected"] < 1 and row["threshold"] == 1.5


def test_class_weights_of_a_run_are_those_it_began_with(tiny_config, tmp_path, monkeypatch):
    """They are computed once, go to 1 by the share that was asked for, and come from the run's own file on resume."""
    seen, jitters = [], []
    original = SegmentationLoss.forward

    def forward(loss, *args, **options):
        seen.append(loss.weight.tolist())
        jitters.append(options["jitter"])
        return original(loss, *args, **options)

    monkeypatch.setattr(SegmentationLoss, "forward", forward)
    tiny_config.loss = LossConfig(class_weights="median", class_weights_until=0.5, aux=0)
    tiny_config.optim.steps = 4
    engine.train(tiny_config, tmp_path)
    named = json.loads((tmp_path / "class_weights.json").read_text())
    first = torch.tensor(list(named.values()))
    expected = [1 + left * (first - 1) for left in (1, 0.5, 0, 0)]
    torch.testing.assert_close(torch.tensor(seen), torch.stack(expected))
    assert torch.tensor(seen[0]).std() > 0.1
    assert jitters == [0, 1, 2, 3], "the pairs move from step to step"
    path = tmp_path / "class_weights.json"
    path.write_text(json.dumps(named | {"sky": 9.0}))
    tiny_config.optim.steps = 40
    with monkeypatch.context() as patch:
        stop_after(patch, 5, signal.SIGUSR1)
        with pytest.raises(Interrupted):
            engine.train(tiny_config, tmp_path, resume=True)
    assert seen[-1][list(named).index("sky")] == pytest.approx(1 + 0.8 * 8)


def test_class_weights_that_are_refused_cost_no_earlier_run(tiny_config, tmp_path):
    (tmp_path / LAST).parent.mkdir()
    (tmp_path / LAST).write_bytes(b"an earlier run's")
    tiny_config.loss = LossConfig(class_weights=str(tmp_path / "enett"))
    with pytest.raises(ConfigError, match="class_weights: expected none, enet, median or a file, got .*enett"):
        engine.train(tiny_config, tmp_path)
    assert (tmp_path / LAST).read_bytes() == b"an earlier run's" and not (tmp_path / "metrics.jsonl").exists()


def test_every_option_of_the_loss_can_be_configured():
    """But for what no dataset has, logits of one class, and what the network decides."""
    module = {"inplace_grad", "validate", "aux"}
    others = {"binary", "pos_weight", "align_corners", "ignore_index", "distillation_temperature"}
    options = SegmentationLossOptions.__optional_keys__ - CallOptions.__optional_keys__
    assert options - others | module <= {field.name for field in dataclasses.fields(LossConfig)}
    changed = {"ce": 0.5, "dice": 0.75, "label_smoothing": 0.125, "focal_gamma": 1.5, "alpha": 0.25,
               "beta": 0.75, "flip": "mirror", "norm": "valid", "max_kept": 7,
               "per_image": True, "inplace_grad": True, "validate": True, "step": 3}  # fmt: skip
    loss = build.build_loss(LossConfig(**changed), 255)
    built = loss.options | loss.call
    assert {key: built[key] for key in changed} == changed


def test_the_papers_presets_name_its_selection():
    papers = {"mode": "paper", "nms": 3, "ratio": 1 / 16, "jitter": False}
    for name, values in PRESETS.items():
        loss = {key: value for key, value in values.get("loss", {}).items() if key != "class_weights"}
        assert loss == (papers if "paper" in name else {}), name
    defaults = inspect.signature(boundary_corrected_loss).parameters
    for key in ("mode", "step", "nms", "threshold", "ratio", "min_kept"):
        assert getattr(LossConfig(), key) == defaults[key].default, key
    assert (LossConfig().nms, LossConfig().ratio) == (1, 0)


@pytest.mark.parametrize(("mode", "expected"), [
    ("plain", {"boundary": 0.0}),
    ("ohem", {"mode": "ohem", "ce": 0.0, "nms": 1, "ratio": 0.0, "threshold": 0.5, "min_kept": 7}),
    ("detect", {"mode": "detect", "nms": 5, "ratio": 0.25, "threshold": 0.5, "min_kept": 7}),
])  # fmt: skip
def test_loss_of_a_configuration(mode, expected):
    """OHEM has no suppression and no share; plain cross-entropy no boundary term."""
    config = LossConfig(mode=mode, nms=5, ratio=0.25, threshold=0.5, min_kept=7)
    options = build.build_loss(config, 255).options
    assert {key: options[key] for key in expected} == expected


def test_terms_of_a_run(tiny_config, tmp_path):
    """Each is told in its rows; a network is taught by another one's weights, which stay what they are."""
    teacher = tmp_path / "teacher.safetensors"
    torch.manual_seed(1)
    save_weights(teacher, create_model("ddrnet23_slim", num_classes=10))
    tiny_config.loss = LossConfig(
        mode="plain", dice=1.0, focal=0.5, distillation=0.7, teacher=str(teacher), label_smoothing=0.1
    )
    tiny_config.optim.steps = tiny_config.log_every = 1
    engine.train(tiny_config, tmp_path)
    row, _ = rows_of(tmp_path)
    assert list(row) == ["step", "epoch", "loss", "ce", "focal", "dice", "distillation", "lr", "images_per_s", *TIMES]
    heads = row["loss"] - (row["ce"] + 0.5 * row["focal"] + row["dice"] + 0.7 * row["distillation"])
    assert 0 < row["dice"] < 1 and 0 < row["distillation"] and heads > 0  # what is left is the auxiliary head's


@pytest.mark.parametrize(("options", "message"), [
    ({"distillation": 0.5}, "loss.distillation, loss.teacher: expected both or neither of them, got .*None"),
    ({"teacher": "camvid11"}, "loss.distillation, loss.teacher: expected both or neither of them, got .*camvid11"),
    ({"label_smoothing": 1.0}, "loss.label_smoothing: expected"),
    ({"dice": -1.0}, "loss.dice: expected"),
])  # fmt: skip
def test_terms_that_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LossConfig(**options)


def test_a_teacher_of_other_classes_is_refused(tiny_config, tmp_path):
    teacher = tmp_path / "teacher.safetensors"
    save_weights(teacher, create_model("bcmfnet", num_classes=3))
    tiny_config.loss = LossConfig(distillation=1.0, teacher=str(teacher))
    with pytest.raises(ConfigError, match="loss.teacher: expected a network of 10 classes, got one of 3"):
        engine.train(tiny_config, tmp_path)
