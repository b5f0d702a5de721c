"""A small run in a process of its own, which says in shared memory where it stands; for the tests that break it off."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch

from bcmfnet.engine import saver
from bcmfnet.engine import train as engine
from bcmfnet.engine.config import DataConfig, OptimConfig, TrainConfig
from bcmfnet.engine.learner import Learner
from bcmfnet.engine.record import Record
from bcmfnet.engine.runtime import Interrupted

PHASES = ("training", "evaluation", "checkpoint")
PHASE, STEP, SAVED, ENTERED = 0, 1, 2, 3
"""What the shared numbers are: the phase, the last finished and the last saved step, and how often each phase began."""


def small_config(save_every_minutes: float) -> TrainConfig:
    """Eight steps with two workers, evaluated after four and eight."""
    return TrainConfig(
        data=DataConfig(name="synthetic", crop=(64, 64), batch_size=2, workers=2, length=8),
        optim=OptimConfig(name="adamw", lr=1e-3, steps=8),
        amp="off",
        device="cpu",
        log_every=3,
        save_every_minutes=save_every_minutes,
    )


def train(folder: str, save_every_minutes: float, resume: bool, shared: Any) -> None:
    """Train in the folder as the leader of a new process group, and exit with the code of the command line."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # the workers', so that they are this process's children
    torch.set_num_threads(1)
    for phase, (owner, name) in enumerate(((Learner, "backward"), (engine, "evaluate"), (saver, "save_checkpoint"))):
        _tell(owner, name, phase, shared)
    engine.report.draw_run = lambda *args: None
    add = Record.add

    def added(record: Record, *args: Any) -> None:
        shared[STEP] = record.state.step
        add(record, *args)

    Record.add = added
    try:
        engine.train(small_config(save_every_minutes), Path(folder), resume=resume)
    except Interrupted as stopped:
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _tell(owner: Any, name: str, phase: int, shared: Any) -> None:
    original = getattr(owner, name)

    def told(*args: Any, **options: Any) -> Any:
        before = shared[PHASE]
        shared[PHASE] = phase
        shared[ENTERED + phase] += 1
        result = original(*args, **options)
        if name == "save_checkpoint":
            shared[SAVED] = args[1].step
        shared[PHASE] = before
        return result

    setattr(owner, name, told)
