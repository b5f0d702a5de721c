"""Training: one function from a configuration to a run folder, resumable at every step that it saves."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import math
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bcmfnet.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Batch,
    Dataset,
    TrainTransform,
    build_dataset,
    check_split_leak,
    normalize,
    train_loader,
)
from bcmfnet.data.class_weights import class_weights, mean_of_one, read_class_weights
from bcmfnet.data.verification import check_before_training, count_pixels
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
from bcmfnet.engine.config import CLASS_WEIGHTS, DataConfig, LossConfig, TrainConfig, to_toml
from bcmfnet.engine.distributed import ALONE, Processes
from bcmfnet.engine.ema import MovingAverage
from bcmfnet.engine.environment import describe_environment
from bcmfnet.engine.evaluate import Evaluation, amp_name, evaluate
from bcmfnet.engine.inference import LabelPredictor
from bcmfnet.engine.optim import Schedule, build_optimizer
from bcmfnet.engine.progress import Progress, progress_bar
from bcmfnet.engine.run_folder import MetricsLog, write_json, write_text
from bcmfnet.engine.runtime import (
    Interrupted,
    StopRequest,
    autocast,
    only_deterministic,
    resolve_amp,
    resolve_device,
    stop_on_signals,
)
from bcmfnet.engine.steps import ADVICE, Laps, Meter, Undo, intact
from bcmfnet.errors import CheckpointError, ConfigError, TrainingError, printable
from bcmfnet.models import count_parameters, create_model, model_from_weights, save_weights
from bcmfnet.models.weights import BEST, read_weights
from bcmfnet.nn import BoundaryCorrectedLoss, UpsampledCrossEntropy
from bcmfnet.viz import require_matplotlib

log = logging.getLogger("bcmfnet.train")

CLASS_WEIGHTS_FILE = "class_weights.json"


@dataclass
class TrainResult:
    """The end of a run: its folder and the evaluation of the weights that it stands for."""

    folder: Path
    steps: int
    evaluation: Evaluation


def train(config: TrainConfig, folder: Path, *, resume: bool = False, processes: Processes = ALONE) -> TrainResult:
    """Train as configured and leave everything in the folder.

    With resume, go on from the folder's last checkpoint: the weights end bit for bit where an uninterrupted run
    ends, unless one of the options that may change is another (`checkpoint.MAY_CHANGE`). The caller owns the folder
    (`run_folder.owned`). Raises ConfigError, DataError, CheckpointError or TrainingError, MissingPackageError where
    matplotlib is not installed; Interrupted after a signal, once the state is saved. Whatever else ends the run, the
    last finished step is saved first. Signals reach the main thread alone, so a run in another is not stopped by them.

    Several processes call it alike. Each loads frames of its own, and a step takes the mean of their gradients; the
    leading one alone reads and writes the folder.
    """
    require_matplotlib("the curves of a run")
    config = config.with_absolute_paths()
    checkpoint = processes.from_leader(lambda: _checkpoint_to_go_on_from(folder, config) if resume else None)
    device = resolve_device(config.device, processes)
    amp = resolve_amp(config.amp, device)
    train_set, val_set = build_datasets(config.data)
    plan = Schedule.of(config, len(train_set), processes.count)
    torch.manual_seed(config.seed)
    model = create_model(
        config.model.name,
        num_classes=train_set.table.num_classes,
        aux=config.model.aux,
        pretrained=config.model.pretrained if not resume else None,
    )
    model.backbone.requires_grad_(not config.model.freeze)
    model.to(device, memory_format=torch.channels_last)
    log_file = _log_file(folder) if processes.leads else contextlib.nullcontext()
    with log_file, only_deterministic(config.deterministic), stop_on_signals(processes) as stop:
        run = _Run(config, folder, model, plan, device, amp, train_set, val_set, stop, processes)
        run.start(checkpoint)
        run.loop()
        evaluation = None if stop else run.finish()
        if evaluation is None:
            message = f"stopped by {stop.signal.name} at step {run.state.step}; go on with --resume {folder}"
            raise Interrupted(message, stop.exit_code)
        return TrainResult(folder, run.state.step, evaluation)


def _checkpoint_to_go_on_from(folder: Path, config: TrainConfig) -> Checkpoint:
    checkpoint = last_checkpoint(folder)
    check_options(checkpoint, config)
    return checkpoint


def build_datasets(data: DataConfig) -> tuple[Any, Any]:
    """The training and the validation set of a configuration.

    Raises DataError when they share a frame, or have what no training can use.
    """
    splits = (data.train_split, data.val_split)
    train_set, val_set = (build_dataset(data.name, data.root, split, **data.options(split)) for split in splits)
    check_split_leak(train_set, val_set)
    check_before_training((train_set, val_set))
    check_crops(data, train_set)
    return train_set, val_set


def check_crops(data: DataConfig, dataset: Dataset) -> None:
    """Raise ConfigError for a crop that is larger than any frame gets at the largest scale, so padded in every step."""
    height, width = map(max, zip(*map(dataset.frame_size, range(len(dataset))), strict=True))
    largest = int(height * data.scale[1]), int(width * data.scale[1])
    for _, crop in data.stages():
        if crop[0] > largest[0] or crop[1] > largest[1]:
            key, frame = "data.crop" if crop == data.crop else "data.crops", f"the largest frame of {data.train_split}"
            bound = f"{frame}, {height}x{width}, at the largest data.scale, {data.scale[1]:g}"
            raise ConfigError(f"{key}: expected at most {_size(largest)} ({bound}), got {_size(crop)}")


def _size(size: tuple[int, int]) -> str:
    return "x".join(map(str, size))


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
        stop: StopRequest,
        processes: Processes,
    ) -> None:
        self.config, self.folder, self.plan = config, folder, plan
        self.processes = processes
        self.device, self.amp = device, amp
        self.train_set, self.val_set = train_set, val_set
        self.stop = stop
        self.model = model
        self.criterion = build_loss(config.loss, train_set.table.ignore_index).to(device)
        self.class_weights: Tensor | None = None
        self.optimizer = build_optimizer(model, config.optim)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        self.average = MovingAverage(model, config.optim.ema) if config.optim.ema is not None else None
        self.averaged = self.average.model if self.average else None
        self.result = self.averaged or model
        self.state = TrainState(batches=processes.count * config.optim.accumulate, threads=torch.get_num_threads())
        self.undo = Undo(model)
        self.meter = Meter(config.data.batch_size * self.state.batches)
        self.laps = Laps(device)
        self.problems: dict[str, int] = {}
        self.progress = Progress()
        self.saved_step, self.saved_at = 0, time.monotonic()

    @property
    def checkpoint(self) -> Path:
        return self.folder / LAST

    @property
    def best_weights(self) -> Path:
        return self.folder / BEST

    def start(self, checkpoint: Checkpoint | None) -> None:
        """Take up a checkpoint, or start anew; then write down what the run is made of."""
        frames = name_frames(self.train_set, self.val_set)
        weights = self.processes.from_leader(lambda: self._class_weights(resume=checkpoint is not None))
        if checkpoint is not None:
            self._take_up(checkpoint, frames)
        else:
            self.state.frames = frames
        if weights is not None:
            self.class_weights = torch.tensor(list(weights.values()), dtype=torch.float32, device=self.device)
        self.processes.from_leader(lambda: self._write_beginning(checkpoint, weights))
        forward = self.processes.parallel(self.model)
        self.forward = torch.compile(forward) if self.config.compile else forward

    def _write_beginning(self, checkpoint: Checkpoint | None, weights: dict[str, float] | None) -> None:
        """Write down what the run is made of."""
        if checkpoint is None:
            for path in (self.checkpoint, *earlier_checkpoints(self.checkpoint)):
                path.unlink(missing_ok=True)
        elif checkpoint.path != self.checkpoint:
            checkpoint.path.replace(self.checkpoint)
        self.metrics = MetricsLog(self.folder, self.state if checkpoint else None)
        if checkpoint is not None:
            log.info("resume at step %d of %d", self.state.step, self.plan.steps)
            for change in check_options(checkpoint, self.config):
                log.info("from here on %s", change)
        if weights is not None:
            log.info("class weights: %s", ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items()))
            write_json(self.folder / CLASS_WEIGHTS_FILE, weights)
        write_text(self.folder / "config.toml", to_toml(self.config.to_dict()))
        write_json(self.folder / "env.json", describe_environment())
        self.best_weights.parent.mkdir(exist_ok=True)
        log.info("%s: %.2f M parameters", self.config.model.name, count_parameters(self.model) / 1e6)
        log.info("%s: %d frames, %d to validate on", self.config.data.name, len(self.train_set), len(self.val_set))
        frames = self.config.data.batch_size * self.state.batches
        where = f"{self.processes.count} processes on {self.device.type}" if self.processes.count > 1 else self.device
        log.info("%d steps of %d frames on %s in %s", self.plan.steps, frames, where, amp_name(self.amp))

    def _take_up(self, checkpoint: Checkpoint, frames: str) -> None:
        """Go on from a checkpoint. Nothing is written where it is refused."""
        self.state = state = restore(checkpoint, self.model, self.optimizer, self.scaler, self.averaged)
        if state.frames != frames:
            expected = f"the frames of {checkpoint.path} ({state.frames})"
            raise ConfigError(f"data.root: expected {expected}, got others ({frames})")
        if state.step > self.plan.steps:
            key = "optim.steps" if self.config.optim.steps else "optim.epochs"
            done = f"at least the {state.step} steps that the run has done"
            raise ConfigError(f"{key}: expected {done}, got {self.plan.steps}")
        batches, processes = self.processes.count * self.config.optim.accumulate, self.processes.count
        if state.batches != batches:
            expected = f"{state.batches} batches a step on all processes, as {checkpoint.path} has them"
            raise ConfigError(f"optim.accumulate: expected {expected}, got {batches} on {processes}")
        threads = torch.get_num_threads()
        if state.threads != threads and self.config.deterministic:
            advice = f"set OMP_NUM_THREADS={state.threads}, or go on with --no-deterministic"
            raise ConfigError(f"deterministic: expected {state.threads} threads, as before, got {threads}; {advice}")
        state.threads = threads
        if state.evaluated and not self.processes.from_leader(self._has_best_weights):
            state.best_miou, state.evaluated = math.nan, min(state.evaluated, state.step - 1)
        self.saved_step = state.step

    def _class_weights(self, resume: bool) -> dict[str, float] | None:
        """Weight of each class, those that the run began with; None where the loss has none."""
        source, table, path = self.config.loss.class_weights, self.train_set.table, self.folder / CLASS_WEIGHTS_FILE
        if source == "none":
            return None
        if resume and path.exists():
            weights = read_class_weights(path, table.classes)
        else:
            pixels = count_pixels(self.train_set)[:, : table.num_classes]
            of_rule = source in CLASS_WEIGHTS
            weights = class_weights(source, pixels) if of_rule else read_class_weights(Path(source), table.classes)
            weights = mean_of_one(weights, pixels)
        return dict(zip(table.classes, weights.tolist(), strict=True))

    def _has_best_weights(self) -> bool:
        try:
            read_weights(self.best_weights)
        except CheckpointError as error:
            log.warning("%s; the best weights from here on take their place", error)
            return False
        return True

    def loop(self) -> None:
        """Train to the next evaluation, evaluate, save; until the last step or a request to stop."""
        with progress_bar("train", self.plan.steps, self.state.step) as self.progress:
            try:
                self._train_and_evaluate()
            except (TrainingError, CheckpointError):  # the state cannot be saved, or is not worth it
                raise
            except BaseException as error:
                self._save_finished()
                if (text := self._explained(error)) is not None:
                    raise TrainingError(f"{text} at step {self.state.step}") from error
                raise

    def _explained(self, error: BaseException) -> str | None:
        """What an error of torch's means to the user, where that is known."""
        if isinstance(error, RuntimeError) and self.processes.lost(error):
            return "a process of the run was lost"
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            crop = "x".join(map(str, self.plan.crop(min(self.state.step, self.plan.steps - 1))[0]))
            advice = "try a lower --data.batch-size (and --optim.accumulate), --data.crop or --loss.inplace-grad"
            return f"out of memory with {self.config.data.batch_size} crops of {crop}; {advice};"
        return None

    def _train_and_evaluate(self) -> None:
        self.save()
        self._evaluate_where_due()
        while self._goes_on():
            crop, change = self.plan.crop(self.state.step)
            with contextlib.closing(self._batches(crop)) as stream:
                while self._goes_on() and self.state.step < change:
                    self.train_until(min(change, self.plan.next_evaluation(self.state.step)), stream)
                    self.save()
                    self._evaluate_where_due()

    def _goes_on(self) -> bool:
        return not self.stop and not self._is_stale() and self.state.step < self.plan.steps

    def _is_stale(self) -> bool:
        return self.config.patience is not None and self.state.stale >= self.config.patience

    def _save_finished(self) -> None:
        """Save the last finished step while what broke the loop is on its way."""
        if not self.processes.leads:
            return
        try:
            self.undo.take_back()
            self.save()
        except Exception as error:
            text = "step %d could not be saved (%s); go on from step %d with --resume %s"
            log.error(text, self.state.step, error, self.saved_step, self.folder)
        else:
            log.warning("step %d is saved; go on with --resume %s", self.state.step, self.folder)

    def _evaluate_where_due(self) -> None:
        step = self.state.step
        due = step % self.plan.evaluate_every == 0 or step == self.plan.steps
        if due and step > self.state.evaluated and not self.stop:
            self.evaluate()
            self.save()

    def _batches(self, crop: tuple[int, int]) -> Generator[Any]:
        data = self.config.data
        transform = TrainTransform(
            crop=crop, scale=data.scale, flip=data.flip, jitter=data.jitter, balance=data.balance,
            ignore_index=self.train_set.table.ignore_index,
        )  # fmt: skip
        loader = train_loader(
            self.train_set, transform, batch_size=data.batch_size, seed=self.config.seed, workers=data.workers,
            start=divmod(self.state.step, self.plan.steps_per_epoch), rank=self.processes.rank,
            world_size=self.processes.count, accumulate=self.config.optim.accumulate, strict=data.strict,
            should_stop=self.stop,
        )  # fmt: skip
        return iter(loader)

    def train_until(self, boundary: int, stream: Iterator[Any]) -> None:
        """Train up to a step, or until a stop is requested."""
        self.model.train()
        if self.config.model.freeze:
            self.model.backbone.eval()
        self.meter = Meter(self.config.data.batch_size * self.state.batches)
        while self.state.step < boundary:
            self.stop.agree()
            self.laps.mark("loader")
            batches = [] if self.stop else list(islice(stream, self.config.optim.accumulate))
            if len(batches) < self.config.optim.accumulate:
                return
            self._tell_problems(batches)
            self.train_step(batches)
            if self.state.step % self.config.log_every == 0:
                self._record()
            self.progress.advance()
            if time.monotonic() - self.saved_at >= 60 * self.config.save_every_minutes:
                self.save()

    def _tell_problems(self, batches: list[Batch]) -> None:
        """Warn of each frame that cannot be read once, and count how often another one stood in."""
        for line in (line for batch in batches for line in batch.problems):
            if line not in self.problems:
                log.warning("%s; another frame stands in for it", printable(line))
            self.problems[line] = self.problems.get(line, 0) + 1

    def train_step(self, batches: list[Batch]) -> None:
        """One step of the optimiser: done and counted, or nothing that `undo` cannot take back."""
        self.laps.mark("optimizer")
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.lr(self.state.step)
        if self.class_weights is not None:
            self.criterion.weight = 1 + self.plan.class_weights_left(self.state.step) * (self.class_weights - 1)
        self.undo.keep()
        self.optimizer.zero_grad(set_to_none=True)
        figures = []
        for batch in batches[:-1]:
            with self.forward.no_sync() if self.processes.count > 1 else contextlib.nullcontext():
                figures.append(self._backward(batch))
        figures.append(self._backward(batches[-1]))
        self.laps.mark("optimizer")
        if self.config.optim.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        mean = self.processes.mean(torch.stack(figures).mean(0))
        with self.stop.held():
            self.undo.seal()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.average:
                self.average.update(self.state.step + 1)
            self.state.step += 1
            self.undo.drop()
            self.meter.add(self.state.step, mean, [files for batch in batches for files in batch.files])
        self.laps.mark("rest")

    def _backward(self, batch: Batch) -> Tensor:
        """Add the gradients of a batch; the loss, and where it selects what it selects, float32 on the device."""
        self.laps.mark("copy")
        images = batch.images.to(self.device, non_blocking=True)
        images = normalize(images, IMAGENET_MEAN, IMAGENET_STD, torch.channels_last)
        labels = batch.labels.to(self.device, non_blocking=True)
        self.laps.mark("forward")
        with autocast(self.device, self.amp):
            output = self.forward(images)
        self.laps.mark("loss")
        options = {"jitter": self.state.step if self.config.loss.jitter else None}
        loss, stats = self.criterion(output.logits, labels, **options, return_stats=True)
        if output.aux is not None:
            loss = loss + self.config.loss.aux_weight * self.criterion(output.aux, labels, **options)
        self.laps.mark("backward")
        self.scaler.scale(loss / self.config.optim.accumulate).backward()
        selection = () if self.config.loss.mode == "plain" else stats.selection().values()
        return torch.stack([loss.detach(), *selection])

    def _record(self) -> None:
        """Write down the steps since the last row. Raises TrainingError for a loss not finite."""
        if not self.meter.steps:
            return
        steps = len(self.meter.steps)
        figures, rate = self.meter.read(self.saved_step)
        seconds = {f"{part}_s": total / steps for part, total in self.laps.read().items()}
        if not self.processes.leads:
            return
        loss, lr = figures["loss"], self.plan.lr(self.state.step - 1)
        step, epoch = self.state.step, self.state.step / self.plan.steps_per_epoch
        self.metrics.add({"step": step, "epoch": epoch, **figures, "lr": lr, "images_per_s": rate, **seconds})
        level = logging.DEBUG if self.progress.visible else logging.INFO
        log.log(level, "step %d/%d  loss %.4f  lr %.2e  %.1f images/s", step, self.plan.steps, loss, lr, rate)
        self.progress.note(f"loss {loss:.3f}  {rate:.1f} images/s")

    def evaluate(self) -> None:
        """Evaluate the current weights in the form that `finish` does, and keep them where they are selected."""
        self.processes.copy_from_leader(self.result)
        result = self._evaluate(self._predictor(self.result), boundary=False)
        if result is None:
            return
        best = not self.state.best_miou >= result.miou
        if self.processes.leads:
            self._keep_scores(result, best)
        if best:
            self.state.best_miou = result.miou
        self.state.stale = 0 if best else self.state.stale + 1
        self.state.evaluated = self.state.step

    def _keep_scores(self, result: Evaluation, best: bool) -> None:
        """Write down an evaluation, and its weights where they are selected."""
        scores = result.to_dict()
        row = {"step": self.state.step, "epoch": self.state.step / self.plan.steps_per_epoch}
        self.metrics.add(row | {key: scores[key] for key in ("miou", "pixel_accuracy", "iou")})
        note = "  (best)" if best else ""
        log.info("step %d/%d  val mIoU %.2f %%%s", self.state.step, self.plan.steps, 100 * result.miou, note)
        if best or self.config.select == "last":
            save_weights(self.best_weights, self.result, self._metadata(result.miou))

    def _evaluate(self, predictor: LabelPredictor, boundary: bool) -> Evaluation | None:
        options = {"workers": self.config.data.workers, "should_stop": self.stop, "processes": self.processes}
        return evaluate(predictor, self.val_set, boundary=boundary, **options)

    def _predictor(self, model: nn.Module) -> LabelPredictor:
        return LabelPredictor(model, IMAGENET_MEAN, IMAGENET_STD, self.device, self.amp)

    def save(self) -> None:
        """Save the state to go on from, and the current weights. Raises TrainingError where they are not finite."""
        self._record()
        if not self.processes.leads:
            return
        self._check_weights()
        save_checkpoint(
            self.checkpoint, self.state, self.config.to_dict(), self.model, self.optimizer, self.scaler, self.averaged
        )
        save_weights(self.folder / "weights" / "last.safetensors", self.result, self._metadata(None))
        self.saved_step, self.saved_at = self.state.step, time.monotonic()

    def _check_weights(self) -> None:
        """A loss is computed before the update of its step, so a finite one says nothing of what the update left."""
        for name, tensor in self.model.state_dict().items():
            if not tensor.isfinite().all():
                raise TrainingError(
                    f"{name}: expected finite weights, got nan or inf after step {self.state.step}; {ADVICE}; "
                    f"{intact(self.saved_step)}"
                )

    def _metadata(self, miou: float | None) -> dict[str, Any]:
        """What a weights file says of itself; no path of this machine goes out with the weights."""
        config = self.config.to_dict()
        config["data"].pop("root")
        if config["data"].pop("colors", None):
            config["data"]["num_classes"] = self.train_set.table.num_classes
        config["model"].pop("pretrained", None)
        if config["loss"]["class_weights"] not in CLASS_WEIGHTS:
            config["loss"]["class_weights"] = "file"
        return {
            "label_table": dataclasses.asdict(self.train_set.table),
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "step": self.state.step,
            "val_miou": miou,
            "config": config,
        }

    def finish(self) -> Evaluation | None:
        """Evaluate the selected weights in full and draw the run; None when stopped on the way."""
        model = self.processes.from_leader(lambda: model_from_weights(self.best_weights)[0]).to(self.device)
        predictor = self._predictor(model)
        evaluation = self._evaluate(predictor, boundary=True)
        if evaluation is None or not self.processes.leads:
            return evaluation
        if self.problems:
            text = "%d frames cannot be read; another one stood in for them %d times"
            log.warning(text, len(self.problems), sum(self.problems.values()))
        write_json(self.folder / "evaluation.json", evaluation.to_dict())
        report.draw_run(
            self.folder, self.metrics.rows, evaluation, predictor, self.val_set, self.criterion, self.meter.batch_size
        )
        return evaluation


def build_loss(config: LossConfig, ignore_index: int) -> BoundaryCorrectedLoss:
    """The loss of a configuration: `plain` is cross-entropy, `ohem` is OHEM as mmseg and HRNet users know it."""
    if config.mode == "plain":
        return UpsampledCrossEntropy(ignore_index)
    own = {field.name for field in dataclasses.fields(config)} & inspect.signature(
        BoundaryCorrectedLoss
    ).parameters.keys()
    options = {key: getattr(config, key) for key in own}
    if config.mode == "ohem":
        options |= {"ce_weight": 0.0, "nms": 1, "ratio": 0.0}
    return BoundaryCorrectedLoss(**options, ignore_index=ignore_index)


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
