import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data._utils import signal_handling

from bcmfnet.data import EpochSampler, SyntheticStreets, TrainTransform, build_dataset, eval_loader, train_loader
from bcmfnet.data.labels import make_label_table
from bcmfnet.data.loader import AUGMENTATION, stream
from bcmfnet.data.workers import STOP_SIGNALS
from bcmfnet.errors import ConfigError, DataError

TRANSFORM = TrainTransform((64, 64))
posix = pytest.mark.skipif(os.name != "posix", reason="no signals to a process")
STREETS = SyntheticStreets(11, size=(64, 96))  # 11: two batches of 4 and a rest of 3 that is dropped


def take(count, **options):
    loader = train_loader(STREETS, TRANSFORM, **{"batch_size": 4, "seed": 1, "workers": 0} | options)
    return list(islice(loader, count))


def assert_same(a, b):
    assert a.files == b.files
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_batch():
    (batch,) = take(1)
    assert batch.images.shape == (4, 3, 64, 64) and batch.images.dtype == torch.uint8
    assert batch.labels.shape == (4, 64, 64) and batch.labels.dtype == torch.uint8
    assert len(batch.files) == 4 and all(files[0].startswith("synthetic:train:0/") for files in batch.files)


def test_batch_holds_the_augmented_frames_of_its_files():
    (batch,) = take(1)
    for image, label, files in zip(*batch[:3], strict=True):
        index = int(files[0].split("/")[1])
        expected = TRANSFORM(*STREETS.read(index), stream(1, AUGMENTATION, 0, index))
        assert np.array_equal(image, expected[0]) and np.array_equal(label, expected[1])


# From the start, within an epoch, its last batch, the start of the second epoch, within the third.
@pytest.mark.parametrize("at", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_stream_is_the_uninterrupted_one(at, workers):
    whole = take(8)
    assert len(train_loader(STREETS, TRANSFORM, batch_size=4, seed=1, workers=0)) == 2
    for a, b in zip(whole[at:], take(8 - at, start=divmod(at, 2), workers=workers), strict=True):
        assert_same(a, b)


def test_epochs_differ_in_order_and_augmentation():
    batches = take(8)
    assert len({tuple(batch.files) for batch in batches}) == 8
    first = {files: image for batch in batches[:2] for files, image in zip(batch.files, batch.images, strict=True)}
    second = {files: image for batch in batches[2:4] for files, image in zip(batch.files, batch.images, strict=True)}
    shared = first.keys() & second.keys()
    assert shared and not any(torch.equal(first[files], second[files]) for files in shared)


def test_seed_changes_the_stream():
    assert take(1)[0].files != take(1, seed=2)[0].files


def test_ranks_share_an_epoch_out():
    batches = [take(3, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    for epoch in ((0, 2), (2, 3)):
        files = [name for rank in batches for batch in rank[slice(*epoch)] for name in batch.files]
        assert len(set(files)) == len(files)
    single = take(2)
    assert {f for rank in batches for batch in rank[:2] for f in batch.files} == {f for b in single for f in b.files}


# One process with a rest, two with a rest, three that divide evenly.
@pytest.mark.parametrize(
    ("length", "world_size", "multiple", "expected"), [(11, 1, 4, 8), (11, 2, 2, 4), (12, 3, 4, 4)]
)
def test_sampler_covers_an_epoch_without_repeats(length, world_size, multiple, expected):
    ranks = [EpochSampler(length, 0, True, r, world_size, multiple=multiple) for r in range(world_size)]
    assert {len(sampler) for sampler in ranks} == {expected}
    for epoch in (0, 1):
        keys = [key for sampler in ranks for key in islice(sampler, epoch * expected, (epoch + 1) * expected)]
        assert {key[0] for key in keys} == {epoch}
        indices = [key[1] for key in keys]
        assert len(set(indices)) == len(indices) == expected * world_size
        assert set(indices) <= set(range(length))


def test_sampler_in_order():
    assert list(islice(EpochSampler(3, 0, shuffle=False, start_index=1), 5)) == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_batch_of_one_and_small_dataset_are_refused():
    with pytest.raises(ConfigError, match="batch_size: expected at least 2"):
        take(1, batch_size=1)
    with pytest.raises(ConfigError, match="needs 12 frames, but train has 11"):
        take(1, batch_size=12)
    with pytest.raises(ConfigError, match="on 3 processes needs 12 frames"):
        take(1, world_size=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_error_of_a_worker_is_its_own_line(segnet_root, workers):
    path = segnet_root / "train" / "b.png"
    path.write_bytes(path.read_bytes()[:60])
    dataset = build_dataset("camvid11-segnet", segnet_root, "train")
    loader = train_loader(dataset, TrainTransform((8, 8)), batch_size=3, seed=0, workers=workers)
    with pytest.raises(DataError) as caught:
        next(iter(loader))
    assert str(caught.value) == f"{path}: truncated PNG"


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_frame_stands_in_for_one_that_cannot_be_read(segnet_root, workers):
    """In its place of the batch, as it would be augmented by itself; the others are as they were."""
    whole = build_dataset("camvid11-segnet", segnet_root, "train")
    options = {"batch_size": 3, "seed": 0, "workers": workers, "strict": False}
    before = next(iter(train_loader(whole, TrainTransform((8, 8)), **options)))
    path = segnet_root / "train" / "b.png"
    path.write_bytes(path.read_bytes()[:60])
    batch = next(iter(train_loader(whole, TrainTransform((8, 8)), **options)))
    assert batch.problems == [f"{path}: truncated PNG"] and before.problems == []
    broken, stand_in = ([names[0] for names in before.files].index(str(segnet_root / "train" / f"{name}.png"))
                        for name in "bc")  # fmt: skip
    expected = [stand_in if place == broken else place for place in range(3)]
    assert batch.files == [before.files[place] for place in expected]
    assert torch.equal(batch.images, before.images[expected]) and torch.equal(batch.labels, before.labels[expected])
    for name in "ac":
        path = segnet_root / "train" / f"{name}.png"
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match="[abc].png: truncated PNG$"):
        next(iter(train_loader(whole, TrainTransform((8, 8)), **options)))


@pytest.mark.parametrize("workers", [0, 1])
def test_eval_loader_gives_each_frame_once_in_order(workers):
    loader = eval_loader(STREETS, batch_size=4, workers=workers)
    batches = list(loader)
    assert [len(batch.files) for batch in batches] == [4, 4, 3] and len(loader) == 3
    assert [files for batch in batches for files in batch.files] == [STREETS.files(i) for i in range(11)]
    image, label = STREETS.read(5)
    assert np.array_equal(batches[1].images[1], image.transpose(2, 0, 1))
    assert np.array_equal(batches[1].labels[1], label)


class Probe:
    """Frames of growing size; a label tells how many of the signals that stop a run its reader ignores."""

    table = make_label_table("probe", 4)
    split, unpaired = "val", ()

    def __len__(self):
        return 3

    def name(self, i):
        return str(i)

    def files(self, i):
        return (f"probe{i}",)

    def read(self, i):
        state = sum(signal.getsignal(number) == signal.SIG_IGN for number in STOP_SIGNALS)
        return np.zeros((4 + i, 6, 3), np.uint8), np.full((4 + i, 6), state, np.uint8)


def test_eval_loader_takes_frames_of_several_sizes_one_by_one():
    assert [tuple(batch.images.shape) for batch in eval_loader(Probe())] == [(1, 3, 4 + i, 6) for i in range(3)]
    with pytest.raises(DataError, match="probe1: 6x5 pixels in one batch with 6x4 of probe0"):
        list(eval_loader(Probe(), batch_size=2))


def test_workers_leave_signals_to_the_parent():
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    try:
        for batch in eval_loader(Probe(), workers=1):
            assert (batch.labels == len(STOP_SIGNALS)).all(), "a worker that dies of Ctrl-C"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)


class Signalled(Probe):
    """Frames whose reader sends itself a signal."""

    def __init__(self, number, at=0):
        self.number, self.at = number, at

    def read(self, i):
        if i == self.at:
            os.kill(os.getpid(), self.number)
        return np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.uint8)


@posix
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_stop_signal_to_a_worker_changes_nothing(number):
    assert [batch.files for batch in eval_loader(Signalled(number, 1), workers=1)] == [
        [(f"probe{i}",)] for i in range(3)
    ]


@posix
def test_killed_worker_is_one_clear_error_and_no_signal_handler_raises():
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(DataError, match=r"loader: expected 1 processes, got one \(pid \d+\) ended by SIGKILL; where "):
        list(eval_loader(Signalled(signal.SIGKILL), workers=1))
    assert signal.getsignal(signal.SIGCHLD) is before
    with pytest.raises(DataError, match="/dev/shm: expected room for the batches of 1 loader processes, got a full "):
        list(eval_loader(Signalled(signal.SIGBUS), workers=1))


@posix
def test_worker_that_is_killed_while_the_others_start(monkeypatch):
    """At the first moment at which torch's handler of its death would raise."""
    original = signal_handling._set_SIGCHLD_handler

    def kill_one():
        original()
        os.kill(min(child.pid for child in multiprocessing.active_children()), signal.SIGKILL)
        time.sleep(0.2)

    before = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    monkeypatch.setattr(signal_handling, "_set_SIGCHLD_handler", kill_one)
    expected = r"^loader: DataLoader worker \(pid \d+\) is killed by signal: Killed; where memory is short try "
    try:
        with pytest.raises(DataError, match=expected):
            list(eval_loader(STREETS, workers=2))
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert not multiprocessing.active_children()


@posix
def test_no_worker_is_left_where_not_all_can_be_started(monkeypatch):
    """A worker heeds no SIGTERM, so this process would wait for it at its end."""
    original, started = multiprocessing.process.BaseProcess.start, []

    def start(process):
        if started:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        original(process)
        started.append(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    expected = "data.workers: expected to start 2 loader processes, got Resource temporarily unavailable; try "
    with pytest.raises(DataError, match=expected):
        list(eval_loader(STREETS, workers=2))
    assert len(started) == 1 and not started[0].is_alive()
    assert not multiprocessing.active_children()


@posix
def test_silent_worker_is_named_then_ends_the_loader(caplog):
    with pytest.raises(
        DataError, match=r"loader: no batch for 2 s from processes \d+, which read probe0; data.workers"
    ):
        list(eval_loader(Signalled(signal.SIGSTOP), workers=1, patience=2))
    (warning,) = caplog.messages
    assert re.fullmatch(r"loader: no batch for 1 s from processes \d+, which read probe0; still waiting", warning)
    assert not multiprocessing.active_children()


@posix
def test_stop_is_honoured_while_a_worker_hangs():
    start = time.monotonic()
    batches = list(eval_loader(Signalled(signal.SIGSTOP), workers=1, should_stop=After(3)))
    assert batches == [] and time.monotonic() - start < 60
    assert not multiprocessing.active_children()


class After:
    """Becomes true some seconds from now."""

    def __init__(self, seconds):
        self.at = time.monotonic() + seconds

    def __bool__(self):
        return time.monotonic() > self.at


def test_full_shared_memory_is_one_clear_error(monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    expected = "expected room for the batches of 1 loader processes, got a full file system; try --data.workers 0"
    with pytest.raises(DataError, match=f"/dev/shm: {expected}"):
        list(eval_loader(Probe(), workers=1))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch's own watch ends them after some seconds")
def test_workers_end_with_a_killed_parent(tmp_path):
    """Also one that is stopped, which would never look for its parent."""
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1]); from test_loader import Signalled, eval_loader\n"
        "class Told(Signalled):\n"
        "    def read(self, i): print(os.getpid(), flush=True); return super().read(i)\n"
        "list(eval_loader(Told(signal.SIGSTOP), workers=1))\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 10
    while _lives(worker):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_loaders_leave_the_random_generator_alone():
    before = torch.get_rng_state()
    take(1, workers=1)
    assert torch.equal(torch.get_rng_state(), before)
