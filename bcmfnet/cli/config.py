"""`bcmfnet config show`."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from bcmfnet.cli.options import CommonOptions, TrainOptions
from bcmfnet.engine.config import TrainConfig, to_toml

app = App(name="config", help="Look at configurations.")


@app.command
def show(
    *,
    preset: str = "synthetic",
    config: Path | None = None,
    cfg: TrainOptions = TrainConfig(),
    common: CommonOptions = CommonOptions(),
) -> int:
    """Print the configuration that `train` would use with the same flags, as TOML that --config takes.

    An option that no flag sets has its value from --config, and one that is not there either from --preset.

    Parameters
    ----------
    preset
        Values to start from: synthetic, camvid, cityscapes, paper or paper-camvid.
    config
        TOML or YAML file laid over the preset; flags are laid over both.
    """
    print(to_toml(cfg.to_dict()), end="")
    return 0
