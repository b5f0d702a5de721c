"""The record of a run holds what its folder holds."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from bcmfnet.benchmarks.record_run import main
from bcmfnet.data import build_dataset
from bcmfnet.engine.train import train
from bcmfnet.models import read_weights


def test_record_of_a_run_and_its_weights(tiny_config, tmp_path, monkeypatch):
    run, out, weights = tmp_path / "run", tmp_path / "out.json", tmp_path / "half.safetensors"
    run.mkdir()
    classes = build_dataset("synthetic", "", "train", length=8).table.classes
    (tmp_path / "weights.json").write_text(json.dumps({name: 1.0 + (i == 2) for i, name in enumerate(classes)}))
    tiny_config.loss.class_weights = str(tmp_path / "weights.json")
    result = train(tiny_config, run)
    about = ["--command", "bcmfnet train", "--commit", "0" * 40, "--note", "a test", "--weights", str(weights)]
    monkeypatch.setattr(sys, "argv", ["record_run", str(run), str(run), "--out", str(out), *about])
    main()
    recorded = json.loads(out.read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(tiny_config.data.batch_size / row["images_per_s"] for row in rows if "loss" in row)
    assert recorded["steps"] == 6 and recorded["total_steps"] == 12 and recorded["note"] == "a test"
    assert recorded["train_seconds"] == pytest.approx(seconds, abs=0.5)
    assert recorded["evaluation"]["miou"] == pytest.approx(result.evaluation.miou)
    assert [point["step"] for point in recorded["curve"]] == [4, 6]
    assert "root" not in recorded["config"]["data"] and recorded["before"][0]["config"] == recorded["config"]
    of_file = recorded["config"]["loss"]["class_weights"]  # what it says, not where it was
    assert list(of_file) == list(classes) and of_file[classes[2]] == pytest.approx(2 * of_file[classes[0]])
    state, metadata = read_weights(weights)
    assert metadata["total_steps"] == 12 and metadata["command"] == "bcmfnet train"
    whole = read_weights(run)[0]
    assert all(torch.equal(state[key].float(), whole[key].half().float()) for key in state if state[key].ndim > 1)
