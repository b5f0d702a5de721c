"""A run end to end: what it leaves, that it resumes exactly, and what stops it."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from training import TIMES, rows_of, stop_after

from bcmfnet.engine import build, saver
from bcmfnet.engine import train as engine
from bcmfnet.engine.checkpoint import LAST, earlier_checkpoints, read_checkpoint, save_checkpoint, sealed
from bcmfnet.engine.config import DataConfig, LossConfig, OptimConfig, TrainConfig
from bcmfnet.engine.learner import Learner
from bcmfnet.engine.optim import Schedule
from bcmfnet.engine.record import Record
from bcmfnet.engine.runtime import Interrupted
from bcmfnet.errors import CheckpointError, ConfigError, TrainingError
from bcmfnet.models import create_model, model_from_weights, weights
from bcmfnet.nn import SegmentationLoss


@pytest.fixture(autouse=True)
def nothing_is_drawn(request, monkeypatch):
    """Pictures take a second a run; one test has them."""
    if request.function is not test_run_leaves_everything_in_its_folder:
        monkeypatch.setattr(engine.report, "draw_run", lambda *arguments: None)


def weights_of(folder):
    return read_checkpoint(folder / "checkpoints" / "last.pt")["model"]


def assert_equal_state(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_run_leaves_everything_in_its_folder(tiny_config, tmp_path):
    result = engine.train(tiny_config, tmp_path)
    for name in ("config.toml", "env.json", "train.log", "metrics.jsonl", "results.csv", "results.png",
                 "confusion_matrix.png", "evaluation.json", "report.html", "weights/best.safetensors",
                 "weights/last.safetensors", "checkpoints/last.pt"):  # fmt: skip
        assert (tmp_path / name).stat().st_size > 0, name
    assert len(list((tmp_path / "overlays").glob("*.jpg"))) == 1
    assert not list(tmp_path.rglob("*.tmp"))

    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "miou" in row] == [4, 6]  # an epoch is 8 // 2 steps; the last step always

    for row in rows:
        if "loss" in row:  # the parts of a step of two frames are no more than the whole
            assert sum(row[time] for time in TIMES) <= 2 / row["images_per_s"] * (1 + 1e-6)
            assert all(row[f"{part}_s"] > 0 for part in ("forward", "loss", "backward", "optimizer"))

    best = max(row["miou"] for row in rows if "miou" in row)
    model, metadata = model_from_weights(tmp_path / "weights" / "best.safetensors")
    assert metadata["val_miou"] == best
    assert result.evaluation.miou == best
    assert metadata["label_table"]["classes"] == list(result.evaluation.table.classes)


@pytest.mark.parametrize(("select", "step"), [pytest.param("best", 4, marks=pytest.mark.exhaustive), ("last", 6)])
def test_the_weights_that_a_run_stands_for(tiny_config, tmp_path, monkeypatch, select, step):
    """Its best evaluation is that of step 4, whatever the network does."""
    original = engine.evaluate

    def evaluate(*arguments, **options):
        result = original(*arguments, **options)
        monkeypatch.setattr(type(result), "miou", property(lambda self: 1 / (len(seen) + 1)))
        seen.append(result)
        return result

    seen = []
    monkeypatch.setattr(engine, "evaluate", evaluate)
    engine.train(dataclasses.replace(tiny_config, select=select), tmp_path)
    assert len(seen) == 3
    assert model_from_weights(tmp_path)[1]["step"] == step


@pytest.mark.parametrize(("crop", "crops", "line"), [
    ((513, 64), (), "data.crop: expected at most 512x1024 (the largest frame of train, 256x512, at the largest "
     "data.scale, 2), got 513x64"),
    ((64, 64), ("64x1025@0.5",), "data.crops: expected at most 512x1024 (the largest frame of train, 256x512, at the "
     "largest data.scale, 2), got 64x1025"),
])  # fmt: skip
def test_crops_larger_than_any_frame_gets_are_refused(crop, crops, line):
    with pytest.raises(ConfigError) as refused:
        build.build_datasets(DataConfig(length=8, crop=crop, crops=crops))
    assert str(refused.value) == line
    build.build_datasets(DataConfig(length=8, crop=(512, 1024)))


@pytest.mark.exhaustive
def test_a_run_without_a_better_evaluation_ends(tiny_config, tmp_path, monkeypatch):
    """Of the evaluations of steps 2, 4, ..., the second is the best; resumed, it is still at its end."""
    scores = iter([0.1, 0.3, 0.2, 0.25, 0.2, 0.2])
    original = engine.evaluate

    def evaluate(*arguments, boundary, **options):
        result = original(*arguments, boundary=boundary, **options)
        if not boundary:
            score = next(scores)
            monkeypatch.setattr(type(result), "miou", property(lambda self: score))
        return result

    monkeypatch.setattr(engine, "evaluate", evaluate)
    tiny_config.optim.steps, tiny_config.val_every, tiny_config.patience = 40, 0.5, 2
    assert engine.train(tiny_config, tmp_path).steps == 8
    assert model_from_weights(tmp_path)[1]["step"] == 4
    assert read_checkpoint(tmp_path / LAST)["state"]["stale"] == 2
    assert engine.train(tiny_config, tmp_path, resume=True).steps == 8


def test_a_frozen_backbone_keeps_weights_and_statistics(tiny_config, tmp_path):
    tiny_config.model.freeze, tiny_config.optim.steps = True, 1
    engine.train(tiny_config, tmp_path)
    torch.manual_seed(tiny_config.seed)
    start, end = create_model("bcmfnet", num_classes=10, aux=True).state_dict(), weights_of(tmp_path)
    changed = {key.split(".")[0] for key in start if not torch.equal(start[key], end[key])}
    assert changed == {"context", "head", "aux_head"}


def test_groups_of_the_optimiser_have_their_own_rate_and_decay(tiny_config, tmp_path, monkeypatch):
    groups = []
    original = Learner.update

    def update(learner, state):
        named = {parameter: name for name, parameter in learner.model.named_parameters()}
        assert sum(len(group["params"]) for group in learner.optimizer.param_groups) == len(named)
        for group in learner.optimizer.param_groups:
            groups.append((group["lr"], group["weight_decay"], [(named[p], p.ndim) for p in group["params"]]))
        original(learner, state)

    monkeypatch.setattr(Learner, "update", update)
    tiny_config.optim = OptimConfig(lr=0.1, backbone_lr=0.25, weight_decay=0.01, decay_1d=False, steps=1)
    engine.train(tiny_config, tmp_path)
    assert len(groups) == 4
    for lr, decay, named in groups:
        for name, ndim in named:
            assert (lr, decay) == (0.025 if name.startswith("backbone.") else 0.1, 0.01 if ndim > 1 else 0.0), name


def test_one_cycle_is_that_of_torch():
    plan = Schedule.of(TrainConfig(optim=OptimConfig(schedule="onecycle", lr=0.5, steps=1000), data=DataConfig()), 100)
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    # torch counts from the first step to the last, here the run ends after the last
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=1001, cycle_momentum=False)
    for step in range(1000):
        assert plan.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=0.02, abs=2e-6), step
        optimizer.step()
        theirs.step()


def test_deterministic_is_for_the_time_of_the_run(tiny_config, tmp_path, monkeypatch):
    seen = []
    original = Learner.update
    monkeypatch.setattr(
        Learner, "update", lambda *args: (seen.append(torch.are_deterministic_algorithms_enabled()), original(*args))
    )
    tiny_config.deterministic, tiny_config.optim.steps = True, 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.train(tiny_config, tmp_path)
    assert seen == [True, True] and not torch.are_deterministic_algorithms_enabled()
    tiny_config.optim.steps = 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    expected = (
        r"deterministic: expected \d+ threads, as before, got 77; set OMP_NUM_THREADS=\d+, or go on with --no-det"
    )
    with pytest.raises(ConfigError, match=expected):
        engine.train(tiny_config, tmp_path, resume=True)
    tiny_config.deterministic = False
    engine.train(tiny_config, tmp_path, resume=True)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_deterministic_runs_of_500_steps_are_equal(tiny_config, tmp_path):
    tiny_config.deterministic, tiny_config.optim.steps, tiny_config.val_every = True, 500, 1000
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        engine.train(tiny_config, tmp_path / name)
    assert_equal_state(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError(),
])  # fmt: skip
def test_out_of_memory_says_what_to_lower(tiny_config, tmp_path, monkeypatch, error):
    original = Learner.add_gradients

    def add_gradients(learner, step, batch):
        if step == 2:
            raise error
        return original(learner, step, batch)

    monkeypatch.setattr(Learner, "add_gradients", add_gradients)
    advice = "try a lower --data.batch-size (and --optim.accumulate), --data.crop or --loss.inplace-grad"
    with pytest.raises(TrainingError) as raised:
        engine.train(tiny_config, tmp_path)
    assert str(raised.value) == f"out of memory with 2 crops of 64x96; {advice}; at step 2"
    assert read_checkpoint(tmp_path / LAST)["state"]["step"] == 2


@pytest.mark.exhaustive
def test_loss_falls(tiny_config, tmp_path):
    tiny_config.optim.steps = 40
    engine.train(tiny_config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


@pytest.mark.exhaustive  # the default run stops one that has all that a recipe has
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_interrupted_and_resumed_equals_uninterrupted(tiny_config, tmp_path, monkeypatch, number, code):
    """Step 3 is inside the first epoch, so the stream of frames is taken up in its middle."""
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    engine.train(tiny_config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3, number)
        with pytest.raises(Interrupted, match="step 3; go on with --resume") as stopped:
            engine.train(tiny_config, tmp_path / "parts")
    assert stopped.value.exit_code == code
    assert read_checkpoint(tmp_path / "parts" / "checkpoints" / "last.pt")["state"]["step"] == 3
    engine.train(tiny_config, tmp_path / "parts", resume=True)
    assert_equal_state(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 4, 5, 6, 6]  # each training row once, and the evaluations of steps 4 and 6


@pytest.mark.exhaustive
def test_same_seed_same_weights_other_seed_others(tiny_config, tmp_path):
    tiny_config.optim.steps = 2
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        engine.train(dataclasses.replace(tiny_config, seed=seed), tmp_path / name)
    assert_equal_state(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    a, c = weights_of(tmp_path / "a"), weights_of(tmp_path / "c")
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_nan_loss_stops_with_step_files_and_advice(tiny_config, tmp_path, monkeypatch):
    original = Record.add

    def add(record, figures, batches):
        original(record, figures * (float("nan") if record.state.step == 5 else 1), batches)

    monkeypatch.setattr(Record, "add", add)
    message = r"got nan at step 5, on synthetic:\S+, synthetic:\S+; try .*; the last checkpoint, of step 4, is intact"
    with pytest.raises(TrainingError, match=message):
        engine.train(tiny_config, tmp_path)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.pt")["state"]["step"] == 4


@pytest.fixture
def spoiled(monkeypatch):
    """Steps (from 1) whose gradients overflow, in runs that scale their loss as fp16 does."""
    steps = set()
    scaler, original = torch.amp.GradScaler, Learner.add_gradients
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=4.0))

    def add_gradients(learner, step, batch):
        figures = original(learner, step, batch)
        if step + 1 in steps:
            next(learner.model.parameters()).grad.fill_(float("inf"))
        return figures

    monkeypatch.setattr(Learner, "add_gradients", add_gradients)
    return steps


def test_a_gradient_that_overflows_under_a_loss_scale_skips_its_step(tiny_config, tmp_path, spoiled, caplog):
    caplog.set_level("INFO", "bcmfnet")
    spoiled |= {2}
    tiny_config.optim.steps, tiny_config.log_every = 3, 3
    engine.train(tiny_config, tmp_path)
    (row,) = (row for row in rows_of(tmp_path) if "loss" in row)
    assert row["skipped"] == 1
    expected = "1 steps up to 3 had gradients beyond fp16 and were skipped; the loss scale is 2 now"
    assert expected in caplog.messages
    payload = read_checkpoint(tmp_path / LAST)
    assert payload["state"]["step"] == 3 and payload["scaler"]["scale"] == 2.0
    assert {int(state["step"]) for state in payload["optimizer"]["state"].values()} == {2}


def test_a_loss_scale_that_is_spent_ends_the_run(tiny_config, tmp_path, spoiled):
    spoiled |= {2, 3, 4}
    message = r"^gradients: expected finite numbers, got inf or nan at a loss scale of 0.5 at step 4; try a lower .*; "
    with pytest.raises(TrainingError, match=message + "the last checkpoint, of step 0, is intact$"):
        engine.train(tiny_config, tmp_path)
    assert read_checkpoint(tmp_path / LAST)["state"]["step"] == 0


@pytest.mark.usefixtures("spoiled")
def test_a_loss_scale_is_no_cure_for_a_loss_that_is_not_finite(tiny_config, tmp_path, monkeypatch):
    original = SegmentationLoss.forward

    def forward(loss, output, target, **options):
        factor = float("nan") if options["jitter"] == 1 else 1
        return original(loss, output._replace(logits=output.logits * factor), target, **options)

    monkeypatch.setattr(SegmentationLoss, "forward", forward)
    tiny_config.optim.steps = 2
    with pytest.raises(TrainingError, match=r"^loss: expected a finite number, got nan at step 2, on synthetic:"):
        engine.train(tiny_config, tmp_path)
    assert [row["step"] for row in rows_of(tmp_path)] == [1]
    assert read_checkpoint(tmp_path / LAST)["state"]["step"] == 0


class Broken(Exception):
    """What breaks a run in these tests."""


def break_off(*args, **options):
    raise Broken


def break_step(patch, step, where):
    """Break a step off at a place of it: in its forward, once batch norm has moved, or in its update."""
    if where == "update":
        original = torch.optim.AdamW.step

        def update(optimizer, *args, **options):
            original(optimizer, *args, **options)
            if optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == step:
                raise Broken

        patch.setattr(torch.optim.AdamW, "step", update)
        return
    original = Record.add

    def add(record, *args):
        original(record, *args)
        if record.state.step == step - 1:
            patch.setattr(SegmentationLoss, "forward", break_off)

    patch.setattr(Record, "add", add)


@pytest.mark.exhaustive
def test_broken_step_leaves_the_state_of_the_last_finished_one(tiny_config, tmp_path, monkeypatch, caplog):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    engine.train(dataclasses.replace(tiny_config, log_every=4), tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Broken):
        break_step(patch, 3, "forward")
        engine.train(dataclasses.replace(tiny_config, log_every=4), tmp_path / "parts")
    assert f"step 2 is saved; go on with --resume {tmp_path / 'parts'}" in caplog.messages
    assert read_checkpoint(tmp_path / "parts" / "checkpoints" / "last.pt")["state"]["step"] == 2
    engine.train(tiny_config, tmp_path / "parts", resume=True)
    assert_equal_state(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))


def test_half_an_update_is_not_saved(tiny_config, tmp_path, monkeypatch, caplog):
    with pytest.raises(Broken):
        break_step(monkeypatch, 2, "update")
        engine.train(tiny_config, tmp_path)
    message = "step 1 could not be saved (its successor's update was broken off half-way); go on from step 0 with"
    assert caplog.messages[-1].startswith(message)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.pt")["state"]["step"] == 0


def test_spoiled_weights_are_not_saved(tiny_config, tmp_path, monkeypatch):
    """The loss of step 4 is finite, its update is not: it is the state that an evaluation would save."""
    original = torch.optim.AdamW.step

    def update(optimizer, *args, **options):
        original(optimizer, *args, **options)
        first = optimizer.param_groups[0]["params"][0]
        if optimizer.state[first]["step"] == 4:
            first.data[0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", update)
    message = r"expected finite weights, got nan or inf after step 4; .*; the last checkpoint, of step 0, is intact"
    with pytest.raises(TrainingError, match=message):
        engine.train(tiny_config, tmp_path)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.pt")["state"]["step"] == 0


def test_state_is_saved_every_few_minutes(tiny_config, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(saver, "save_checkpoint", lambda path, state, *rest: saved.append(state.step))
    tiny_config.optim.steps, tiny_config.save_every_minutes = 3, 0
    engine.train(tiny_config, tmp_path)
    assert saved == [0, 1, 2, 3, 3, 3]  # each step, then before and after the evaluation


def test_training_in_a_thread_is_training(tiny_config, tmp_path):
    tiny_config.optim.steps = 1
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(engine.train, tiny_config, tmp_path).result().steps == 1


def test_full_disk_keeps_the_previous_checkpoint(tiny_config, tmp_path, monkeypatch):
    original = weights.os.replace

    def replace(source, target):
        if target.name == "last.pt" and target.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        original(source, target)

    monkeypatch.setattr(weights.os, "replace", replace)
    with pytest.raises(CheckpointError, match="last.pt: cannot be written: No space left on device"):
        engine.train(tiny_config, tmp_path)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.pt")["state"]["step"] == 0
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(("content", "message"), [
    (None, "found no file"), (b"", "no training checkpoint, or only the beginning of one"),
    (b"PK\x03\x04 half a zip", "no training checkpoint, or only the beginning of one"),
])  # fmt: skip
def test_unreadable_checkpoint_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "last.pt")


def test_truncated_and_foreign_checkpoints_are_refused(tiny_config, tmp_path):
    tiny_config.optim.steps = 1
    engine.train(tiny_config, tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    (earlier,) = earlier_checkpoints(path)
    earlier.unlink()
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="no training checkpoint, or only the beginning of one"):
        engine.train(tiny_config, tmp_path, resume=True)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="no training checkpoint, or only the beginning of one"):
        read_checkpoint(path)
    path.write_bytes(sealed({"state_dict": {}}))
    with pytest.raises(CheckpointError, match="expected a training checkpoint of format 3"):
        read_checkpoint(path)


class Killed(BaseException):
    """Stands for SIGKILL where nothing that is left to do on the way out would write."""


def killed_after_evaluation(config, folder, step):
    """A run that ends after an evaluation of a step is written down and before the state that knows of it is saved."""

    def save(path, state, *others):
        if state.evaluated == step:
            raise Killed
        save_checkpoint(path, state, *others)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(saver, "save_checkpoint", save)
        engine.train(config, folder)


@pytest.fixture
def every_kept_checkpoint_is_read(monkeypatch):
    """After each save of a run: what was damaged, or another run's, is not carried along."""

    def save(path, *parts):
        save_checkpoint(path, *parts)
        assert all(map(read_checkpoint, (path, *earlier_checkpoints(path))))

    monkeypatch.setattr(saver, "save_checkpoint", save)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.exhaustive
def test_a_killed_run_whose_files_are_damaged_ends_as_one_that_was_not(
    tiny_config, tmp_path, caplog, every_kept_checkpoint_is_read
):
    """Its last checkpoint is taken from the one before, its rows stand once, and its best weights are found again."""
    config = dataclasses.replace(tiny_config, val_every=0.5)
    config.optim.steps = 4
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    engine.train(config, whole)
    killed_after_evaluation(config, parts, step=2)
    assert [row["step"] for row in rows_of(parts) if "miou" in row] == [2]

    last, metrics, best = parts / LAST, parts / "metrics.jsonl", parts / "weights" / "best.safetensors"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    metrics.write_text(metrics.read_text() + "\0\0\0\n")
    best.unlink()
    caplog.clear()
    engine.train(config, parts, resume=True)
    assert_equal_state(weights_of(whole), weights_of(parts))
    times = dict.fromkeys(("images_per_s", *TIMES), 0)
    assert [row | times for row in rows_of(parts)] == [row | times for row in rows_of(whole)]
    assert (parts / "results.csv").read_text() == (whole / "results.csv").read_text()
    assert model_from_weights(best)[1] == model_from_weights(whole / "weights" / "best.safetensors")[1]
    assert warnings_of(caplog) == [
        f"{last}: damaged, its digest is not the one that was written with it; the run goes on from last-1.pt",
        f"{metrics}, line 4: expected a JSON object, got '\\x00\\x00\\x00'; "
        "left out with what else is damaged, 1 of 4 lines",
    ]


def test_a_run_that_lost_its_best_weights_and_its_rows_can_be_finished(tiny_config, tmp_path, caplog):
    tiny_config.optim.steps = 1
    first = engine.train(tiny_config, tmp_path)
    best, metrics = tmp_path / "weights" / "best.safetensors", tmp_path / "metrics.jsonl"
    evaluation = rows_of(tmp_path)[-1]
    for path in (best, metrics, tmp_path / "results.csv"):
        path.unlink()
    best.write_bytes(b"damaged")
    again = engine.train(tiny_config, tmp_path, resume=True)
    assert again.evaluation.to_dict()["iou"] == first.evaluation.to_dict()["iou"]
    assert rows_of(tmp_path) == [evaluation]
    assert model_from_weights(best)[1]["val_miou"] == evaluation["miou"]
    warnings = warnings_of(caplog)
    assert [message.partition(": ")[0] for message in warnings] == [str(best), str(metrics)]
    assert warnings[0].endswith("; the best weights from here on take their place")


def test_a_new_run_in_an_old_folder_does_not_keep_its_checkpoints(tiny_config, tmp_path, every_kept_checkpoint_is_read):
    """Or a damaged checkpoint of the new run would be followed by one of the old."""
    tiny_config.optim.steps = 1
    (tmp_path / "checkpoints").mkdir()
    for number in range(1, 4):
        (tmp_path / "checkpoints" / f"last-{number}.pt").write_bytes(b"old")
    (tmp_path / LAST).write_bytes(b"old")
    engine.train(tiny_config, tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["last-1.pt", "last.pt"]


def test_schedule_warms_up_and_decays():
    config = TrainConfig(data=DataConfig(batch_size=4))
    config.optim.lr, config.optim.warmup_steps, config.optim.epochs = 1.0, 4, 2
    plan = Schedule.of(config, 43)  # 10 full batches an epoch, the short one dropped
    assert (plan.steps_per_epoch, plan.steps, plan.evaluate_every) == (10, 20, 10)
    assert plan.lr(0) == pytest.approx(1 / 5)
    assert plan.lr(4) == pytest.approx((16 / 20) ** 0.9)
    assert plan.lr(19) == pytest.approx((1 / 20) ** 0.9)
    assert [step for step in range(21) if plan.evaluates(step)] == [0, 10, 20]


@pytest.mark.parametrize(("frames", "epochs", "message"), [
    (3, 1, "data.batch_size: expected at most the 3 frames"), (8, None, "expected one of the two, got neither"),
])  # fmt: skip
def test_schedule_refuses(frames, epochs, message):
    config = TrainConfig(data=DataConfig(batch_size=4))
    config.optim.epochs = epochs
    with pytest.raises(ConfigError, match=message):
        Schedule.of(config, frames)


def test_resume_is_exact_with_all_that_a_recipe_has(tiny_config, tmp_path, monkeypatch):
    """Stopped at steps 2 and 4: in the first crop's half, and in the second's while class weights go."""
    config = dataclasses.replace(
        tiny_config,
        data=dataclasses.replace(tiny_config.data, crops=("64x64@0.5",), balance=0.5),
        loss=LossConfig(class_weights="enet", class_weights_until=0.9),
        optim=dataclasses.replace(tiny_config.optim, ema=0.9, clip=1.0, schedule="cosine"),
    )
    sizes, norms = [], []
    gradients, clip = Learner.add_gradients, torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        Learner, "add_gradients", lambda *args: sizes.append(args[-1].labels.shape[1:]) or gradients(*args)
    )
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, norm: norms.append(norm) or clip(p, norm))
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    engine.train(config, tmp_path / "whole")
    assert sizes == [(64, 64)] * 3 + [(64, 96)] * 3 and norms == [1.0] * 6
    for step in (2, 4):
        with monkeypatch.context() as patch:
            stop_after(patch, step, signal.SIGUSR1)
            with pytest.raises(Interrupted):
                engine.train(config, tmp_path / "parts", resume=step == 4)
    engine.train(config, tmp_path / "parts", resume=True)
    whole, parts = (read_checkpoint(tmp_path / name / LAST) for name in ("whole", "parts"))
    for key in ("model", "average"):
        assert_equal_state(whole[key], parts[key])
    last, _ = weights.read_weights(tmp_path / "parts" / "weights" / "last.safetensors")
    assert_equal_state(last, parts["average"])
    assert any(not torch.equal(parts["average"][key], parts["model"][key]) for key in last)


def test_schedules():
    plan = Schedule.of(
        TrainConfig(
            data=DataConfig(crop=(100, 200), crops=("64x64@0.25", "80x90@.5"), batch_size=2),
            loss=LossConfig(class_weights="enet", class_weights_until=0.5),
            optim=OptimConfig(schedule="cosine", lr=2.0, steps=10),
        ),
        frames=8,
    )
    assert [plan.lr(step) for step in (0, 5)] == pytest.approx([2.0, 1.0])
    assert plan.lr(9) == pytest.approx(1 + math.cos(0.9 * math.pi))
    assert [plan.crop(step) for step in range(10)] == (
        [((64, 64), 3)] * 3 + [((80, 90), 5)] * 2 + [((100, 200), 10)] * 5
    )
    assert [step for step in range(1, 11) if plan.pauses(step)] == [3, 4, 5, 8, 10]
    assert [plan.class_weights_left(step) for step in (0, 1, 4, 5, 9)] == pytest.approx([1, 0.8, 0.2, 0, 0])


@pytest.mark.parametrize(("crops", "message"), [
    (("64x64",), "data.crops: expected HxW@SHARE such as 192x256@0.6, got '64x64'"),
    (("64x64@1.5",), "data.crops: expected HxW@SHARE such as 192x256@0.6, got '64x64@1.5'"),
    (("64x32@0.5",), "data.crops: expected height and width from 64 to 16384, got '64x32@0.5'"),
    (("64x64@0.5", "80x80@0.5"), "data.crops: expected shares that grow from above 0 to below 1, got"),
    (("64x64@0.0",), "data.crops: expected shares that grow from above 0 to below 1, got"),
])  # fmt: skip
def test_crops_refused(crops, message):
    with pytest.raises(ConfigError) as error:
        DataConfig(crops=crops)
    assert str(error.value).startswith(message)
