"""The paper's Tables 2 and 3 again: which networks run on which frames, and what stands beside their speeds."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from bcmfnet.benchmarks import _timing, harness, tables
from bcmfnet.benchmarks.peers.published import PAPER
from bcmfnet.benchmarks.tables import INFERENCE, TABLES, Case, Speeds
from bcmfnet.errors import ConfigError


@pytest.fixture
def planned(monkeypatch):
    """The cases that a run would measure."""
    cases = []
    monkeypatch.setattr(harness, "run_cases", lambda work, *_, **__: cases.extend(case for *_, case in work) or [])
    return cases


def test_the_networks_are_the_papers_in_its_order():
    for key, table in TABLES.items():
        own = [name for name in table.networks if not name.endswith(INFERENCE) and name != "pidnet_s"]
        assert own == [row.network for row in PAPER[key]]


def test_frames_on_a_cpu_are_a_quarter_of_the_datasets(planned):
    tables.run()
    assert [case.name for case in planned] == ["cityscapes-1x3x512x1024", "camvid-1x3x360x480"]
    assert [case.networks for case in planned] == [table.networks for table in TABLES.values()]


def test_frames_on_a_gpu_are_the_datasets(planned, monkeypatch):
    monkeypatch.setattr(harness, "find_device", torch.device)
    tables.run(device="cuda")
    assert [case.size for case in planned] == [(1024, 2048), (720, 960)]


def test_a_size_is_for_both_tables_and_one_without_a_chosen_network_is_left_out(planned):
    tables.run(["enet", "bcmfnet"], size=(64, 96))
    assert planned == [Case("cityscapes", (64, 96), ("enet", "bcmfnet")), Case("camvid", (64, 96), ("bcmfnet",))]
    planned.clear()
    tables.run(["enet"], size=(64, 96))
    assert planned == [Case("cityscapes", (64, 96), ("enet",))]


def test_a_network_that_is_in_no_table():
    with pytest.raises(ConfigError, match="^networks: expected some of segnet, enet, .*, msfnet, got 'unet'$"):
        tables.run(["enet", "unet"])


@pytest.mark.parametrize(("shape", "value", "wrong"), [
    ((1, 19, 8, 12), 0.0, None),
    ((1, 19, 8, 12), math.nan, "expected finite logits [1, 19, h, w], got [1, 19, 8, 12]"),
    ((1, 11, 8, 12), 0.0, "expected finite logits [1, 19, h, w], got [1, 11, 8, 12]"),
    ((1, 64, 96), 0.0, "expected finite logits [1, 19, h, w], got [1, 64, 96]"),
])  # fmt: skip
def test_logits_are_finite_and_one_for_each_class(shape, value, wrong):
    case = Case("cityscapes", (64, 96), ("enet",))
    expected = Speeds().expected(case, torch.zeros(1, 3, 64, 96))
    assert Speeds().disagreement(case, "enet", torch.full(shape, value), expected) == wrong


def test_frames_a_second_are_of_the_median_and_its_quantiles(monkeypatch):
    times = {"time_us_20": 2000.0, "time_us_50": 4000.0, "time_us_80": 5000.0}
    measured = {"provider": "enet", "case": "cityscapes-1x3x64x96", "threads": 2, "status": "ok"} | times
    monkeypatch.setattr(harness, "run_cases", lambda *_, **__: [measured])
    monkeypatch.setattr(tables, "counts", lambda name, classes, size: (1_234_567_890, size[0]))
    (row,) = tables.run(["enet"], size=(64, 96))
    assert (row["fps"], row["parameters"], row["multiply_adds"]) == (250.0, 1_234_567_890, 64)
    assert row["multiply_adds_at_published_size"] == 360
    (heading, table), _ = tables.shown([row])
    assert heading == "Table 2, Cityscapes: 1x3x64x96, threads 2"
    shown = dict(zip(*table, strict=True))
    assert (shown["FPS"], shown["20 %"], shown["80 %"], shown["M params"]) == ("250", "200", "500", "1235")


def evaluation(folder, **iou):
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps({"iou": iou, "miou": 0.625}))
    return folder


def test_classes_of_evaluations_are_columns(tmp_path):
    first, second = evaluation(tmp_path / "a", road=0.98149, pole=None), evaluation(tmp_path / "b", road=0.9, pole=0.1)
    assert tables.by_class([first, second / "evaluation.json"]) == [
        ["", "road", "pole", "mIoU"],
        [str(first), "98.1", "-", "62.5"],
        [str(second / "evaluation.json"), "90.0", "10.0", "62.5"],
    ]


def test_evaluations_that_cannot_be_one_table(tmp_path):
    first, other = evaluation(tmp_path / "a", road=0.9), evaluation(tmp_path / "b", sky=0.9)
    with pytest.raises(ConfigError, match="^evaluations: expected the classes road, got .*b/evaluation.json with oth"):
        tables.by_class([first, other])
    (first / "evaluation.json").write_text("[]")
    for path in (first, tmp_path / "none"):
        with pytest.raises(ConfigError, match=f"^evaluations: expected the scores of .*{re.escape(str(path))}"):
            tables.by_class([path])


@pytest.mark.exhaustive
def test_every_network_runs(monkeypatch):
    monkeypatch.setattr(_timing, "COPY_BYTES", 2**20)
    found = tables.run(size=(64, 96), threads=[1], seconds=1e-6)
    assert [(row["table"], row["provider"]) for row in found] == [
        (key, name) for key, table in TABLES.items() for name in table.networks
    ]
    assert [row["provider"] for row in found if row["status"] != "ok"] == ["msfnet"]
