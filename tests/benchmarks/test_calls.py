"""The host time of a call is measured for every op."""

from __future__ import annotations

from bcmfnet.benchmarks import calls
from bcmfnet.ops import __all__ as public


def test_every_op_is_timed():
    measured = calls.measure(number=10)
    assert {name for name in public if name[0].islower()} <= set(measured)
    assert all(microseconds > 0 for microseconds in measured.values())
