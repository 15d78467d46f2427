"""Geometry, frame picks and pixels against the golden rows; then what no golden row covers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from lance_core.config import RELEASED_VIT
from lance_core.errors import MediaError, RequestError
from lance_core.inputs import preprocess as pre
from lance_core.inputs.media import load_image, read_clip

CASES = Path(__file__).parent / "golden" / "cases"
UNITS = json.loads((CASES / "units.json").read_text())
MANIFEST = json.loads((CASES / "manifest.json").read_text())
SIDES = [(preset, *sides) for preset, sides in pre.PRESETS.items()]
GRID_CASES = [
    f.stem for f in sorted(CASES.glob("*.safetensors")) if "vit_grid" in safe_open(str(f), "pt").keys()
]


def tensors(case: str) -> dict[str, torch.Tensor]:
    with safe_open(str(CASES / f"{case}.safetensors"), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith("vit_")}


def references(case: str) -> list[np.ndarray]:
    """The frames of a case's references, in order."""
    request = MANIFEST[case]["request"]
    media = [
        item for item in request["interleave_array"] if isinstance(item, str) and item.startswith("inputs/")
    ]
    return [read_clip(CASES / m)[0] if m.endswith(".mp4") else load_image(CASES / m)[None] for m in media]


@pytest.mark.parametrize(("preset", "vae_side", "vit_side"), SIDES)
def test_bucket_table(preset, vae_side, vit_side):
    for row in UNITS["buckets"][preset]:
        size = row["width"], row["height"]
        assert pre.vae_size(*size, preset) == tuple(row["vae_hw"][::-1])
        assert pre.bucket(*size, vit_side) == tuple(row["vit_resize_hw"][::-1])
        assert pre.vit_size(*size, preset) == tuple(row["vit_hw"][::-1])


@pytest.mark.parametrize(("preset", "vae_side", "vit_side"), SIDES)
def test_nearest_buckets(preset, vae_side, vit_side):
    rows = UNITS["nearest_buckets"]["rows"][preset]
    assert len(rows) == 168
    for width, height, vae_h, vae_w, vit_h, vit_w in rows:
        assert pre.bucket(width, height, vae_side) == (vae_w, vae_h)
        assert pre.bucket(width, height, vit_side) == (vit_w, vit_h)


@pytest.mark.parametrize("row", UNITS["crops"], ids=lambda r: f"{r['width']}x{r['height']}-{r['resolution']}")
def test_crops(row):
    box = pre.crop_box(row["width"], row["height"], *row["bucket_hw"][::-1])
    assert box == (row["left"], row["top"], row["crop_w"], row["crop_h"])


@pytest.mark.parametrize("row", UNITS["frame_indices"], ids=lambda r: f"{r['total_frames']}@{r['fps']}")
def test_frame_indices(row):
    assert pre.frame_indices(row["total_frames"], row["fps"]) == row["indices"]


@given(st.integers(1, 10_000), st.floats(0.01, 300))
@settings(max_examples=200, deadline=None)
def test_frame_indices_hold_everywhere(total, fps):
    picks = pre.frame_indices(total, fps)
    assert len(picks) % 4 == 1 and len(picks) <= 69
    assert picks[0] == 0 and (picks[-1] == total - 1 or len(picks) == 1)
    assert picks == sorted(picks)


@pytest.mark.parametrize(("total", "fps"), [(0, 24), (5, 0), (5, -1), (5, float("nan")), (5, float("inf"))])
def test_frame_indices_refuse(total, fps):
    with pytest.raises(MediaError):
        pre.frame_indices(total, fps)


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from(sorted(pre.PRESETS)))
@settings(max_examples=300, deadline=None)
def test_crop_is_inside_and_of_the_ratio(width, height, preset):
    w, h = pre.vae_size(width, height, preset)
    left, top, cw, ch = pre.crop_box(width, height, w, h)
    area = round((width * height * w / h) ** 0.5), round((width * height * h / w) ** 0.5)
    if area[0] <= width and area[1] <= height and min(area) > 0:  # the released window, where it fits
        assert (cw, ch) == area
        assert (left, top) == ((width - cw) // 2, (height - ch) // 2)
        return
    assert left >= 0 and top >= 0 and cw >= 1 and ch >= 1
    assert left + cw <= width and top + ch <= height
    assert cw == width or ch == height  # the largest such window
    assert abs((width - cw - left) - left) <= 1 and abs((height - ch - top) - top) <= 1
    assert abs(cw - ch * w / h) <= max(1, w / h) * 0.5 + 1e-6 or min(cw, ch) == 1


@pytest.mark.parametrize(
    ("size", "preset", "window"),
    [
        ((854, 480), "image_768res", (854, 480)),
        ((426, 240), "video_360p", (426, 240)),
        ((80, 60), "video_360p", (80, 60)),
        ((1920, 1080), "video_480p", None),
    ],
)
def test_a_picture_nearly_of_the_ratio_stays_whole(size, preset, window):
    """The released window has the picture's area: common sizes are not cut by the pixel that rounding leaves
    over.
    """
    left, top, w, h = pre.crop_box(*size, *pre.bucket(*size, pre.sides(preset)[0]))
    assert window is None or ((w, h) == window and (left, top) == (0, 0))
    assert w <= size[0] and h <= size[1]


@pytest.mark.parametrize("case", GRID_CASES)
def test_golden_patches(case):
    golden, preset = tensors(case), MANIFEST[case]["resolution"]
    made = [pre.vit_patches(frames, preset, RELEASED_VIT) for frames in references(case)]
    assert [list(grid) for _, grid in made] == golden["vit_grid"].tolist() or len(made) > 1
    assert [list(grid) for _, grid in made][: len(golden["vit_grid"])] == golden["vit_grid"].tolist()
    patches, (t, h, w) = made[0]
    assert patches.shape == (t * h * w, 1176) and patches.dtype == torch.float32
    torch.testing.assert_close(patches[:64], golden["vit_patches_head"], atol=1e-6, rtol=0)


def test_golden_cases_are_there():
    assert len(GRID_CASES) == 10


@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (20_000, 1), (1, 20_000), (2, 3), (255, 16), (37, 501)]
)
@pytest.mark.parametrize("preset", ["image_256res", "video_480p"])
def test_extreme_sizes(width, height, preset):
    frame = np.full((1, height, width, 3), 90, np.uint8)
    pixels = pre.vae_pixels(frame, preset)
    w, h = pre.vae_size(width, height, preset)
    assert pixels.shape == (1, 3, 1, h, w) and h % 16 == w % 16 == 0
    torch.testing.assert_close(pixels, torch.full_like(pixels, 90 / 127.5 - 1))
    patches, (t, gh, gw) = pre.vit_patches(frame, preset, RELEASED_VIT)
    assert patches.shape == (t * gh * gw, 1176) and patches.isfinite().all() and gh % 2 == gw % 2 == 0


def test_photo_is_cropped_then_resized_by_pil():
    photo = pytest.importorskip("skimage.data").astronaut()[:300]  # 512 x 300, a real picture
    (w, h), (left, top, cw, ch) = (
        pre.vae_size(512, 300, "image_256res"),
        pre.crop_box(512, 300, *pre.vae_size(512, 300, "image_256res")),
    )
    expected = (
        Image.fromarray(photo).crop((left, top, left + cw, top + ch)).resize((w, h), Image.Resampling.BICUBIC)
    )
    np.testing.assert_array_equal(pre.crop_resize(photo, (w, h)), np.asarray(expected))
    signed = pre.vae_pixels(photo[None], "image_256res")
    assert -1 <= signed.min() < -0.9 and 0.9 < signed.max() <= 1
    back = ((signed[0, :, 0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    np.testing.assert_array_equal(back, np.asarray(expected))


def test_patch_order():
    """Each patch value says where it came from: frame, row, column, channel."""
    config = dataclasses.replace(RELEASED_VIT, patch_size=2, window_size=16)
    t, rows, cols = 4, 8, 12
    frames = np.random.default_rng(0).integers(0, 256, (t, rows, cols, 3), dtype=np.uint8)
    patches, grid = pre.patchify(frames, config)
    assert grid == (2, 4, 6)
    n = 0
    for step in range(2):
        for group_row in range(2):
            for group_col in range(3):
                for row in range(2):
                    for col in range(2):
                        y, x = (group_row * 2 + row) * 2, (group_col * 2 + col) * 2
                        window = (
                            torch.from_numpy(
                                frames[step * 2 : step * 2 + 2, y : y + 2, x : x + 2].copy()
                            ).float()
                            / 255
                        )
                        window = (window - torch.tensor(pre.CLIP_MEAN)) / torch.tensor(pre.CLIP_STD)
                        torch.testing.assert_close(
                            patches[n], window.permute(3, 0, 1, 2).reshape(-1), atol=1e-6, rtol=0
                        )
                        n += 1
    assert n == len(patches)


def test_odd_video_repeats_its_last_frame():
    clip = np.random.default_rng(1).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    odd, grid = pre.vit_patches(clip, "image_256res", RELEASED_VIT)
    even, same = pre.vit_patches(np.concatenate([clip, clip[-1:]]), "image_256res", RELEASED_VIT)
    assert grid == same == (2, 16, 16)
    assert torch.equal(odd, even)


def test_frames_come_in_several_forms():
    clip = np.random.default_rng(2).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    expected = pre.vae_pixels(clip, "image_256res")
    for form in (
        list(clip),
        torch.from_numpy(clip),
        [torch.from_numpy(f) for f in clip],
        [Image.fromarray(f) for f in clip],
    ):
        assert torch.equal(pre.vae_pixels(form, "image_256res"), expected)


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ([], "no frames"),
        (np.zeros((0, 4, 4, 3), np.uint8), "no frames"),
        (np.zeros((4, 4, 3), np.uint8), r"\[4, 4, 3\]"),
        (np.zeros((1, 4, 4, 4), np.uint8), r"\[4, 4, 4\]"),
        (np.zeros((1, 4, 4, 3), np.float32), "float32"),
        (np.zeros((1, 0, 4, 3), np.uint8), "4x0"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], "4x4 and 5x4"),
    ],
)
def test_bad_frames(frames, says):
    with pytest.raises(MediaError, match=says):
        pre.vae_pixels(frames, "image_256res")


def test_unknown_preset_lists_the_known():
    with pytest.raises(RequestError, match="image_1024res.*image_768res.*video_480p"):
        pre.vae_size(10, 10, "image_1024res")
    with pytest.raises(RequestError, match="too small"):
        pre.bucket(10, 10, 8)
    with pytest.raises(MediaError, match="0x10"):
        pre.bucket(0, 10, 256)
