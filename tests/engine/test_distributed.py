"""Several processes train what one does that adds up their batches, stop together, and lose nothing when one dies."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import time

import pytest
import several
import torch

from bcmfnet.data import EpochSampler
from bcmfnet.engine import train as engine
from bcmfnet.engine.checkpoint import read_checkpoint
from bcmfnet.engine.distributed import launched_processes
from bcmfnet.engine.runtime import resolve_device
from bcmfnet.errors import ConfigError

LIMIT = 120  # seconds, for a machine with much else to do
ROUNDS = int(os.environ.get("BCMFNET_ROUNDS", "10"))


@pytest.fixture(scope="module")
def context():
    return several.context()


def run(context, count, folder, config, resume=False, strike=None):
    """Exit codes and last finished steps of `count` processes."""
    steps = context.Array("i", count, lock=False)
    processes = several.start(context, count, several.train, str(folder), config, resume, steps, strike)
    for process in processes:
        process.join(LIMIT)
    return [process.exitcode for process in processes], list(steps)


def state_of(folder):
    return read_checkpoint(folder / "checkpoints" / "last.pt")


def assert_close(a, b, tolerance=1e-6):
    for key in ("model", "average"):
        for name, tensor in a[key].items():
            torch.testing.assert_close(tensor, b[key][name], rtol=0, atol=tolerance, msg=f"{key}.{name}")


def numbers(tree):
    return [n for value in tree.values() for n in numbers(value)] if isinstance(tree, dict) else [tree]


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith("_s")} for row in rows]


def test_processes_do_what_one_does_that_adds_up_their_batches(context, tmp_path):
    """The weights to 1e-6, the average, the running statistics and the rows too; the scores of the same weights."""
    together, alone = tmp_path / "together", tmp_path / "alone"
    for folder in (together, alone):
        folder.mkdir()
    assert run(context, 2, together, several.small_config(steps=3))[0] == [0, 0]
    assert run(context, 1, alone, several.small_config(steps=3, accumulate=2))[0] == [0]
    assert_close(state_of(together), state_of(alone))
    for ours, theirs in zip(rows_of(together), rows_of(alone), strict=True):
        assert ours.pop("iou", None) == theirs.pop("iou", None)
        assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = (json.loads((folder / "evaluation.json").read_text()) for folder in (together, alone))
    for key in ("frames", "miou", "iou", "pixel_accuracy"):
        assert ours[key] == theirs[key]
    for key in ("boundary_iou", "boundary_f", "trimap_iou"):  # boundary F is a sum of fractions, in another order
        for a, b in zip(numbers(ours["boundary"][key]), numbers(theirs["boundary"][key]), strict=True):
            assert a == pytest.approx(b, rel=1e-12)


@pytest.mark.exhaustive
def test_three_processes_are_one_up_to_the_rounding_of_a_third(context, tmp_path):
    """A step of SGD, which does not make more of the rounding of a gradient that is nearly zero, as AdamW would."""
    together, alone = tmp_path / "together", tmp_path / "alone"
    for folder in (together, alone):
        folder.mkdir()
    config = {"name": "sgd", "steps": 1}
    assert run(context, 3, together, several.small_config(**config))[0] == [0] * 3
    assert run(context, 1, alone, several.small_config(**config, accumulate=3))[0] == [0]
    ours, theirs = state_of(together)["model"], state_of(alone)["model"]
    for name, tensor in ours.items():
        tolerance = 1e-4 * (1 + tensor.abs().max().item())  # what a bias before a batch norm has is rounding alone
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.exhaustive
def test_all_stop_at_one_step_when_one_is_asked_to_and_one_goes_on(context, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert run(context, 2, whole, several.small_config())[0] == [0, 0]
    codes, steps = run(context, 2, parts, several.small_config(), strike=(1, 3, signal.SIGTERM))
    assert (codes, steps) == ([143, 143], [3, 3])
    assert state_of(parts)["state"]["step"] == 3
    wrong = r"^optim.accumulate: expected 2 batches a step on all processes, as .*last.pt has them, got 1 on 1$"
    with pytest.raises(ConfigError, match=wrong):
        engine.train(several.small_config(), parts, resume=True)
    assert run(context, 1, parts, several.small_config(accumulate=2), resume=True)[0] == [0]
    assert_close(state_of(whole), state_of(parts))


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_others_and_costs_no_finished_step(context, tmp_path, rank):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert run(context, 2, whole, several.small_config())[0] == [0, 0]
    config = dataclasses.replace(several.small_config(), save_every_minutes=0)
    codes, _ = run(context, 2, parts, config, strike=(rank, 3, signal.SIGKILL))
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1
    assert (parts / f"rank{1 - rank}.err").read_text() == "a process of the run was lost at step 3"
    assert state_of(parts)["state"]["step"] == 3 - (rank == 0)
    assert run(context, 2, parts, config, resume=True)[0] == [0, 0]
    assert_close(state_of(whole), state_of(parts), tolerance=0)


@pytest.mark.exhaustive
@pytest.mark.timeout(60 * ROUNDS + LIMIT)
def test_rounds_of_kills(context, tmp_path):
    """One of two processes, or both, at a random moment; BCMFNET_ROUNDS rounds."""
    whole = tmp_path / "whole"
    whole.mkdir()
    config = dataclasses.replace(several.small_config(), save_every_minutes=0)
    assert run(context, 2, whole, config)[0] == [0, 0]
    for seed in range(ROUNDS):
        rng = random.Random(seed)
        (folder := tmp_path / str(seed)).mkdir()
        steps = context.Array("i", 2, lock=False)
        processes = several.start(context, 2, several.train, str(folder), config, False, steps)
        step = rng.randint(1, 5)
        deadline = time.monotonic() + LIMIT
        while steps[0] < step and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        struck = rng.choice(([0], [1], [0, 1]))
        for rank in struck:
            processes[rank].kill()
        for process in processes:
            process.join(LIMIT)
        ended = [process.exitcode for process in processes]
        saved = state_of(folder)["state"]["step"]
        print(f"round {seed}: killed {struck} after step {step}, codes {ended}, saved {saved}", flush=True)
        assert saved >= step - 1
        assert run(context, 2, folder, config, resume=True)[0] == [0, 0]
        assert_close(state_of(whole), state_of(folder), tolerance=0)
        shutil.rmtree(folder)


def test_what_the_leader_answers_and_raises_reaches_all(context):
    answers = context.Queue()
    for process in several.start(context, 2, several.ask_the_leader, answers):
        process.join(LIMIT)
    heard = sorted(answers.get(timeout=LIMIT) for _ in range(2))
    error = "invalid literal for int() with base 10: 'x'"
    assert heard == [(0, "by 0", error, 10), (1, "by 0", error, 10)]


SIZES = ((12, 16), (6, 8))  # of the logits: the target's, and upsampled inside
EVERY = list(itertools.product(several.SYNCED, SIZES))
FEW = [("plain", SIZES[0]), ("many terms", SIZES[1]), ("ohem", SIZES[1]), ("a batch without a valid pixel", SIZES[1])]


@pytest.mark.parametrize(("count", "cases", "dtype", "tolerance"), [
    (2, FEW, torch.float64, 1e-12),
    pytest.param(2, EVERY, torch.float64, 1e-12, marks=pytest.mark.exhaustive),
    pytest.param(3, EVERY, torch.float64, 1e-12, marks=pytest.mark.exhaustive),
    pytest.param(2, EVERY, torch.float32, 2e-5, marks=pytest.mark.exhaustive),
])  # fmt: skip
def test_a_shared_loss_and_its_gradients_are_those_of_the_whole_batch(context, count, cases, dtype, tolerance):
    answers = context.Queue()
    started = several.start(context, count, several.synced_losses, dtype, cases, answers)
    heard = [answers.get(timeout=LIMIT) for _ in range(count * len(cases))]
    for process in started:
        process.join(LIMIT)
    assert [(case, error) for case, error, _ in heard if not error <= tolerance] == []
    assert [case for case, _, equal in heard if not equal] == []


def test_losses_share_their_batches_where_they_are_asked_to(context):
    answers = context.Queue()
    for process in several.start(context, 2, several.losses_that_share, answers):
        process.join(LIMIT)
    assert [answers.get(timeout=LIMIT) for _ in range(2)] == [[True, False] * 3] * 2


def test_a_world_size_that_no_launcher_explains(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    expected = "WORLD_SIZE: expected RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT beside 2, got no RANK; "
    with pytest.raises(ConfigError, match=expected), launched_processes():
        pass
    with pytest.raises(ConfigError, match="^WORLD_SIZE: expected one process, got 2; start it without torchrun$"):
        resolve_device("cpu")


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_the_frames_of_a_step_depend_on_its_batches_alone(world_size, accumulate):
    """Of 53 frames four steps of 6 x 2; each rank has its batches of a step one after another."""
    samplers = [EpochSampler(53, 1, True, r, world_size, 0, 0, 2, accumulate) for r in range(world_size)]
    whole = EpochSampler(53, 1, multiple=12)
    assert {len(sampler) for sampler in samplers} == {8 * accumulate}
    streams = [iter(sampler) for sampler in samplers]
    expected = iter(whole)
    for _ in range(6):  # into the second epoch
        parts = [[next(stream) for _ in range(2)] for stream in streams for _ in range(accumulate)]
        block = [next(expected) for _ in range(12)]
        assert parts == [block[part::6] for part in range(6)]
