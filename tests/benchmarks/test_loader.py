"""The loader's benchmark measures each stage for all frames, and prints what its seconds are."""

from __future__ import annotations

import re

from bcmfnet.benchmarks import loader


def test_rows_are_seconds_of_the_process_for_each_frame(monkeypatch, capsys):
    monkeypatch.setattr(loader, "ROUNDS", 1)
    clock = iter(range(1000))
    monkeypatch.setattr(loader.time, "process_time", lambda: 8 * next(clock))
    monkeypatch.setattr("sys.argv", ["loader", "--frames", "8", "--size", "64", "96", "--crop", "64", "64"])
    loader.main()
    head, *rows = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"8 frames: 0\.\d MB of PNG, 0\.2 MB prepared", head)
    assert [re.sub(r"\s+", " ", row) for row in rows] == [
        f"{name} 1000.00 ms a frame, 1.0 frames/s a core"
        for name in ("PNG: image", "PNG: label", "PNG: batches", "prepared: batches")
    ]
