"""`bcmfnet train`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bcmfnet.cli.options import CommonOptions, TrainOptions, print_table
from bcmfnet.engine.config import OptionalPath, TrainConfig, to_toml
from bcmfnet.errors import ConfigError


def train(
    *,
    preset: str = "synthetic",
    config: Path | None = None,
    output_dir: OptionalPath = None,
    name: str | None = None,
    exist_ok: bool = False,
    resume: Path | None = None,
    dry_run: bool = False,
    json_output: Annotated[bool, Parameter(name="--json")] = False,
    cfg: TrainOptions = TrainConfig(),
    common: CommonOptions = CommonOptions(),
) -> int:
    """Train a network and evaluate its best weights.

    Without anything else it trains on generated street scenes for two to three minutes. An option that no flag sets has
    its value from --config, and one that is not there either from --preset: `bcmfnet config show` prints them all.
    Under torchrun all processes train one network; where it starts them again, they go on from what --output-dir holds.

    Parameters
    ----------
    preset
        Values to start from: synthetic, camvid, cityscapes, paper or paper-camvid.
    config
        TOML or YAML file laid over the preset; flags are laid over both.
    output_dir
        The run folder; without it runs/train/NAME[-N].
    name
        Name of the run; without it the preset's.
    exist_ok
        Write into an output folder that has something in it.
    resume
        A run folder to go on from, with its own configuration. Flags may change where, how long, how fast and with
        which decay it trains on, and what it writes; what it has started with cannot change.
    dry_run
        Print the resolved configuration and stop.
    json_output
        Print the evaluation as JSON instead of a table.
    """
    common.start_logging()
    if dry_run:
        print(to_toml(cfg.to_dict()), end="")
        return 0
    from bcmfnet.engine.distributed import launched_processes
    from bcmfnet.engine.evaluate import scores_table
    from bcmfnet.engine.run_folder import owned, run_folder
    from bcmfnet.engine.train import train

    with launched_processes() as processes, ExitStack() as stack:
        if resume is not None:
            for key, value in {"output_dir": output_dir, "name": name, "exist_ok": exist_ok or None}.items():
                if value is not None:
                    raise ConfigError(f"{key}: expected none with --resume, the run has its folder, got {value!r}")
        elif processes.restarts:
            resume = processes.from_leader(lambda: _interrupted_run(output_dir))
            exist_ok = True
        if resume is not None:
            owner = owned(resume, "resume")
        else:
            owner = run_folder("train", output_dir, name, exist_ok, default_name=preset)
        folder = processes.from_leader(lambda: stack.enter_context(owner))
        result = train(cfg, folder, resume=resume is not None, processes=processes)
    if not processes.leads:
        return 0
    if json_output:
        print(json.dumps({"folder": str(result.folder), **result.evaluation.to_dict()}, indent=2))
    else:
        print_table(scores_table(result.evaluation))
        print(f"\nrun folder: {result.folder}")
    return 0


def _interrupted_run(output_dir: str | None) -> Path | None:
    """The run that processes which were started again go on with; None where it has saved nothing yet."""
    from bcmfnet.engine.checkpoint import LAST, earlier_checkpoints

    if output_dir is None:
        raise ConfigError(
            "output_dir: expected the folder of the run, since its processes were started again, got none"
        )
    last = Path(output_dir) / LAST
    return Path(output_dir) if last.exists() or earlier_checkpoints(last) else None
