"""A prepared dataset is its source: the same frames, the same crops, the same problems; or it is refused by name."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
from frames import write_frame

from bcmfnet.data import (
    BatchLoader,
    TrainTransform,
    build_dataset,
    eval_loader,
    prepare,
    prepared,
    train_loader,
    verify,
    write_png,
)
from bcmfnet.data.verification import check_before_training, count_pixels
from bcmfnet.errors import ConfigError, DataError, MissingDataError


def segnet(root, *splits):
    return {split: build_dataset("camvid11-segnet", root, split) for split in splits}


@pytest.fixture
def cache(segnet_root, tmp_path_factory):
    """Prepared from camvid11-segnet, with frames of two sizes."""
    ids = (np.arange(80 * 101) % 12).astype(np.uint8).reshape(80, 101)
    write_frame(segnet_root / "val" / "f.png", segnet_root / "valannot" / "f.png", ids, seed=9)
    folder = tmp_path_factory.mktemp("cache")
    prepare(folder, segnet(segnet_root, "train", "val"))
    return folder


def refusal(cache, split="train", error=DataError) -> str:
    with pytest.raises(error) as caught:
        build_dataset("prepared", cache, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def batches(loader: BatchLoader, count: int):
    return [batch for batch, _ in zip(loader, range(count), strict=False)]


def test_frames_are_those_of_the_source(segnet_root, cache):
    for split, source in segnet(segnet_root, "train", "val").items():
        dataset = build_dataset("prepared", cache, split)
        assert (len(dataset), dataset.table, dataset.split) == (len(source), source.table, split)
        for i in range(len(source)):
            assert dataset.name(i) == source.name(i) and dataset.frame_size(i) == source.frame_size(i)
            assert dataset.files(i) == (f"{cache}/{split}.frames:{source.name(i)}",)
            for found, expected in zip(dataset.read(i), source.read(i), strict=True):
                assert found.dtype == np.uint8 and np.array_equal(found, expected)
            assert np.array_equal(dataset.label(i), source.read(i)[1])
        assert np.array_equal(count_pixels(dataset), count_pixels(source))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_source_bit_for_bit(segnet_root, cache, workers):
    transform = TrainTransform((64, 64), balance=0.5)
    options = {"batch_size": 2, "seed": 3, "workers": workers}
    ours, theirs = (
        batches(train_loader(dataset, transform, **options), 6)
        for dataset in (build_dataset("prepared", cache, "train"), segnet(segnet_root, "train")["train"])
    )
    assert len(ours) == len(theirs) == 6
    for a, b in zip(ours, theirs, strict=True):
        assert a.images.equal(b.images) and a.labels.equal(b.labels)
    ours, theirs = (
        list(eval_loader(dataset, workers=workers))
        for dataset in (build_dataset("prepared", cache, "val"), segnet(segnet_root, "val")["val"])
    )
    assert [batch.images.shape[-1] for batch in ours] == [96, 96, 101]
    assert all(a.images.equal(b.images) and a.labels.equal(b.labels) for a, b in zip(ours, theirs, strict=True))


def test_verify_says_what_it_says_of_the_source(segnet_root, tmp_path_factory):
    write_png(segnet_root / "trainannot" / "lone.png", np.zeros((72, 96), np.uint8))
    write_png(segnet_root / "valannot" / "d.png", np.full((72, 96), 3, np.uint8))
    write_png(segnet_root / "valannot" / "e.png", np.full((72, 96), 5, np.uint8))
    for folder in ("", "annot"):
        shutil.copy(segnet_root / f"train{folder}" / "a.png", segnet_root / f"val{folder}" / "a.png")
    cache = tmp_path_factory.mktemp("cache")
    prepare(cache, segnet(segnet_root, "train", "val"))
    source, report = (
        verify("camvid11-segnet", segnet_root, ["train", "val"]),
        verify("prepared", cache, ["train", "val"]),
    )
    assert len(report.problems) == 2 and report.to_dict() == source.to_dict() and report.rows == source.rows


def test_the_quick_look_before_a_training_looks_at_prepared_frames_too(tmp_path, tmp_path_factory):
    void = np.full((64, 64), 255, np.uint8)
    write_frame(tmp_path / "train/images/a.png", tmp_path / "train/masks/a.png", void)
    cache = tmp_path_factory.mktemp("cache")
    prepare(cache, {"train": build_dataset("folder", tmp_path, num_classes=3)})
    with pytest.raises(DataError, match="expected a pixel of a class, got void"):
        check_before_training([build_dataset("prepared", cache)])


def test_drawn_frames_can_be_prepared(tmp_path):
    source = build_dataset("synthetic", length=2, size=(64, 96))
    prepare(tmp_path, {"train": source})
    dataset = build_dataset("prepared", tmp_path)
    assert [dataset.name(i) for i in range(2)] == [source.name(i) for i in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(dataset.read(1), source.read(1), strict=True))


def test_what_is_written_to_a_frame_does_not_reach_the_file(cache):
    dataset = build_dataset("prepared", cache)
    image, label = dataset.read(0)
    before = image.copy()
    image[:], label[:] = 7, 7
    assert np.array_equal(dataset.read(0)[0], before)
    dataset.check(0)


def test_a_dataset_goes_to_a_worker_without_its_frames(cache):
    """Workers that are spawned get a pickle."""
    dataset = build_dataset("prepared", cache)
    dataset.read(0)
    content = pickle.dumps(dataset)
    assert len(content) < 3000 and np.array_equal(pickle.loads(content).read(2)[0], dataset.read(2)[0])


def test_each_flipped_bit_of_the_frames_is_found_by_verify(cache):
    path = cache / "train.frames"
    size = 4 * 72 * 96
    for at, name in ((0, "a"), (size - 1, "a"), (2 * size, "c"), (3 * size - 1, "c")):
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)
        line = f"{path}:{name}: damaged, its CRC-32 is not the one of the index; prepare it again"
        assert line in verify("prepared", cache, ["train"]).problems, at
        content[at] ^= 1
        path.write_bytes(content)
    assert verify("prepared", cache, ["train"]).ok


def test_each_flipped_bit_of_the_index_is_refused(cache):
    path = cache / "index.json"
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        assert refusal(cache) in (
            f"{path}: damaged, its digest is not the one that was written with it; prepare it again",
            f"{path}: damaged, or not the index of a prepared dataset; prepare it again",
            f"{path}: expected format 1, got 0; prepare it again",
        )


def test_frames_that_are_short_or_gone_are_refused(cache):
    path, size = cache / "train.frames", 3 * 4 * 72 * 96
    for content in (path.read_bytes()[:-1], path.read_bytes() + b"\0", b""):
        path.write_bytes(content)
        expected = f"{path}: damaged, expected {size} bytes, got {len(content)}; prepare it again"
        assert refusal(cache) == expected
    path.unlink()
    assert refusal(cache) == f"{path}: cannot be read: No such file or directory; prepare it again"


def test_another_format_is_refused(cache):
    path = cache / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    assert refusal(cache) == f"{path}: expected format 1, got 2; prepare it again"


@pytest.mark.parametrize("folder", ["train", "trainannot"])
def test_a_source_that_has_changed_since_is_refused_by_name(segnet_root, cache, folder):
    path = segnet_root / folder / "b.png"
    found = os.stat(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    line = f"{cache}/train.frames: older than {path}, which has changed since; prepare it again"
    assert refusal(cache) == line
    assert len(build_dataset("prepared", cache, "val")) == 3
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert len(build_dataset("prepared", cache)) == 3


def test_a_cache_does_without_its_source(segnet_root, cache, tmp_path_factory):
    """As on another machine, and under another path."""
    expected = build_dataset("prepared", cache).read(1)
    moved = tmp_path_factory.mktemp("moved") / "cache"
    shutil.move(cache, moved)
    for folder in ("train", "trainannot"):
        shutil.rmtree(segnet_root / folder)
    found = build_dataset("prepared", moved).read(1)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_index_and_no_such_split(cache, tmp_path):
    line = refusal(cache, "vla", ConfigError)
    assert line == "split: expected one of train, val, got 'vla'; did you mean 'val'?"
    (cache / "index.json").unlink()
    line = refusal(cache, error=MissingDataError)
    assert line == f"{cache}/index.json: no such file; `bcmfnet data prepare` writes it when all else is done"


def test_a_frame_that_cannot_be_read_ends_it_and_leaves_nothing(segnet_root, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    path = segnet_root / "valannot" / "e.png"
    datasets = segnet(segnet_root, "train", "val")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError) as caught:
        prepare(cache, datasets)
    assert str(caught.value) == f"{path}: truncated PNG" and not list(cache.iterdir())


def test_a_disk_without_room_is_one_line_before_anything_is_written(segnet_root, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**4))
    with pytest.raises(DataError) as caught:
        prepare(tmp_path / "train", segnet(segnet_root, "train"))
    folder = tmp_path / "train"
    assert str(caught.value) == f"{folder}: expected room for 0.1 MB, got 0.0 MB"
    assert caplog.messages[-1] == f"{folder}: 3 frames, 0.1 MB"
    assert not (folder / "train.frames").exists()


def test_a_disk_that_fills_up_is_one_line_and_the_former_cache_is_not_taken_for_whole(segnet_root, cache, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared.os, "fsync", full)
    with pytest.raises(DataError) as caught:
        prepare(cache, segnet(segnet_root, "train"))
    assert str(caught.value) == f"{cache}/train.frames: cannot be written: No space left on device"
    assert [path.name for path in cache.iterdir()] == ["val.frames"]
    assert "no such file" in refusal(cache)
