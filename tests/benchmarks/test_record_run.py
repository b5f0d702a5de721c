"""The record of a run holds what its folder holds."""

from __future__ import annotations

import json

import pytest

from bcmfnet.benchmarks.compare_runs import row
from bcmfnet.benchmarks.record_run import record
from bcmfnet.engine.train import train


def test_record_of_a_run(tiny_config, tmp_path):
    result = train(tiny_config, tmp_path)
    recorded = record(tmp_path, "bcmfnet train", "0" * 40, "a test")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(tiny_config.data.batch_size / row["images_per_s"] for row in rows if "loss" in row)
    assert recorded["steps"] == 6
    assert recorded["train_seconds"] == pytest.approx(seconds, abs=0.5)
    assert recorded["evaluation"]["miou"] == pytest.approx(result.evaluation.miou)
    assert [point["step"] for point in recorded["curve"]] == [4, 6]
    assert "root" not in recorded["config"]["data"]


def test_row_of_a_run(tiny_config, tmp_path):
    tiny_config.optim.steps, tiny_config.optim.epochs = None, 1.0
    result = train(tiny_config, tmp_path)
    compared = row(tmp_path)
    assert compared["miou"] == pytest.approx(100 * result.evaluation.miou, abs=0.006)
    assert compared["boundary_f_3px"] == pytest.approx(
        100 * json.loads((tmp_path / "evaluation.json").read_text())["boundary"]["boundary_f"]["3"]["mean"], abs=0.006
    )
    assert (compared["mode"], compared["pretrained"], compared["seed"]) == ("detect", "", tiny_config.seed)
