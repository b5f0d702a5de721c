"""`bcmfnet benchmark` on a small case."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from bcmfnet.benchmarks import _timing, upsample_argmax

CASE = "1x11x45x60-360x480-float32-rough"
SHORT = (
    "upsample_argmax",
    "--case",
    CASE,
    "--threads",
    "1",
    "--seconds",
    "1e-6",
    "--providers",
    "eager_best",
    "reference",
)


@pytest.fixture(autouse=True)
def small_copy(monkeypatch):
    monkeypatch.setattr(_timing, "COPY_BYTES", 2**20)


def test_table(bcmfnet):
    result = bcmfnet("benchmark", *SHORT, "triton")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert f"torch {torch.__version__}" in lines[0]
    assert lines[1].startswith("copy, threads 1: ") and lines[2].startswith("upsample_argmax on cpu: ")
    table = lines[lines.index(f"upsample_argmax {CASE}") + 1 :]
    assert table[0].split()[:3] == ["provider", "threads", "time"]
    eager = next(line for line in table if line.startswith("eager_best"))
    assert eager.split()[1] == "1" and "1.00x" in eager
    assert any(line.startswith("reference") for line in table)
    assert lines[-1] == "triton unavailable: on a CPU Triton only interprets, which is not timed"


def test_json_and_csv(bcmfnet, tmp_path):
    path = tmp_path / "all.csv"
    for _ in range(2):  # the second replaces the rows of the first
        result = bcmfnet("benchmark", *SHORT, "--json", "--output", path)
        assert result.code == 0, result.err
    rows = {row["provider"]: row for row in json.loads(result.out)}
    assert rows.keys() == {"eager_best", "reference"}
    assert rows["eager_best"]["bytes_moved"] == 11 * 45 * 60 * 4 + 360 * 480
    assert rows["eager_best"]["speedup"] == 1
    with path.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert {row["provider"]: float(row["time_us_50"]) for row in written} == {
        name: pytest.approx(row["time_us_50"], rel=1e-5) for name, row in rows.items()
    }
    assert len(written) == 2


def test_a_provider_that_disagrees_has_no_time_and_fails_the_command(bcmfnet, monkeypatch):
    monkeypatch.setattr(
        upsample_argmax, "disagreement", lambda case, provider, *_: "is off" if provider == "reference" else None
    )
    result = bcmfnet("benchmark", *SHORT)
    assert result.code == 1
    assert result.out.splitlines()[-1] == "reference disagrees: is off"
    assert not any(line.startswith("reference  ") for line in result.out.splitlines())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["upsample"], "NAMES: expected some of "),
        (["--case", "2x2"], "--case: expected a pattern of "),
        (["--providers", "nvcc"], "--providers: expected some of "),
        (["--seconds", "0"], "--seconds: expected a number above 0 to 3600, got 0"),
        (["--threads", "0"], "--threads: expected an integer from 1 to 4096, got 0"),
        (["--threads", "two"], "--threads: expected an integer from 1 to 4096, got 'two'"),
        (["--device", "gpu"], "--device: expected cpu, cuda or cuda:N, got 'gpu'"),
        (["--device", "cuda:99"], "--device: 'cuda:99' is not here"),
        (["--output", __file__], "--output: expected a CSV file with the columns machine, benchmark, case, "),
        (["--output", f"{__file__}/a.csv"], f"--output: expected a file to write, got {__file__}/a.csv: "),
    ],
)
def test_names_of_nothing_are_one_line(bcmfnet, argv, message):
    result = bcmfnet("benchmark", *argv)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"bcmfnet: {message}") and result.err.count("\n") == 1
