import numpy as np
import pytest
import torch

from bcmfnet.data import IMAGENET_MEAN, IMAGENET_STD, EvalTransform, TrainTransform, normalize
from bcmfnet.data.transforms import FILL, color_matrix
from bcmfnet.errors import ConfigError

HEIGHT, WIDTH = 120, 200
Y, X = np.mgrid[:HEIGHT, :WIDTH].astype(np.uint8)
COORDINATES = np.stack([X, Y, np.full_like(X, 77)], -1)  # red is the column, green the row


def rng(seed=0):
    return np.random.default_rng(seed)


# Crops: smaller than the scaled frame, odd, larger on one axis, larger on both.
@pytest.mark.parametrize("crop", [(48, 64), (45, 77), (90, 300), (260, 420)])
@pytest.mark.parametrize("scale", [0.5, 0.77, 1.0, 1.3, 2.0])
@pytest.mark.parametrize(("label", "channel"), [(X, 0), (Y, 1)])
def test_label_and_image_stay_aligned(crop, scale, label, channel):
    """A label that encodes its column (row) must meet the colour that encodes the same one, wherever both land."""
    transform = TrainTransform(crop, (scale, scale), flip=0, jitter=0)
    for seed in range(4):
        image, moved = transform(COORDINATES, label, rng(seed))
        assert image.shape == (3, *crop) and moved.shape == crop
        assert image.dtype == moved.dtype == np.uint8 and image.flags.c_contiguous and moved.flags.c_contiguous
        inside = moved != 255
        assert np.array_equal(image.transpose(1, 2, 0)[~inside], np.full(((~inside).sum(), 3), FILL))
        assert (image[2][inside] == 77).all()
        offset = image[channel][inside].astype(float) - moved[inside]
        # Nearest is within half a source pixel of the interpolated colour, and rounding adds another half.
        assert np.abs(offset).max() <= 1
        assert abs(offset.mean()) <= 0.3, "a shift of half a pixel between image and label"


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.25, 2.0])
def test_scale_is_the_one_asked_for(scale):
    image, _ = TrainTransform((40, 60), (scale, scale), flip=0, jitter=0)(COORDINATES, X, rng())
    for line in (image[0, 20].astype(float), image[1, :, 30].astype(float)):
        steps = (line[-3] - line[2]) / (len(line) - 5)
        assert steps == pytest.approx(1 / scale, rel=0.05)


def test_crop_of_the_frame_at_scale_one_is_a_window_of_it():
    image, label = TrainTransform((48, 64), (1, 1), flip=0, jitter=0)(COORDINATES, X, rng(3))
    left, top = int(image[0, 0, 0]), int(image[1, 0, 0])
    window = COORDINATES[top : top + 48, left : left + 64]
    assert np.array_equal(image.transpose(1, 2, 0), window)
    assert np.array_equal(label, X[top : top + 48, left : left + 64])


def test_windows_reach_every_corner():
    transform = TrainTransform((HEIGHT - 2, WIDTH - 2), (1, 1), flip=0, jitter=0)
    corners = {tuple(transform(COORDINATES, X, rng(seed))[0][:2, 0, 0].tolist()) for seed in range(200)}
    assert corners == {(x, y) for x in range(3) for y in range(3)}


def test_padding_surrounds_the_whole_frame():
    image, label = TrainTransform((130, 220), (1, 1), flip=0, jitter=0, ignore_index=200)(COORDINATES, Y, rng(1))
    inside = label != 200
    assert inside.sum() == HEIGHT * WIDTH
    rows, cols = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    assert (len(rows), len(cols)) == (HEIGHT, WIDTH)
    assert rows[0] > 0 and cols[0] > 0, "this seed pads on all four sides"
    box = image[:, rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    assert np.array_equal(box.transpose(1, 2, 0), COORDINATES)


def test_flip_mirrors_both():
    plain = TrainTransform((48, 64), flip=0, jitter=0)(COORDINATES, X, rng(5))
    mirrored = TrainTransform((48, 64), flip=1, jitter=0)(COORDINATES, X, rng(5))
    for a, b in zip(plain, mirrored, strict=True):
        assert np.array_equal(a[..., ::-1], b)
        assert not np.array_equal(a, b)


def test_scale_is_spread_over_its_range():
    transform = TrainTransform((40, 60), (0.5, 2.0), flip=0, jitter=0)
    spans = []
    for seed in range(300):
        image, _ = transform(COORDINATES, X, rng(seed))
        spans.append((float(image[0, 20, 50]) - image[0, 20, 10]) / 40)
    scales = 1 / np.array(spans)
    assert scales.min() == pytest.approx(0.5, abs=0.05) and scales.max() == pytest.approx(2.0, abs=0.1)
    assert scales.mean() == pytest.approx(1.25, abs=0.1)


def test_same_generator_same_result():
    transform = TrainTransform((48, 64))
    first, again, other = (transform(COORDINATES, X, rng(seed)) for seed in (7, 7, 8))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_input_is_not_written_to():
    image, label = COORDINATES.copy(), X.copy()
    TrainTransform((48, 64), (1, 1))(image, label, rng())
    assert np.array_equal(image, COORDINATES) and np.array_equal(label, X)


@pytest.mark.parametrize("factors", [(1, 1, 1), (1.3, 1, 1), (1, 0.6, 1), (1, 1, 0), (1.2, 0.8, 1.4)])
def test_color_matrix_is_brightness_contrast_saturation(factors):
    """The oracle applies the three steps one after the other to a colour, in float64."""
    brightness, contrast, saturation = factors
    weights = np.array([0.299, 0.587, 0.114])
    pixels = COORDINATES.reshape(-1, 3).astype(float)
    saturated = saturation * pixels + (1 - saturation) * (pixels @ weights)[:, None]
    mean = (pixels @ weights).mean()
    expected = brightness * (contrast * saturated + (1 - contrast) * mean)
    matrix = color_matrix(COORDINATES, np.array(factors, float))
    assert np.allclose(pixels @ matrix[:, :3].T + matrix[:, 3], expected)


def test_jitter_changes_colors_only():
    plain = TrainTransform((48, 64), jitter=0)(COORDINATES, X, rng(2))
    jittered = TrainTransform((48, 64), jitter=0.4)(COORDINATES, X, rng(2))
    assert np.array_equal(plain[1], jittered[1])
    assert not np.array_equal(plain[0], jittered[0])


def test_eval_transform_is_the_frame():
    image, label = EvalTransform()(COORDINATES, X)
    assert np.array_equal(image.transpose(1, 2, 0), COORDINATES) and np.array_equal(label, X)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalize(memory_format):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 7), dtype=np.uint8)
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    result = normalize(torch.from_numpy(images), memory_format=memory_format)
    assert result.dtype == torch.float32 and result.is_contiguous(memory_format=memory_format)
    np.testing.assert_allclose(result.numpy(), (images / 255 - mean) / std, atol=2e-6)


def test_padding_is_near_zero_after_normalisation():
    fill = torch.tensor(FILL, dtype=torch.uint8).view(1, 3, 1, 1)
    assert normalize(fill).abs().max() < 0.5 / 255 / min(IMAGENET_STD) + 1e-6


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"crop": (0, 5)}, "crop: expected"),
        ({"balance": 1.5}, "balance: expected"),
        ({"scale": (2.0, 0.5)}, "scale: expected"),
        ({"flip": 1.5}, "flip: expected"),
        ({"jitter": 1.0}, "jitter: expected"),
    ],
)
def test_options_refused(options, line):
    with pytest.raises(ConfigError, match=line):
        TrainTransform(**{"crop": (48, 64)} | options)


def test_balanced_crops_show_every_class_of_the_frame_alike():
    """A pole of 3 pixels and a sign of 1 in a frame of road: half of the crops hold each, however small it is."""
    label = np.zeros((HEIGHT, WIDTH), np.uint8)
    label[20:23, 150] = 1
    label[70, 30] = 2
    label[:5] = 255
    transform = TrainTransform((24, 24), (1, 1), flip=0, jitter=0, balance=1, ignore_index=255)
    crops = [transform(COORDINATES, label, rng(seed))[1] for seed in range(300)]
    shown = [sum(int((crop == value).any()) for crop in crops) / len(crops) for value in (1, 2)]
    assert all(abs(share - 1 / 3) < 0.1 for share in shown), shown
    places = {tuple(np.argwhere(crop == 2)[0].tolist()) for crop in crops if (crop == 2).any()}
    assert len(places) > 80, "the pixel lies anywhere in the crop"


@pytest.mark.parametrize("crop", [(24, 24), (130, 220)])
def test_balance_of_a_frame_without_classes_is_any_crop(crop):
    label = np.full((HEIGHT, WIDTH), 255, np.uint8)
    image, moved = TrainTransform(crop, balance=1)(COORDINATES, label, rng(0))
    assert image.shape == (3, *crop) and (moved == 255).all()


def test_a_balanced_crop_keeps_its_pixel_at_every_scale():
    label = np.zeros((HEIGHT, WIDTH), np.uint8)
    label[-1, -1] = 1  # the corner, of which few crops would have a pixel
    transform = TrainTransform((24, 32), (1, 2), flip=0, jitter=0, balance=1)
    found = [(transform(COORDINATES, label, rng(seed))[1] == 1).any() for seed in range(200)]
    assert 0.4 < np.mean(found) < 0.6
