"""Label maps for the Cityscapes benchmark server, of frames that need no labels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from bcmfnet.data.io import read_image, write_png
from bcmfnet.data.labels import LabelTable
from bcmfnet.data.pairs import check_frame_size, index_files
from bcmfnet.engine.inference import Predictor
from bcmfnet.engine.predict import label_ids
from bcmfnet.engine.progress import progress_bar
from bcmfnet.errors import ConfigError

TABLE = "cityscapes19"
ENDING = "_pred_labelIds.png"
"""After CITY_SEQUENCE_FRAME. The server takes the one PNG below its folder that begins with these three; its script
takes files named by hand for predictions where their name has "pred" in it.
"""


def submission_frames(root: str, split: str) -> dict[str, Path]:
    """Images of a split of Cityscapes by CITY_SEQUENCE_FRAME, whether or not there are labels of them.

    Without a root it is the environment's CITYSCAPES_DATASET. Raises ConfigError for none, MissingDataError for a
    folder that is not there.
    """
    root = root or os.environ.get("CITYSCAPES_DATASET", "")
    if not root:
        raise ConfigError("data.root: expected the folder of dataset cityscapes (or CITYSCAPES_DATASET), got none")
    return index_files(Path(root) / "leftImg8bit" / split, ("_leftImg8bit.png",), "*/*")


def write_submission(predictor: Predictor, table: LabelTable, frames: Mapping[str, Path], folder: Path) -> None:
    """Write the labelIds of each frame, a PNG of 8 bits of the frame's size.

    Raises ConfigError for classes that are not those of the benchmark, DataError for a frame that cannot be used: the
    server takes all frames or none.
    """
    if table.name != TABLE:
        raise ConfigError(f"submission: expected weights of the classes {TABLE}, got those of {table.name}")
    with progress_bar("predict", len(frames)) as progress:
        for name, path in frames.items():
            image = read_image(path, turn=False)
            check_frame_size(path, *image.shape[:2])
            labels = predictor(torch.from_numpy(image).permute(2, 0, 1)[None])[0].cpu().numpy()
            write_png(folder / f"{name}{ENDING}", label_ids(labels, table))
            progress.advance()
