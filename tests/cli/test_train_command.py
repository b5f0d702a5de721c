"""`bcmfnet train` and `config show`: layers of configuration, signals, and input that is refused."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import tomllib

import numpy as np
import pytest
from tiny import FRAMES, TINY

from bcmfnet.data import write_png
from bcmfnet.engine import report
from bcmfnet.engine.checkpoint import read_checkpoint
from bcmfnet.engine.run_folder import owned


@pytest.fixture(autouse=True)
def nothing_is_drawn(monkeypatch):
    """Pictures take a second a run; tests of the engine have them."""
    monkeypatch.setattr(report, "draw_run", lambda *arguments: None)


def show(bcmfnet, *argv):
    result = bcmfnet("config", "show", *argv)
    assert result.code == 0, result.err
    return tomllib.loads(result.out)


def test_layers_default_preset_file_flags(bcmfnet, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('preset = "camvid"\n[optim]\nlr = 0.5\npower = 1.0\n[data]\nflip = 0.25\n')
    assert show(bcmfnet)["data"]["name"] == "synthetic"
    values = show(bcmfnet, "--config", file, "--optim.lr", 0.125)
    assert values["data"]["name"] == "camvid11-segnet"  # preset
    assert (values["data"]["flip"], values["optim"]["power"]) == (0.25, 1.0)  # file over preset and default
    assert values["optim"]["lr"] == 0.125  # flag over file
    assert show(bcmfnet, "--config", file, "--preset", "cityscapes")["data"]["name"] == "cityscapes"


def test_steps_and_epochs_hide_each_other_across_layers(bcmfnet, tmp_path):
    assert "steps" not in show(bcmfnet, "--preset", "camvid", "--optim.epochs", 200)["optim"]
    assert show(bcmfnet, "--preset", "camvid")["data"]["crops"] == ["192x256@0.7"]
    assert show(bcmfnet, "--preset", "camvid", "--data.crop", 96, 96)["data"]["crops"] == []
    small = show(bcmfnet, "--preset", "camvid", "--data.crop", 96, 96, "--data.crops", "64x64@0.5")
    assert small["data"]["crops"] == ["64x64@0.5"]
    assert "steps" not in show(bcmfnet, "--preset", "synthetic", "--optim.epochs", 2)["optim"]
    result = bcmfnet("config", "show", "--optim.steps", 1, "--optim.epochs", 1)
    assert result.code == 2
    assert result.err == "bcmfnet: --optim.steps, --optim.epochs: expected one of the two, got (1, 1.0)\n"


def test_shown_configuration_is_a_configuration_file(bcmfnet, tmp_path):
    shown = bcmfnet("config", "show", "--preset", "paper", "--seed", 7)
    (tmp_path / "a.toml").write_text(shown.out)
    assert bcmfnet("config", "show", "--config", tmp_path / "a.toml").out == shown.out


def test_paper_presets_are_the_papers(bcmfnet):
    paper = show(bcmfnet, "--preset", "paper")
    assert (paper["optim"]["name"], paper["optim"]["lr"], paper["optim"]["momentum"]) == ("sgd", 0.1, 0.9)
    assert (paper["optim"]["weight_decay"], paper["optim"]["warmup_steps"]) == (5e-4, 1000)
    assert (paper["data"]["crop"], paper["data"]["batch_size"]) == ([1024, 1024], 8)
    camvid = show(bcmfnet, "--preset", "paper-camvid")["data"]
    assert (camvid["name"], camvid["crop"], camvid["batch_size"]) == ("camvid11-ignore", [720, 960], 16)


@pytest.mark.parametrize(("argv", "message"), [
    (["--preset", "camvd"], "--preset: expected one of synthetic, camvid, cityscapes, paper, paper-camvid, "
                            "got 'camvd'; did you mean 'camvid'?"),
    (["--optim.lrr", "1"], "Unknown option: --optim.lrr. Did you mean --optim.lr?"),
    (["--optim.lr", "-1"], "--optim.lr: expected a number above 0 to 1000, got -1"),
    (["--optim.steps", "many"], "--optim.steps: expected an integer from 1 to 1000000000, got 'many'"),
    (["--data.batch-size", "1"], "--data.batch-size: expected an integer from 2 to 65536, got 1"),
    (["--data.num-classes", "0"], "--data.num-classes: expected an integer from 2 to 254, got 0"),
    (["--loss.nms", "2"], "--loss.nms: expected an odd number, got 2"),
    (["--data.crop", "32", "512"], "--data.crop: expected integers from 64 to 16384, got (32, 512)"),
    (["--config", "missing.toml"], "--config: expected a configuration at missing.toml: No such file or directory"),
])  # fmt: skip
def test_refused_configuration_is_one_line_and_exit_2(bcmfnet, argv, message):
    result = bcmfnet("train", *argv, "--dry-run")
    assert (result.code, result.out, result.err) == (2, "", f"bcmfnet: {message}\n")


def test_unknown_key_in_file_is_refused(bcmfnet, tmp_path):
    (tmp_path / "a.toml").write_text("[optim]\nlearning_rate = 1\n")
    result = bcmfnet("train", "--config", tmp_path / "a.toml", "--dry-run")
    assert result.code == 2
    assert "learning_rate" in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize(("argv", "words"), [
    (["--data.name", "camvid"], "--data.name: expected one of camvid11-ignore, camvid11-segnet, "),
    (["--data.name", "camvid11-segnet"], "--data.root: expected the folder of dataset camvid11-segnet, got none"),
    (["--data.name", "camvid11-segnet", "--data.root", "/nowhere"], "--data.root: expected a folder, found none at"),
    (["--data.name", "folder", "--data.root", "/"], "--data.num-classes: expected the number of classes of dataset"),
    (["--data.num-classes", "3"], "--data.num-classes: dataset synthetic has no such option; its options: "),
    (["--data.train-split", "tr"], "--data.train-split: expected one of train, val, test, got 'tr'"),
    (["--model.name", "bcmfnett"], "--model.name: expected bcmfnet or ddrnet23_slim, got 'bcmfnett'"),
    (["--model.pretrained", "/nowhere"], "/nowhere: expected a weights file, the folder of a run or camvid11, "),
    (["--device", "cuda:99"], "--device: expected "),
    (["--device", "gpu"], "--device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
    (["--device", "cpu", "--amp", "fp16"], "--amp: expected bf16 or off on a CPU, got 'fp16'"),
    (["--data.length", "8", "--data.batch-size", "16"], "--data.batch-size: expected at most the 8 frames of "),
])  # fmt: skip
def test_refused_run_is_one_line_and_leaves_no_folder(bcmfnet, tmp_path, argv, words):
    result = bcmfnet("train", "--optim.steps", 1, "--data.workers", 0, "--output-dir", tmp_path / "run", *argv)
    assert result.code == 2
    assert result.err.startswith(f"bcmfnet: {words}") and result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_run_folder_that_exists_is_kept(bcmfnet, trained):
    before = (trained / "metrics.jsonl").read_bytes()
    result = bcmfnet("train", *TINY, "--optim.steps", 1, "--output-dir", trained)
    assert result.code == 2 and "exists and is not empty; choose another or give --exist-ok" in result.err
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_default_run_folders_are_numbered(bcmfnet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert bcmfnet("train", *TINY, "--optim.steps", 1, "--name", "try").code == 0
    assert sorted(path.name for path in (tmp_path / "runs" / "train").iterdir()) == ["try", "try-2"]


def test_json_is_alone_on_standard_output(bcmfnet, tmp_path):
    result = bcmfnet("train", *TINY, "--optim.steps", 1, "--output-dir", tmp_path / "run", "--json")
    assert json.loads(result.out)["folder"] == str(tmp_path / "run")
    assert "val mIoU" in result.err


def test_resume_goes_on_with_the_runs_own_configuration_and_obeys_what_may_change(bcmfnet, tmp_path):
    folder = tmp_path / "run"
    assert bcmfnet("train", *TINY, "--optim.steps", 1, "--optim.schedule", "poly", "--output-dir", folder).code == 0
    options = {"weight-decay": 0.5, "momentum": 0.25, "lr": 0.125, "power": 0, "steps": 3}
    argv = [word for key, value in options.items() for word in (f"--optim.{key}", value)]
    result = bcmfnet("train", "--resume", folder, *argv, "--log-every", 1)
    assert result.code == 0 and "resume at step 1 of 3" in result.err
    assert "from here on optim.weight_decay: 0.5, before 0.01" in result.err

    checkpoint = read_checkpoint(folder / "checkpoints" / "last.pt")
    (group,) = checkpoint["optimizer"]["param_groups"]
    assert (checkpoint["state"]["step"], group["weight_decay"], group["betas"]) == (3, 0.5, (0.25, 0.999))
    written = tomllib.loads((folder / "config.toml").read_text())
    assert written["data"]["crop"] == [64, 96]
    assert {key: written["optim"][key.replace("-", "_")] for key in options} == options
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if "lr" in row]
    assert rates[1:] == pytest.approx([0.125 * 2 / 21, 0.125 * 3 / 21])  # in the midst of 20 steps of warm-up
    assert bcmfnet("train", "--resume", tmp_path / "none").code == 2
    assert bcmfnet("train", "--resume", folder, "--preset", "camvid").code == 2


@pytest.mark.parametrize("saved", [
    "last-1.pt",
    pytest.param("last.pt", marks=pytest.mark.exhaustive),
    pytest.param(None, marks=pytest.mark.exhaustive),
])  # fmt: skip
def test_processes_that_are_started_again_go_on(bcmfnet, tmp_path, monkeypatch, saved):
    """From the last checkpoint, or where a broken save left no other, the one before it; anew where there is none."""
    folder = tmp_path / "run"
    command = ("train", *TINY, "--optim.steps", 1, "--output-dir", folder)
    assert bcmfnet(*command).code == 0
    checkpoints = folder / "checkpoints"
    for path in checkpoints.iterdir():
        if path.name != saved:
            path.unlink()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    result = bcmfnet(*command)
    assert result.code == 0
    assert ("resume at step 1 of 1" in result.err) == (saved is not None)
    assert read_checkpoint(checkpoints / "last.pt")["state"]["step"] == 1


def test_processes_that_are_started_again_without_a_folder(bcmfnet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    result = bcmfnet("train", *TINY, "--optim.steps", 1)
    expected = "--output-dir: expected the folder of the run, since its processes were started again, got none"
    assert (result.code, result.err) == (2, f"bcmfnet: {expected}\n")
    assert not list(tmp_path.iterdir())


def test_a_second_resume_at_once_is_refused(bcmfnet, trained):
    with owned(trained, "resume"):
        result = bcmfnet("train", "--resume", trained, "--optim.steps", 3)
    owner = f"process {os.getpid()} on {platform.node()}"
    expected = f"--resume: expected a folder that nobody writes to, got {trained}, owned by {owner}"
    assert (result.code, result.err) == (2, f"bcmfnet: {expected}\n")


def write_frames(root, count=4):
    frame, mask = np.zeros((64, 96, 3), np.uint8), np.arange(64 * 96).reshape(64, 96) % 3
    for split in ("train", "val"):
        for number in range(count):
            for kind, image in (("images", frame), ("masks", mask.astype(np.uint8))):
                path = root / kind / split / f"{split}{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_png(path, image)


def test_a_relative_root_is_found_from_another_folder_and_its_frames_are_compared(bcmfnet, tmp_path, monkeypatch):
    """Neither the root nor the folder it was relative to goes into weights."""
    write_frames(tmp_path / "frames")
    monkeypatch.chdir(tmp_path)
    argv = ("--data.name", "folder", "--data.root", "frames", "--data.num-classes", 3, "--data.crop", 64, 64,
            "--data.batch-size", 2, "--data.workers", 0, "--device", "cpu", "--amp", "off")  # fmt: skip
    result = bcmfnet("train", *argv, "--optim.steps", 1, "--output-dir", "run")
    assert result.code == 0, result.err
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = bcmfnet("train", "--resume", "../run")
    assert result.code == 0, result.err
    for path in (tmp_path / "run" / "weights").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()

    write_frames(tmp_path / "others", count=5)
    written = (tmp_path / "run" / "config.toml").read_bytes()
    result = bcmfnet("train", "--resume", "../run", "--optim.steps", 3, "--data.root", "../others")
    expected = (
        r"--data.root: expected the frames of ../run/checkpoints/last.pt \(4 to train on and 4 to validate on, names"
    )
    assert result.code == 2 and re.match(f"bcmfnet: {expected} .*, got others \\(5 to train on and 5 to", result.err)
    assert (tmp_path / "run" / "config.toml").read_bytes() == written


@pytest.mark.parametrize(("argv", "message"), [
    (["--seed", 1, "--data.crop", 64, 64],
     "--data.crop, --seed: expected (64, 96), 0, as {last} has it, got (64, 64), 1"),
    (["--data.name", "camvid11-segnet"], "--data.name: expected 'synthetic', as {last} has it, got 'camvid11-segnet'"),
    (["--loss.mode", "ohem"], "--loss.mode: expected 'detect', as {last} has it, got 'ohem'"),
    (["--output-dir", "x"], "--output-dir: expected none with --resume, the run has its folder, got 'x'"),
    (["--name", "x"], "--name: expected none with --resume, the run has its folder, got 'x'"),
    (["--exist-ok"], "--exist-ok: expected none with --resume, the run has its folder, got True"),
    (["--device", "cuda:99"], None),
    (["--model.name", "ddrnet23_slim"], "--model.name: expected 'bcmfnet', as {last} has it, got 'ddrnet23_slim'"),
    (["--model.no-aux"], "--model.aux: expected True, as {last} has it, got False"),
    (["--optim.name", "sgd"], "--optim.name: expected 'adamw', as {last} has it, got 'sgd'"),
    (["--no-compile", "--optim.no-decay-1d"], "--optim.decay-1d: expected True, as {last} has it, got False"),
    (["--optim.steps", "1"], "--optim.steps: expected at least the 2 steps that the run has done, got 1"),
    (["--preset", "paper"], "--resume: expected no --preset and no --config, the run has its own configuration"),
])  # fmt: skip
def test_refused_resume_is_one_line_and_changes_nothing(bcmfnet, trained, argv, message):
    def contents():
        return {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}

    before = contents()
    result = bcmfnet("train", "--resume", trained, *argv)
    last = trained / "checkpoints" / "last.pt"
    if message is not None:
        assert result.err == f"bcmfnet: {message.format(last=last)}\n"
    assert result.code == 2 and result.err.count("\n") == 1
    assert contents() == before


def test_resume_of_what_is_no_run(bcmfnet, trained, tmp_path):
    result = bcmfnet("train", "--resume", tmp_path)
    expected = f"expected a configuration at {tmp_path}/config.toml: No such file or directory"
    assert (result.code, result.err) == (2, f"bcmfnet: --resume: {expected}\n")
    (tmp_path / "config.toml").write_bytes((trained / "config.toml").read_bytes())
    result = bcmfnet("train", "--resume", tmp_path)
    expected = f"{tmp_path}/checkpoints/last.pt: expected a training checkpoint, found no file"
    assert (result.code, result.err) == (2, f"bcmfnet: {expected}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


@pytest.mark.parametrize(("text", "message"), [
    ("[optim]\nlr = -1", "optim.lr in {file}: expected a number above 0 to 1000, got -1"),
    ("[optim]\nlr = inf", "optim.lr in {file}: expected a number above 0 to 1000, got inf"),
    ("[optim]\nsteps = 3\nepochs = 1", "optim.steps in {file}, optim.epochs in {file}: expected one of the two, "),
    ("[data]\ncrop = 300", "data.crop in {file}: Incorrect number of arguments: expected 2 but got 1."),
    ("[data]\nnum_classes = 1", "data.num_classes in {file}: expected an integer from 2 to 254, got 1"),
    ("[data]\nflip = 'often'", "data.flip in {file}: expected a number from 0 to 1, got 'often'"),
    ("[optim]\nlrr = 1", 'Unknown option: "[optim][lrr]" from {file}. Did you mean --optim.lr?'),
    ("preset = 'camvd'", "preset in {file}: expected one of synthetic, camvid, cityscapes, paper, "),
    ("preset = ''", "preset in {file}: expected one of synthetic, camvid, cityscapes, paper, paper-camvid, got ''"),
    ("data = 3", "[data]: expected a section of options in {file}, got 3"),
    ("model = 'bcmfnet'", "[model]: expected a section of options in {file}, got 'bcmfnet'"),
    ("optim = true", "[optim]: expected a section of options in {file}, got True"),
    ("resume = 'run'", "--config: expected no resume in {file}, it is for the command line alone"),
    ("seed", "--config: expected TOML or YAML in {file}: "),
    ("seed = 1\nseed = 2", "--config: expected TOML or YAML in {file}: Cannot overwrite a value (at "),
    ("a = " + 3000 * "[" + 3000 * "]", "--config: expected options in {file}, got a deep nest of values"),
    ("[optim.lr.x]\ny = 1", "lr in {file}: expected a value or a list of values, got {{'x': {{'y': 1}}}}"),
    ("seed = [[1]]", "seed in {file}: expected a value or a list of values, got [[1]]"),
    ("seed = 1.5", "seed in {file}: expected an integer from 0 to 9223372036854775807, got 1.5"),
    ("seed = 9999999999999999999", "seed in {file}: expected an integer from 0 to 9223372036854775807, got 9999999"),
    ("seed = 1" + 5000 * "0", "--config: expected TOML or YAML in {file}: Exceeds the limit (4300 digits)"),
    ("[optim]\nsteps = 2.5", "optim.steps in {file}: expected an integer from 1 to 1000000000, got 2.5"),
    ("[optim]\nlr = 1e23", "optim.lr in {file}: expected a number above 0 to 1000, got 1e+23"),
    ("[optim]\nlr = nan", "optim.lr in {file}: expected a number above 0 to 1000, got nan"),
    ("[data]\nworkers = 100000", "data.workers in {file}: expected an integer from 0 to 1024, got 100000"),
    ('[data]\nroot = "\\u0000"', "data.root in {file}: expected text in UTF-8 without a zero, got '\\x00'"),
    (2**20 * "#" + "\n", "--config: expected a configuration at {file}, got a file of more than 1048576 bytes"),
])  # fmt: skip
def test_refused_configuration_file_is_one_line_that_names_its_key(bcmfnet, tmp_path, text, message):
    file = tmp_path / "a.toml"
    file.write_text(text)
    for verb in (("train", "--dry-run"), ("config", "show")):
        result = bcmfnet(*verb, "--config", file)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith(f"bcmfnet: {message.format(file=file)}") and result.err.count("\n") == 1


@pytest.mark.parametrize(("text", "message"), [
    ("- 1", "expected sections of options in {file}, got list"), ("a: [", "expected TOML or YAML in {file}: while "),
    ("optim: 3", "[optim]: expected a section of options in {file}, got '3'"),
    ("seed: 1\nseed: 2", "expected TOML or YAML in {file}: seed as a key for the second time, line 2"),
    ("optim:\n  lr: 1\n  lr: 2", "expected TOML or YAML in {file}: lr as a key for the second time, line 3"),
    ("a: " + 3000 * "[" + 3000 * "]", "expected options in {file}, got a deep nest of values"),
    ("optim: {lr: {x: {y: {z: 1}}}}", "expected TOML or YAML in {file}: a deep nest of values, line 1"),
    ("a: &a [*a]", "expected TOML or YAML in {file}: a deep nest of values, line 1"),
    ("a: !!python/object/apply:os.system [touch x]",
     "expected TOML or YAML in {file}: tag tag:yaml.org,2002:python/object/apply:os.system, line 1"),
    ("? [1, 2]\n: 3", "expected TOML or YAML in {file}: a sequence as a key, line 1"),
    ("seed: 99999999999999999999", "seed in {file}: expected an integer from 0 to 9223372036854775807, got 99999"),
    ("optim: {lr: .nan}", "optim.lr in {file}: expected a number above 0 to 1000, got '.nan'"),
    ("amp: false", 'Invalid value "false" for [amp] from {file}. Choose from: "auto", "bf16", "fp16", "off".'),
])  # fmt: skip
def test_refused_yaml_is_one_line(bcmfnet, tmp_path, text, message):
    pytest.importorskip("yaml")
    file = tmp_path / "a.yaml"
    file.write_text(text)
    result = bcmfnet("config", "show", "--config", file)
    assert result.code == 2 and message.format(file=file) in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize("ending", ["toml", "yaml"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_configurations_of_other_systems(bcmfnet, tmp_path, ending, mark, newline):
    text = {"toml": "[optim]\nsteps = 3\n", "yaml": "optim:\n  steps: 3\n"}[ending]
    (tmp_path / f"a.{ending}").write_bytes((mark + text.replace("\n", newline)).encode())
    assert show(bcmfnet, "--config", tmp_path / f"a.{ending}")["optim"]["steps"] == 3


@pytest.mark.parametrize(("text", "key", "value"), [
    ("amp: off", "amp", "off"), ("compile: on", "compile", True), ("compile: yes", "compile", True),
    ("compile: off", "compile", False), ("model: {aux: no}", "model.aux", False),
    ("model: {aux: off}", "model.aux", False),
    ("data: {train_split: no}", "data.train_split", "no"), ("data: {train_split: 010}", "data.train_split", "010"),
    ("seed: 010", "seed", 10), ("optim: {lr: 1e-3}", "optim.lr", 1e-3),
    ("data: {crop: [64, 128]}", "data.crop", [64, 128]), ("log_every: &a 1\nseed: *a", "seed", 1),
    ("model: {pretrained: null}", "model.pretrained", None),
])  # fmt: skip
def test_words_of_yaml_are_what_the_same_words_are_in_a_flag(bcmfnet, tmp_path, text, key, value):
    (tmp_path / "a.yaml").write_text(text)
    found = show(bcmfnet, "--config", tmp_path / "a.yaml")
    for part in key.split("."):
        found = found.get(part)
    assert found == value


def test_paths_of_a_configuration_may_begin_with_the_home_folder(bcmfnet, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.toml").write_text("[data]\nroot = '~/x'\n[model]\npretrained = '~/y'\n")
    found = show(bcmfnet, "--config=~/a.toml")
    assert (found["data"]["root"], found["model"]["pretrained"]) == (f"{tmp_path}/x", f"{tmp_path}/y")


@pytest.mark.exhaustive
def test_names_of_any_alphabet_pass_through_an_ascii_locale(tmp_path):
    """The configuration is shown, read back, and names the folder that is there."""
    root = tmp_path / 'd\u00e9j\u00e0 \u30c7 \U0001f600 "q" \\b'
    write_frames(root)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    argv = [sys.executable, "-m", "bcmfnet", "train", "--data.name", "folder", "--data.num-classes", "3",
            "--optim.steps", "1", "--data.batch-size", "2", "--data.crop", "64", "64", "--device", "cpu",
            "--data.workers", "0"]  # fmt: skip
    run = functools.partial(subprocess.run, env=environment, cwd=tmp_path, capture_output=True, text=True)
    shown = run([*argv, "--data.root", str(root), "--dry-run"])
    assert shown.returncode == 0 and shown.stdout.isascii(), shown.stderr
    assert tomllib.loads(shown.stdout)["data"]["root"] == str(root)
    (tmp_path / "a.toml").write_text(shown.stdout)
    trained = run([*argv, "--config", "a.toml", "--output-dir", "run"])
    assert trained.returncode == 0, trained.stderr
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())["data"]["root"] == str(root)


def test_yaml_without_its_package_is_one_line(bcmfnet, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    result = bcmfnet("train", "--config", tmp_path / "a.yaml")
    expected = f"expected TOML or YAML in {tmp_path}/a.yaml: YAML needs PyYAML (pip install PyYAML), TOML needs nothing"
    assert (result.code, result.err) == (2, f"bcmfnet: --config: {expected}\n")


def test_the_preset_of_a_file_names_the_run(bcmfnet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text('preset = "paper"\n[data]\nname = "synthetic"\n')
    assert bcmfnet("train", *TINY, "--config", "a.toml", "--optim.steps", 1, "--optim.lr", 1e-3).code == 0
    assert [path.name for path in (tmp_path / "runs" / "train").iterdir()] == ["paper"]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_leaves_a_checkpoint_to_resume(tmp_path, number, code):
    """With loader processes, as a user's terminal would deliver it: to the whole process group."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "bcmfnet", "train", *FRAMES, "--data.workers", "2", "--optim.steps", "100000",
               "--log-every", "1", "--output-dir", str(folder)]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.1)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    step = read_checkpoint(folder / "checkpoints" / "last.pt")["state"]["step"]
    assert step >= 2 and f"at step {step}; go on with --resume {folder}" in err.splitlines()[-1]
    assert "Traceback" not in err
