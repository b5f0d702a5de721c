"""Where the time of a training step goes: the table of real runs, alone and in two processes."""

import csv
from pathlib import Path

import pytest

from bcmfnet.benchmarks import steps

ROOT = Path(__file__).parents[2]


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_of_the_page_is_drawn_from_the_results_file():
    rows = read(ROOT / "benchmarks" / "results" / "amd-epyc-steps.csv")
    assert {(row["processes"], row["precision"]) for row in rows} == {(n, p) for n in "12" for p in ("off", "bf16")}
    assert "\n".join(steps.lines(rows)) in (ROOT / "docs" / "distributed.md").read_text()


@pytest.mark.exhaustive
def test_runs_of_one_and_two_processes_are_told_by_their_parts(tmp_path, capsys):
    options = "--processes 1 2 --amp off --sync --size 64 96 --frames 2 --steps 2 --rounds 1 --output"
    steps.main([*options.split(), str(tmp_path / "rows.csv")])
    rows = read(tmp_path / "rows.csv")
    assert [(row["processes"], row["precision"], row["size"]) for row in rows] == [
        ("1", "off", "64x96"), ("2", "off", "64x96"),
    ]  # fmt: skip
    for row in rows:
        assert 0.8 < sum(float(row[part]) for part in steps.PARTS) < 1.01, row
    first, second = capsys.readouterr().out.splitlines()[2:]
    assert "| 100% |" in first
    expected = float(rows[0]["seconds"]) / float(rows[1]["seconds"])
    assert f"| {expected:.0%} |" in second
    assert f"| {4 / float(rows[1]['seconds']):.1f} |" in second
