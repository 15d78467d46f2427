"""Pictures in memory, as people and nodes give them: any usual range, channels and masks, or a sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lance_core.errors import MediaError
from lance_core.inputs import media, pixels

LEVELS = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3), dtype=np.uint8)
UNIT = LEVELS.astype(np.float32) / 255

FORMS = {
    "uint8": LEVELS,
    "uint16": LEVELS.astype(np.uint16) * 257,
    "0..1": UNIT,
    "0..255": LEVELS.astype(np.float32),
    "-1..1": UNIT * 2 - 1,
    "double": UNIT.astype(np.float64),
    "list": list(UNIT),
    "PIL": [Image.fromarray(frame) for frame in LEVELS],
    "batches of one": [frame[None] for frame in UNIT],
    "tensor": torch.from_numpy(UNIT),
    "tensor of 0..255": torch.from_numpy(LEVELS.astype(np.float32)),
    "tensor with gradients": torch.from_numpy(UNIT).requires_grad_(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_picture(form):
    np.testing.assert_array_equal(media.pictures(FORMS[form]), LEVELS)
    np.testing.assert_array_equal(media.pictures(FORMS[form][1]), LEVELS[1:2])
    np.testing.assert_array_equal(media.load_image(FORMS[form][1]), LEVELS[1])
    np.testing.assert_array_equal(
        media.read_clip(FORMS[form], pick=lambda total, fps: [0, 2])[0], LEVELS[::2]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    made = media.pictures(torch.from_numpy(UNIT).to(dtype))
    assert np.abs(made.astype(int) - LEVELS).max() <= 1


def test_channels():
    grey, alpha = LEVELS[..., :1], np.zeros_like(LEVELS[..., :1])
    alpha[:, :, 6:] = 255
    np.testing.assert_array_equal(media.pictures(grey), np.repeat(grey, 3, axis=3))
    np.testing.assert_array_equal(media.pictures(grey[0, ..., 0]), np.repeat(grey[:1], 3, axis=3))
    np.testing.assert_array_equal(media.pictures(grey > 99), np.repeat(grey > 99, 3, axis=3) * np.uint8(255))
    for opaque in (LEVELS, grey):
        made = media.pictures(np.concatenate([opaque, alpha], axis=3))
        np.testing.assert_array_equal(made[:, :, 6:], np.broadcast_to(opaque, LEVELS.shape)[:, :, 6:])
        assert (made[:, :, :6] == 255).all()
        as_float = media.pictures(np.concatenate([opaque, alpha], axis=3).astype(np.float32) / 255)
        np.testing.assert_array_equal(as_float, made)


def test_a_black_frame_has_the_range_of_its_batch():
    clip = UNIT * 2 - 1
    clip[1] = -1
    for form in (clip, list(clip), torch.from_numpy(clip)):
        assert (media.pictures(form)[1] == 0).all()
        frames = media.read_clip(form, pick=lambda total, fps: [0, 1])[0]
        assert (frames[0] == LEVELS[0]).all() and (frames[1] == 0).all()
    bright = LEVELS.astype(np.float32)
    bright[1] = 0
    np.testing.assert_array_equal(media.pictures(torch.from_numpy(bright))[2], LEVELS[2])


def test_what_resampling_overshoots_is_clamped():
    made = media.pictures(np.array([[[-0.1, 0.5, 1.2]]], np.float32))
    np.testing.assert_array_equal(made[0, 0, 0], [0, 128, 255])


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (np.zeros((0, 4, 4, 3), np.uint8), "0 images"),
        (torch.zeros(0, 4, 4, 3), "0 images"),
        ([], "0 images"),
        (np.zeros((1, 0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
        (np.zeros((2, 4, 4, 5), np.uint8), r"\[4, 4, 5\]"),
        (np.zeros((3, 8, 8), np.uint8), "channels last"),
        (np.zeros((1, 1, 2, 4, 3), np.uint8), "pictures"),
        (np.zeros((2, 4, 4, 3), np.int64), "int64"),
        (np.array([[[0.0, 4.0, 9.0]]], np.float32), "0 to 9"),  # HDR, or a dark picture of 0..255
        (np.array([[[-3.0, 0.0, 3.0]]], np.float32), "-3 to 3"),
        (np.array([[[0.0, 5.0, 70_000.0]]], np.float32), "70000"),
        (np.full((1, 2, 2, 3), 200.0, np.float32), "200 to 200"),  # one level tells no range
        (np.array([[[0.0, np.nan, 1.0]]], np.float32), "NaN"),
        (torch.tensor([[[0.0, float("inf"), 1.0]]]), "infinite"),
        ("picture.png", "a str came"),
        (None, "NoneType"),
        ([LEVELS[0], LEVELS[0, :4]], "12x8 and 12x4"),
    ],
)
def test_what_is_no_picture(images, says):
    with pytest.raises(MediaError, match=says) as refused:
        media.pictures(images)
    assert len(str(refused.value)) < 300


# Masks: 1 is transparent, and white shows through


def masked(frames: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """What masks of 0 and 1 leave of frames."""
    return np.where(masks[..., None] == 1, np.uint8(255), frames)


ONE = np.zeros((8, 12), np.float32)
ONE[2:5, 3:] = 1
TWO = np.stack([ONE, ONE[::-1]])


@pytest.mark.parametrize(
    "form",
    [
        ONE,
        ONE[None],
        ONE[None, ..., None],
        ONE[None, None],
        torch.from_numpy(ONE),
        ONE > 0,
        (ONE * 255).astype(np.uint8),
        ONE.astype(np.float64),
    ],
)
def test_one_mask_for_all(form):
    np.testing.assert_array_equal(media.pictures(UNIT, form), masked(LEVELS, ONE))


def test_a_mask_for_each_and_the_last_for_the_rest():
    three = np.stack([*TWO, np.zeros_like(ONE)])
    np.testing.assert_array_equal(media.pictures(UNIT, three), masked(LEVELS, three))
    np.testing.assert_array_equal(media.pictures(UNIT, TWO), masked(LEVELS, TWO[[0, 1, 1]]))
    np.testing.assert_array_equal(
        media.pictures(UNIT, three, picks=[1, 2, 2]), masked(LEVELS, three)[[1, 2, 2]]
    )
    np.testing.assert_array_equal(
        media.pictures(UNIT, TWO, picks=[0, 2]), masked(LEVELS, TWO[[0, 1, 1]])[[0, 2]]
    )


def test_half_a_mask_is_half_white():
    made = media.pictures(np.zeros((1, 4, 4, 3), np.float32), np.full((4, 4), 0.5, np.float32))
    assert np.abs(made.astype(int) - 127).max() <= 1


def test_a_mask_and_the_pictures_own_transparency():
    own = np.concatenate([LEVELS, np.full_like(LEVELS[..., :1], 255)], axis=3)
    own[:, 6:, :, 3] = 0
    both = np.maximum(ONE, (np.arange(8) >= 6)[:, None])
    np.testing.assert_array_equal(media.pictures(own, ONE), masked(LEVELS, both))
    grey = LEVELS[..., :1]
    np.testing.assert_array_equal(media.pictures(grey, ONE), masked(np.repeat(grey, 3, axis=3), ONE))


def test_an_empty_mask_hides_nothing_whatever_its_size():
    """What a loader gives with a picture without transparency."""
    for mask in (np.zeros((1, 64, 64), np.float32), torch.zeros(64, 64), np.zeros((0, 8, 12), np.float32)):
        np.testing.assert_array_equal(media.pictures(UNIT, mask), LEVELS)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (np.ones((4, 8, 12), np.float32), "4 masks came for 3 images"),
        (np.ones((1, 8, 13), np.float32), "mask is 13x8 and the image 12x8"),
        (np.ones((8,), np.float32), r"mask of shape \[8\]"),
        (np.full((8, 12), 200.0, np.float32), "200"),
        (np.full((8, 12), np.nan, np.float32), "mask"),
        (np.ones((8, 12), np.int64), "int64"),
        ("mask", "a str came"),
    ],
)
def test_masks_that_do_not_fit(mask, says):
    with pytest.raises(MediaError, match=says):
        media.pictures(UNIT, mask)


# Pillow's rarer modes


def test_premultiplied_grey_and_a_transparent_level_of_16_bits(tmp_path):
    grey = Image.fromarray(np.array([[[40, 0], [40, 255]]], np.uint8)).convert("La")
    np.testing.assert_array_equal(media.load_image(grey)[0, :, 0], [255, 40])
    levels = np.array([[0, 257, 65535, 1000]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "x.png", transparency=1000)
    np.testing.assert_array_equal(media.load_image(tmp_path / "x.png")[0, :, 0], [0, 1, 255, 255])


def test_a_float_picture_beyond_1_is_a_sentence_and_not_clipped(tmp_path):
    bright = np.linspace(0, 8, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(bright).save(tmp_path / "x.tif")
    with pytest.raises(MediaError, match="0 to 8"):
        media.load_image(tmp_path / "x.tif")
    Image.fromarray(bright / 8).save(tmp_path / "y.tif")
    assert media.load_image(tmp_path / "y.tif").max() == 255


def test_large_pictures_are_converted_in_bands(monkeypatch):
    """The same as at once: bands only save memory."""
    rng = np.random.default_rng(1)
    made = {
        "RGBA": rng.integers(0, 256, (37, 23, 4), np.uint8),
        "LA": rng.integers(0, 256, (37, 23, 2), np.uint8),
        "I;16": rng.integers(0, 65536, (37, 23)).astype(np.uint16),
        "F": rng.random((37, 23), np.float32),
    }
    images = [Image.fromarray(data) for data in made.values()]
    images.append(images[0].convert("P"))
    whole = [pixels.rgb_from_image(image) for image in images]
    monkeypatch.setattr(pixels, "BAND_PIXELS", 100)
    for image, expected in zip(images, whole, strict=True):
        np.testing.assert_array_equal(pixels.rgb_from_image(image), expected, err_msg=image.mode)
