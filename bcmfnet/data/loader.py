"""Streams of batches that a resumed run takes up exactly where an interrupted one left them.

Order is a function of (seed, epoch) and augmentation of (seed, epoch, index), so a position in the stream is two
numbers and no worker has state to keep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, get_worker_info

from bcmfnet.data.pairs import Dataset
from bcmfnet.data.transforms import EvalTransform, TrainTransform
from bcmfnet.data.workers import FULL_SHM, PATIENCE, POLL, WorkerStream, start_worker
from bcmfnet.errors import ConfigError, DataError

ORDER, AUGMENTATION = 0, 1  # keys that keep the two kinds of random streams apart


class Batch(NamedTuple):
    """Frames of one size: images uint8 [N, 3, H, W], labels uint8 [N, H, W], and the files of each frame.

    problems has a line for each frame that could not be read, and that another one stands in for.
    """

    images: Tensor
    labels: Tensor
    files: list[tuple[str, ...]]
    problems: list[str]


Sample = tuple[np.ndarray, np.ndarray, tuple[str, ...], str | None]
STAND_INS = 8  # frames that are tried in the place of one that cannot be read


def stream(seed: int, *key: int) -> np.random.Generator:
    """The generator of a key, independent of those of all other keys."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


class EpochSampler(Sampler[tuple[int, int]]):
    """Endless (epoch, index), a new order each epoch when shuffled; each rank takes every world_size-th index.

    Args:
        length: frames of the dataset.
        multiple: the indices of an epoch and rank are cut down to a multiple of this, so that batches of that size
            never hold frames of two epochs.
        accumulate: batches that a rank adds up before it steps. They are, in turn, those that as many ranks would
            have, so the frames of a step depend on world_size * accumulate alone.
        start_epoch, start_index: where to begin; start_index counts this rank's indices within the epoch.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        start_epoch: int = 0,
        start_index: int = 0,
        multiple: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self.parts = world_size * accumulate
        self.mine = slice(rank * accumulate, (rank + 1) * accumulate)
        self.multiple = multiple
        self.start_epoch, self.start_index = start_epoch, start_index
        self.steps = length // (self.parts * multiple)
        self.per_epoch = self.steps * multiple * accumulate

    def __len__(self) -> int:
        """Indices of an epoch on this rank."""
        return self.per_epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, start = self.start_epoch, self.start_index
        while self.per_epoch:
            shuffled = self.shuffle
            order = stream(self.seed, ORDER, epoch).permutation(self.length) if shuffled else np.arange(self.length)
            whole = order[: self.steps * self.multiple * self.parts].reshape(self.steps, self.multiple, self.parts)
            for index in whole[:, :, self.mine].swapaxes(1, 2).reshape(-1)[start:]:
                yield epoch, int(index)
            epoch, start = epoch + 1, 0


@dataclass(frozen=True)
class TrainSamples(torch.utils.data.Dataset[Sample | DataError]):
    """Map (epoch, index) to an augmented frame; a DataError is returned, for `collate` to hand to the parent.

    Where `strict` is off, the next frame of the dataset that can be read stands in for one that cannot.
    """

    dataset: Dataset
    transform: TrainTransform
    seed: int
    strict: bool = True

    def __getitem__(self, key: tuple[int, int]) -> Sample | DataError:
        sample = self._augmented(*key)
        if self.strict or not isinstance(sample, DataError):
            return sample
        epoch, index = key
        for step in range(1, STAND_INS + 1):
            other = self._augmented(epoch, (index + step) % len(self.dataset))
            if not isinstance(other, DataError):
                return *other[:3], str(sample)
        return sample

    def _augmented(self, epoch: int, index: int) -> Sample | DataError:
        rng = stream(self.seed, AUGMENTATION, epoch, index)
        return _load(self.dataset, index, lambda image, label: self.transform(image, label, rng))

    def files(self, key: tuple[int, int]) -> tuple[str, ...]:
        return self.dataset.files(key[1])

    def __len__(self) -> int:
        return len(self.dataset)


@dataclass(frozen=True)
class EvalSamples(torch.utils.data.Dataset[Sample | DataError]):
    """Map an index to a whole frame; a DataError is returned, for `collate` to hand to the parent."""

    dataset: Dataset

    def __getitem__(self, index: int) -> Sample | DataError:
        return _load(self.dataset, index, EvalTransform())

    def files(self, index: int) -> tuple[str, ...]:
        return self.dataset.files(index)

    def __len__(self) -> int:
        return len(self.dataset)


def _load(dataset: Dataset, index: int, transform) -> Sample | DataError:
    try:
        image, label = transform(*dataset.read(index))
    except DataError as error:
        return error
    return image, label, dataset.files(index), None


def collate(samples: Sequence[Sample | DataError]) -> Batch | DataError:
    """Stack frames of one size. An error passes as a value: raised in a worker, torch would wrap its one line."""
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    images, labels, files, problems = zip(*samples, strict=True)
    for label, names in zip(labels, files, strict=True):
        if label.shape != labels[0].shape:
            return DataError(
                f"{names[0]}: {label.shape[1]}x{label.shape[0]} pixels in one batch with {labels[0].shape[1]}x"
                f"{labels[0].shape[0]} of {files[0][0]}; frames of several sizes need batch_size 1"
            )
    told = [problem for problem in problems if problem is not None]
    batch = Batch(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels)), list(files), told)
    if (worker := get_worker_info()) is not None:
        # On its way to the parent a batch goes to shared memory anyway; where that fails there, torch only prints.
        try:
            batch.images.share_memory_()
            batch.labels.share_memory_()
        except RuntimeError as error:
            full = "No space left" in str(error)
            return DataError(FULL_SHM.format(workers=worker.num_workers) if full else f"shared memory: {error}")
    return batch


class BatchLoader:
    """Iterates over batches and raises here the DataError that a worker met. `len` is the batches of an epoch.

    Args:
        should_stop: asked for its truth while a batch of a worker is waited for; the batches end where it is true.
        patience: seconds without a batch from the workers after which a DataError is raised; a warning comes before.
    """

    def __init__(self, loader: DataLoader, should_stop: object = False, patience: float = PATIENCE) -> None:
        self.loader, self.should_stop, self.patience = loader, should_stop, patience

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Generator[Batch, None, None]:
        with contextlib.closing(self._results()) as results:
            for batch in results:
                if isinstance(batch, DataError):
                    raise batch
                yield batch

    def _results(self) -> Generator[Batch | DataError, None, None]:
        if self.loader.num_workers == 0:
            yield from self.loader
            return
        samples, batches = self.loader.dataset, self.loader.batch_sampler
        assert isinstance(samples, TrainSamples | EvalSamples) and batches is not None  # as `_loader` makes them
        with contextlib.closing(WorkerStream(self.loader, self.patience)) as stream:
            for keys in batches:
                files = [samples.files(key)[0] for key in keys]
                batch = stream.next(self.should_stop, files)
                if batch is None:
                    return
                yield batch


def train_loader(
    dataset: Dataset,
    transform: TrainTransform,
    *,
    batch_size: int,
    seed: int,
    workers: int,
    start: tuple[int, int] = (0, 0),
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
    strict: bool = True,
    should_stop: object = False,
    patience: float = PATIENCE,
) -> BatchLoader:
    """Endless batches of augmented frames, from step start[1] of epoch start[0] on; short batches are dropped.

    A step takes `accumulate` batches on each of world_size ranks. strict is TrainSamples', should_stop and patience are
    `BatchLoader`'s.

    Raises:
        ConfigError: batch_size < 2 (BatchNorm on the 1x1 map needs two values), or a dataset smaller than a batch.
    """
    if batch_size < 2:
        raise ConfigError(
            f"batch_size: expected at least 2 for each process (BatchNorm on a 1x1 map), got {batch_size}"
        )
    frames = batch_size * world_size * accumulate
    if len(dataset) < frames:
        times = f"{batch_size} on {world_size} processes" + (f", {accumulate} times a step," if accumulate > 1 else "")
        raise ConfigError(f"batch_size: {times} needs {frames} frames, but {dataset.split} has {len(dataset)}")
    epoch, steps = start
    start_index = steps * batch_size * accumulate
    sampler = EpochSampler(len(dataset), seed, True, rank, world_size, epoch, start_index, batch_size, accumulate)
    loader = _loader(TrainSamples(dataset, transform, seed, strict), batch_size, workers, sampler)
    return BatchLoader(loader, should_stop, patience)


def eval_loader(
    dataset: Dataset,
    *,
    batch_size: int = 1,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    should_stop: object = False,
    patience: float = PATIENCE,
) -> BatchLoader:
    """Every frame once and in order, each world_size-th of them on a rank. A batch_size above 1 needs frames of one
    size (DataError).

    should_stop and patience are `BatchLoader`'s.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, got {batch_size}")
    mine = range(rank, len(dataset), world_size)
    return BatchLoader(_loader(EvalSamples(dataset), batch_size, workers, mine), should_stop, patience)


def _loader(samples: TrainSamples | EvalSamples, batch_size: int, workers: int, sampler: Sampler | range) -> DataLoader:
    return DataLoader(
        samples,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=start_worker,
        timeout=POLL if workers else 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each loader would draw from the generator whose state a run saves
    )
