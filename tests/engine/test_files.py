"""Files that the engine reads: each key that is missing, of another type or of another value is one clear error."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bcmfnet.data import get_label_table
from bcmfnet.engine import checkpoint as checkpoint_module
from bcmfnet.engine.checkpoint import (
    DIGITS,
    Checkpoint,
    DamagedFileError,
    TrainState,
    check_options,
    last_checkpoint,
    name_frames,
    read_checkpoint,
    restore,
    save_checkpoint,
    sealed,
)
from bcmfnet.engine.config import OptimConfig, TrainConfig
from bcmfnet.engine.inference import LabelPredictor, label_table, trained_on
from bcmfnet.engine.optim import build_optimizer
from bcmfnet.engine.run_folder import MetricsLog
from bcmfnet.engine.train import train
from bcmfnet.errors import CheckpointError, ConfigError, MissingFileError, MissingPackageError
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
    ("config.data.num_classes", [1], "config.data.num_classes: expected an integer from 2 to 254, got 1"),
    ("config.data.length", ["8", []], "config.data.length: expected int, got "),
    ("config.data.length", [3], "config.data.length: expected an integer from 8 to 10000000, got 3"),
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
        self.config = TrainConfig(optim=OptimConfig(name=optimizer, steps=3))
        self.model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.optimizer = build_optimizer(self.model, OptimConfig(name=optimizer))
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.model(torch.randn(4, 3)).square().sum().backward()
        self.optimizer.step()
        self.save(1)

    def save(self, step):
        state = TrainState(step, 0, 0.5, "8 frames")
        save_checkpoint(self.path, state, self.config.to_dict(), self.model, self.optimizer, self.scaler)

    def restore(self, payload, **options):
        """Take up a checkpoint as `train` does."""
        check_options(Checkpoint(self.path, payload), options.pop("config", self.config))
        parts = {key: getattr(self, key) for key in ("model", "optimizer", "scaler")}
        return restore(Checkpoint(self.path, payload), **parts | options)

    def state(self):
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), torch.get_rng_state().tolist()))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_checkpoint_comes_back(tmp_path, optimizer):
    run = Run(tmp_path, optimizer)
    payload = read_checkpoint(run.path)
    other = Run(tmp_path, optimizer)
    assert run.restore(payload, model=other.model, optimizer=other.optimizer) == TrainState(1, 0, 0.5, "8 frames")
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
    ("state.frames", [MISSING, None, 3], "state.frames: expected text, got "),
    ("config", [MISSING, None, 3], "config: expected sections of options, got "),
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
        (tmp_path / "b.pt").write_bytes(sealed(changed(read_checkpoint(run.path), key, value)))
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


def test_another_precision_than_the_checkpoints_is_refused(tmp_path):
    run = Run(tmp_path)
    payload = read_checkpoint(run.path)
    with pytest.raises(
        ConfigError, match=r"^amp: expected bf16 or off, since .*last.pt has no loss scale, got 'fp16'$"
    ):
        run.restore(payload, scaler=torch.amp.GradScaler("cpu"))
    payload["scaler"] = torch.amp.GradScaler("cpu").state_dict() | {"scale": "x"}
    assert refusal(lambda: run.restore(payload, scaler=torch.amp.GradScaler("cpu"))).endswith(
        "scaler.scale: expected a number, got 'x'"
    )


OTHER = {
    "data.name": "folder", "data.root": "/elsewhere", "data.train_split": "val", "data.val_split": "test",
    "data.num_classes": 5, "data.length": 9, "data.crop": (64, 64), "data.scale": (0.5, 1.5), "data.flip": 0.25,
    "data.colors": "/elsewhere/colors.csv",
    "data.crops": ("64x64@0.5",), "data.balance": 0.25, "optim.schedule": "cosine", "optim.clip": 1.0, "optim.ema": 0.9,
    "optim.accumulate": 2, "data.strict": True, "model.freeze": True, "deterministic": True, "patience": 3,
    "loss.max_kept": 9, "loss.ce": 0.5, "loss.alpha": 0.5, "loss.beta": 0.5, "loss.flip": "mirror",
    "loss.norm": "valid", "loss.per_image": True, "loss.inplace_grad": True, "loss.validate": True,
    "loss.jitter": False, "loss.sync": True, "loss.class_weights": "enet", "loss.class_weights_until": 0.5,
    "data.jitter": 0.25, "data.batch_size": 3, "data.workers": 1, "model.name": "ddrnet23_slim", "model.aux": False,
    "model.pretrained": "/w", "loss.mode": "paper", "loss.boundary": 0.5, "loss.step": 2, "loss.nms": 3,
    "loss.threshold": 0.5, "loss.ratio": 0.5, "loss.min_kept": 1, "loss.aux": 0.5, "optim.name": "sgd",
    "loss.focal": 0.5, "loss.dice": 0.5, "loss.jaccard": 0.5, "loss.tversky": 0.5, "loss.distillation": 0.5,
    "loss.teacher": "/w", "loss.label_smoothing": 0.5, "loss.focal_gamma": 0.5, "loss.tversky_alpha": 0.25,
    "loss.tversky_beta": 0.25, "loss.overlap_smooth": 0.5, "loss.overlap_log": True, "loss.overlap_absent": "zero",
    "loss.overlap_per_image": True, "loss.temperature": 0.5, "loss.distillation_where": "all",
    "loss.boundary_term": "focal", "optim.lr": 0.5, "optim.backbone_lr": 0.1,
    "optim.momentum": 0.5, "optim.weight_decay": 0.5, "optim.decay_1d": False, "optim.power": 1.0,
    "optim.warmup_steps": 1, "optim.steps": 4, "seed": 1, "amp": "off", "device": "cpu", "compile": True,
    "cuda_graph": True,
    "val_every": 2.0, "log_every": 1, "save_every_minutes": 1.0, "keep": 3, "tensorboard": True, "select": "last",
}  # fmt: skip
OBEYED = ("data.root", "data.workers", "optim.lr", "optim.momentum", "optim.weight_decay", "optim.power", "amp",
          "data.colors", "optim.warmup_steps", "optim.steps", "device", "compile", "cuda_graph", "val_every",
          "log_every", "save_every_minutes", "keep", "optim.clip", "optim.accumulate", "data.strict",
          "deterministic", "patience", "tensorboard")  # fmt: skip


def flat(values, prefix=""):
    for key, value in values.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]


def test_every_option_that_another_run_may_have_is_obeyed_or_refused_by_name(tmp_path):
    run = Run(tmp_path)
    checkpoint = Checkpoint(run.path, read_checkpoint(run.path))
    before = dict(flat(dataclasses.asdict(run.config)))
    assert OTHER.keys() == before.keys() - {"optim.epochs"}
    assert check_options(checkpoint, run.config) == []
    for key, value in OTHER.items():
        config = copy.deepcopy(run.config)
        *section, name = key.split(".")
        setattr(getattr(config, section[0]) if section else config, name, value)
        if key in OBEYED:
            assert check_options(checkpoint, config) == [f"{key}: {value!r}, before {before[key]!r}"]
        else:
            line = refusal(check_options, checkpoint, config, error=ConfigError)
            assert line == f"{key}: expected {before[key]!r}, as {run.path} has it, got {value!r}"


def test_all_options_that_are_refused_are_named_at_once(tmp_path):
    run = Run(tmp_path)
    run.config.seed, run.config.data.crop, run.config.keep = 7, (64, 96), 5
    line = refusal(check_options, Checkpoint(run.path, read_checkpoint(run.path)), run.config, error=ConfigError)
    assert line == f"data.crop, seed: expected (256, 512), 0, as {run.path} has it, got (64, 96), 7"


def test_steps_may_become_epochs(tmp_path):
    run = Run(tmp_path)
    run.config.optim.steps, run.config.optim.epochs = None, 2.5
    changes = check_options(Checkpoint(run.path, read_checkpoint(run.path)), run.config)
    assert changes == ["optim.epochs: 2.5, before None", "optim.steps: None, before 3"]


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
def test_damaged_rows_of_metrics_are_left_out_with_a_warning(tmp_path, caplog, line, expected):
    path = tmp_path / "metrics.jsonl"
    path.write_text(GOOD + line + "\n" + '{"step": 4, "loss": 1}\n' + line + "\n")
    assert [row["step"] for row in MetricsLog(tmp_path, TrainState(9, 9)).rows] == [1, 2, 4]
    (message,) = caplog.messages
    assert message.startswith(f"{path}, line 3: ") and f"expected {expected}" in message
    assert message.endswith("; left out with what else is damaged, 2 of 5 lines")
    assert path.read_text() == GOOD + '{"step": 4, "loss": 1}\n'


def test_a_last_row_that_was_not_finished_is_dropped(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text(GOOD + '{"step": 3, "lo')
    assert [row["step"] for row in MetricsLog(tmp_path, TrainState(9, 9)).rows] == [1, 2]
    assert (tmp_path / "metrics.jsonl").read_text() == GOOD and caplog.messages == []


def test_metrics_that_are_gone_start_anew_with_a_warning(tmp_path, caplog):
    assert MetricsLog(tmp_path, TrainState(9, 9)).rows == []
    assert caplog.messages == [f"{tmp_path}/metrics.jsonl: expected the rows of the run's earlier steps, found no file"]


@pytest.mark.parametrize(("state", "kept"), [
    (TrainState(4, 4), ["loss 3", "loss 4", "miou 4"]), (TrainState(4, 2), ["loss 3", "loss 4"]),
    (TrainState(3, 2), ["loss 3"]), (TrainState(0, 0), []),
])  # fmt: skip
def test_rows_that_come_again_are_dropped_from_both_files(tmp_path, state, kept):
    """A state saved before an evaluation of the same step is evaluated again when it is resumed."""
    rows = [{"step": 3, "loss": 1.0}, {"step": 4, "loss": 2.0}, {"step": 4, "miou": 0.5}, {"step": 5, "loss": 1.0}]
    log = MetricsLog(tmp_path)
    for row in rows:
        log.add(row)
    MetricsLog(tmp_path, state)
    read = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [f"{key} {row['step']}" for row in read for key in ("loss", "miou") if key in row] == kept
    table = tmp_path / "results.csv"
    assert (table.read_text() if table.exists() else None) == ("step,miou\n4,0.5\n" if "miou 4" in kept else None)


def test_each_flipped_bit_of_a_checkpoint_is_detected(tmp_path):
    """In tensors, in the pickle, in the padding and the names of the archive, in the digest itself."""
    run = Run(tmp_path)
    content = run.path.read_bytes()
    assert torch.load(run.path, weights_only=True)["state"]["step"] == 1  # it is a file of torch's all the same
    generator = random.Random(0)
    places = [generator.randrange(8 * len(content)) for _ in range(200)] + [8 * (len(content) - DIGITS) + 1, 0]
    for place in places:
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        run.path.write_bytes(damaged)
        line = refusal(read_checkpoint, run.path, error=DamagedFileError)
        assert line.removeprefix(f"{run.path}: ") in (
            "damaged, its digest is not the one that was written with it",
            "no training checkpoint, or only the beginning of one: it ends without a digest",
        )
    for other in (content[:-1], content + b"\0", content[: len(content) // 2], b"", bytes(len(content))):
        run.path.write_bytes(other)
        refusal(read_checkpoint, run.path, error=DamagedFileError)


@pytest.mark.parametrize(("keep", "steps"), [(1, [6]), (2, [6, 5]), (4, [6, 5, 4, 3])])
def test_checkpoints_that_are_kept(tmp_path, keep, steps):
    run = Run(tmp_path)
    run.config.keep = keep
    for step in range(2, 7):
        run.save(step)
    names = ["last.pt", "last-1.pt", "last-2.pt", "last-3.pt"][:keep]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert [read_checkpoint(tmp_path / name)["state"]["step"] for name in names] == steps
    run.config.keep = 2
    run.save(7)
    assert {path.name: read_checkpoint(path)["state"]["step"] for path in tmp_path.iterdir()} == (
        {"last.pt": 7, "last-1.pt": 6}
    )


def test_checkpoints_are_kept_where_there_are_no_hard_links(tmp_path, monkeypatch):
    run = Run(tmp_path)
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    run.save(2)
    assert [read_checkpoint(tmp_path / name)["state"]["step"] for name in ("last.pt", "last-1.pt")] == [2, 1]


def test_a_save_that_failed_keeps_the_checkpoints_apart(tmp_path, monkeypatch):
    """A full disk, twice: the one before the last is not lost to copies of the last."""
    run = Run(tmp_path)
    run.config.keep = 3
    run.save(2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "replace_file", lambda *_: (_ for _ in ()).throw(CheckpointError("full")))
        for _ in range(2):
            assert refusal(run.save, 3) == "full"
    run.save(4)
    steps = [read_checkpoint(tmp_path / name)["state"]["step"] for name in ("last.pt", "last-1.pt", "last-2.pt")]
    assert steps == [4, 2, 1]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "gone"])
def test_the_checkpoint_before_a_damaged_one_is_taken_with_a_warning(tmp_path, caplog, damage):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    run = Run(folder)
    run.save(2)
    content = run.path.read_bytes()
    damaged = {"flipped": content[:500] + b"?" + content[501:], "truncated": content[:-9], "empty": b"", "gone": None}
    run.path.unlink()
    if damaged[damage] is not None:
        run.path.write_bytes(damaged[damage])
    found = last_checkpoint(tmp_path)
    assert (found.path.name, found.payload["state"]["step"]) == ("last-1.pt", 1)
    (message,) = caplog.messages
    assert message.startswith(f"{run.path}: ") and message.endswith("; the run goes on from last-1.pt")
    found.path.unlink()
    assert refusal(last_checkpoint, tmp_path).startswith(f"{run.path}: ")


def test_a_checkpoint_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    run = Run(tmp_path / "checkpoints")
    run.save(2)
    monkeypatch.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert refusal(last_checkpoint, tmp_path) == f"{run.path}: cannot be read: Permission denied"


class Writer:
    """Stands for TensorBoard's SummaryWriter."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.flushed = folder, purge_step, [], 0

    def add_scalar(self, key, value, step):
        self.scalars.append((key, value, step))

    def flush(self):
        self.flushed = len(self.scalars)


def test_rows_go_to_tensorboard_as_scalars(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    log = MetricsLog(tmp_path, tensorboard=True)
    log.add({"step": 3, "loss": 1.5, "lr": 0.1})
    log.add({"step": 4, "miou": None, "iou": {"sky": 0.5, "road": None}})
    assert log.writer.scalars == [("loss", 1.5, 3), ("lr", 0.1, 3), ("iou/sky", 0.5, 4)]
    assert (log.writer.folder, log.writer.purge_step, log.writer.flushed) == (str(tmp_path / "tensorboard"), 0, 3)
    again = MetricsLog(tmp_path, TrainState(3, 0), tensorboard=True)
    assert again.writer.purge_step == 4, "what comes again takes the place of what was written"
    assert MetricsLog(tmp_path).writer is None


def test_tensorboard_that_is_not_installed_is_missed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    line = refusal(train, TrainConfig(tensorboard=True), tmp_path, error=MissingPackageError)
    assert line == "tensorboard: needed for --tensorboard; pip install tensorboard"
    assert list(tmp_path.iterdir()) == []


class Frames:
    def __init__(self, *names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def name(self, index):
        return self.names[index]


def test_frames_are_told_apart_by_number_name_and_order():
    first = name_frames(Frames("a", "b"), Frames("c"))
    assert first == name_frames(Frames("a", "b"), Frames("c"))
    assert first.startswith("2 to train on and 1 to validate on, names ")
    others = [name_frames(Frames("b", "a"), Frames("c")), name_frames(Frames("a", "b"), Frames("d")),
              name_frames(Frames("a"), Frames("b", "c")), name_frames(Frames("a", "b\udcff"), Frames("c"))]  # fmt: skip
    assert len({first, *others}) == 5
