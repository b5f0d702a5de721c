"""`bcmfnet train` and `config show`: layers of configuration, signals, and input that is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib

import pytest
from tiny import FRAMES, TINY

from bcmfnet.engine.checkpoint import read_checkpoint


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
    assert "epochs" not in show(bcmfnet, "--preset", "camvid", "--optim.steps", 200)["optim"]
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
    (["--optim.lr", "-1"], "--optim.lr: expected more than 0, got -1.0"),
    (["--optim.steps", "many"], 'Invalid value for --optim.steps: unable to convert "many" into int.'),
    (["--data.batch-size", "1"], "--data.batch-size: expected at least 2 (BN sees a 1x1 map), got 1"),
    (["--data.num-classes", "0"], "--data.num-classes: expected 2 to 254, got 0"),
    (["--loss.nms", "2"], "--loss.nms: expected an odd number, got 2"),
    (["--data.crop", "32", "512"], "--data.crop: expected height and width >= 64, got (32, 512)"),
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
    (["--model.pretrained", "/nowhere"], "/nowhere: expected a weights file or the folder of a run, found no file"),
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


def test_resume_goes_on_with_the_runs_own_configuration(bcmfnet, tmp_path):
    folder = tmp_path / "run"
    assert bcmfnet("train", *TINY, "--optim.steps", 2, "--output-dir", folder).code == 0
    result = bcmfnet("train", "--resume", folder, "--optim.steps", 3)
    assert result.code == 0 and "resume at step 2 of 3" in result.err
    assert tomllib.loads((folder / "config.toml").read_text())["data"]["crop"] == [64, 96]
    assert read_checkpoint(folder / "checkpoints" / "last.pt")["state"]["step"] == 3
    assert bcmfnet("train", "--resume", tmp_path / "none").code == 2
    assert bcmfnet("train", "--resume", folder, "--preset", "camvid").code == 2


@pytest.mark.parametrize(("argv", "message"), [
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
    assert (result.code, result.err) == (2, f"bcmfnet: {message.format(last=last)}\n")
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
    ("[optim]\nlr = -1", "optim.lr in {file}: expected more than 0, got -1.0"),
    ("[optim]\nlr = inf", "optim.lr in {file}: expected more than 0, got inf"),
    ("[optim]\nsteps = 3\nepochs = 1", "optim.steps in {file}, optim.epochs in {file}: expected one of the two, "),
    ("[data]\ncrop = 300", "data.crop in {file}: Incorrect number of arguments: expected 2 but got 1."),
    ("[data]\nnum_classes = 1", "data.num_classes in {file}: expected 2 to 254, got 1"),
    ("[data]\nflip = 'often'", 'Invalid value for [data][flip] from {file}: unable to convert "often" into float.'),
    ("[optim]\nlrr = 1", 'Unknown option: "[optim][lrr]" from {file}. Did you mean --optim.lr?'),
    ("preset = 'camvd'", "preset in {file}: expected one of synthetic, camvid, cityscapes, paper, "),
    ("preset = ''", "preset in {file}: expected one of synthetic, camvid, cityscapes, paper, paper-camvid, got ''"),
    ("data = 3", "[data]: expected a section of options in {file}, got 3"),
    ("model = 'bcmfnet'", "[model]: expected a section of options in {file}, got 'bcmfnet'"),
    ("optim = true", "[optim]: expected a section of options in {file}, got True"),
    ("resume = 'run'", "--config: expected no resume in {file}, it is for the command line alone"),
    ("seed", "--config: expected TOML or YAML in {file}: "),
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
    ("optim: 3", "[optim]: expected a section of options in {file}, got 3"),
])  # fmt: skip
def test_refused_yaml_is_one_line(bcmfnet, tmp_path, text, message):
    pytest.importorskip("yaml")
    file = tmp_path / "a.yaml"
    file.write_text(text)
    result = bcmfnet("config", "show", "--config", file)
    assert result.code == 2 and message.format(file=file) in result.err and result.err.count("\n") == 1


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.exhaustive), (signal.SIGTERM, 143)]
)
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
