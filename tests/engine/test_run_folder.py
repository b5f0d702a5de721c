"""Who owns the folder of a run: one process at a time, until it dies; and what a killed one left is swept."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
import time

import pytest

from bcmfnet.engine import run_folder as module
from bcmfnet.engine.run_folder import LOCK, owned, run_folder
from bcmfnet.errors import ConfigError

# Owns a folder, and has a child that outlives it, as a loader process may. The child names itself: what it inherited
# is closed by then.
OWNER = """
import os, sys, time
from pathlib import Path
from bcmfnet.engine.run_folder import owned
with owned(Path(sys.argv[1]), "output_dir"):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def refusal(folder, key="output_dir"):
    with pytest.raises(ConfigError) as caught, owned(folder, key):
        pass
    return str(caught.value)


def test_a_lock_dies_with_its_owner(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", OWNER, tmp_path], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        expected = (
            f"resume: expected a folder that nobody writes to, got {tmp_path}, owned by process {process.pid} on "
        )
        assert refusal(tmp_path, "resume") == expected + platform.node()
        process.kill()
        process.wait()
        os.kill(child, 0)  # is alive
        with owned(tmp_path, "output_dir"):
            assert refusal(tmp_path).endswith(f"owned by process {os.getpid()} on {platform.node()}")
        assert not list(tmp_path.iterdir())
    finally:
        process.kill()
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_of_many_that_start_at_once_one_owns_the_folder_at_a_time(tmp_path):
    """Threads contend as processes do. Each owner leaves, so that files that are removed and made anew are met too."""
    inside, most, done = [], [], []

    def contend():
        while len(done) < 200:
            try:
                with owned(tmp_path, "output_dir"):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.0005)
                    inside.pop()
                    done.append(1)
            except ConfigError:
                pass

    threads = [threading.Thread(target=contend) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}


def test_a_folder_that_was_filled_before_it_was_owned_is_refused(tmp_path, monkeypatch):
    """A whole run may come and go between a look into the folder and its lock."""
    lock = module._lock

    def late(path, key):
        (tmp_path / "run" / "metrics.jsonl").touch()
        return lock(path, key)

    monkeypatch.setattr(module, "_lock", late)
    with pytest.raises(ConfigError, match="exists and is not empty"), run_folder("train", str(tmp_path / "run"), None):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_folder_is_left_without_its_lock_and_taken_away_where_nothing_is_in_it(tmp_path):
    with run_folder("train", str(tmp_path / "run"), None) as folder:
        assert [path.name for path in folder.iterdir()] == [LOCK]
    assert not list(folder.iterdir())
    with pytest.raises(KeyError), run_folder("train", str(tmp_path / "run"), None):
        raise KeyError
    assert not folder.exists()


def test_what_a_killed_owner_left_unfinished_is_swept_and_nothing_else(tmp_path):
    kept = [".hidden.tmp", "a.tmp", ".b.1.tmp.txt", "weights/best.safetensors", "other/.x.1.tmp"]
    swept = [".config.toml.123.tmp", "weights/.best.safetensors.7.tmp", "checkpoints/.last.pt.99.tmp"]
    for name in kept + swept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with owned(tmp_path, "resume"):
        pass
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


@pytest.mark.parametrize("missing", ["module", "file system"])
def test_without_file_locks_a_warning_says_so(tmp_path, monkeypatch, caplog, missing):
    def refuse(*_):
        raise OSError(37, "No locks available")

    if missing == "module":
        monkeypatch.setattr(module, "fcntl", None)
    else:
        monkeypatch.setattr(module.fcntl, "flock", refuse)
    with owned(tmp_path, "output_dir"):
        pass
    reason = {"module": "this system has none", "file system": "No locks available"}[missing]
    assert caplog.messages == [f"no file lock ({reason}): a second run in the same folder would not be noticed"]
