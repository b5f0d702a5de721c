"""Every verb that reads weights refuses damaged and foreign ones, and those that no network can use, by one line."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bcmfnet.models import read_weights
from bcmfnet.models.weights import write_weights

OUT = ("--output-dir", "{out}")
VERBS = {
    "predict": ("predict", "{frame}", "--weights", "{path}", *OUT),
    "evaluate": ("evaluate", "--weights", "{path}", *OUT),
    "compare": ("compare", "{path}", "{path}"),
    "loss": ("loss", "--weights", "{path}", *OUT),
    "train": ("train", "--optim.steps", "1", "--data.workers", "0", "--model.pretrained", "{path}", *OUT),
}


def flip_a_bit(path, source):
    data = bytearray(source.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def with_value(key, value):
    def write(path, source):
        state, metadata = read_weights(source)
        state[key][0] = value
        write_weights(path, state, metadata)

    return write


def pickle_a_model(path, source):
    torch.save(nn.Linear(2, 2), path)


UNUSABLE = {
    "flipped bit": (flip_a_bit, "damaged: its contents are not those that were saved (SHA-256)"),
    "nan": (with_value("head.bn1.bias", math.nan), "head.bn1.bias: expected finite values, got nan"),
    "inf": (with_value("head.bn1.bias", math.inf), "head.bn1.bias: expected finite values, got inf"),
    "variance": (
        with_value("head.bn1.running_var", -1.0),
        "head.bn1.running_var: expected finite values of at least 0, got -1.0",
    ),
    "whole model": (
        pickle_a_model,
        "expected a state dict, got a pickled torch.nn.modules.linear.Linear, whose loading runs code; "
        "torch.save(model.state_dict(), PATH) writes one",
    ),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("write", "expected"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_weights_are_one_line(bcmfnet, trained, tmp_path, verb, write, expected):
    path, frame = tmp_path / "w.safetensors", tmp_path / "a.png"
    frame.touch()
    write(path, trained / "weights" / "best.safetensors")
    result = bcmfnet(*(word.format(path=path, frame=frame, out=tmp_path / "out") for word in VERBS[verb]))
    assert (result.code, result.out, result.err) == (1, "", f"bcmfnet: {path}: {expected}\n")
    assert not (tmp_path / "out").exists()
