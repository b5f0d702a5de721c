"""The guard of the ratios: what it lets pass, and what not."""

from __future__ import annotations

import pytest

from bcmfnet.benchmarks import guard, harness
from bcmfnet.benchmarks.figures import MACHINES, RESULTS, measured

KEY = ("bcl", "small", "cpp", "1")


def row(**other):
    known = {"benchmark": "bcl", "case": "small", "provider": "cpp", "threads": 1, "status": "ok", "reason": None}
    return known | other


@pytest.mark.parametrize(
    ("found", "fine"),
    [
        (row(speedup=12.0), True),
        (row(speedup=12.0 * guard.SHARE), True),
        (row(speedup=12.0 * guard.SHARE - 0.01), False),
        (row(), False),  # nothing to compare with
        (row(status="disagrees", reason="loss 3 is not 4"), False),
        (row(status="unavailable", reason="no library"), False),
    ],
)
def test_a_ratio_below_its_floor_fails(monkeypatch, capsys, found, fine):
    monkeypatch.setattr(harness, "run_cases", lambda *_, **__: [row(provider="eager_best", speedup=1.0), found])
    monkeypatch.setattr(guard, "measured", lambda path: {KEY: {"speedup": "12"}})
    with pytest.raises(SystemExit) as end:
        guard.main([])
    assert not end.value.code == fine
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("bcl small: ")
    assert ("BELOW" in line) == (not fine and "speedup" in found)


def test_nothing_measured_fails(monkeypatch):
    monkeypatch.setattr(harness, "run_cases", lambda *_, **__: [])
    with pytest.raises(SystemExit) as end:
        guard.main([])
    assert end.value.code


def test_each_case_that_is_watched_is_there_and_recorded():
    found, recorded = harness.find(), measured(RESULTS / MACHINES["no AMX"])
    for name, cases in guard.CASES.items():
        assert set(cases) <= {case.name for case in found[name].CASES}
        assert all(float(recorded[name, case, "cpp", str(guard.THREADS)]["speedup"]) > 0 for case in cases)
