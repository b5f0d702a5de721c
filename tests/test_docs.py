"""What the pages in docs/ say is what the code does: their examples run, and their defaults are those of the code."""

from __future__ import annotations

import csv
import inspect
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from served import frame

from bcmfnet.cli.app import app, run
from bcmfnet.cli.serve import serve
from bcmfnet.data import get_label_table, normalize
from bcmfnet.data.io import read_label
from bcmfnet.engine.inference import LabelPredictor, label_table
from bcmfnet.models import create_model
from bcmfnet.ops import backends, boundary_corrected_loss
from bcmfnet.reference.bcl import MODES
from bcmfnet.serve.limits import STATUSES, Limits

DOCS = Path(__file__).parents[1] / "docs"
LOSS = (DOCS / "loss.md").read_text()
SERVE = (DOCS / "serve.md").read_text()


def run_examples(page):
    """Names that the python blocks of a page define, run one after another."""
    if "inplace_grad=True" in page and backends.choose("bcl", "cpu")[0] == "reference":
        pytest.skip("the reference cannot write the gradient in place")
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    return names


@pytest.fixture
def official(tmp_path, monkeypatch):
    """Weights as the authors of DDRNet publish them, but of a network that was not trained."""
    model = create_model("ddrnet23_slim", num_classes=19, aux=True)
    torch.save(
        {f"model.{key}": tensor for key, tensor in model.state_dict().items()}, tmp_path / "best_val_smaller.pth"
    )
    monkeypatch.chdir(tmp_path)
    return model.eval()


@pytest.mark.parametrize("page", ["loss.md", "weights.md"])
def test_examples_run(page, official):
    assert run_examples((DOCS / page).read_text())


def test_the_loss_has_the_bits_that_the_page_promises():
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        assert run_examples((DOCS / "determinism.md").read_text())["equal"]
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)


def test_official_weights_can_be_evaluated(official):
    run_examples((DOCS / "weights.md").read_text())
    predictor, metadata = LabelPredictor.from_weights(Path("ddrnet23_slim_cityscapes.safetensors"), "cpu", "off")
    frame = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    expected = official(normalize(frame)).logits
    torch.testing.assert_close(predictor.logits(frame), expected, rtol=1e-3, atol=1e-3)
    assert label_table(metadata, Path("w")) == get_label_table("cityscapes19")


def test_the_loss_trains_somebody_elses_model():
    example = LOSS.split("## What it computes")[0]
    first, last = map(run_examples, (example.replace("range(30)", "range(1)"), example))
    assert first["model"](first["images"]).shape == (2, 5, 16, 32)
    assert last["loss"] < 0.8 * first["loss"]


def test_kappa_is_as_the_page_says():
    names = run_examples(LOSS)
    assert names["kappa"] > 1
    assert names["criterion"].options["boundary_weight"] * 2 < 1


def test_the_gradient_is_in_the_logits():
    names = run_examples(LOSS)
    logits = names["full"](names["images"]).detach().requires_grad_()
    boundary_corrected_loss(logits, names["labels"]).backward()
    assert torch.equal(names["logits"], logits.grad)


def test_every_option_stands_in_the_table_with_its_default():
    rows = re.findall(r"^\| (`[^|]*`) \| (`[^|]*`) \|", LOSS, re.MULTILINE)
    shown = {}
    for names, defaults in rows:
        names, defaults = (re.findall(r"`([^`]*)`", cell) for cell in (names, defaults))
        shown |= dict(zip(names, defaults * (len(names) // len(defaults)), strict=True))
    parameters = list(inspect.signature(boundary_corrected_loss).parameters.values())[2:]
    actual = {option.name: repr(option.default) for option in parameters if option.name not in ("mode", "size")}
    assert shown == actual


def test_every_mode_stands_in_the_table():
    assert re.findall(r"^\| `(\w+)`(?: \(default\))? \| (?:true|flipped)", LOSS, re.MULTILINE) == list(MODES)


def test_the_readings_are_those_of_the_results_file():
    columns = {"miou": 1, "iou_pole": 1, "selected": 1, "threshold": 3, "ce": 3, "selected_ce": 3}
    sets: dict[str, list[dict[str, str]]] = {}
    with (DOCS.parent / "benchmarks" / "results" / "camvid11-readings.csv").open() as file:
        for row in csv.DictReader(file):
            if row["steps"] == "1000":
                sets.setdefault(row["reading"], []).append(row)
    for name, rows in sets.items():
        figures = (", ".join(f"{float(r[key]):.{n}f}" for r in rows if r[key]) for key, n in columns.items())
        line = " ".join(f"| {cell}".strip() for cell in (name, *figures)) + " |"
        assert line in LOSS.splitlines()
    assert len(sets) == len(re.findall(r"^\| [a-z][^|]*\| \d\d\.\d, ", LOSS, re.MULTILINE)) == 7


def test_commands_exist():
    for verb in re.findall(r"^bcmfnet (\w+)", LOSS, re.MULTILINE):
        assert app[verb]


def test_what_the_design_names_is_there():
    root, text = DOCS.parent, (DOCS / "design.md").read_text()
    named = set(re.findall(r"`([\w./]+\.(?:py|h|cpp|cu))`", text))
    files = (path.relative_to(root) for path in root.rglob("*"))
    paths = [str(path) for path in files if not {".venv", "build"} & set(path.parts)]
    assert len(named) > 30
    assert [name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in paths)] == []
    rooms = set(re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", text, re.MULTILINE))
    packages = {path.parent.name for path in (root / "bcmfnet").glob("*/__init__.py")}
    assert packages - {"kernels"} <= {name for room in rooms for name in re.findall(r"`(\w+)`", room)}


def test_limits_of_the_server_are_as_the_page_says():
    rows = re.findall(r"^\| `--([\w-]+)` \| ([\d.]+) \|", SERVE, re.MULTILINE)
    parameters = inspect.signature(serve).parameters
    assert len(rows) == len(fields(Limits)) == 5
    for (name, default), limit in zip(rows, fields(Limits), strict=True):
        assert default == str(parameters[name.replace("-", "_")].default) == str(limit.default)


def test_refusals_stand_on_the_page():
    from_page = {int(status) for status in re.findall(r"\b[45]\d\d\b", SERVE)}
    assert from_page == set(STATUSES) - {500}


@pytest.mark.exhaustive
def test_commands_of_the_server_run(tmp_path):
    pytest.importorskip("uvicorn")
    if shutil.which("curl") is None:
        pytest.skip("no curl on PATH")
    first, second = re.findall(r"```sh\n(.*?)```", SERVE, re.DOTALL)
    (tmp_path / "photo.jpg").write_bytes(cv2.imencode(".jpg", frame(0, 360, 480))[1].tobytes())
    words = first.splitlines()[1].replace("8000", "0").split()
    command = [sys.executable, "-P", "-m", *words]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            port = process.stdout.readline().strip().rpartition(":")[2]
            subprocess.run(["bash", "-e"], input=second.replace("8000", port), text=True, cwd=tmp_path, check=True)
        finally:
            process.terminate()
    answer = json.loads((tmp_path / "classes.json").read_text())
    assert sum(entry["share"] for entry in answer["classes"]) == pytest.approx(1)
    labels = read_label(tmp_path / "labels.png")
    shares = np.bincount(labels.ravel(), minlength=11) / labels.size
    assert [entry["share"] for entry in answer["classes"]] == pytest.approx(shares.tolist())
    assert cv2.imread(str(tmp_path / "overlay.png")).shape == (360, 480, 3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", ["dataset", "deployment"])
def test_commands_of_a_page_run(page, tmp_path, monkeypatch):
    text = (DOCS / f"{page}.md").read_text()
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    cv2.imwrite("photos/photo.jpg", frame(0, 64, 96))
    run_examples(text)
    for line in "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines():
        assert run(line.split()[1:]) == 0, line
    assert [path for path in Path().rglob("*.png") if {"OUT", "predictions"} & set(path.parts)]


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BCMFNET_CAMVID", raising=False)
    names: dict = {}
    for cell in json.loads((DOCS / "tour.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["labels"].shape == names["image"].shape[:2]
    assert torch.allclose(names["gradient"], names["expected"], atol=1e-6)
    assert names["losses"][-1] < 0.8 * names["losses"][0]
