"""The one call for a GPU goes on to its end, whatever happens on the way."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bcmfnet.benchmarks import on_gpu
from bcmfnet.benchmarks.on_gpu import Step


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


PLAN = [
    Step("says", python("print('first'); print(); print('last')"), 60),
    Step("fails", python("print('so far'); raise SystemExit(3)"), 60),
    Step("hangs", python("import time; print('begun', flush=True); time.sleep(60)"), 2),
    Step("is missing", ["no-such-program"], 60),
    Step("needs it", python("print('never')"), 60, needs="fails"),
    Step("goes on", python("print('still here')"), 60, needs="says"),
]


@pytest.fixture
def report(tmp_path):
    return tmp_path / "report"


def test_every_outcome_is_reported(report, capsys):
    assert on_gpu.main([str(report)], lambda folder: PLAN) == 4
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
    assert on_gpu.main([str(report), "--minutes", "0.03"], lambda folder: plan) == 2
    assert [o["status"] for o in json.loads((report / "summary.json").read_text())] == [
        "stopped after 2 s",
        "left out: no time is left",
    ]


def test_the_staged_package_is_the_one_that_steps_import(report):
    code = "import bcmfnet.kernels, bcmfnet.benchmarks.on_gpu as m; print(m.__file__)"
    assert on_gpu.main([str(report)], lambda folder: [Step("import", python(code), 60)]) == 0
    package = report / "package" / "bcmfnet"
    assert (report / "import.log").read_text().splitlines()[-1] == str(package / "benchmarks" / "on_gpu.py")
    assert not (package / "_C.so").exists()


def test_the_real_plan_names_what_exists(report):
    plan = on_gpu.steps(report)
    names = [step.name for step in plan]
    assert names.index("build") < names.index("test") < names.index("benchmark")
    assert all(step.needs is None or step.needs in names[: names.index(step.name)] for step in plan)
    assert all((on_gpu.ROOT / folder).is_dir() for folder in [*on_gpu.TESTED, on_gpu.SANITIZED])
    script = subprocess.run([sys.executable, on_gpu.__file__, "--help"], capture_output=True, text=True)
    assert script.returncode == 0
    assert "REPORT" in script.stdout
