"""Files that the engine reads: each key that is missing, of another type or of another value is one clear error."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from bcmfnet.data import get_label_table
from bcmfnet.engine.checkpoint import TrainState, read_checkpoint, restore, save_checkpoint
from bcmfnet.engine.config import OptimConfig, TrainConfig
from bcmfnet.engine.inference import LabelPredictor, label_table, trained_on
from bcmfnet.engine.optim import build_optimizer
from bcmfnet.engine.run_folder import MetricsLog
from bcmfnet.errors import CheckpointError, ConfigError, MissingFileError
from bcmfnet.models import create_model, save_weights

MISSING = object()
TABLE = get_label_table("camvid11")


def changed(values, key, value):
    """A copy of nested dicts in which a dotted key has another value, or none."""
    values = copy.deepcopy(values)
    *sections, last = key.split(".")
    place = values
    for section in sections:
        place = place[section]
    if value is MISSING:
        del place[last]
    else:
        place[last] = value
    return values


def metadata():
    """Of weights for CamVid, as a file gives them back."""
    values = {"num_classes": 11, "label_table": dataclasses.asdict(TABLE), "config": TrainConfig().to_dict(),
              "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}  # fmt: skip
    return json.loads(json.dumps(values))


def refusal(read, *arguments, error=CheckpointError):
    with pytest.raises(error) as caught:
        read(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("key", "values", "expected"), [
    ("label_table", [MISSING, None, 3, []], None),
    ("label_table.name", [MISSING, None, 3], "text"),
    ("label_table.classes", [MISSING, None, "road", [1] * 11, ["road"], ["road"] * 12], "11 names"),
    ("label_table.colors", [MISSING, 3, [[0, 0, 0]], [[0, 0]] * 11, [[0, 0, 256]] * 11, [[0, 0, 0.5]] * 11, [7] * 11],
     "11 RGB colours of 0..255"),
    ("label_table.ignore_index", [MISSING, None, "255", 256, -1, 255.0, True], "0..255"),
])  # fmt: skip
def test_label_tables_of_weights(key, values, expected):
    assert label_table(metadata(), "w") == TABLE
    for value in values:
        line = refusal(label_table, changed(metadata(), key, value), "w")
        if expected is not None:
            assert line.startswith(f"w: {key}: expected {expected} in its metadata (see save_weights), got ")
            assert value is not MISSING or line.endswith(", got nothing")
        else:
            assert line.startswith("w: label_table.name: expected text")


@pytest.mark.parametrize(("key", "values", "expected"), [
    ("config", [None, 3, []], "config.data: expected a section of options, got nothing"),
    ("config.data", [MISSING, None, 3], "config.data: expected a section of options, got "),
    ("config.data.name", [MISSING, None, 3], "config.data.name: expected str, got "),
    ("config.data.train_split", [MISSING, 3], "config.data.train_split: expected str, got "),
    ("config.data.val_split", [MISSING, ["val"]], "config.data.val_split: expected str, got "),
    ("config.data.num_classes", ["3", 1.5, True, None], "config.data.num_classes: expected int, got "),
    ("config.data.num_classes", [1], "config.data.num_classes: expected 2 to 254, got 1"),
    ("config.data.length", ["8", []], "config.data.length: expected int, got "),
    ("config.data.length", [3], "config.data.length: expected at least 8, got 3"),
])  # fmt: skip
def test_datasets_of_weights(key, values, expected):
    assert trained_on(metadata(), "w").name == "synthetic" and trained_on({}, "w") is None
    for value in values:
        assert refusal(trained_on, changed(metadata(), key, value), "w").startswith(f"w: {expected}")


@pytest.mark.parametrize(("key", "value", "got"), [
    ("mean", MISSING, "nothing"), ("mean", [0.5, 0.5], "[0.5, 0.5]"), ("mean", "x", "'x'"),
    ("std", [1, 1, "1"], "[1, 1, '1']"),
    ("std", [1, 1, 0], "[1, 1, 0]"), ("std", [1, 1, math.nan], "[1, 1, nan]"),
])  # fmt: skip
def test_mean_and_std_of_weights(tmp_path, key, value, got):
    path = tmp_path / "w.safetensors"
    save_weights(path, create_model("bcmfnet", num_classes=11), changed(metadata(), key, value))
    expected = {"mean": "three numbers", "std": "three numbers above 0"}[key]
    line = refusal(LabelPredictor.from_weights, path, "cpu")
    assert line == f"{path}: {key}: expected {expected} in its metadata (see save_weights), got {got}"


class Run:
    """A model of two layers after a step, its optimiser and its checkpoint on the disk."""

    def __init__(self, folder, optimizer="adamw"):
        self.path = folder / "last.pt"
        self.config = TrainConfig(optim=OptimConfig(name=optimizer, steps=3)).to_dict()
        self.model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.optimizer = build_optimizer(self.model, OptimConfig(name=optimizer))
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.model(torch.randn(4, 3)).square().sum().backward()
        self.optimizer.step()
        state = TrainState(1, 0, 0.5)
        save_checkpoint(self.path, state, self.config, self.model, self.optimizer, self.scaler)

    def restore(self, payload, **options):
        parts = {key: getattr(self, key) for key in ("config", "model", "optimizer", "scaler")}
        return restore(self.path, payload, **parts | options)

    def state(self):
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), torch.get_rng_state().tolist()))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_checkpoint_comes_back(tmp_path, optimizer):
    run = Run(tmp_path, optimizer)
    payload = read_checkpoint(run.path)
    other = Run(tmp_path, optimizer)
    assert run.restore(payload, model=other.model, optimizer=other.optimizer) == TrainState(1, 0, 0.5)
    for key, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[key])
    for mine, theirs in zip(run.optimizer.state.values(), other.optimizer.state.values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


MOMENTS = "optimizer.state[0].{}: expected a tensor of {}, got "


@pytest.mark.parametrize(("key", "values", "expected"), [
    ("state", [MISSING, None, 3], "state.best_miou: expected nan or 0 to 1, got nothing"),
    ("state.step", [MISSING, None, "1", 1.0, -1, True], "state.step: expected a number of steps, got "),
    ("state.evaluated", [MISSING, "1"], "state.evaluated: expected a number of steps, got "),
    ("state.best_miou", [MISSING, None, 2.0], "state.best_miou: expected nan or 0 to 1, got "),
    ("config", [MISSING, None, 3], "config.model.name: expected an option, got nothing"),
    ("config.model", [MISSING, "x"], "config.model.name: expected an option, got nothing"),
    ("config.optim.name", [MISSING, None], "config.optim.name: expected an option, got "),
    ("model", [MISSING, None, 3, []], "model: expected tensors, got "),
    ("model", [{}], "0.bias: expected float32 [2], got nothing (and 6 other tensors)"),
    ("optimizer", [MISSING, None, 3], "optimizer.param_groups: expected groups of 4 parameters, got nothing"),
    ("optimizer.param_groups", [MISSING, None, [], [3], [{"params": [0]}]], "optimizer.param_groups: expected groups "),
    ("optimizer.state", [MISSING, None, [], {0: {}}], "optimizer.state: expected the state of 4 parameters, got "),
    ("optimizer.state", [dict.fromkeys(range(4), 3), dict.fromkeys(range(4), {})], MOMENTS.format("exp_avg", [2, 3])),
    ("scaler", [MISSING, None, 3], "scaler: expected the state of the loss scale, got "),
    ("rng", [MISSING, None, torch.zeros(3, dtype=torch.uint8), torch.zeros(5056)], "rng: expected uint8 [5056], got "),
])  # fmt: skip
def test_each_key_of_a_checkpoint_is_checked_before_anything_changes(tmp_path, key, values, expected):
    run = Run(tmp_path)
    before = run.state()
    for value in values:
        torch.save(changed(read_checkpoint(run.path), key, value), tmp_path / "b.pt")
        assert refusal(run.restore, read_checkpoint(tmp_path / "b.pt")).startswith(f"{run.path}: {expected}")
    torch.testing.assert_close(run.state(), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("key", "value", "expected"), [
    ("exp_avg", torch.zeros(3, 2), [2, 3]), ("exp_avg_sq", None, [2, 3]), ("step", "x", []),
])  # fmt: skip
def test_each_moment_of_a_checkpoint_is_checked(tmp_path, key, value, expected):
    run = Run(tmp_path)
    payload = read_checkpoint(run.path)
    payload["optimizer"]["state"][0][key] = value
    assert refusal(run.restore, payload).startswith(f"{run.path}: {MOMENTS.format(key, expected)}")


def test_another_run_than_the_checkpoints_is_refused(tmp_path):
    run = Run(tmp_path)
    payload = read_checkpoint(run.path)
    for key, value, expected in (("model.name", "ddrnet23_slim", "'bcmfnet'"), ("model.aux", False, "True"),
                                 ("optim.name", "sgd", "'adamw'"), ("optim.decay_1d", False, "True")):  # fmt: skip
        restore_with = changed(run.config, key, value)
        with pytest.raises(ConfigError) as error:
            run.restore(payload, config=restore_with)
        assert str(error.value) == f"{key}: expected {expected}, as {run.path} has it, got {value!r}"
    with pytest.raises(
        ConfigError, match=r"^amp: expected bf16 or off, since .*last.pt has no loss scale, got 'fp16'$"
    ):
        run.restore(payload, scaler=torch.amp.GradScaler("cpu"))
    payload["scaler"] = torch.amp.GradScaler("cpu").state_dict() | {"scale": "x"}
    assert refusal(lambda: run.restore(payload, scaler=torch.amp.GradScaler("cpu"))).endswith(
        "scaler.scale: expected a number, got 'x'"
    )


def test_the_options_of_the_optimiser_are_those_of_the_configuration(tmp_path):
    run = Run(tmp_path)
    run.optimizer.param_groups[0] |= {"weight_decay": 0.5, "betas": (0.5, 0.999)}
    run.restore(read_checkpoint(run.path))
    assert (run.optimizer.param_groups[0]["weight_decay"], run.optimizer.param_groups[0]["betas"]) == (
        0.5,
        (0.5, 0.999),
    )


def test_a_checkpoint_that_is_not_there(tmp_path):
    expected = f"{tmp_path}/last.pt: expected a training checkpoint, found no file"
    assert refusal(read_checkpoint, tmp_path / "last.pt", error=MissingFileError) == expected


GOOD = '{"step": 1, "loss": 0.5, "lr": 0.1}\n{"step": 2, "miou": null, "iou": {"road": 0.5, "sky": null}}\n'


@pytest.mark.parametrize(("line", "expected"), [
    ('{"step": 3', "a JSON object, got '{\"step\": 3'"),
    ("3", "a JSON object, got '3'"),
    ("[]", "a JSON object, got '[]'"),
    ("{}", "a number of steps, got nothing"),
    ('{"step": "3"}', "a number of steps, got '3'"),
    ('{"step": 3.0}', "a number of steps, got 3.0"),
    ('{"step": 3, "loss": "low"}', "a number, got 'low'"),
    ('{"step": 3, "lr": [1]}', "a number, got [1]"),
    ('{"step": 3, "miou": 0.5, "iou": 3}', "IoU by class, got 3"),
    ('{"step": 3, "miou": 0.5, "iou": {"sky": "x"}}', "IoU by class, got {'sky': 'x'}"),
    ("\x00\x01", "a JSON object, got "),
])  # fmt: skip
def test_rows_of_metrics(tmp_path, line, expected):
    path = tmp_path / "metrics.jsonl"
    text = GOOD + line + "\n" + '{"step": 4, "loss": 1}\n'
    path.write_text(text)
    error = refusal(MetricsLog, tmp_path, 9)
    assert error.startswith(f"{path}, line 3: ") and f"expected {expected}" in error
    assert path.read_text() == text


def test_a_last_row_that_was_not_finished_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(GOOD + '{"step": 3, "lo')
    assert [row["step"] for row in MetricsLog(tmp_path, 9).rows] == [1, 2]
    assert (tmp_path / "metrics.jsonl").read_text() == GOOD
