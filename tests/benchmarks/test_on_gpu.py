"""The one call for a GPU goes on to its end, whatever happens on the way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile

import pytest

from bcmfnet.benchmarks import on_gpu
from bcmfnet.benchmarks.on_gpu import Step


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


PLAN = {"all": [
    Step("says", python("print('first'); print(); print('last')"), 60),
    Step("fails", python("print('so far'); raise SystemExit(3)"), 60),
    Step("hangs", python("import time; print('begun', flush=True); time.sleep(60)"), 2),
    Step("is missing", ["no-such-program"], 60),
    Step("needs it", python("print('never')"), 60, needs="fails"),
    Step("goes on", python("print('still here')"), 60, needs="says"),
]}  # fmt: skip


@pytest.fixture
def report(tmp_path):
    return tmp_path / "report"


def test_every_outcome_is_reported(report, capsys):
    assert on_gpu.main([str(report)], lambda folder, dry: PLAN) == 4
    outcomes = {o["name"]: (o["status"], o["last_line"]) for o in json.loads((report / "summary.json").read_text())}
    assert outcomes == {
        "says": ("ok", "last"),
        "fails": ("failed with exit code 3", "so far"),
        "hangs": ("stopped after 2 s", "begun"),
        "is missing": ("could not start: [Errno 2] No such file or directory: 'no-such-program'", ""),
        "needs it": ("left out: fails failed", ""),
        "goes on": ("ok", "still here"),
    }
    assert (report / "fails.log").read_text() == "so far\n"
    assert (report / "summary.md").read_text() in capsys.readouterr().out


def test_a_step_gets_no_more_time_than_is_left(report):
    plan = [Step("long", python("import time; time.sleep(60)"), 100), Step("after", python("print()"), 100)]
    assert on_gpu.main([str(report), "--minutes", "0.03"], lambda folder, dry: {"all": plan}) == 2
    assert [o["status"] for o in json.loads((report / "summary.json").read_text())] == [
        "stopped after 2 s",
        "left out: no time is left",
    ]


@pytest.mark.exhaustive
def test_what_a_stopped_step_has_started_is_stopped_too(report):
    grandchild = "import time; time.sleep(4); print('outlived', flush=True)"
    child = f"print('begun', flush=True); import subprocess as s, sys; s.run([sys.executable, '-c', {grandchild!r}])"
    plan = [Step("builds", python(child), 1), Step("waits", python("import time; time.sleep(4)"), 60)]
    assert on_gpu.main([str(report)], lambda folder, dry: {"all": plan}) == 1
    assert (report / "builds.log").read_text() == "begun\n"


def test_the_staged_package_is_the_one_that_steps_import(report):
    code = "import bcmfnet.kernels, bcmfnet.benchmarks.on_gpu as m; print(m.__file__)"
    assert on_gpu.main([str(report)], lambda folder, dry: {"all": [Step("import", python(code), 60)]}) == 0
    package = report / "package" / "bcmfnet"
    assert (report / "import.log").read_text().splitlines()[-1] == str(package / "benchmarks" / "on_gpu.py")
    assert not (package / "_C.so").exists()


def test_groups_are_called_one_after_the_other_and_packed(report, capsys):
    plan = {
        "first": [Step("a", python("print('before')"), 60)],
        "second": [Step("b", python("import os; print(os.environ['BCMFNET_COMMIT'])"), 60)],
    }
    assert on_gpu.main([str(report), "--only", "first"], lambda folder, dry: plan) == 0
    built = report / "package" / "bcmfnet" / "_C.so"
    built.touch()
    assert on_gpu.main([str(report), "--only", "second", "--commit", "abc"], lambda folder, dry: plan) == 0
    assert built.exists()
    assert [(o["name"], o["last_line"]) for o in json.loads((report / "summary.json").read_text())] == [
        ("a", "before"), ("b", "abc"),
    ]  # fmt: skip
    archive = report.with_name("report.tar.gz")
    assert str(archive) in capsys.readouterr().out
    with tarfile.open(archive) as packed:
        assert packed.getnames() == [f"report/{name}" for name in ("a.log", "b.log", "summary.json", "summary.md")]
    with pytest.raises(SystemExit):
        on_gpu.main([str(report), "--only", "third"], lambda folder, dry: plan)
    assert "--only: expected some of first, second, got third" in capsys.readouterr().err


def test_the_real_plan_names_what_exists(report):
    groups = on_gpu.steps(report)
    plan = [step for group in groups.values() for step in group]
    names = [step.name for step in plan]
    assert names.index("build") < names.index("test") < names.index("ops") and len(set(names)) == len(names)
    assert all(step.needs is None or step.needs in names[: names.index(step.name)] for step in plan)
    assert all((on_gpu.ROOT / folder).is_dir() for folder in [*on_gpu.TESTED, on_gpu.SANITIZED, on_gpu.JUDGES])
    for call in (("build", "tests", "ops"), ("network",), ("sanitizers", "triton")):
        assert sum(step.seconds for name in call for step in groups[name]) <= 9 * 60
    assert {step.name for group in on_gpu.steps(report, dry=True).values() for step in group} == set(names)
    script = subprocess.run([sys.executable, on_gpu.__file__, "--help"], capture_output=True, text=True)
    assert script.returncode == 0
    assert "REPORT" in script.stdout


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_every_step_runs_on_a_cpu(report):
    """But what is there on a machine with a GPU alone."""
    on_gpu.main([str(report), "--dry", "--minutes", "59"])
    outcomes = {o["name"]: o["status"] for o in json.loads((report / "summary.json").read_text())}
    elsewhere = {"device", "ncu", "memcheck", "racecheck"} | (set() if shutil.which("nvcc") else {"configure", "build"})
    assert {name for name, status in outcomes.items() if status != "ok"} <= elsewhere, outcomes
    assert (report / "benchmarks.csv").exists() and (report / "compiled.csv").exists()
