"""Where a run takes up its state, and how it saves state and weights."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

from bcmfnet.data import IMAGENET_MEAN, IMAGENET_STD
from bcmfnet.engine.checkpoint import LAST, Checkpoint, TrainState, earlier_checkpoints, restore, save_checkpoint
from bcmfnet.engine.config import CLASS_WEIGHTS
from bcmfnet.engine.learner import Learner
from bcmfnet.engine.record import ADVICE, Record, intact
from bcmfnet.errors import CheckpointError, ConfigError, TrainingError
from bcmfnet.models import save_weights
from bcmfnet.models.weights import BEST, read_weights

log = logging.getLogger("bcmfnet.train")


def take_up(checkpoint: Checkpoint, learner: Learner, new: TrainState) -> TrainState:
    """Go on from a checkpoint instead of a new state. Raises ConfigError where that is another run's."""
    state = restore(checkpoint, learner.model, learner.optimizer, learner.scaler, learner.averaged)
    if state.frames != new.frames:
        expected = f"the frames of {checkpoint.path} ({state.frames})"
        raise ConfigError(f"data.root: expected {expected}, got others ({new.frames})")
    if state.step > learner.plan.steps:
        key = "optim.steps" if learner.config.optim.steps else "optim.epochs"
        done = f"at least the {state.step} steps that the run has done"
        raise ConfigError(f"{key}: expected {done}, got {learner.plan.steps}")
    if state.batches != new.batches:
        expected = f"{state.batches} batches a step on all processes, as {checkpoint.path} has them"
        raise ConfigError(f"optim.accumulate: expected {expected}, got {new.batches} on {learner.processes.count}")
    if state.threads != new.threads and learner.config.deterministic:
        advice = f"set OMP_NUM_THREADS={state.threads}, or go on with --no-deterministic"
        raise ConfigError(f"deterministic: expected {state.threads} threads, as before, got {new.threads}; {advice}")
    state.threads = new.threads
    return state


class Saver:
    """Saves the state of a run, and its weights; in all processes but the leading one it writes nothing."""

    def __init__(self, folder: Path, learner: Learner, state: TrainState, record: Record) -> None:
        self.folder, self.learner, self.state, self.record = folder, learner, state, record
        self.config, self.leads = learner.config, learner.processes.leads
        self.checkpoint, self.best = folder / LAST, folder / BEST
        self.saved_step, self.saved_at = state.step, time.monotonic()

    def make_room(self, checkpoint: Checkpoint | None) -> None:
        """Make room for a new run's checkpoints, or put the one that is taken up into the place of the last."""
        self.best.parent.mkdir(exist_ok=True)
        if checkpoint is None:
            for path in (self.checkpoint, *earlier_checkpoints(self.checkpoint)):
                path.unlink(missing_ok=True)
        elif checkpoint.path != self.checkpoint:
            checkpoint.path.replace(self.checkpoint)

    def has_best(self) -> bool:
        """Whether the best weights so far can be read; a warning says that they cannot."""
        try:
            read_weights(self.best)
        except CheckpointError as error:
            log.warning("%s; the best weights from here on take their place", error)
            return False
        return True

    def is_due(self) -> bool:
        """Whether so much time has passed since the last save."""
        return time.monotonic() - self.saved_at >= 60 * self.config.save_every_minutes

    def save(self) -> None:
        """Save the state to go on from, and the current weights. Raises TrainingError where they are not finite."""
        self.record.write_steps(self.saved_step)
        if not self.leads:
            return
        self._check_weights()
        learner = self.learner
        parts = learner.model, learner.optimizer, learner.scaler, learner.averaged
        save_checkpoint(self.checkpoint, self.state, self.config.to_dict(), *parts)
        save_weights(self.folder / "weights" / "last.safetensors", learner.result, self._metadata(None))
        self.saved_step, self.saved_at = self.state.step, time.monotonic()

    def save_finished(self) -> None:
        """Save the last finished step while what broke the run is on its way."""
        if not self.leads:
            return
        try:
            self.learner.take_back()
            self.save()
        except Exception as error:
            text = "step %d could not be saved (%s); go on from step %d with --resume %s"
            log.error(text, self.state.step, error, self.saved_step, self.folder)
        else:
            log.warning("step %d is saved; go on with --resume %s", self.state.step, self.folder)

    def save_best(self, miou: float) -> None:
        """Save the weights that the run stands for from here on."""
        if self.leads:
            save_weights(self.best, self.learner.result, self._metadata(miou))

    def _check_weights(self) -> None:
        """A loss is computed before the update of its step, so a finite one says nothing of what the update left."""
        for name, tensor in self.learner.model.state_dict().items():
            if not tensor.isfinite().all():
                got = f"got nan or inf after step {self.state.step}; {ADVICE}; {intact(self.saved_step)}"
                raise TrainingError(f"{name}: expected finite weights, {got}")

    def _metadata(self, miou: float | None) -> dict[str, Any]:
        """What a weights file says of itself; no path of this machine goes out with the weights."""
        config = self.config.to_dict()
        config["data"].pop("root")
        if config["data"].pop("colors", None):
            config["data"]["num_classes"] = self.learner.table.num_classes
        config["model"].pop("pretrained", None)
        if config["loss"]["class_weights"] not in CLASS_WEIGHTS:
            config["loss"]["class_weights"] = "file"
        return {
            "label_table": dataclasses.asdict(self.learner.table),
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "step": self.state.step,
            "val_miou": miou,
            "config": config,
        }
