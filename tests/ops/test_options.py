"""One rule for each kind of option: what NumPy gives counts, what is of another kind is refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bcmfnet import create_model, for_inference
from bcmfnet.nn import LMFM, BoundaryCorrectedLoss, OhemCrossEntropy
from bcmfnet.ops import _options, boundary_corrected_loss, pyramid_pool, upsample_argmax

LOGITS, TARGET = torch.randn(2, 5, 8, 8), torch.randint(0, 5, (2, 16, 16))
INTEGERS = {"ignore_index": 3, "step": 2, "nms": 3, "min_kept": 9, "max_kept": 50, "jitter": 4, "size": 16}
NUMBERS = {
    "ce_weight": 0.5, "boundary_weight": 0.25, "alpha": 0.5, "beta": 2.0, "threshold": 0.5, "ratio": 0.25,
}  # fmt: skip
BOOLEANS = {"per_image": True, "validate": True, "inplace_grad": True}


@pytest.mark.parametrize(
    ("name", "value", "of_numpy"),
    [
        *((name, value, kind(value)) for name, value in INTEGERS.items() for kind in (np.int64, np.uint8)),
        *((name, value, kind(value)) for name, value in NUMBERS.items() for kind in (np.float64, np.float32)),
        *((name, value, np.bool_(value)) for name, value in BOOLEANS.items()),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_takes_numbers_of_numpy(name, value, of_numpy, compiled):
    if compiled and name in ("size", "jitter", "validate"):
        pytest.skip("given to a call, where dynamo makes a tensor of it; or waits for the labels")
    if compiled:
        torch._dynamo.reset()
        criterion = BoundaryCorrectedLoss(**{name: of_numpy})
        actual = torch.compile(criterion, fullgraph=True, backend="eager")(LOGITS, TARGET)
    else:
        actual = boundary_corrected_loss(LOGITS, TARGET, **{name: of_numpy})
    assert torch.equal(actual, boundary_corrected_loss(LOGITS, TARGET, **{name: value}))


@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS, *BOOLEANS])
@pytest.mark.parametrize("value", ["1", torch.tensor(1), [1.5], 1j, b"1"])
def test_the_loss_refuses_what_is_no_number_by_name(name, value):
    with pytest.raises(TypeError, match=rf"^{name}: expected (an integer|a number|True or False).*, got .+$"):
        boundary_corrected_loss(LOGITS, TARGET, **{name: value})


@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS])
def test_a_bool_is_no_number(name):
    with pytest.raises(TypeError, match=rf"^{name}: expected (an integer|a number).*, got True$"):
        boundary_corrected_loss(LOGITS, TARGET, **{name: True})


@pytest.mark.parametrize("size", [16, (16, 16), [16, 16], torch.Size((16, 16)), np.array([16, 16]), np.int64(16)])
def test_a_size_is_one_integer_or_two(size):
    assert upsample_argmax(LOGITS, size).shape == (2, 16, 16)


@pytest.mark.parametrize("size", [16.0, (16.0, 16), "16", (16,), (16, 16, 16), None, torch.tensor([16, 16])])
def test_a_size_of_something_else_is_refused(size):
    with pytest.raises(TypeError, match=r"^size: expected an integer or \(H, W\), got "):
        upsample_argmax(LOGITS, size)


def test_constructors_take_numbers_of_numpy():
    model = create_model(
        "bcmfnet", num_classes=np.int64(5), aux=np.bool_(True), branch_channels=np.int32(8), interval=np.int64(1),
        pools=np.array([[5, 2, 2]]).tolist(), shortcut=np.bool_(False),
    )  # fmt: skip
    assert [type(model.recipe[key]) for key in ("num_classes", "aux")] == [int, bool]
    assert {type(value) for value in model.recipe["options"].values()} == {int, list, bool}
    assert LMFM(np.int64(4), np.int64(3)).compression.conv.out_channels == 3
    assert OhemCrossEntropy(np.float32(0.5), np.int64(10)).options["min_kept"] == 10
    assert len(pyramid_pool(LOGITS, np.array([[3, 2, 1]]))) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LMFM(4.0, 3), "in_channels: expected an integer, got 4.0"),
        (lambda: LMFM(4, 0), "out_channels: expected an integer >= 1, got 0"),
        (lambda: create_model("bcmfnet", num_classes=5, aux="no"), "aux: expected True or False, got 'no'"),
        (lambda: create_model("bcmfnet", num_classes=True), "num_classes: expected an integer in 1..256, got True"),
        (
            lambda: for_inference(create_model("bcmfnet", num_classes=5), compile=1),
            "compile: expected True or False, got 1",
        ),
        (
            lambda: create_model("bcmfnet", num_classes=5)(np.zeros((2, 3, 64, 64), np.float32)),
            "images: expected a tensor, got ndarray",
        ),
        (lambda: upsample_argmax(LOGITS, 16, return_confidence=1), "return_confidence: expected True or False, got 1"),
    ],
)
def test_constructors_refuse_what_is_of_another_kind(call, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value) == message


def test_integers_and_numbers_stay_what_a_compiler_traces():
    """Symbolic integers and floats are neither specialised nor refused."""
    seen = []

    def scaled(x, step):
        seen.append(_options.integer("step", step))
        return x * seen[-1]

    compiled = torch.compile(scaled, fullgraph=True, backend="eager", dynamic=True)
    assert [compiled(torch.ones(()), step).item() for step in (3, 4, 5)] == [3, 4, 5]
