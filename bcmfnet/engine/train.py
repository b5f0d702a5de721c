"""Training: one function from a configuration to a run folder, resumable at every step that it saves."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bcmfnet.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    TrainTransform,
    build_dataset,
    check_split_leak,
    normalize,
    train_loader,
)
from bcmfnet.data.verification import check_before_training
from bcmfnet.engine import report
from bcmfnet.engine.checkpoint import (
    LAST,
    Checkpoint,
    TrainState,
    check_options,
    earlier_checkpoints,
    last_checkpoint,
    name_frames,
    restore,
    save_checkpoint,
)
from bcmfnet.engine.config import DataConfig, LossConfig, TrainConfig, to_toml
from bcmfnet.engine.environment import describe_environment
from bcmfnet.engine.evaluate import Evaluation, amp_name, evaluate
from bcmfnet.engine.inference import LabelPredictor
from bcmfnet.engine.optim import Schedule, build_optimizer
from bcmfnet.engine.progress import Progress, progress_bar
from bcmfnet.engine.run_folder import MetricsLog, write_json, write_text
from bcmfnet.engine.runtime import Interrupted, StopRequest, autocast, resolve_amp, resolve_device, stop_on_signals
from bcmfnet.errors import CheckpointError, ConfigError, TrainingError
from bcmfnet.models import count_parameters, create_model, model_from_weights, save_weights
from bcmfnet.models.weights import BEST, read_weights
from bcmfnet.nn import BoundaryCorrectedLoss, UpsampledCrossEntropy
from bcmfnet.viz import require_matplotlib

log = logging.getLogger("bcmfnet.train")


@dataclass
class TrainResult:
    """The end of a run: its folder and the evaluation of its best weights."""

    folder: Path
    steps: int
    evaluation: Evaluation


def train(config: TrainConfig, folder: Path, *, resume: bool = False) -> TrainResult:
    """Train as configured and leave everything in the folder.

    With resume, go on from the folder's last checkpoint: the weights end bit for bit where an uninterrupted run
    ends, unless one of the options that may change is another (`checkpoint.MAY_CHANGE`). The caller owns the folder
    (`run_folder.owned`). Raises ConfigError, DataError, CheckpointError or TrainingError, MissingPackageError where
    matplotlib is not installed; Interrupted after a signal, once the state is saved.
    """
    require_matplotlib("the curves of a run")
    config = config.with_absolute_paths()
    checkpoint = last_checkpoint(folder) if resume else None
    if checkpoint is not None:
        check_options(checkpoint, config)
    device = resolve_device(config.device)
    amp = resolve_amp(config.amp, device)
    train_set, val_set = build_datasets(config.data)
    plan = Schedule.of(config, len(train_set))
    torch.manual_seed(config.seed)
    model = create_model(
        config.model.name,
        num_classes=train_set.table.num_classes,
        aux=config.model.aux,
        pretrained=config.model.pretrained if not resume else None,
    )
    model.to(device, memory_format=torch.channels_last)
    run = _Run(config, folder, model, plan, device, amp, train_set, val_set)
    with _log_file(folder), stop_on_signals() as stop:
        run.start(checkpoint)
        run.loop(stop)
        evaluation = None if stop else run.finish(stop)
        if evaluation is None:
            message = f"stopped by {stop.signal.name} at step {run.state.step}; go on with --resume {folder}"
            raise Interrupted(message, stop.exit_code)
        return TrainResult(folder, run.state.step, evaluation)


def build_datasets(data: DataConfig) -> tuple[Any, Any]:
    """The training and the validation set of a configuration.

    Raises DataError when they share a frame, or have what no training can use.
    """
    splits = (data.train_split, data.val_split)
    train_set, val_set = (build_dataset(data.name, data.root, split, **data.options(split)) for split in splits)
    check_split_leak(train_set, val_set)
    check_before_training((train_set, val_set))
    return train_set, val_set


class _Run:
    """A run in progress: what its phases share."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        model: nn.Module,
        plan: Schedule,
        device: torch.device,
        amp: torch.dtype | None,
        train_set: Any,
        val_set: Any,
    ) -> None:
        self.config, self.folder, self.plan = config, folder, plan
        self.device, self.amp = device, amp
        self.train_set, self.val_set = train_set, val_set
        self.model = model
        self.forward = torch.compile(model) if config.compile else model
        self.criterion = build_loss(config.loss, train_set.table.ignore_index).to(device)
        self.optimizer = build_optimizer(model, config.optim)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        self.predictor = LabelPredictor(self.forward, IMAGENET_MEAN, IMAGENET_STD, device, amp)
        self.state = TrainState()

    @property
    def checkpoint(self) -> Path:
        return self.folder / LAST

    @property
    def best_weights(self) -> Path:
        return self.folder / BEST

    def start(self, checkpoint: Checkpoint | None) -> None:
        """Take up a checkpoint, or start anew; then write down what the run is made of."""
        frames = name_frames(self.train_set, self.val_set)
        if checkpoint is not None:
            self._take_up(checkpoint, frames)
        else:
            for path in (self.checkpoint, *earlier_checkpoints(self.checkpoint)):
                path.unlink(missing_ok=True)
            self.state.frames = frames
            self.metrics = MetricsLog(self.folder)
        write_text(self.folder / "config.toml", to_toml(self.config.to_dict()))
        write_json(self.folder / "env.json", describe_environment())
        self.best_weights.parent.mkdir(exist_ok=True)
        log.info("%s: %.2f M parameters", self.config.model.name, count_parameters(self.model) / 1e6)
        log.info("%s: %d frames, %d to validate on", self.config.data.name, len(self.train_set), len(self.val_set))
        batch = self.config.data.batch_size
        log.info("%d steps of %d frames on %s in %s", self.plan.steps, batch, self.device, amp_name(self.amp))

    def _take_up(self, checkpoint: Checkpoint, frames: str) -> None:
        """Go on from a checkpoint. Nothing is written where it is refused."""
        self.state = state = restore(checkpoint, self.model, self.optimizer, self.scaler)
        if state.frames != frames:
            expected = f"the frames of {checkpoint.path} ({state.frames})"
            raise ConfigError(f"data.root: expected {expected}, got others ({frames})")
        if state.step > self.plan.steps:
            key = "optim.steps" if self.config.optim.steps else "optim.epochs"
            done = f"at least the {state.step} steps that the run has done"
            raise ConfigError(f"{key}: expected {done}, got {self.plan.steps}")
        if checkpoint.path != self.checkpoint:
            checkpoint.path.replace(self.checkpoint)
        if state.evaluated and not self._has_best_weights():
            state.best_miou, state.evaluated = math.nan, min(state.evaluated, state.step - 1)
        self.metrics = MetricsLog(self.folder, state)
        log.info("resume at step %d of %d", state.step, self.plan.steps)
        for change in check_options(checkpoint, self.config):
            log.info("from here on %s", change)

    def _has_best_weights(self) -> bool:
        try:
            read_weights(self.best_weights)
        except CheckpointError as error:
            log.warning("%s; the best weights from here on take their place", error)
            return False
        return True

    def loop(self, stop: StopRequest) -> None:
        """Train to the next evaluation, evaluate, save; until the last step or a request to stop."""
        with progress_bar("train", self.plan.steps, self.state.step) as progress:
            stream = self._batches()
            while True:
                self.save()
                if stop or self.state.evaluated == self.plan.steps:
                    return
                boundary = self.plan.next_evaluation(self.state.step)
                if self._evaluation_is_due():
                    self.evaluate(stop)
                else:
                    self.train_until(boundary, stream, stop, progress)

    def _evaluation_is_due(self) -> bool:
        step = self.state.step
        return step > self.state.evaluated and (step % self.plan.evaluate_every == 0 or step == self.plan.steps)

    def _batches(self) -> Iterator[Any]:
        data = self.config.data
        transform = TrainTransform(
            crop=data.crop, scale=data.scale, flip=data.flip, jitter=data.jitter,
            ignore_index=self.train_set.table.ignore_index,
        )  # fmt: skip
        loader = train_loader(
            self.train_set, transform, batch_size=data.batch_size, seed=self.config.seed, workers=data.workers,
            start=divmod(self.state.step, self.plan.steps_per_epoch),
        )  # fmt: skip
        return iter(loader)

    def train_until(self, boundary: int, stream: Iterator[Any], stop: StopRequest, progress: Progress) -> None:
        """Train up to a step, or until a stop is requested."""
        self.model.train()
        meter = _Meter(self.config.data.batch_size)
        while self.state.step < boundary and not stop:
            batch = next(stream)
            lr = self.plan.lr(self.state.step)
            meter.add(self.state.step + 1, self.train_step(batch, lr), batch.files)
            self.state.step += 1
            if self.state.step % self.config.log_every == 0 or self.state.step == boundary or stop:
                self._record(meter, lr, progress)
            progress.advance()

    def train_step(self, batch: Any, lr: float) -> Tensor:
        """One step of the optimiser; the loss and figures of the main head's selection, detached, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        images = batch.images.to(self.device, non_blocking=True)
        images = normalize(images, IMAGENET_MEAN, IMAGENET_STD, torch.channels_last)
        labels = batch.labels.to(self.device, non_blocking=True)
        with autocast(self.device, self.amp):
            output = self.forward(images)
        loss, stats = self.criterion(output.logits, labels, return_stats=True)
        if output.aux is not None:
            loss = loss + self.config.loss.aux_weight * self.criterion(output.aux, labels)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        figures = () if self.config.loss.mode == "plain" else stats.selection().values()
        return torch.stack([loss.detach(), *figures])

    def _record(self, meter: _Meter, lr: float, progress: Progress) -> None:
        figures, rate = meter.read()
        loss = figures["loss"]
        step, epoch = self.state.step, self.state.step / self.plan.steps_per_epoch
        self.metrics.add({"step": step, "epoch": epoch, **figures, "lr": lr, "images_per_s": rate})
        level = logging.DEBUG if progress.visible else logging.INFO
        log.log(level, "step %d/%d  loss %.4f  lr %.2e  %.1f images/s", step, self.plan.steps, loss, lr, rate)
        progress.note(f"loss {loss:.3f}  {rate:.1f} images/s")

    def evaluate(self, stop: StopRequest) -> None:
        """Evaluate the current weights, and keep them where they are the best so far."""
        workers = self.config.data.workers
        result = evaluate(self.predictor, self.val_set, workers=workers, boundary=False, should_stop=stop)
        if result is None:
            return
        scores = result.to_dict()
        row = {"step": self.state.step, "epoch": self.state.step / self.plan.steps_per_epoch}
        self.metrics.add(row | {key: scores[key] for key in ("miou", "pixel_accuracy", "iou")})
        best = not self.state.best_miou >= result.miou
        note = "  (best)" if best else ""
        log.info("step %d/%d  val mIoU %.2f %%%s", self.state.step, self.plan.steps, 100 * result.miou, note)
        if best:
            self.state.best_miou = result.miou
            save_weights(self.best_weights, self.model, self._metadata(result.miou))
        self.state.evaluated = self.state.step

    def save(self) -> None:
        """Save the state to go on from, and the current weights."""
        save_checkpoint(self.checkpoint, self.state, self.config.to_dict(), self.model, self.optimizer, self.scaler)
        save_weights(self.folder / "weights" / "last.safetensors", self.model, self._metadata(None))

    def _metadata(self, miou: float | None) -> dict[str, Any]:
        """What a weights file says of itself; no path of this machine goes out with the weights."""
        config = self.config.to_dict()
        config["data"].pop("root")
        config["model"].pop("pretrained", None)
        return {
            "label_table": dataclasses.asdict(self.train_set.table),
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "step": self.state.step,
            "val_miou": miou,
            "config": config,
        }

    def finish(self, stop: StopRequest) -> Evaluation | None:
        """Evaluate the best weights in full and draw the run; None when stopped on the way."""
        model, _ = model_from_weights(self.best_weights, self.device)
        model = model.for_inference(dtype=self.amp or torch.float32, output="logits")
        predictor = LabelPredictor(model, IMAGENET_MEAN, IMAGENET_STD, self.device, amp=None)
        evaluation = evaluate(predictor, self.val_set, workers=self.config.data.workers, should_stop=stop)
        if evaluation is None:
            return None
        write_json(self.folder / "evaluation.json", evaluation.to_dict())
        report.draw_run(self.folder, self.metrics.rows, evaluation, predictor, self.val_set)
        return evaluation


class _Meter:
    """Figures of the steps since the last reading, kept on the device so that no step waits for them."""

    NAMES = ("loss", "ce", "selected", "threshold", "selected_loss")

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._reset()

    def _reset(self) -> None:
        self.figures: list[Tensor] = []
        self.steps: list[tuple[int, list[tuple[str, ...]]]] = []
        self.start = time.perf_counter()

    def add(self, step: int, figures: Tensor, files: list[tuple[str, ...]]) -> None:
        self.figures.append(figures)
        self.steps.append((step, files))

    def read(self) -> tuple[dict[str, float], float]:
        """Mean figures and images per second since the last reading. Raises TrainingError for a loss not finite."""
        rows = torch.stack(self.figures).tolist()
        for (value, *_), (step, files) in zip(rows, self.steps, strict=True):
            if not math.isfinite(value):
                raise TrainingError(
                    f"loss: expected a finite number, got {value} at step {step}, on {', '.join(f[0] for f in files)}; "
                    "try a lower --optim.lr, a longer --optim.warmup-steps or --amp off; the last checkpoint is intact"
                )
        rate = len(rows) * self.batch_size / (time.perf_counter() - self.start)
        self._reset()
        means = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        return dict(zip(self.NAMES, means, strict=False)), rate


def build_loss(config: LossConfig, ignore_index: int) -> BoundaryCorrectedLoss:
    """The loss of a configuration: `plain` is cross-entropy, `ohem` is OHEM as mmseg and HRNet users know it."""
    if config.mode == "plain":
        return UpsampledCrossEntropy(ignore_index)
    options = {key: getattr(config, key) for key in ("mode", "boundary_weight", "step", "threshold", "min_kept")}
    if config.mode == "ohem":
        return BoundaryCorrectedLoss(ce_weight=0.0, nms=1, ratio=0.0, ignore_index=ignore_index, **options)
    return BoundaryCorrectedLoss(nms=config.nms, ratio=config.ratio, ignore_index=ignore_index, **options)


@contextlib.contextmanager
def _log_file(folder: Path) -> Iterator[None]:
    """Send the package's log to train.log in the folder as well, from INFO on where nobody set a level."""
    logger = logging.getLogger("bcmfnet")
    level = logger.level
    handler = logging.FileHandler(
        folder / "train.log", encoding="utf-8", delay=True
    )  # made by a run that starts, not by one refused
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level or logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()
