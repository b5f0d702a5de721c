"""Everything that needs a GPU, in one call: build, GPU tests, benchmarks, sanitizers, and a folder with the report.

    python benchmarks/on_gpu.py REPORT [--minutes 9]

It needs torch, triton, numpy, pytest, hypothesis, opencv, safetensors, cmake, ninja and nvcc, and no network. A step
that fails is reported and the next one runs; a step gets no more time than what is left. Where the sources are not a
checkout, BCMFNET_COMMIT says which commit they are of.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTED = ("tests/ops", "tests/nn", "tests/models", "tests/engine")
"""Triton's tests come after the benchmarks: they compile a kernel for nearly every case."""
SANITIZED = "tests/ops"
"""compute-sanitizer slows a kernel down a hundredfold: it runs the smallest case of each test."""


@dataclass
class Step:
    """A command, the seconds that it may take, and whether it is left out where another step failed."""

    name: str
    command: list[str]
    seconds: float
    needs: str | None = None


@dataclass
class Outcome:
    name: str
    status: str
    seconds: float
    last_line: str


def steps(report: Path) -> list[Step]:
    """What is done, the most important first."""
    python, build, package = sys.executable, report / "build", report / "package"
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "--continue-on-collection-errors"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "1", "--target-processes", "all"]
    sanitized = [*tests, "-x", "-k", "cuda-cuda and not slow and not random", SANITIZED]
    code = "import sys; from bcmfnet.benchmarks.harness import measure_all; measure_all(*sys.argv[1:])"
    measure = [python, "-c", code, "cuda", str(report / "benchmarks.csv")]
    facts = "import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())"
    find = "import os, torch; print(os.path.dirname(torch.__file__))"
    torch_directory = subprocess.run([python, "-c", find], capture_output=True, text=True).stdout.strip()
    return [
        Step("device", ["nvidia-smi"], 20),
        Step("versions", [python, "-c", facts], 60),
        Step("configure", [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DTORCH_DIRECTORY={torch_directory}",
            "-DBCMFNET_CUDA=1", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package / 'bcmfnet'}",
        ], 60),
        Step("build", ["cmake", "--build", str(build), "--parallel"], 180, "configure"),
        Step("test", [*tests, f"--junitxml={report / 'tests.xml'}", "-k", "not triton", *TESTED], 180),
        Step("benchmark", [*measure, "-network"], 180),
        Step("stages", [python, "-m", "bcmfnet.benchmarks.stages", "--device", "cuda", "--dtype", "float16"], 60),
        Step("network", [*measure, "network"], 200),
        Step("test_triton", [*tests, f"--junitxml={report / 'triton.xml'}", "-k", "triton", *TESTED], 180),
        Step("memcheck", [*sanitizer, "--tool", "memcheck", *sanitized], 90, "build"),
        Step("racecheck", [*sanitizer, "--tool", "racecheck", *sanitized], 90, "build"),
    ]  # fmt: skip


def stage(report: Path) -> Path:
    """A folder from which bcmfnet, its kernels and its benchmarks are imported as if installed."""
    package = report / "package" / "bcmfnet"
    unbuilt = shutil.ignore_patterns("__pycache__", "_C.so", "_build.json")
    shutil.copytree(ROOT / "bcmfnet", package, ignore=unbuilt)
    for mapped in ("kernels", "benchmarks"):
        shutil.copytree(ROOT / mapped, package / mapped, ignore=shutil.ignore_patterns("__pycache__", "results"))
    return package.parent


def commit() -> str:
    """The checkout's commit, with -dirty where sources differ from it; nothing outside of a checkout."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
    except OSError:
        return ""


def run_all(todo: list[Step], report: Path, environment: dict[str, str], seconds: float) -> list[Outcome]:
    """Run each step, its output in a log of its own; write the summary after each, in case there is no next."""
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for step in todo:
        failed = {outcome.name for outcome in outcomes if outcome.status != "ok"}
        if step.needs in failed:
            outcomes.append(Outcome(step.name, f"left out: {step.needs} failed", 0.0, ""))
        else:
            limit = min(step.seconds, deadline - time.monotonic())
            outcomes.append(run(step, report / f"{step.name}.log", environment, limit))
        write_summary(outcomes, report)
    return outcomes


def run(step: Step, log: Path, environment: dict[str, str], limit: float) -> Outcome:
    """One step. Whatever happens to it is its outcome."""
    if limit <= 0:
        return Outcome(step.name, "left out: no time is left", 0.0, "")
    start = time.monotonic()
    with log.open("w") as output:
        try:
            process = subprocess.run(
                step.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=limit
            )
            status = "ok" if process.returncode == 0 else f"failed with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        except OSError as error:
            status = f"could not start: {error}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Outcome(step.name, status, round(time.monotonic() - start, 1), lines[-1] if lines else "")


def write_summary(outcomes: list[Outcome], report: Path) -> None:
    (report / "summary.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    rows = [f"| {o.name} | {o.status} | {o.seconds} | `{o.last_line[:120]}` |" for o in outcomes]
    (report / "summary.md").write_text("\n".join(["| step | status | s | last line |", "|---|---|---|---|", *rows, ""]))


def main(argv: list[str] | None = None, plan: Callable[[Path], list[Step]] = steps) -> int:
    """Number of steps that did not succeed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    arguments = parser.parse_args(argv)
    report = arguments.report.resolve()
    report.mkdir(parents=True)
    package = stage(report)
    paths = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    environment.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    environment.setdefault("BCMFNET_COMMIT", commit())
    outcomes = run_all(plan(report), report, environment, 60 * arguments.minutes)
    print((report / "summary.md").read_text())
    return sum(outcome.status != "ok" for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
