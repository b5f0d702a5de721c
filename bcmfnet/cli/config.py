"""`bcmfnet config show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from bcmfnet.engine.config import TrainConfig, to_toml

app = App(name="config", help="Look at configurations.")


@app.command
def show(
    *,
    preset: str = "synthetic",
    config: Path | None = None,
    cfg: Annotated[TrainConfig, Parameter(name="*")] = TrainConfig(),
) -> int:
    """Print the configuration that `train` would use with the same flags, as TOML that --config takes.

    Parameters
    ----------
    preset
        Values to start from: synthetic, camvid, cityscapes, paper or paper-camvid.
    config
        TOML or YAML file laid over the preset; flags are laid over both.
    """
    print(to_toml(cfg.to_dict()), end="")
    return 0
