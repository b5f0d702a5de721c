"""Signals and kills at random moments of a run with workers: nothing is lost but what cannot be kept."""

from __future__ import annotations

import collections
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import interrupted
import pytest
from interrupted import ENTERED, PHASES, SAVED, STEP

from bcmfnet.data.workers import STOP_SIGNALS
from bcmfnet.engine.checkpoint import read_checkpoint
from bcmfnet.models.weights import read_weights

ROUNDS = int(os.environ.get("BCMFNET_ROUNDS", "20"))
SEED = int(os.environ.get("BCMFNET_ROUNDS_SEED", "0"))
TARGETS = ("process", "group", "worker")
LIMIT = 120  # seconds, for a machine with much else to do

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")


@pytest.fixture(scope="module")
def context():
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["interrupted", "bcmfnet.inference.network", "matplotlib.pyplot", "safetensors.torch"]
    )
    return context


@pytest.fixture(scope="module")
def whole(context, tmp_path_factory) -> str:
    """Digest of the weights of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(context, folder, 10, resume=False) == 0
    return digest(folder)


def start(context, folder, minutes, resume):
    shared = context.Array("i", ENTERED + len(PHASES), lock=False)
    process = context.Process(target=interrupted.train, args=(str(folder), minutes, resume, shared))
    process.start()
    return process, shared


def finish(context, folder, minutes, resume):
    process, _ = start(context, folder, minutes, resume)
    process.join(LIMIT)
    return process.exitcode


def digest(folder: Path) -> str:
    """SHA-256 of names and values of the last weights."""
    state, _ = read_weights(folder / "weights" / "last.safetensors")
    total = hashlib.sha256()
    for key in sorted(state):
        total.update(key.encode() + state[key].numpy().tobytes())
    return total.hexdigest()


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, process=None) -> bool:
    deadline = time.monotonic() + LIMIT
    while not condition():
        if process is not None and not process.is_alive():
            return False
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return True


def strike(process, shared, rng, number, target, phase) -> set[int]:
    """Send the signal a moment after the phase has begun for the n-th time; the processes of the run until then."""
    begins = 3 if phase == PHASES.index("checkpoint") else 1  # the checkpoint of step 0 is a whole one
    nth = rng.randint(begins, begins + 1) if phase else 1
    wait_for(lambda: shared[ENTERED + phase] >= nth and children(process.pid), process)
    time.sleep(rng.choice((0, rng.uniform(0, 0.02), rng.uniform(0, 0.3))))
    workers = children(process.pid)
    try:
        if target == "process":
            os.kill(process.pid, number)
        elif target == "group":
            os.killpg(process.pid, number)
        elif workers:
            os.kill(rng.choice(workers), number)
    except ProcessLookupError:
        pass
    return {process.pid, *workers}


def play(context, folder, whole, number, target, phase, rng) -> str:
    """One round; what became of the run that was struck."""
    minutes = rng.choice((0, 10))
    process, shared = start(context, folder, minutes, resume=False)
    struck = strike(process, shared, rng, number, target, phase)
    process.join(LIMIT)
    code = process.exitcode
    struck_down = number == signal.SIGKILL and target != "worker"
    stopped = {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}.get(number, 143)
    allowed = {0, stopped} if target != "worker" else {0, 1} if number == signal.SIGKILL else {0}
    assert code in allowed
    assert wait_for(lambda: not any(map(lives, struck))), "processes outlive the run"
    step = read_checkpoint(folder / "checkpoints" / "last.pt")["state"]["step"]
    assert step >= shared[SAVED] if struck_down else step == shared[STEP]
    if code:
        assert finish(context, folder, minutes, resume=True) == 0
    assert digest(folder) == whole
    return f"exit {code}"


@pytest.mark.exhaustive
@pytest.mark.parametrize(("number", "target", "phase"), [
    (signal.SIGTERM, "group", "training"), (signal.SIGKILL, "worker", "training"),
])  # fmt: skip
def test_struck_run_resumes_to_the_same_weights(context, whole, tmp_path, number, target, phase):
    play(context, tmp_path, whole, number, target, PHASES.index(phase), random.Random(SEED))


@pytest.mark.exhaustive
@pytest.mark.timeout(200 * ROUNDS + LIMIT)
def test_rounds_of_signals_and_kills(context, whole, tmp_path):
    """BCMFNET_ROUNDS rounds from BCMFNET_ROUNDS_SEED on; each is printed, and the table of outcomes at the end."""
    table = collections.Counter()
    for seed in range(SEED, SEED + ROUNDS):
        rng = random.Random(seed)
        number, target = rng.choice((*STOP_SIGNALS, signal.SIGKILL)), rng.choice(TARGETS)
        phase = rng.randrange(len(PHASES))
        print(f"round {seed}: {number.name} to the {target} at {PHASES[phase]}", end=" ", flush=True)
        (folder := tmp_path / str(seed)).mkdir()
        outcome = play(context, folder, whole, number, target, phase, rng)
        shutil.rmtree(folder)
        print(outcome, flush=True)
        table[number.name, target, PHASES[phase], outcome] += 1
    for key, count in sorted(table.items()):
        print(*key, count)
