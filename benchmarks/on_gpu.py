"""Everything that needs a GPU, in three calls of nine minutes: build, tests, benchmarks, sanitizers, and an archive.

    python benchmarks/on_gpu.py REPORT --only build tests ops
    python benchmarks/on_gpu.py REPORT --only network
    python benchmarks/on_gpu.py REPORT --only sanitizers triton

It needs torch, triton, numpy, pytest, hypothesis, opencv, safetensors, cmake, ninja and nvcc, and no network. A step
that fails is reported and the next one runs; a step gets no more time than what is left. The folder REPORT is kept
from call to call, for what was built; logs and figures are also packed into REPORT.tar.gz. Where the sources are not a
checkout, --commit says which commit they are of. With --dry a CPU takes the place of the GPU, on the smallest cases:
that every step begins and ends is then known before a GPU is at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTED = ("tests/ops", "tests/nn", "tests/models", "tests/engine", "tests/inference")
SANITIZED = "tests/ops"
"""compute-sanitizer slows a kernel down a hundredfold: it runs the smallest case of each test."""
JUDGES = "tests/cuda_on_cpu"
"""Compiled by nvcc they say whether the execution of kernels on a CPU is true to a GPU."""


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


ARCHITECTURE = "9.0"
"""Of an H100 and an H200."""
DRY_PATIENCE = 10.0
"""So much longer than with a GPU may a step take on a CPU that may be busy and has few cores."""


def steps(report: Path, dry: bool = False) -> dict[str, list[Step]]:
    """What is done by its group, the most important first."""
    python, build, package = sys.executable, report / "build", report / "package"
    find = "import os, torch; print(os.path.dirname(torch.__file__))"
    torch_directory = subprocess.run([python, "-c", find], capture_output=True, text=True).stdout.strip()
    facts = "import torch as t, triton; print(t.__version__, triton.__version__, t.cuda.device_count(), t.version.cuda)"

    device, dtype = ("cpu", "float32") if dry else ("cuda", "float16")
    size = ["--size", "64", "96"] if dry else []
    few = ["--smallest"] if dry else []
    briefly = [*few, "--threads", "1", "--seconds", "0.01"] if dry else []

    def tests(where: Sequence[str], which: str = "", *options: str, on_cpu: str = "cpu-cuda and empty") -> list[str]:
        chosen = ["-k", on_cpu] if dry else ["-m", "gpu", *(["-k", which] if which else [])]
        plain = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        return [python, "-m", "pytest", *plain, *chosen, *options, *where]

    def run(module: str, *options: str) -> list[str]:
        return [python, "-m", f"bcmfnet.benchmarks.{module}", "--device", device, *options]

    def measure(file: str, *options: str) -> list[str]:
        return run("harness", "--output", str(report / file), *briefly, *options)

    def sanitized(tool: str) -> list[str]:
        command = ["compute-sanitizer", "--error-exitcode", "1", "--target-processes", "all", "--tool", tool]
        return [*command, *tests([SANITIZED], "cuda-cuda and not slow and not random", "-x")]

    ncu = ["ncu", "--set", "full", "--profile-from-start", "off", "--target-processes", "all", "--export"]
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DTORCH_DIRECTORY={torch_directory}",
        "-DBCMFNET_CUDA=1", f"-DBCMFNET_ARCHITECTURES={ARCHITECTURE}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package / 'bcmfnet'}",
    ]  # fmt: skip
    compiled = ["--providers", "eager_best", "compile"]
    return {
        "build": [
            Step("device", ["nvidia-smi"], 20),
            Step("versions", [python, "-c", facts], 30),
            Step("configure", configure, 30),
            Step("build", ["cmake", "--build", str(build), "--parallel"], 110, "configure"),
        ],
        "tests": [
            Step("test", tests(TESTED, "not triton", f"--junitxml={report / 'tests.xml'}"), 110),
            Step("judges", tests([JUDGES], on_cpu="shim-index"), 60),
        ],
        "ops": [
            Step("ops", measure("benchmarks.csv", "--but", "network", "segformer", "--without", "*compile*"), 100),
            Step("frame", run("once", *size, "frame"), 40),
            Step("ncu", [*ncu, str(report / "ops"), *run("once", *few)], 40),
        ],
        "network": [
            Step("network", measure("benchmarks.csv", "network", "--without", "*compile*"), 150),
            Step("stages", run("stages", "--dtype", dtype, *size), 60),
            Step("compiled", measure("compiled.csv", "--but", "network", "segformer", "terms", "lmfm", *compiled), 150),
            Step("compiled_network", measure("compiled.csv", "network", *compiled), 180),
        ],
        "sanitizers": [Step("memcheck", sanitized("memcheck"), 150), Step("racecheck", sanitized("racecheck"), 150)],
        "triton": [Step("triton", tests(TESTED, "triton", f"--junitxml={report / 'triton.xml'}"), 240)],
    }


def stage(report: Path) -> Path:
    """A folder from which bcmfnet, its kernels and its benchmarks are imported as if installed; a build there stays."""
    package = report / "package" / "bcmfnet"
    unbuilt = shutil.ignore_patterns("__pycache__", "_C.so", "_build.json")
    shutil.copytree(ROOT / "bcmfnet", package, ignore=unbuilt, dirs_exist_ok=True)
    for mapped in ("kernels", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / mapped, package / mapped, ignore=ignored, dirs_exist_ok=True)
    return package.parent


def pack(report: Path) -> Path:
    """Logs and figures in one file, beside the folder."""
    archive = report.with_name(f"{report.name}.tar.gz")
    with tarfile.open(archive, "w:gz") as packed:
        for path in sorted(path for path in report.iterdir() if path.is_file()):
            packed.add(path, f"{report.name}/{path.name}")
    return archive


def commit() -> str:
    """The checkout's commit, with -dirty where sources differ from it; nothing outside of a checkout."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
    except OSError:
        return ""


def run_all(
    todo: list[Step], report: Path, environment: dict[str, str], seconds: float, patience: float = 1
) -> list[Outcome]:
    """Run each step, for `patience` times its seconds at most, its output in a log of its own; write the summary after
    each, in case there is no next.
    """
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    known = earlier(report, {step.name for step in todo})
    for step in todo:
        failed = {outcome.name for outcome in outcomes if outcome.status != "ok"}
        if step.needs in failed:
            outcomes.append(Outcome(step.name, f"left out: {step.needs} failed", 0.0, ""))
        else:
            limit = min(patience * step.seconds, deadline - time.monotonic())
            outcomes.append(run(step, report / f"{step.name}.log", environment, limit))
        write_summary([*known, *outcomes], report)
    return outcomes


def earlier(report: Path, again: set[str]) -> list[Outcome]:
    """What the summary of earlier calls says of steps that are not run again."""
    summary = report / "summary.json"
    found = json.loads(summary.read_text()) if summary.exists() else []
    return [Outcome(**outcome) for outcome in found if outcome["name"] not in again]


def run(step: Step, log: Path, environment: dict[str, str], limit: float) -> Outcome:
    """One step. Whatever happens to it is its outcome."""
    if limit <= 0:
        return Outcome(step.name, "left out: no time is left", 0.0, "")
    start = time.monotonic()
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            code = process.wait(limit)
            status = "ok" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started, which would take the next step's time
            process.wait()
            status = f"stopped after {limit:.0f} s"
        except OSError as error:
            status = f"could not start: {error}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Outcome(step.name, status, round(time.monotonic() - start, 1), lines[-1] if lines else "")


def write_summary(outcomes: list[Outcome], report: Path) -> None:
    (report / "summary.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    rows = [f"| {o.name} | {o.status} | {o.seconds} | `{o.last_line[:120]}` |" for o in outcomes]
    (report / "summary.md").write_text("\n".join(["| step | status | s | last line |", "|---|---|---|---|", *rows, ""]))


def main(argv: list[str] | None = None, plan: Callable[[Path, bool], dict[str, list[Step]]] = steps) -> int:
    """Number of steps that did not succeed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="of build, tests, ops, network, sanitizers, triton")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--commit", help="of the sources, where they are no checkout")
    parser.add_argument("--dry", action="store_true", help="a CPU in place of the GPU")
    arguments = parser.parse_args(argv)
    report = arguments.report.resolve()
    groups = plan(report, arguments.dry)
    chosen = arguments.only or list(groups)
    if unknown := set(chosen) - groups.keys():
        parser.error(f"--only: expected some of {', '.join(groups)}, got {', '.join(sorted(unknown))}")
    report.mkdir(parents=True, exist_ok=True)
    package = stage(report)
    paths = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    environment.setdefault("BCMFNET_COMMIT", arguments.commit or commit())
    if arguments.dry:  # what no GPU will run need not be fast
        environment.setdefault("NVCC_APPEND_FLAGS", "--Ofast-compile=max")
    todo = [step for name in chosen for step in groups[name]]
    outcomes = run_all(todo, report, environment, 60 * arguments.minutes, DRY_PATIENCE if arguments.dry else 1)
    print((report / "summary.md").read_text())
    print(pack(report))
    return sum(outcome.status != "ok" for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
