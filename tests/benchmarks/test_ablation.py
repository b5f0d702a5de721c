"""The table of the readings of the loss: what stands in a row, and what docs/camvid.md shows of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bcmfnet.benchmarks import ablation
from bcmfnet.benchmarks.ablation import ROWS, append, lines, measured, row
from bcmfnet.engine.train import train

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "camvid11-ablation.csv"


def test_row_of_a_run(tiny_config, tmp_path, monkeypatch):
    result = train(tiny_config, tmp_path)
    values = row(tmp_path, "LMFM, detect", 3)
    boundary = json.loads((tmp_path / "evaluation.json").read_text())["boundary"]
    assert (values["run"], values["seed"], values["steps"]) == ("LMFM, detect", 3, result.steps)
    assert values["miou"] == pytest.approx(100 * result.evaluation.miou, abs=0.006)
    assert values["boundary_f_3px"] == pytest.approx(100 * boundary["boundary_f"]["3"]["mean"], abs=0.006)
    append(tmp_path / "out.csv", values)
    append(tmp_path / "out.csv", values | {"seed": 4, "miou": values["miou"] + 1})
    assert measured(tmp_path / "out.csv") == {("LMFM, detect", 3), ("LMFM, detect", 4)}
    monkeypatch.setattr(ablation, "COLUMNS", {"mIoU": "miou"})
    table = list(lines(tmp_path / "out.csv"))
    mean, low, high = (f"{values['miou'] + more:.1f}" for more in (0.5, 0, 1))
    assert len(table) == 3 and table[2].startswith(f"| LMFM, detect | 2 | {mean} ({low} to {high}) |")


def test_readme_shows_what_was_measured():
    assert "\n".join(lines(RESULTS)) in (ROOT / "docs" / "camvid.md").read_text()
    assert {name for name, _ in measured(RESULTS)} <= ROWS.keys()
