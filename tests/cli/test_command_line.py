"""What every verb has in common: its help, how it names what was typed, its exit codes, closed pipes."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from typing import Literal, get_origin

import pytest
import torch
from cyclopts import Token
from tiny import TINY

from bcmfnet.cli import app as command_line
from bcmfnet.cli import main
from bcmfnet.cli.app import app, run
from bcmfnet.cli.options import _prepare
from bcmfnet.engine import inference, run_folder
from bcmfnet.engine.bounds import bounds_of, number_type
from bcmfnet.models import create_model, save_weights

VERBS = (
    *(("train",), ("evaluate",), ("compare",), ("predict",), ("loss",), ("benchmark",), ("env",)),
    *(("data", "verify"), ("data", "prepare"), ("data", "convert"), ("config", "show")),
    ("benchmark", "tables"),
)
REQUIRED = {
    "evaluate": ("--weights", "w"), "predict": ("image", "--weights", "w"), "loss": ("--weights", "w"),
    "compare": ("a", "b"), "data verify": ("--data.name", "synthetic"),
    "data convert": ("a.json", "--output-dir", "o"),
    "data prepare": ("--data.name", "synthetic", "--output-dir", "o"),
}  # fmt: skip
NEGATIVE = {"--model.no-aux", "--model.no-freeze", "--optim.no-decay-1d", "--no-compile", "--no-cuda-graph",
            "--no-deterministic",
            "--data.no-strict", "--loss.no-jitter", "--loss.no-overlap-log", "--loss.no-per-image",
            "--loss.no-inplace-grad", "--loss.no-validate", "--loss.no-sync", "--no-tensorboard"}  # fmt: skip


@pytest.fixture
def as_it_is(monkeypatch):
    """Leave networks as they are read: nothing runs them here, and folding them takes seconds."""
    monkeypatch.setattr(inference, "for_inference", lambda network, **_: network)


def options(verb):
    """Arguments of a verb that take a value or are a flag, without the sections that hold them."""
    leaf = app
    for word in verb:
        leaf = leaf[word]
    return [argument for argument in leaf.assemble_argument_collection() if not argument.children]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_offers_the_flags_of_the_verb_and_no_other(bcmfnet, verb):
    result = bcmfnet(*verb, "--help")
    assert result.code == 0
    offered = set(re.findall(r"(?<=[\s│])--[\w.-]+", result.out))
    meant = {argument.name for argument in options(verb) if argument.name.startswith("--")}
    negative = NEGATIVE if verb in (("train",), ("config", "show")) else set()
    assert meant <= offered and {"--debug", "--verbose", "--quiet"} <= offered
    assert {flag for flag in offered if re.search(r"(empty|no)-", flag)} == negative


@pytest.mark.parametrize("verb", [("train",), ("config", "show")], ids=" ".join)
def test_help_shows_no_default_that_a_preset_overrules(bcmfnet, verb):
    text = " ".join(re.sub("[│\n]", " ", bcmfnet(*verb, "--help").out).split())
    assert set(re.findall(r"\[default: (.*?)\]", text)) == {"synthetic", "False"}
    assert "value from --config, and one that is not there either from --preset" in text


def wrong_values(every=True):
    """Verb, flag and words of each, or of a number one of them in turn: to parse a line of train takes 30 ms."""
    for verb in VERBS:
        for turn, argument in enumerate(options(verb)):
            count = max(1, argument.token_count()[0])
            if argument.hint is bool:
                yield verb, argument.name, (f"{argument.name}=x",)
            elif kind := number_type(argument.field_info.annotation):
                wrong = ("x", "nan", "inf", "1e23", "9" * 30, *(["2.5", "3.0"] if kind is int else []))
                tried = wrong if every else [wrong[turn % len(wrong)]]
                yield from ((verb, argument.name, (argument.name, *count * [word])) for word in tried)
            elif argument.hint is not str and "Path" not in str(argument.hint) and "str" not in str(argument.hint):
                yield verb, argument.name, (argument.name, *count * ["x"])


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["one", "every"])
@pytest.mark.parametrize("verb", [
    pytest.param(verb, marks=pytest.mark.exhaustive if verb == ("config", "show") else ()) for verb in VERBS
], ids=" ".join)  # fmt: skip
def test_a_value_of_another_type_or_out_of_bounds_is_one_line_that_names_the_flag(bcmfnet, verb, every):
    for _, flag, words in filter(lambda found: found[0] == verb, wrong_values(every)):
        result = bcmfnet(*verb, *REQUIRED.get(" ".join(verb), ()), *words)
        assert (result.code, result.out) == (2, ""), words
        named = re.escape(flag)
        assert re.match(rf'bcmfnet: (Invalid value ("x" )?for {named}[:.]|{named}: )', result.err), result.err
        assert result.err.count("\n") == 1


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb[0] != "data"], ids=" ".join)
def test_every_number_has_bounds_that_hold_its_default(verb):
    for argument in options(verb):
        if number_type(argument.field_info.annotation):
            bounds, default = bounds_of(argument.field_info.annotation), argument.field_info.default
            assert bounds is not None, argument.name
            values = default if isinstance(default, tuple) else (default,)
            assert all(value in bounds for value in values if value is not None), argument.name


@pytest.mark.parametrize("name", ["a/b", "../../x", "..", ".", "", "/x", "a\nb", "a\x1b"])
@pytest.mark.parametrize("verb", ["train", "evaluate", "predict", "loss"])
def test_a_name_that_is_no_folders_name_is_refused(bcmfnet, as_it_is, trained, tmp_path, monkeypatch, verb, name):
    """With and without --output-dir, which it would otherwise be dropped for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").touch()
    weights = (*(["a.png"] if verb == "predict" else []), "--weights", trained)
    options = (*TINY, "--optim.steps", 1) if verb == "train" else weights
    for more in ((), ("--output-dir", "out")):
        result = bcmfnet(verb, *options, "--name", name, *more)
        shown = repr(name)
        assert (result.code, result.err) == (2, f"bcmfnet: --name: expected the name of a folder, got {shown}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_a_name_beside_an_output_folder_is_refused(bcmfnet, as_it_is, trained, tmp_path, verb):
    options = (*TINY, "--optim.steps", 1) if verb == "train" else ("--weights", trained)
    result = bcmfnet(verb, *options, "--name", "a", "--output-dir", tmp_path / "out")
    expected = "--name: expected it or --output-dir, since both name the folder, got 'a'"
    assert (result.code, result.err) == (2, f"bcmfnet: {expected}\n")


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict", "loss"])
def test_a_folder_that_another_process_owns_is_refused(bcmfnet, as_it_is, trained, tmp_path, verb):
    (tmp_path / "a.png").touch()
    weights = (*([tmp_path / "a.png"] if verb == "predict" else []), "--weights", trained)
    options = (*TINY, "--optim.steps", 1) if verb == "train" else weights
    folder = tmp_path / "out"
    with run_folder.run_folder(verb, str(folder), None):
        for more in ((), ("--exist-ok",)):
            result = bcmfnet(verb, *options, "--output-dir", folder, *more)
            owner = f"process {os.getpid()} on {platform.node()}"
            expected = f"--output-dir: expected a folder that nobody writes to, got {folder}, owned by {owner}"
            assert (result.code, result.err) == (2, f"bcmfnet: {expected}\n")
    assert not list(folder.iterdir())


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_path_may_begin_with_the_home_folder(bcmfnet, monkeypatch, tmp_path, verb):
    """`--option=~/x` reaches the program as it is: a shell expands `~` at the beginning of a word alone."""
    home, leaves = tmp_path / "home", options(verb)
    monkeypatch.setenv("HOME", str(home))
    paths = [
        argument
        for argument in leaves
        if "Path" in str(argument.hint) or re.search("root|dir|pretrained|colors|images", argument.name)
    ]
    for argument in paths:
        argument.tokens[:] = [Token(value="~/x y", source="cli")]
        _prepare(argument)
        assert [token.value for token in argument.tokens] == [f"{home}/x y"], argument.name


def test_wrong_values_are_found_in_every_verb():
    found = list(wrong_values())
    assert {verb for verb, *_ in found} == set(VERBS) and len(found) > 80
    assert any(get_origin(argument.hint) is Literal for argument in options(("train",)))


@pytest.mark.parametrize(("argv", "code", "message"), [
    (["trian"], 2, 'Unknown command "trian". Did you mean "train"? Available commands: '),
    (["data", "verfy"], 2, 'Unknown command "verfy". Did you mean "verify"? Available commands: '),
    (["predict"], 2, 'Command "predict" parameter SOURCE requires an argument.'),
    (["evaluate"], 2, 'Command "evaluate" parameter --weights requires an argument.'),
    (["data", "verify"], 2, 'Command "data verify" parameter --data.name requires an argument.'),
    (["data", "prepare", "--data.name", "synthetic"], 2, 'Command "data prepare" parameter --output-dir requires an '),
    (["data", "convert", "--output-dir", "{no}"], 2, 'Command "data convert" parameter SOURCE requires an argument.'),
    (["data", "convert", "{no}/a.json", "--output-dir", "{no}"], 2, "{no}/a.json: expected the annotations of COCO "),
    (["data", "convert", "{dir}/a.toml", "--output-dir", "{no}"], 1, "{dir}/a.toml: expected the annotations of COCO "),
    (["data", "convert", "{dir}", "--output-dir", "{no}", "--split", "a/b"], 2, "--split: expected the name of a "),
    (["data", "prepare", "--data.name", "synthetic", "--output-dir", "{dir}"], 2, "--output-dir: {dir} exists and is "),
    (["evaluate", "--weights", "{run}", "--data.name", "prepared", "--data.root", "{dir}"], 2,
     "{dir}/index.json: no such file; `bcmfnet data prepare` writes it"),
    (["data", "verify", "--data.name", "folder", "--data.root", "{dir}", "--data.colors", "{no}.csv"], 2,
     "--data.colors: expected a file of names and colours at {no}.csv: No such file or directory"),
    (["evaluate", "--weights", "{run}", "--data.name", "folder", "--data.root", "{dir}", "--data.colors", "{no}"], 2,
     "--data.colors: expected a .json or .csv file, got {no}"),
    (["env", "now"], 2, "Unused Tokens: ['now']."),
    (["evaluate", "--weights", "{no}"], 2, "{no}: expected a weights file, the folder of a run or camvid11, "),
    (["loss", "--weights", "{no}"], 2, "{no}: expected a weights file, the folder of a run or camvid11, "),
    (["predict", "{dir}/a.toml", "--weights", "{no}"], 2, "{no}: expected a weights file, the folder of a run "),
    (["predict", "{no}", "--weights", "{run}"], 2, "SOURCE: expected an image file, a folder of images or a glob, "),
    (["evaluate", "--weights", "{dir}"], 2, "{dir}: expected a weights file, the folder of a run or "),
    (["evaluate", "--weights", "{dir}/a.toml"], 1, "{dir}/a.toml: expected a weights file, got a text that "),
    (["evaluate", "--weights", "{run}", "--data.split", "tset"], 2, "--data.split: expected one of train, val, test"),
    (["evaluate", "--weights", "{run}", "--data.name", "camvid"], 2, "--data.name: expected one of camvid11-ignore, "),
    (["evaluate", "--weights", "{run}", "--data.name", "cityscapes", "--data.root", "{no}"], 2,
     "--data.root: expected a folder, found none at {no}"),
    (["evaluate", "--weights", "{run}", "--data.name", "camvid11-segnet", "--data.root", "{dir}"], 2,
     "{dir}/val: no such folder"),
    (["evaluate", "--weights", "{run}", "--data.workers", "-1"], 2,
     "--data.workers: expected an integer from 0 to 1024, got -1"),
    (["evaluate", "--weights", "{run}", "--device", "gpu"], 2, "--device: expected auto, cpu, cuda or cuda:N, got"),
    (["evaluate", "--weights", "{run}", "--device", "cuda:99"], 2, "--device: expected "),
    (["evaluate", "--weights", "{run}", "--device", "cpu", "--amp", "fp16"], 2, "--amp: expected bf16 or off on a CPU"),
    (["evaluate", "--weights", "{run}", "--output-dir", "{run}"], 2, "--output-dir: {run} exists and is not empty; "),
    (["evaluate", "--weights", "{run}", "--output-dir", "{dir}/a.toml"], 2, "--output-dir: expected a folder, got the"),
    (["evaluate", "--weights", "{run}", "--output-dir", "{dir}/a.toml/x"], 2,
     "--output-dir: expected a folder to write to, got {dir}/a.toml/x: Not a directory"),
    (["evaluate", "--weights", "{run}", "--name", "a/b"], 2, "--name: expected the name of a folder, got 'a/b'"),
    (["evaluate", "--weights", "{run}", "--tta.scales", "1", "0"], 2,
     "--tta.scales: expected numbers from 0.1 to 4, got (1, 0)"),
    (["evaluate", "--weights", "{run}", "--tta.scales"], 2, "--tta.scales: expected a scale, got ()"),
    (["predict", "{dir}", "--tta.scales=-1"], 2, "--tta.scales: expected a number from 0.1 to 4, got -1"),
    (["compare", "{run}", "{run}", "--tta.scales", "nan"], 2, "--tta.scales: expected a number from 0.1 to 4, got nan"),
    (["predict", "{dir}", "--tta.window", "64", "99"], 2, "--tta.window: expected multiples of 8, got (64, 99)"),
    (["predict", "{dir}", "--tta.stride", "64", "64"], 2, "--tta.stride: expected none without a window, got (64, 64)"),
    (["evaluate", "--weights", "{run}", "--tta.window", "64", "64", "--tta.stride", "64", "72"], 2,
     "--tta.stride: expected at most the window's (64, 64), got (64, 72)"),
    (["evaluate", "--weights", "{run}", "--submission", "--min-miou", "50"], 2,
     "--min-miou: expected none with --submission, which scores nothing, got 50.0"),
    (["evaluate", "--weights", "{run}", "--submission", "--data.name", "folder"], 2,
     "--data.name: expected cityscapes with --submission, got 'folder'"),
    (["compare", "{run}"], 2, 'Command "compare" parameter B requires an argument.'),
    (["compare", "{run}", "{no}"], 2, "{no}: expected a weights file, the folder of a run or camvid11, "),
    (["compare", "{run}", "{run}", "--samples", "99"], 2, "--samples: expected an integer from 100 to 1000000, got 99"),
    (["compare", "{run}", "{run}"], 2, "--data.split: expected at least two frames to draw from, got 1"),
    (["loss", "nowhere", "--weights", "{run}"], 2, "FRAMES: expected one of street_val_0_000000, got 'nowhere'"),
    (["data", "verify", "--data.name", "x"], 2, "--data.name: expected one of camvid11-ignore, "),
    (["data", "verify", "--data.name", "folder", "--data.root", "{no}"], 2, "--data.root: expected a folder, found"),
    (["data", "verify", "--data.name", "folder", "--data.root", "{dir}"], 2, "--data.num-classes: expected the number"),
    (["data", "verify", "--data.name", "folder", "--data.root", "{dir}", "--data.num-classes", "999"], 2,
     "--data.num-classes: expected 2..254, got 999"),
    (["data", "verify", "--data.name", "synthetic", "--data.splits", "tr"], 2, "--data.splits: expected one of "),
    (["data", "verify", "--data.name", "synthetic", "--data.num-classes", "3"], 2, "--data.num-classes: dataset "),
])  # fmt: skip
def test_exit_code_and_line_of_what_goes_wrong(bcmfnet, as_it_is, trained, tmp_path, argv, code, message):
    """2 where what was typed is wrong, a path that is not there included; 1 where a file is not what it should be."""
    (tmp_path / "a.toml").write_text("seed = 1\n")
    names = {"no": tmp_path / "no", "dir": tmp_path, "run": trained}
    result = bcmfnet(*(word.format(**names) for word in argv))
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith(f"bcmfnet: {message.format(**names)}") and result.err.count("\n") == 1


def test_weights_without_metadata_say_what_is_missing(bcmfnet, tmp_path):
    path, image = tmp_path / "w.safetensors", tmp_path / "a.png"
    image.touch()
    save_weights(path, create_model("bcmfnet", num_classes=3))
    for verb in (("predict", image), ("evaluate",)):
        result = bcmfnet(*verb, "--weights", path)
        expected = f"{path}: mean: expected three numbers in its metadata (see save_weights), got nothing"
        assert (result.code, result.err) == (1, f"bcmfnet: {expected}\n")


def test_a_long_error_is_cut_in_its_middle(bcmfnet):
    name = "a" * 5000 + "z"
    short, whole = bcmfnet("train", "--preset", name), bcmfnet("train", "--preset", name, "--debug")
    assert short.code == whole.code == 2
    assert len(short.err) < 700 and short.err.count("\n") == 1
    assert short.err.startswith("bcmfnet: --preset: expected one of synthetic, ")
    assert short.err.endswith("aaz' (--debug shows all)\n")
    assert f"got '{name}'" in whole.err.splitlines()[-1]


def test_a_long_list_of_names_is_cut(bcmfnet, tmp_path):
    from bcmfnet.errors import unknown_name

    line = unknown_name("frames", "f7", [f"f{i}x" for i in range(300)])
    first = ", ".join(f"f{i}x" for i in range(12))
    assert line == f"frames: expected one of {first} or another 288, got 'f7'; did you mean 'f7x'?"


@pytest.mark.parametrize(("closed", "verb", "code"), [(">&- 2>&-", "config show", 0), ("2>&-", "config shwo", 2)])
def test_closed_standard_streams_change_no_exit_code(closed, verb, code):
    """As daemons and cron start programs; what would go to standard error goes nowhere, not to standard output."""
    run = subprocess.run(["sh", "-c", f'"$0" -P -m bcmfnet {verb} {closed}', sys.executable], capture_output=True)
    assert (run.returncode, run.stdout, run.stderr) == (code, b"", b"")


@pytest.mark.parametrize("argv", [["env"], ["env", "--json"], ["config", "show"], ["train", "--help"], ["--version"]])
def test_a_closed_pipe_ends_a_verb_in_silence(bcmfnet, monkeypatch, capfd, argv):
    reader, writer = os.pipe()
    os.close(reader)
    capfd.readouterr()
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert run(argv) == 141
        assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("verb", "given", "expected"),
    [("env", None, "passive"), ("env", "active", "active"), ("benchmark", None, None), ("benchmark", "no", "no")],
)
def test_threads_that_wait_leave_the_core_to_others(monkeypatch, verb, given, expected):
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY") if given is None else monkeypatch.setenv("OMP_WAIT_POLICY", given)
    seen = []
    monkeypatch.setattr(command_line, "run", lambda argv: seen.append(os.environ.get("OMP_WAIT_POLICY")) or 0)
    with pytest.raises(SystemExit) as ended:
        main([verb])
    assert (ended.value.code, seen) == (0, [expected])


def test_torch_is_not_loaded_before_the_threads_are_told_how_to_wait():
    """What OpenMP reads from the environment it reads when torch loads it."""
    names = subprocess.check_output(
        [sys.executable, "-P", "-c", "import sys, bcmfnet.cli; print(*sys.modules)"], text=True
    )
    assert "bcmfnet.cli" in names.split() and "torch" not in names.split()


def test_the_process_ends_in_silence_too():
    process = subprocess.Popen(
        [sys.executable, "-m", "bcmfnet", "config", "show"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_another_broken_pipe_is_an_error(bcmfnet, monkeypatch):
    def broken(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(command_line, "app", broken)
    result = bcmfnet("env")
    assert (result.code, result.err) == (1, "bcmfnet: [Errno 32] Broken pipe\n")


@pytest.mark.parametrize(("verb", "what"), [("train", "the curves of a run"), ("evaluate", "the confusion matrix")])
def test_matplotlib_is_asked_for_at_the_start(bcmfnet, monkeypatch, tmp_path, verb, what):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = ("--weights", tmp_path) if verb == "evaluate" else (*TINY, "--optim.steps", 1)
    result = bcmfnet(verb, *options, "--output-dir", tmp_path / "out")
    expected = f"matplotlib: needed to draw {what}; pip install 'bcmfnet[train]'"
    assert (result.code, result.err) == (1, f"bcmfnet: {expected}\n")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_refused_at_the_start(bcmfnet, as_it_is, monkeypatch, trained, tmp_path):
    def refuse(path, key):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run_folder, "_lock", refuse)
    train = ("train", *TINY, "--optim.steps", 1)
    for verb in (train, ("evaluate", "--weights", trained), ("loss", "--weights", trained)):
        result = bcmfnet(*verb, "--output-dir", tmp_path)
        expected = f"--output-dir: expected a folder to write to, got {tmp_path}: Permission denied"
        assert (result.code, result.err) == (2, f"bcmfnet: {expected}\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_env_says_that_nothing_serves_a_device_that_is_not_here(bcmfnet):
    lines = [line for line in bcmfnet("env").out.splitlines() if " on cuda: " in line]
    assert lines and all(line.endswith(" on cuda: none (no CUDA device)") for line in lines)
