"""`bcmfnet compare` of weights on the same frames."""

from __future__ import annotations

import json

import numpy as np
import pytest
from frames import write_frame

from bcmfnet.models import read_weights
from bcmfnet.models.weights import write_weights


@pytest.fixture
def frames(tmp_path):
    """Flags of three frames in ten classes, as the weights have."""
    rng = np.random.default_rng(0)
    for i in range(3):
        ids = np.kron(rng.integers(0, 10, (4, 6)), np.ones((18, 16))).astype(np.uint8)
        write_frame(tmp_path / "val/images" / f"{i}.png", tmp_path / "val/masks" / f"{i}.png", ids, seed=i)
    return ("--data.name", "folder", "--data.root", tmp_path, "--data.split", "val", "--data.workers", 0)


def test_the_scores_are_those_of_evaluate(bcmfnet, local_network, trained, frames, tmp_path):
    """The run beside views of the same, and both beside evaluate."""
    weights = trained / "weights" / "last.safetensors"
    for flags in ((), ("--tta.flip", "--tta.scales", 1, 2)):
        result = bcmfnet("compare", trained, weights, *frames, *flags, "--samples", 200, "--seed", 5, "--json")
        assert result.code == 0, result.err
        compared = json.loads(result.out)
        out = ("--output-dir", tmp_path / f"out{len(flags)}", "--json")
        evaluated = json.loads(bcmfnet("evaluate", "--weights", trained, *frames, *flags, *out).out)
        assert compared["iou"]["a"] == compared["iou"]["b"] == pytest.approx(evaluated["miou"], rel=1e-14)
        boundary = evaluated["boundary"]["boundary_iou"]["mean"]
        assert compared["boundary_iou"]["a"] == pytest.approx(boundary, rel=1e-14)
        assert compared.get("tta") == evaluated.get("tta")
    assert (compared["a"], compared["b"], compared["frames"]) == (str(trained), str(weights), 3)
    assert compared["split"] == "val"
    assert compared["bootstrap"] == {"samples": 200, "confidence": 0.95, "seed": 5}


def test_the_terminal_has_both_tables_and_the_seed(bcmfnet, local_network, trained, frames):
    result = bcmfnet("compare", trained, trained, *frames, "--confidence", 90, "--samples", 100)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[:2] == [f"A: {trained}", f"B: {trained}"]
    words = [line.split() for line in lines]
    assert ["class", "IoU", "A", "B", "B", "-", "A", "boundary", "IoU", "A", "B", "B", "-", "A"] in words
    assert ["score", "A", "B", "B", "-", "A", "90", "%", "interval"] in words
    (row,) = (line for line in words if line[:2] == ["mean", "boundary"])
    assert row[5:] == ["+0.00", "+0.00", "to", "+0.00"] and row[3] == row[4]
    assert lines[-1] == "3 frames, drawn 100 times with seed 0"


def test_weights_of_other_frames_are_refused(bcmfnet, local_network, trained, tmp_path):
    state, metadata = read_weights(trained)
    metadata["config"]["data"]["length"] = 24
    write_weights(tmp_path / "w", state, metadata)
    result = bcmfnet("compare", trained, tmp_path / "w")
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        "bcmfnet: B: expected weights whose dataset and split are those of A, 1 frames of street10 from "
        "synthetic:val:0/0 on, got 3 frames of street10 from synthetic:val:0/0 on; --data.name and --data.split name "
        "one for both\n"
    )
