"""Processes that train one network together, as torchrun starts them; for the tests of distributed training."""

from __future__ import annotations

import copy
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bcmfnet.engine import train as engine
from bcmfnet.engine.build import build_loss
from bcmfnet.engine.config import DataConfig, LossConfig, OptimConfig, TrainConfig
from bcmfnet.engine.distributed import Processes, launched_processes
from bcmfnet.engine.learner import Learner
from bcmfnet.engine.record import Record
from bcmfnet.engine.runtime import Interrupted
from bcmfnet.ops import boundary_corrected_loss, segmentation_loss


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
    context.set_forkserver_preload(["several", "torch._dynamo", "bcmfnet.inference.network", "safetensors.torch"])
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


CLASSES = 5
SYNCED: dict[str, dict[str, Any]] = {
    "plain": {"boundary_weight": 0.0},
    "detect": {"boundary_weight": 0.5},
    "detect, the hardest third": {"ratio": 1 / 3, "threshold": 60.0},
    "detect, few": {"threshold": 0.01, "max_kept": 37},
    "detect, few of a tie": {"threshold": 0.0, "max_kept": 1},
    "detect, divided by the valid": {"norm": "valid", "nms": 3, "min_kept": 200, "threshold": 9.0},
    "ohem": {"mode": "ohem", "ce_weight": 0.0, "min_kept": 300, "threshold": 2.0},
    "paper": {"mode": "paper", "nms": 3, "ratio": 1 / 16, "boundary_weight": 0.05, "jitter": 5},
    "class weights": {"weight": [0.5, 0.0, 2.0, 1.0, 3.0], "ratio": 0.25},
    "each image": {"per_image": True, "ratio": 0.25},
    "a batch without a valid pixel": {"ratio": 0.25, "void": 1},
    "nothing valid at all": {"void": 9},
    "many terms": {
        "focal": 0.5, "dice": 1.0, "tversky": 0.3, "tversky_alpha": 0.3, "boundary": 0.5, "label_smoothing": 0.1,
        "overlap_smooth": 1.0, "overlap_absent": "zero", "weight": [0.5, 0.0, 2.0, 1.0, 3.0], "pixel_weight": True,
    },
    "overlap of each image": {"ce": 0.0, "jaccard": 1.0, "overlap_per_image": True, "overlap_log": True, "void": 1},
    "distillation": {"distillation": 0.7, "teacher": True, "pixel_weight": True, "distillation_where": "all"},
    "distillation of the valid": {"ce": 0.0, "distillation": 1.0, "teacher": True, "distillation_temperature": 2.0},
}  # fmt: skip
"""Options of losses over several processes; `void` is from the end how many of them have nothing valid.

Those of terms are for `segmentation_loss`.
"""
TERMS = {"ce", "focal", "dice", "jaccard", "tversky", "boundary", "distillation"}


def losses_that_share(processes: Processes, answers: Any) -> None:
    """Put whether the losses of --loss.sync share the batches of all processes, and whether others do."""
    configs = [LossConfig(mode=mode, sync=sync) for mode in ("detect", "ohem", "plain") for sync in (True, False)]
    answers.put([build_loss(config, 255, processes).call["process_group"] is dist.group.WORLD for config in configs])


def synced_losses(processes: Processes, dtype: torch.dtype, cases: list[tuple[str, Any]], answers: Any) -> None:
    """Compare, for each case and size of the logits, the loss that processes share with that of one with all images.

    Put (case, largest difference of loss and of the gradients that DistributedDataParallel leaves, whether the counts
    and thresholds are equal).
    """
    for case, size in cases:
        torch.manual_seed(0)
        images = torch.randn(2 * processes.count, 3, *size, dtype=dtype)
        target = torch.randint(0, CLASSES, (len(images), 12, 16), dtype=torch.uint8)
        target[torch.rand(target.shape) < 0.1] = 255
        options = dict(SYNCED[case])
        target[len(images) - 2 * min(options.pop("void", 0), processes.count) :] = 255
        if "weight" in options:
            options["weight"] = torch.tensor(options["weight"])
        if "pixel_weight" in options:
            options["pixel_weight"] = torch.rand(target.shape).to(dtype)
        if "teacher" in options:
            options["teacher"] = torch.randn(len(images), CLASSES, *size, dtype=dtype)
        compute = segmentation_loss if TERMS & options.keys() else boundary_corrected_loss
        network = torch.nn.Conv2d(3, CLASSES, 1).to(dtype)
        alone = copy.deepcopy(network)
        mine = slice(2 * processes.rank, 2 * processes.rank + 2)
        options = options | {"return_stats": True}
        expected, figures = compute(alone(images), target, **options)
        options |= {name: options[name][mine] for name in ("pixel_weight", "teacher") if name in options}
        expected.backward()
        parallel = processes.parallel(network)  # its hooks go with it
        loss, stats = compute(parallel(images[mine]), target[mine], **options, process_group=processes.group)
        loss.backward()
        errors = [(loss - expected).detach().abs()]
        errors += [(getattr(stats, name) - getattr(figures, name)).abs() for name in TERMS]
        for ours, theirs in zip(network.parameters(), alone.parameters(), strict=True):
            errors.append((ours.grad - theirs.grad).abs().max())
        thresholds = figures.threshold[mine] if options.get("per_image") else figures.threshold
        equal = torch.equal(stats.threshold, thresholds) and all(
            int(ours) == int(theirs) for ours, theirs in zip(stats[2:4], figures[2:4], strict=True)
        )
        answers.put((f"{case} {size}", float(max(errors)), equal))
