"""`bcmfnet export`: a file that evaluates as its weights do, and options that do not go together."""

from __future__ import annotations

import json

import pytest


@pytest.mark.exhaustive
def test_exported_file_takes_the_place_of_weights(bcmfnet, trained, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    out = tmp_path / "exported"
    words = ("--format", "onnx", "--size", 256, 512, "--uint8", "--output-dir", out)
    made = bcmfnet("export", "--weights", trained, *words)
    assert made.code == 0, made.err
    check = json.loads((out / "check.json").read_text())
    assert check["images"] == 8 and check["pixels"] == 8 * 256 * 512 and check["differing"] <= 1e-3 * check["pixels"]
    file = out / "bcmfnet-256x512.onnx"
    assert f"{check['differing']} of {check['pixels']} (" in made.out and made.out.endswith(f"file: {file}\n")
    scores = []
    for weights in (trained, file):
        done = bcmfnet(
            "evaluate", "--weights", weights, "--json", "--amp", "off", "--output-dir", tmp_path / weights.name
        )
        assert done.code == 0, done.err
        scores.append(json.loads(done.out)["miou"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    refused = bcmfnet("evaluate", "--weights", file, "--device", "cuda")
    assert refused.code == 2 and "--device: expected auto or cpu with" in refused.err


@pytest.mark.parametrize(("words", "said"), [
    (("--size", 32, 64), "--size"),
    (("--size", 64, 96, "--dtype", "float16", "--format", "openvino"), "--dtype: expected float32 with form"),
    (("--size", 64, 96, "--dtype", "int8", "--format", "torch"), "--dtype: expected float32 with format torch, got"),
    (("--size", 64, 96, "--dtype", "int8"), "--calibration: expected images with dtype int8, and with it alone"),
    (("--size", 64, 96, "--calibration", "."), "--calibration: expected images with dtype int8, and with it alone"),
    (("--size", 64, 96, "--format", "tensorrt"), "trtexec --onnx=FILE.onnx --saveEngine=FILE.engine --fp16"),
    (("--size", 64, 96, "--weights", "nothing.safetensors"), "nothing.safetensors: expected a weights file"),
    (("--size", 64, 96, "--frames", "nowhere"), "expected an image file, a folder of images or a glob"),
])  # fmt: skip
def test_what_cannot_be_exported_is_named(bcmfnet, tmp_path, words, said):
    refused = bcmfnet("export", *words, "--output-dir", tmp_path / "out")
    assert refused.code == 2 and said in refused.err
