"""Frames a second that a core loads, from PNGs and from what `data prepare` makes of them, and where the time goes.

python -m bcmfnet.benchmarks.loader [--frames N] [--size H W] [--crop H W] [--blur SIGMA]

Seconds are those of the process (`time.process_time`), so that other work on the machine does not count; the files are
in the page cache. Drawn frames have more grain than photographs: with --blur 1 a PNG of 1024x2048 is of 2.2 MB, as
those of Cityscapes, with none of 3.7 MB.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import cv2

from bcmfnet.data import (
    Dataset,
    TrainSamples,
    TrainTransform,
    build_dataset,
    collate,
    prepare,
    read_image,
    read_label,
    write_png,
)

ROUNDS, BATCH = 5, 4


def write_frames(root: Path, frames: int, size: tuple[int, int], blur: float) -> Dataset:
    """Drawn streets as a dataset `folder` of PNGs, compressed as libpng does unasked."""
    source = build_dataset("synthetic", length=frames, size=size)
    for part in ("images", "masks"):
        (root / part / "train").mkdir(parents=True)
    for i in range(frames):
        image, label = source.read(i)
        write_png(root / "images" / "train" / f"{i}.png", cv2.GaussianBlur(image, (0, 0), blur) if blur else image, 6)
        write_png(root / "masks" / "train" / f"{i}.png", label, 6)
    return build_dataset("folder", root, num_classes=source.table.num_classes)


def seconds(load: Callable[[int], object], calls: int) -> float:
    """Of this process, for each call of `load`."""
    start = time.process_time()
    for i in range(calls):
        load(i)
    return (time.process_time() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048))
    parser.add_argument("--crop", type=int, nargs=2, default=(1024, 1024))
    parser.add_argument("--blur", type=float, default=1.0)
    options = parser.parse_args()
    cv2.setNumThreads(0)
    with TemporaryDirectory() as folder:
        root, cache = Path(folder, "source"), Path(folder, "cache")
        source = write_frames(root, options.frames, tuple(options.size), options.blur)
        cache.mkdir()
        prepare(cache, {"train": source})
        sizes = [sum(path.stat().st_size for path in place.rglob("*")) / 1e6 for place in (root, cache)]
        print(f"{options.frames} frames: {sizes[0]:.1f} MB of PNG, {sizes[1]:.1f} MB prepared")
        measure(source, build_dataset("prepared", cache), TrainTransform(tuple(options.crop)))


def measure(source: Dataset, prepared: Dataset, transform: TrainTransform) -> None:
    def batches(dataset: Dataset) -> Callable[[int], object]:
        samples = TrainSamples(dataset, transform, seed=0)
        return lambda i: collate([samples[i, j % len(dataset)] for j in range(BATCH * i, BATCH * (i + 1))])

    rows = {
        "PNG: image": (1, lambda i: read_image(source.files(i)[0], turn=False)),
        "PNG: label": (1, lambda i: read_label(source.files(i)[1])),
        "PNG: batches": (BATCH, batches(source)),
        "prepared: batches": (BATCH, batches(prepared)),
    }
    found = {name: [] for name in rows}
    for _ in range(ROUNDS):
        for name, (frames, load) in rows.items():
            found[name].append(seconds(load, len(source) // frames) / frames)
    for name, values in found.items():
        print(f"{name:18} {1e3 * median(values):7.2f} ms a frame, {1 / median(values):6.1f} frames/s a core")


if __name__ == "__main__":
    main()
