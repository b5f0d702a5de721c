"""Stage by stage: every multiply-add is counted in a stage that is timed, and bytes are those of the nodes."""

from __future__ import annotations

import pytest
import torch

from bcmfnet.benchmarks import stages
from bcmfnet.benchmarks.network import BestLabels, Case, _model, make_inputs
from bcmfnet.benchmarks.upsample_argmax import best_labels
from bcmfnet.inference import for_inference
from bcmfnet.models import count_multiply_adds

CPU = torch.device("cpu")
SMALL = Case("bcmfnet", (128, 192), 7)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(stages, "ROUNDS", 2)
    monkeypatch.setattr(stages, "peak", lambda dtype, device: 1e12)
    monkeypatch.setattr(stages._timing, "copy_bandwidth", lambda device: 10.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stages_have_all_the_arithmetic_and_all_the_time(dtype):
    rows = stages.measure(SMALL, dtype, CPU)
    by_name = {row["stage"]: row for row in rows}
    assert len(by_name) == len(rows)
    ours = [row for row in rows if row["ms"] > 0]
    assert ours[0]["stage"] == "stem" and ours[-1]["stage"] == "upsample_argmax"
    assert {"layer1", "layer5", "high5", "down4", "compression3", "context", "head"} <= by_name.keys()
    assert sum(row["multiply_adds"] for row in rows) == count_multiply_adds(_model(SMALL), (1, 3, 128, 192))
    assert sum(row["share"] for row in rows) == pytest.approx(1, abs=0.02)
    eager = {row["stage"] for row in rows if row["eager_best_ms"] > 0}
    assert {row["stage"] for row in rows} - {row["stage"] for row in ours} <= eager
    assert {"stem", "layer1", "layer5", "context", "head", "interpolate", "upsample_argmax"} <= eager


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_eager_stages_are_those_of_the_best_eager_form(dtype):
    (frames,) = make_inputs(SMALL, CPU)
    with torch.no_grad():
        logits = stages.eager_network(_model(SMALL), dtype)(frames)
        expected = BestLabels(_model(SMALL), dtype)(frames)
    assert torch.equal(best_labels(logits, frames.shape[-2:])[0], expected)


def test_floors():
    """Logits of 7 x 16 x 24 floats and 128 x 192 labels at 10 GB/s; 2 operations a multiply-add at 1e12 a second."""
    rows = {row["stage"]: row for row in stages.measure(SMALL, torch.float32, CPU)}
    assert rows["upsample_argmax"]["floor_ms"] == round((4 * 7 * 16 * 24 + 128 * 192) / 1e7, 3)
    layer4 = rows["layer4"]
    assert layer4["floor_ms"] >= round(2e3 * layer4["multiply_adds"] / 1e12, 3)


def test_the_network_gives_its_own_result():
    network = for_inference(_model(SMALL), output="logits")
    (frames,) = make_inputs(SMALL, CPU)
    watch = stages.Stopwatch(network.network, CPU)
    with torch.no_grad():
        assert torch.equal(watch.run(frames), network(frames))
    assert watch.seconds.keys() == watch.bytes.keys()
