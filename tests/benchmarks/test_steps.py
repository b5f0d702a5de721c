"""Where the time of a training step goes: the table of real runs, alone and in two processes."""

import pytest

from bcmfnet.benchmarks import steps


@pytest.mark.exhaustive
def test_runs_of_one_and_two_processes_are_told_by_their_parts(capsys):
    steps.main("--processes 1 2 --amp off --sync --size 64 96 --frames 2 --steps 2 --rounds 1".split())
    machine, _, header, _, *rows = capsys.readouterr().out.splitlines()
    assert "2 frames of 64x96 a process" in machine
    names = [name.strip() for name in header.strip("|").split("|")]
    found = [dict(zip(names, (cell.strip() for cell in row.strip("|").split("|")), strict=True)) for row in rows]
    assert [(row["processes"], row["precision"]) for row in found] == [("1", "off"), ("2", "off")]
    assert found[0]["efficiency"] == "100%"
    for row in found:
        parts = sum(float(row[part].rstrip("%")) for part in steps.PARTS)
        assert 80 < parts < 101, row
        frames = 2 * int(row["processes"]) / float(row["s a step"])
        assert float(row["frames/s"]) == pytest.approx(frames, rel=0.15)
