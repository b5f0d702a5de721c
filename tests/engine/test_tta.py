"""Test-time augmentation against its definition in float64, with networks that are simple enough to be followed."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bcmfnet.engine.config import TTAConfig
from bcmfnet.engine.tta import BAND, TTAPredictor, argmax_of_mean, with_tta
from bcmfnet.errors import ConfigError
from bcmfnet.ops import upsample_argmax

CLASSES = 5


class Local:
    """A predictor whose logits are a linear map of blocks of 8x8 pixels, so that windows do not change them."""

    device = torch.device("cpu")

    def __init__(self):
        self.weight = torch.randn(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(0)) / 300
        self.seen = []

    def __call__(self, images):
        return upsample_argmax(self.logits(images), images.shape[-2:])

    def logits(self, images):
        assert images.dtype == torch.uint8
        self.seen.append(images.clone())
        odd = (-images.shape[2] % 8, -images.shape[3] % 8)
        return F.conv2d(F.pad(images.float() - 128, (0, odd[1], 0, odd[0])), self.weight, stride=8)


class Calls(Local):
    """Logits that are the number of the call, in class 0: what is averaged can be told."""

    def logits(self, images):
        number = len(self.seen)
        return super().logits(images).zero_().index_fill_(1, torch.tensor(0), number)


def frames(height, width, count=1, seed=0):
    """Smooth frames, so that labels are of regions."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 6, 9, 3), dtype=np.uint8)
    large = [cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC) for image in small]
    return torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2)


def mean_of_softmax(views, size):
    """The definition: float64 probabilities [N, C, H, W] of whole upsampled views."""
    upsampled = (F.interpolate(view.double(), tuple(size), mode="bilinear", align_corners=False) for view in views)
    return torch.stack([logits.softmax(1) for logits in upsampled]).mean(0)


def assert_labels(labels, probabilities):
    """Labels are the definition's, but where its two best classes are a rounding apart."""
    best = probabilities.topk(2, 1).values
    clear = best[:, 0] - best[:, 1] > 1e-5
    assert labels.dtype == torch.uint8 and labels.shape == clear.shape
    assert clear.float().mean() > 0.99 and len(labels.unique()) > 1
    assert torch.equal(labels[clear].long(), probabilities.argmax(1)[clear])


# One view and several, odd sizes, a height below a band, one that ends with it, one past it, and a larger view than the
# frame has pixels in a band.
@pytest.mark.parametrize("size", [(BAND - 3, 40), (2 * BAND, 33), (2 * BAND + 1, 64), (75, 101)], ids=str)
def test_bands_have_the_labels_of_the_whole_frame(size):
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 3), (4, 5), (9, 13), (1, 1)]
    views = [3 * torch.randn(2, CLASSES, h, w, generator=generator) for h, w in shapes]
    for chosen in (views[:1], views):
        assert_labels(argmax_of_mean(chosen, size), mean_of_softmax(chosen, size))


@pytest.mark.parametrize(("height", "width"), [(72, 96), (75, 101)])
def test_scales_and_flip_are_the_mean_of_softmax_at_the_frames_resolution(height, width):
    network, images = Local(), frames(height, width, count=2)
    labels = TTAPredictor(network, TTAConfig(scales=(1, 1.5, 2.25), flip=True))(images)
    seen = network.seen
    assert torch.equal(seen[0], images) and len(seen) == 6
    views = []
    for scale, plain, mirrored in zip((1, 1.5, 2.25), seen[::2], seen[1::2], strict=True):
        assert torch.equal(mirrored, plain.flip(3))
        if scale != 1:
            size = tuple(8 * round(side * scale / 8) for side in (width, height))
            expected = [cv2.resize(image.permute(1, 2, 0).float().numpy(), size) for image in images]
            error = np.abs(plain.permute(0, 2, 3, 1).numpy() - np.stack(expected))
            assert error.max() < 0.501
        views += [network.logits(plain), network.logits(mirrored).flip(3)]
    assert_labels(labels, mean_of_softmax(views, (height, width)))
    assert not torch.equal(labels, network(images))


def test_windows_of_a_local_network_have_the_labels_of_the_whole_frame():
    network, images = Local(), frames(136, 200)
    config = TTAConfig(window=(64, 72), stride=(40, 64))
    assert torch.equal(TTAPredictor(network, config)(images), network(images))


def test_overlapping_windows_are_averaged_and_the_last_ends_with_the_frame():
    network = Calls()
    predictor = TTAPredictor(network, TTAConfig(window=(64, 80), stride=(64, 40)))
    logits = next(predictor._views(frames(75, 171)))  # 72x168 in whole steps of the logits
    total, count = np.zeros((9, 21)), np.zeros((9, 21))
    corners = [(top, left) for top in (0, 8) for left in (0, 40, 80, 88)]
    for number, (top, left) in enumerate(corners):
        total[top // 8 : top // 8 + 8, left // 8 : left // 8 + 10] += number
        count[top // 8 : top // 8 + 8, left // 8 : left // 8 + 10] += 1
    np.testing.assert_allclose(logits[0, 0].numpy(), total / count, rtol=1e-6)
    assert [tuple(seen.shape[2:]) for seen in network.seen] == [(64, 80)] * 8


def test_the_stride_is_two_thirds_of_the_window():
    assert TTAConfig(window=(512, 1024)).steps() == (336, 680)
    assert TTAConfig(window=(64, 72)).steps() == (40, 48)


def test_a_window_of_the_whole_frame_changes_nothing():
    network, images = Local(), frames(72, 96)
    assert torch.equal(TTAPredictor(network, TTAConfig(window=(72, 96)))(images), network(images))
    assert torch.equal(network.seen[0], images)


def test_without_augmentation_the_predictor_is_the_one_that_was_given():
    network = Local()
    assert with_tta(network, TTAConfig()) is network
    assert with_tta(network, TTAConfig(scales=[np.float32(1)])) is network
    for on in ({"flip": True}, {"scales": (2,)}, {"window": (64, 64)}):
        assert isinstance(with_tta(network, TTAConfig(**on)), TTAPredictor)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"scales": ()}, "tta.scales: expected a scale, got ()"),
        ({"scales": (1, 0)}, "tta.scales: expected numbers from 0.1 to 4, got (1, 0)"),
        ({"scales": (-1,)}, "tta.scales: expected a number from 0.1 to 4, got (-1,)"),
        ({"scales": (float("nan"),)}, "tta.scales: expected a number from 0.1 to 4, got (nan,)"),
        ({"window": (0, 64)}, "tta.window: expected integers from 64 to 16384, got (0, 64)"),
        ({"window": (100, 64)}, "tta.window: expected multiples of 8, got (100, 64)"),
        ({"stride": (64, 64)}, "tta.stride: expected none without a window, got (64, 64)"),
        ({"window": (64, 64), "stride": (0, 8)}, "tta.stride: expected integers from 8 to 16384, got (0, 8)"),
        ({"window": (64, 64), "stride": (8, 12)}, "tta.stride: expected multiples of 8, got (8, 12)"),
        ({"window": (64, 96), "stride": (72, 96)}, "tta.stride: expected at most the window's (64, 96), got (72, 96)"),
    ],
)
def test_options_that_cannot_be_used_are_one_line(options, line):
    with pytest.raises(ConfigError) as caught:
        TTAConfig(**options)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"scales": (1, 0.5)}, "tta.scales: expected scales that leave 64x64 pixels of a frame of 96x80, got 0.5"),
        (
            {"window": (88, 64)},
            "tta.window: expected at most (80, 96), height and width of a frame at scale 1, got (88, 64)",
        ),
        (
            {"window": (80, 96), "scales": (1, 0.9)},
            "tta.window: expected at most (72, 88), height and width of a frame at scale 0.9, got (80, 96)",
        ),
    ],
)
def test_frames_that_are_too_small_for_the_options_are_one_line(options, line):
    with pytest.raises(ConfigError) as caught:
        TTAPredictor(Local(), TTAConfig(**options))(frames(80, 96))
    assert str(caught.value) == line
