"""Processes that train one network together, as torchrun starts them; for the tests of distributed training."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bcmfnet.engine import train as engine
from bcmfnet.engine.config import DataConfig, OptimConfig, TrainConfig
from bcmfnet.engine.distributed import Processes, launched_processes
from bcmfnet.engine.learner import Learner
from bcmfnet.engine.record import Record
from bcmfnet.engine.runtime import Interrupted


def small_config(**optim: Any) -> TrainConfig:
    """Six steps of two frames on each process, evaluated after the last; eleven or more frames do not divide."""
    return TrainConfig(
        data=DataConfig(name="synthetic", crop=(64, 64), batch_size=2, workers=0, length=27),
        optim=OptimConfig(**{"name": "adamw", "lr": 1e-3, "steps": 6, "ema": 0.5} | optim),
        amp="off",
        device="cpu",
        log_every=2,
        val_every=10,
    )


def context() -> Any:
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["several", "bcmfnet.inference.network", "safetensors.torch"])
    return context


def start(context: Any, count: int, target: Callable, *args: Any) -> list[Any]:
    """Start `count` processes that call target(processes, *args)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [context.Process(target=_join, args=(rank, count, port, target, args)) for rank in range(count)]
    for process in started:
        process.start()
    return started


def _join(rank: int, count: int, port: int, target: Callable, args: tuple) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    with launched_processes() as processes:
        target(processes, *args)


def train(processes: Processes, folder: str, config: TrainConfig, resume: bool, steps: Any, strike: Any = None) -> None:
    """Train, tell the step in shared memory, and send the signal `strike` = (rank, step, number) to oneself.

    A process that adds up batches does as several do: only the first of each step counts for the running statistics.
    """
    engine.report.draw_run = lambda *args: None
    add_gradients, calls = Learner.add_gradients, []

    def first_counts(learner: Learner, step: int, batch: Any) -> Any:
        buffers = [(buffer, buffer.clone()) for buffer in learner.model.buffers()]
        figures = add_gradients(learner, step, batch)
        for buffer, before in buffers if len(calls) % config.optim.accumulate else ():
            buffer.copy_(before)
        calls.append(batch)
        return figures

    Learner.add_gradients = first_counts
    add = Record.add

    def added(record: Record, *args: Any) -> None:
        steps[processes.rank] = record.state.step
        add(record, *args)
        if strike is not None and (processes.rank, record.state.step) == strike[:2]:
            os.kill(os.getpid(), strike[2])

    Record.add = added
    try:
        engine.train(config, Path(folder), resume=resume, processes=processes)
    except Interrupted as stopped:
        sys.exit(stopped.exit_code)
    except Exception as error:
        Path(folder, f"rank{processes.rank}.err").write_text(str(error))
        sys.exit(1)


def ask_the_leader(processes: Processes, answers: Any) -> None:
    """Put what each process makes of an answer and of an error of the leading one."""
    answer = processes.from_leader(lambda: f"by {processes.rank}")
    try:
        processes.from_leader(lambda: int("x"))
    except ValueError as error:
        answers.put((processes.rank, answer, str(error), processes.largest(10 * processes.rank)))
