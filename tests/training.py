"""What tests of runs share: the rows that one leaves, and a signal in the middle of it."""

from __future__ import annotations

import json
import os

from bcmfnet.engine.learner import Laps, Learner

TIMES = [f"{part}_s" for part in Laps.PARTS]


def stop_after(monkeypatch, step, number):
    """Send the process a signal once a step is done."""
    original = Learner.update

    def update(learner, state):
        original(learner, state)
        if state.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Learner, "update", update)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
