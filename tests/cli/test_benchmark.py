"""`bcmfnet benchmark` on a small case."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from bcmfnet.benchmarks import _timing, tables, upsample_argmax
from bcmfnet.benchmarks.peers import ENet

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
        (["upsample_argmax", "--providers", "nvcc"], "--providers: expected some of "),
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


TABLES = ("tables", "enet", "bcmfnet", "msfnet", "--size", "64", "96", "--threads", "1", "--seconds", "1e-6")


def test_tables_of_the_paper(bcmfnet, tmp_path):
    """Two networks and one without code: measured and counted beside the published figures, which are marked."""
    path = tmp_path / "all.csv"
    result = bcmfnet("benchmark", *TABLES, "--output", path)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert f"torch {torch.__version__}" in lines[0]
    cityscapes, camvid = (
        lines.index(f"{title}: 1x3x64x96, threads 1") for title in ("Table 2, Cityscapes", "Table 3, CamVid")
    )
    assert lines[cityscapes + 1].split() == [
        "network", "FPS", "20", "%", "80", "%", "FPS*", "mIoU*", "M", "params", "M", "params*", "G", "mult-adds", "at",
        "frame*", "GFLOPs*", "frame*", "GPU*",
    ]  # fmt: skip
    enet, ours = (lines[cityscapes + number].split() for number in (3, 4))
    assert [enet[0], *enet[4:]] == ["ENet", "135.4", "57.0", "0.36", "0.4", "0.046", "1.72", "3.8", "360x640", "-"]
    assert [ours[0], *ours[4:]] == [
        "BCMFNet",
        "103.4",
        "78.2",
        "5.55",
        "5.6",
        "0.107",
        "36.2",
        "35.8",
        "1024x2048",
        "-",
    ]
    assert all(float(cell) > 0 for row in (enet, ours) for cell in row[1:4])
    assert lines[camvid + 3].split() == ["MSFNet", "-", "-", "-", "91.0", "75.4", *7 * "-"]
    assert lines[camvid + 4].split()[0] == "BCMFNet"
    assert "* published, on the frame and the GPU that are named; the rest was measured or counted here." in result.out
    assert lines[-1].startswith("msfnet unavailable in tables camvid-1x3x64x96: there is no code of it")
    with path.open(newline="") as file:
        rows = [(row["case"], row["provider"], row["time_us_50"] != "") for row in csv.DictReader(file)]
    assert rows == [
        ("cityscapes-1x3x64x96", "enet", True), ("cityscapes-1x3x64x96", "bcmfnet", True),
        ("camvid-1x3x64x96", "msfnet", False), ("camvid-1x3x64x96", "bcmfnet", True),
    ]  # fmt: skip


def test_tables_of_the_paper_in_json(bcmfnet):
    result = bcmfnet("benchmark", "tables", "msfnet", *TABLES[4:], "--json")
    assert result.code == 0, result.err
    (row,) = json.loads(result.out)
    assert (row["table"], row["case"], row["status"]) == ("camvid", "camvid-1x3x64x96", "unavailable")
    assert (row["fps"], row["published"]["fps"], row["published"]["miou"]) == (None, 91.0, 75.4)


def test_a_network_of_the_tables_that_fails_has_no_speed_and_fails_the_command(bcmfnet, monkeypatch):
    class Broken(ENet):
        def forward(self, images):
            return super().forward(images) / 0

    monkeypatch.setitem(tables.PEERS, "enet", Broken)
    result = bcmfnet("benchmark", "tables", "enet", *TABLES[4:])
    assert result.code == 1
    row = next(line for line in result.out.splitlines() if line.startswith("ENet"))
    assert row.split()[1:5] == ["-", "-", "-", "135.4"]
    assert result.out.splitlines()[-1] == "enet disagrees: expected finite logits [1, 19, h, w], got [1, 19, 64, 96]"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["unet"], "NETWORKS: expected some of segnet, enet, "),
        (["--size", "16", "64"], "--size: expected integers from 32 to 16384, got (16, 64)"),
        (["--device", "gpu"], "--device: expected cpu, cuda or cuda:N, got 'gpu'"),
    ],
)
def test_words_that_no_table_has_are_one_line(bcmfnet, argv, message):
    result = bcmfnet("benchmark", "tables", *argv)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"bcmfnet: {message}") and result.err.count("\n") == 1
