"""What a run tells of its steps: figures, rates and times, as rows of metrics.jsonl, lines of the log and the bar."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bcmfnet.data import Batch
from bcmfnet.engine.checkpoint import TrainState
from bcmfnet.engine.evaluate import Evaluation
from bcmfnet.engine.learner import Learner
from bcmfnet.engine.progress import Progress
from bcmfnet.engine.run_folder import MetricsLog
from bcmfnet.errors import TrainingError, printable

log = logging.getLogger("bcmfnet.train")
ADVICE = "try a lower --optim.lr, a longer --optim.warmup-steps or --amp off"


class Record:
    """Figures of the steps since the last row, kept on the device so that no step waits for them; then a row."""

    def __init__(self, learner: Learner, state: TrainState) -> None:
        self.learner, self.plan, self.state = learner, learner.plan, state
        self.frames = learner.config.data.batch_size * state.batches
        self.metrics: MetricsLog | None = None
        self.progress = Progress()
        self.problems: dict[str, int] = {}
        self.restart()

    def open(self, folder: Path, resumed: bool) -> None:
        """Write to a folder from here on; without it, as in all processes but the leading one, nothing is written."""
        tensorboard = self.learner.config.tensorboard
        self.metrics = MetricsLog(folder, self.state if resumed else None, tensorboard=tensorboard)

    def restart(self) -> None:
        """Count the time of the steps from now on."""
        self.figures: list[Tensor] = []
        self.steps: list[tuple[int, list[tuple[str, ...]]]] = []
        self.start = time.perf_counter()

    def tell_problems(self, batches: list[Batch]) -> None:
        """Warn of each frame that cannot be read once, and count how often another one stood in."""
        for line in (line for batch in batches for line in batch.problems):
            if line not in self.problems:
                log.warning("%s; another frame stands in for it", printable(line))
            self.problems[line] = self.problems.get(line, 0) + 1

    def add(self, figures: Tensor, batches: list[Batch]) -> None:
        """Figures of the step that was just done, and the batches that it had."""
        self.figures.append(figures)
        self.steps.append((self.state.step, [files for batch in batches for files in batch.files]))

    def write_steps(self, saved_step: int) -> None:
        """Write down the mean of the steps since the last row. Raises TrainingError for a loss not finite."""
        if not self.steps:
            return
        rows = torch.stack(self.figures).tolist()
        for (value, *_), (step, files) in zip(rows, self.steps, strict=True):
            if not math.isfinite(value):
                got = f"got {value} at step {step}, on {', '.join(f[0] for f in files)}; {ADVICE}; {intact(saved_step)}"
                raise TrainingError(f"loss: expected a finite number, {got}")
        rate = len(rows) * self.frames / (time.perf_counter() - self.start)
        seconds = {f"{part}_s": total / len(rows) for part, total in self.learner.laps.read().items()}
        self.restart()
        skipped = self._read_skipped(saved_step)
        if self.metrics is None:
            return
        means = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        figures = dict(zip(self.learner.figures, means, strict=True))
        step, lr = self.state.step, self.plan.lr(self.state.step - 1)
        self.metrics.add(self._position() | figures | {"lr": lr, "images_per_s": rate} | seconds | skipped)
        level = logging.DEBUG if self.progress.visible else logging.INFO
        text = "step %d/%d  loss %.4f  lr %.2e  %.1f images/s"
        log.log(level, text, step, self.plan.steps, figures["loss"], lr, rate)
        self.progress.note(f"loss {figures['loss']:.3f}  {rate:.1f} images/s")

    def _read_skipped(self, saved_step: int) -> dict[str, int]:
        """How many of these steps were skipped, where there is a loss scale. Raises TrainingError where it is spent."""
        if not self.learner.scaler.is_enabled():
            return {}
        skipped, scale = int(self.learner.skipped), self.learner.scaler.get_scale()
        self.learner.skipped.zero_()
        if skipped and scale < 1:
            got = (
                f"got inf or nan at a loss scale of {scale:g} at step {self.state.step}; {ADVICE}; {intact(saved_step)}"
            )
            raise TrainingError(f"gradients: expected finite numbers, {got}")
        if skipped and self.metrics is not None:
            text = "%d steps up to %d had gradients beyond fp16 and were skipped; the loss scale is %g now"
            log.info(text, skipped, self.state.step, scale)
        return {"skipped": skipped}

    def write_scores(self, evaluation: Evaluation, best: bool) -> None:
        """Write down an evaluation."""
        if self.metrics is None:
            return
        scores = evaluation.to_dict()
        self.metrics.add(self._position() | {key: scores[key] for key in ("miou", "pixel_accuracy", "iou")})
        text, note = "step %d/%d  val mIoU %.2f %%%s", "  (best)" if best else ""
        log.info(text, self.state.step, self.plan.steps, 100 * evaluation.miou, note)

    def _position(self) -> dict[str, Any]:
        return {"step": self.state.step, "epoch": self.state.step / self.plan.steps_per_epoch}


def intact(saved_step: int) -> str:
    return f"the last checkpoint, of step {saved_step}, is intact"
