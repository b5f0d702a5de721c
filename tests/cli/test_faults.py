"""Faults of disks and frames under a run: one line says what happened, and the last finished step is not lost."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from frames import write_frame
from tiny import TINY

from bcmfnet.engine import report
from bcmfnet.engine.checkpoint import LAST, read_checkpoint
from bcmfnet.engine.learner import Learner

STEPS = ("--optim.steps", "4", "--log-every", "1", "--keep", "1", "--save-every-minutes", "0")


@pytest.fixture(autouse=True)
def nothing_is_drawn(monkeypatch):
    monkeypatch.setattr(report, "draw_run", lambda *arguments: None)


def run_of(folder: Path) -> dict:
    return read_checkpoint(folder / LAST)


def rows_of(folder: Path) -> list[dict]:
    """Rows of a run but for their times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith("_s")} for row in rows]


def assert_same_weights(a: Path, b: Path) -> None:
    """Bit for bit."""
    ours, theirs = run_of(a)["model"], run_of(b)["model"]
    assert [key for key in ours if not ours[key].equal(theirs[key])] == []


@contextlib.contextmanager
def after_step(step: int, action):
    """Do something once a step is done and not yet written down."""
    original = Learner.update

    def update(learner, state):
        original(learner, state)
        if state.step == step:
            action()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "update", update)
        yield


def mount(*words: object) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """A disk of 400 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=400m", "none", folder)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def whole(bcmfnet, tmp_path):
    """A run that nothing disturbs."""
    assert bcmfnet("train", *TINY, *STEPS, "-q", "--output-dir", tmp_path / "whole").code == 0
    return tmp_path / "whole"


def fill(folder: Path) -> None:
    """Leave nothing of a disk."""
    free = os.statvfs(folder)
    with (folder / "filler").open("wb") as file, contextlib.suppress(OSError):
        file.write(bytes(free.f_bavail * free.f_frsize))
        file.flush()


@pytest.mark.exhaustive
def test_a_disk_that_gets_full(bcmfnet, disk, whole):
    """At the checkpoint of step 2; that of step 1 is whole, and the run goes on from there."""
    run = disk / "run"
    with after_step(2, lambda: fill(disk)):
        failed = bcmfnet("train", *TINY, *STEPS, "-q", "--output-dir", run)
    line = f"bcmfnet: {run}/checkpoints/last.pt: cannot be written: No space left on device\n"
    assert (failed.code, failed.err) == (1, line)
    assert run_of(run)["state"]["step"] == 1 and not list(disk.rglob("*.tmp"))
    (disk / "filler").unlink()
    assert bcmfnet("train", "--resume", run, "-q").code == 0
    assert_same_weights(run, whole)
    assert rows_of(run) == rows_of(whole)


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file that is always full")
def test_a_log_and_rows_that_cannot_be_written(bcmfnet, tmp_path, whole):
    """A log costs nothing but its lines, a row ends the run; the state is saved all the same."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "train.log").symlink_to("/dev/full")
    rows, aside = run / "metrics.jsonl", run / "aside.jsonl"

    def lose_rows():
        rows.rename(aside)
        rows.symlink_to("/dev/full")

    with after_step(2, lose_rows):
        failed = bcmfnet("train", *TINY, *STEPS, "-q", "--exist-ok", "--output-dir", run)
    saved = f"step 2 is saved; go on with --resume {run}"
    assert failed.err.splitlines() == [saved, f"bcmfnet: [Errno 28] No space left on device: '{rows}'"]
    assert run_of(run)["state"]["step"] == 2
    aside.rename(rows)
    assert bcmfnet("train", "--resume", run, "-q").code == 0
    assert_same_weights(run, whole)
    assert rows_of(run) == [row for row in rows_of(whole) if row["step"] != 2]


@pytest.mark.exhaustive
def test_a_folder_that_becomes_read_only(bcmfnet, disk, whole):
    run = disk / "run"

    def make_read_only():
        mount("--bind", run, run)
        mount("-o", "remount,bind,ro", run)

    with after_step(3, make_read_only):
        failed = bcmfnet("train", *TINY, *STEPS, "-q", "--output-dir", run)
    problem = "Read-only file system"
    assert failed.code == 1 and failed.err.splitlines()[-1] == f"bcmfnet: [Errno 30] {problem}: '{run}/metrics.jsonl'"
    assert run_of(run)["state"]["step"] == 2
    refused = bcmfnet("train", "--resume", run, "-q")
    assert (
        refused.code == 2 and refused.err == f"bcmfnet: --resume: expected a folder to write to, got {run}: {problem}\n"
    )
    subprocess.run(["umount", "-l", run], check=True)
    assert bcmfnet("train", "--resume", run, "-q").code == 0
    assert_same_weights(run, whole)
    assert rows_of(run) == rows_of(whole)


@pytest.fixture
def frames(tmp_path):
    """Eight frames of three classes to train on, one to validate on."""
    for number in range(9):
        split = "train" if number < 8 else "val"
        ids = np.random.default_rng(number).integers(0, 3, (72, 104), dtype=np.uint8)
        write_frame(tmp_path / f"images/{split}/{number}.png", tmp_path / f"labels/{split}/{number}.png", ids, number)
    return tmp_path


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_frame_that_is_damaged_in_mid_epoch(bcmfnet, frames, strict):
    """Another one stands in for it, which is told once and counted; or the run ends where it is met, in step 3."""
    run, damaged = frames / "run", frames / "images/train/5.png"
    flags = ("--data.name", "folder", "--data.root", frames, "--data.num-classes", "3", "--optim.steps", "4")
    with after_step(1, lambda: damaged.write_bytes(damaged.read_bytes()[:200])):
        small = [word for word in TINY if word not in ("--data.length", "8")]
        result = bcmfnet("train", *small, *flags, *["--data.strict"] * strict, "-q", "--output-dir", run)
    if strict:
        saved = f"step 2 is saved; go on with --resume {run}"
        assert (result.code, result.err.splitlines()) == (1, [saved, f"bcmfnet: {damaged}: truncated PNG"])
        assert run_of(run)["state"]["step"] == 2
    else:
        told = f"{damaged}: truncated PNG; another frame stands in for it"
        counted = "1 frames cannot be read; another one stood in for them 1 times"
        assert (result.code, result.err.splitlines()) == (0, [told, counted])
        assert run_of(run)["state"]["step"] == 4
