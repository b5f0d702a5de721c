import numpy as np
import pytest
from frames import write_frame


@pytest.fixture
def segnet_root(tmp_path):
    """camvid11-segnet: three training frames and two validation frames of 72x96, ids 0..11 in blocks of 6x6."""
    ids = (np.arange(12 * 16) % 12).astype(np.uint8).reshape(12, 16).repeat(6, 0).repeat(6, 1)
    for split, names in (("train", ("a", "b", "c")), ("val", ("d", "e"))):
        for k, name in enumerate(names):
            write_frame(tmp_path / split / f"{name}.png", tmp_path / f"{split}annot" / f"{name}.png", ids, seed=k)
    return tmp_path
