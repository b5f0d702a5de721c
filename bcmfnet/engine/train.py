"""Training: one function from a configuration to a run folder, resumable at every step that it saves."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bcmfnet.engine import report
from bcmfnet.engine.build import build_class_weights, build_datasets, build_model, step_batches
from bcmfnet.engine.checkpoint import Checkpoint, TrainState, check_options, last_checkpoint, name_frames
from bcmfnet.engine.config import TrainConfig, to_toml
from bcmfnet.engine.distributed import ALONE, Processes
from bcmfnet.engine.environment import describe_environment
from bcmfnet.engine.evaluate import Evaluation, amp_name, evaluate
from bcmfnet.engine.learner import Learner
from bcmfnet.engine.optim import Schedule
from bcmfnet.engine.progress import progress_bar
from bcmfnet.engine.record import Record
from bcmfnet.engine.run_folder import require_tensorboard, write_json, write_text
from bcmfnet.engine.runtime import Interrupted, only_deterministic, resolve_amp, resolve_device, stop_on_signals
from bcmfnet.engine.saver import Saver, take_up
from bcmfnet.errors import CheckpointError, TrainingError
from bcmfnet.models import count_parameters, model_from_weights
from bcmfnet.viz import require_matplotlib

log = logging.getLogger("bcmfnet.train")

CLASS_WEIGHTS = "class_weights.json"
Validate = Callable[..., Evaluation | None]
"""`evaluate` on the validation set of a run."""


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
    matplotlib, or tensorboard if that is asked for, is not installed; Interrupted after a signal, once the state is
    saved. Whatever else ends the run, the last finished step is saved first. Signals reach the main thread alone, so a
    run in another is not stopped by them.

    Several processes call it alike. Each loads frames of its own, and a step takes the mean of their gradients; the
    leading one alone reads and writes the folder.
    """
    require_matplotlib("the curves of a run")
    if config.tensorboard:
        require_tensorboard()
    config = config.with_absolute_paths()
    checkpoint = processes.from_leader(lambda: _checkpoint_to_go_on_from(folder, config) if resume else None)
    device = resolve_device(config.device, processes)
    amp = resolve_amp(config.amp, device)
    train_set, val_set = build_datasets(config.data)
    plan = Schedule.of(config, len(train_set), processes.count)
    torch.manual_seed(config.seed)
    model = build_model(config.model, train_set.table, trained=resume)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    log_file = _log_file(folder) if processes.leads else contextlib.nullcontext()
    with log_file, only_deterministic(config.deterministic), stop_on_signals(processes) as stop:
        kept = folder / CLASS_WEIGHTS if resume else None
        class_weights = processes.from_leader(lambda: build_class_weights(config.loss, train_set, kept))
        learner = Learner(config, plan, model, train_set.table, class_weights, device, amp, processes)
        frames, parts = name_frames(train_set, val_set), processes.count * config.optim.accumulate
        state = TrainState(frames=frames, batches=parts, threads=torch.get_num_threads())
        if checkpoint is not None:
            state = take_up(checkpoint, learner, state)
        record = Record(learner, state)
        saver = Saver(folder, learner, state, record)
        if state.evaluated and not processes.from_leader(saver.has_best):
            state.best_miou, state.evaluated = math.nan, min(state.evaluated, state.step - 1)
        processes.from_leader(lambda: _write_beginning(saver, checkpoint, (len(train_set), len(val_set))))

        workers = config.data.workers
        validate = partial(evaluate, dataset=val_set, workers=workers, should_stop=stop, processes=processes)
        bar = progress_bar("train", plan.steps, state.step)
        stream = step_batches(config, plan, train_set, state.step, processes, stop)
        with bar as record.progress, _finished_step_saved(saver), contextlib.closing(stream):
            saver.save()
            _evaluate_where_due(saver, validate, stop)
            while not (stop or state.step == plan.steps or state.is_stale(config.patience)):
                stop.agree()
                learner.laps.mark("loader")
                batches = None if stop else next(stream, None)
                if batches is None:
                    break
                record.tell_problems(batches)
                figures = learner.backward(state.step, batches)
                with stop.held():
                    learner.update(state)
                    record.add(figures, batches)
                if state.step % config.log_every == 0:
                    record.write_steps(saver.saved_step)
                record.progress.advance()
                if saver.is_due():
                    saver.save()
                if plan.pauses(state.step):
                    saver.save()
                    _evaluate_where_due(saver, validate, stop)
                    record.restart()
            if stop:
                saver.save()

        evaluation = None if stop else _finish(saver, val_set, validate)
        if evaluation is None:
            assert stop.signal is not None  # nothing else leaves a run without an evaluation
            message = f"stopped by {stop.signal.name} at step {state.step}; go on with --resume {folder}"
            raise Interrupted(message, stop.exit_code)
        return TrainResult(folder, state.step, evaluation)


def _checkpoint_to_go_on_from(folder: Path, config: TrainConfig) -> Checkpoint:
    checkpoint = last_checkpoint(folder)
    check_options(checkpoint, config)
    return checkpoint


def _write_beginning(saver: Saver, checkpoint: Checkpoint | None, frames: tuple[int, int]) -> None:
    """Write down what the run is made of; frames are those to train and to validate on."""
    learner, config, plan, processes = saver.learner, saver.config, saver.learner.plan, saver.learner.processes
    saver.make_room(checkpoint)
    saver.record.open(saver.folder, resumed=checkpoint is not None)
    if checkpoint is not None:
        log.info("resume at step %d of %d", saver.state.step, plan.steps)
        for change in check_options(checkpoint, config):
            log.info("from here on %s", change)
    if weights := learner.class_weights:
        log.info("class weights: %s", ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items()))
        write_json(saver.folder / CLASS_WEIGHTS, weights)
    write_text(saver.folder / "config.toml", to_toml(config.to_dict()))
    write_json(saver.folder / "env.json", describe_environment())
    log.info("%s: %.2f M parameters", config.model.name, count_parameters(learner.model) / 1e6)
    log.info("%s: %d frames, %d to validate on", config.data.name, *frames)
    where = f"{processes.count} processes on {learner.device.type}" if processes.count > 1 else learner.device
    text = "%d steps of %d frames on %s in %s"
    log.info(text, plan.steps, saver.record.frames, where, amp_name(learner.amp))


@contextlib.contextmanager
def _finished_step_saved(saver: Saver) -> Iterator[None]:
    """Save the last finished step where something breaks the code inside, and say what that means where it is known."""
    try:
        yield
    except (TrainingError, CheckpointError):  # the state cannot be saved, or is not worth it
        raise
    except BaseException as error:
        saver.save_finished()
        if (text := _explained(error, saver.learner, saver.state.step)) is not None:
            raise TrainingError(f"{text} at step {saver.state.step}") from error
        raise


def _explained(error: BaseException, learner: Learner, step: int) -> str | None:
    """What an error of torch's means to the user, where that is known."""
    if isinstance(error, RuntimeError) and learner.processes.lost(error):
        return "a process of the run was lost"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        crop = "x".join(map(str, learner.plan.crop(min(step, learner.plan.steps - 1))[0]))
        advice = "try a lower --data.batch-size (and --optim.accumulate), --data.crop or --loss.inplace-grad"
        return f"out of memory with {learner.config.data.batch_size} crops of {crop}; {advice};"
    return None


def _evaluate_where_due(saver: Saver, validate: Validate, should_stop: object) -> None:
    """Evaluate the current weights in the form that `_finish` does, and keep them where they are selected."""
    learner, state = saver.learner, saver.state
    if should_stop or state.step <= state.evaluated or not learner.plan.evaluates(state.step):
        return
    learner.processes.copy_from_leader(learner.result)
    result = validate(learner.predictor(learner.result), boundary=False)
    if result is None:
        return
    best = not state.best_miou >= result.miou
    saver.record.write_scores(result, best)
    if best or learner.config.select == "last":
        saver.save_best(result.miou)
    state.best_miou, state.stale = (result.miou, 0) if best else (state.best_miou, state.stale + 1)
    state.evaluated = state.step
    saver.save()


def _finish(saver: Saver, val_set: Any, validate: Validate) -> Evaluation | None:
    """Evaluate the selected weights in full and draw the run; None when stopped on the way."""
    learner, record = saver.learner, saver.record
    model = learner.processes.from_leader(lambda: model_from_weights(saver.best)[0]).to(learner.device)
    predictor = learner.predictor(model)
    evaluation = validate(predictor, boundary=True)
    if evaluation is None or record.metrics is None:  # the leading process alone has them
        return evaluation
    if record.problems:
        text = "%d frames cannot be read; another one stood in for them %d times"
        log.warning(text, len(record.problems), sum(record.problems.values()))
    write_json(saver.folder / "evaluation.json", evaluation.to_dict())
    report.draw_run(saver.folder, record.metrics.rows, evaluation, predictor, val_set, learner.criterion, record.frames)
    return evaluation


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: on a full disk the log ends, and not the run."""


@contextlib.contextmanager
def _log_file(folder: Path) -> Iterator[None]:
    """Send the package's log to train.log in the folder as well, from INFO on where nobody set a level."""
    logger = logging.getLogger("bcmfnet")
    level = logger.level
    # The file is made by the first line: a run that is refused leaves none.
    handler = _LogFile(folder / "train.log", encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level or logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()
