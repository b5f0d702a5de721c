"""What the README says is what the code does and what the files of results hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from bcmfnet.benchmarks import figures
from bcmfnet.engine.config import PRESETS
from bcmfnet.models import count_multiply_adds, count_parameters, create_model, list_models

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_examples_run_one_after_the_other():
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(code, names)
    assert torch.isfinite(names["loss"])
    assert names["output"].logits.shape == names["output"].aux.shape == (2, 19, 64, 128)
    assert all(torch.isfinite(p.grad).all() for p in names["model"].parameters())
    assert names["maps"].dtype == torch.uint8 and names["maps"].shape == (1, 512, 1024)


def test_sizes_of_the_networks():
    for name in list_models():
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}`"))
        figures = [int(cell.replace(",", "")) for cell in re.findall(r"\d[\d,]{6,}", row)]
        plain, aux = (create_model(name, num_classes=19, aux=aux) for aux in (False, True))
        assert figures == [count_parameters(plain), count_parameters(aux), count_multiply_adds(plain)]


def test_presets_are_named():
    assert [name for name in PRESETS if f"`{name}`" not in README] == []


def test_camvid_figures_are_those_of_the_results_file():
    scores = json.loads((ROOT / "benchmarks" / "results" / "camvid11-segnet.json").read_text())["evaluation"]
    for name, iou in scores["iou"].items():
        assert f"| {name} | {100 * iou:.1f} |" in README, name
    for figure in (scores["miou"], scores["boundary"]["boundary_iou"]["mean"]):
        assert f"{100 * figure:.1f}" in README


def test_tables_of_figures_are_those_of_the_results_files(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(README)
    figures.main(str(copy))
    assert copy.read_text() == README
    assert README.count("|  | no AMX, ") == len(figures.TABLES)  # drawn from rows, and each found in README
