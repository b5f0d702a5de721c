"""Requests to stop, and the bar of a process without a terminal."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

from bcmfnet.engine.progress import progress_bar
from bcmfnet.engine.runtime import stop_on_signals

posix = pytest.mark.skipif(os.name != "posix", reason="no signals to a process")


@posix
def test_second_interrupt_waits_for_the_end_of_what_must_be_whole():
    done = []
    with stop_on_signals() as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        assert stop and stop.exit_code == 130
        with stop.held():
            signal.raise_signal(signal.SIGINT)
            done.append("held")
        done.append("after")
    assert done == ["held"]


@posix
def test_hangup_stops_unless_it_is_ignored_as_under_nohup():
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal is signal.SIGHUP and stop.exit_code == 143
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_ask_for_no_signals():
    stops = []

    def body():
        with stop_on_signals() as stop:
            stops.append(bool(stop))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert stops == [False]


@pytest.mark.parametrize("closed", [None, "file"])
def test_no_standard_error_is_no_bar(monkeypatch, tmp_path, closed):
    if closed:
        (closed := (tmp_path / "closed").open("w")).close()
    monkeypatch.setattr(sys, "stderr", closed)
    with progress_bar("train", 1) as progress:
        progress.advance()
    assert not progress.visible
