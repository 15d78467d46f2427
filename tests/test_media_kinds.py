"""Clips and pictures as a person sees them: by content, by time, upright, in their true shape, on white."""

from __future__ import annotations

import io
import logging
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from made_media import every, gif, number, numbered, video
from PIL import Image

from lance_core.errors import MediaError
from lance_core.inputs import media, preprocess
from lance_core.inputs.clips import Times

CASES = Path(__file__).parent / "cases"

# Content, not name


@pytest.mark.parametrize(
    ("name", "frames", "fps"),
    [
        ("anim.avif", 24, 25),
        ("really_mp4.gif", 48, 24),
        ("really_gif.mp4", 24, 25),
        ("a.jfif", 1, 24),
        ("apng_default.png", 5, 10),
    ],
)
def test_the_bytes_say_what_a_file_is(name, frames, fps):
    data = (CASES / name).read_bytes()
    for source in (CASES / name, str(CASES / name), data, io.BytesIO(data)):
        clip = media.read_clip(source, pick=every)
        assert (clip.total, clip.fps, clip.note) == (frames, fps, None)
        assert len({frame.tobytes() for frame in clip.frames}) == frames


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".avif", ".tif"])
def test_moving_pictures_under_any_name(tmp_path, suffix):
    clip = numbered(6)
    path = tmp_path / f"x{suffix}"
    images = [Image.fromarray(frame) for frame in clip]
    images[0].save(path, save_all=True, append_images=images[1:], duration=50)
    renamed = path.rename(tmp_path / "x.mp4")
    frames, fps, total = media.read_clip(renamed, pick=every)
    assert total == 6 and fps == (20 if suffix != ".tif" else 10)
    assert np.abs(frames.astype(int) - clip).mean() < 12
    assert np.abs(media.load_image(renamed).astype(int) - clip[0]).mean() < 12
    assert media.read_metadata(renamed) is None


@pytest.mark.parametrize(
    ("suffix", "kind", "codec", "pixels"),
    [
        (".y4m", "yuv4mpegpipe", "rawvideo", "yuv420p"),
        (".mxf", "mxf", "mpeg2video", "yuv420p"),
        (".nut", "nut", "ffv1", "yuv420p"),
        (".ts", "mpegts", "libx264", "yuv420p"),
        (".avi", "avi", "mpeg4", "yuv420p"),
        (".flv", "flv", "flv", "yuv420p"),
        (".wmv", "asf", "wmv2", "yuv420p"),
        (".mpg", "mpeg", "mpeg2video", "yuv420p"),
        (".webm", "webm", "libvpx-vp9", "yuv420p"),
    ],
)
def test_containers(tmp_path, suffix, kind, codec, pixels):
    path = video(
        tmp_path / f"x{suffix}", numbered(50), range(50), Fraction(1, 25), codec, kind, pixels, rate=25
    )
    for source in (path, path.rename(tmp_path / "x.jpg")):
        if source.exists():
            clip = media.read_clip(source, pick=every)
            assert (clip.total, round(clip.fps, 3), clip.note) == (50, 25, None)
            assert number(clip.frames[-1], 50) >= 45


def test_a_picture_of_another_kind_is_a_sentence(tmp_path):
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(MediaError, match="HEIC.*JPEG or PNG"):
        media.read_clip(tmp_path / "x.heic")
    with pytest.raises(MediaError, match="HEIC.*JPEG or PNG"):
        media.load_image(tmp_path / "x.heic")
    with pytest.raises(MediaError, match="video"):
        media.load_image(CASES / "plain.mp4")


# Time


@pytest.mark.parametrize(
    ("name", "codec", "claimed"),
    [
        ("x.mkv", "libx264", 1000),
        ("x.webm", "libvpx", 1000),
        ("x.avi", "mpeg4", 1000),
        ("x.ts", "libx264", 30),
    ],
)
def test_the_rate_is_the_timestamps(tmp_path, name, codec, claimed):
    """A browser's recording says 1000 frames per second, a transport stream says nothing."""
    kind = "mpegts" if name.endswith(".ts") else None
    path = video(tmp_path / name, numbered(151), range(0, 151 * 33, 33), codec=codec, kind=kind, rate=claimed)
    frames, fps, total = media.read_clip(path)
    assert (total, round(fps, 1)) == (151, 30.3)
    assert len(frames) == len(preprocess.frame_indices(151, 30))


def test_an_even_clip_whose_header_is_right_keeps_its_rate():
    frames, fps, total = media.read_clip(CASES / "plain.mp4")
    picks = preprocess.frame_indices(48, 24)
    assert (fps, total, len(frames)) == (24, 48, len(picks))
    np.testing.assert_array_equal(frames, media.read_clip(CASES / "plain.mp4", pick=every)[0][picks])


@pytest.mark.parametrize("header", [29.97, 24.0, 60.0, 10.0])
@pytest.mark.parametrize("count", [2, 5, 49, 300])
def test_rounded_timestamps_are_not_uneven(header, count):
    """Matroska's are whole milliseconds; phones' are a few off."""
    rng = np.random.default_rng(0)
    for jitter in (0, 0.1 / header):
        starts = np.round(np.arange(count) / header + rng.uniform(-jitter, jitter, count), 3)
        times = Times(np.sort(starts).tolist(), float(starts[-1]) + 1 / header)
        assert times.even()
        if not jitter:
            assert times.rate(header) == header


def test_a_screen_recording_is_picked_by_time(tmp_path):
    """Three frames of 2 seconds, then 30 in one: by number the three would get a twelfth of the picks."""
    times = [0, 2000, 4000, *range(6000, 7000, 33)]
    path = video(tmp_path / "x.mkv", numbered(len(times)), times, codec="ffv1", pixels="bgr0")
    frames, fps, total = media.read_clip(path)
    seen = np.array([number(frame, total) for frame in frames])
    assert (len(frames), total) == (69, len(times)) and fps == pytest.approx(total / 7, rel=0.02)
    for first in range(3):  # 2 seconds of 7
        assert np.sum(seen == first) == pytest.approx(69 * 2 / 7, abs=2)
    assert (np.diff(seen) >= 0).all() and seen[-1] >= total - 2
    asked = media.read_clip(path, pick=every)[0]  # a caller's own pick goes by number
    assert [number(frame, total) for frame in asked] == list(range(total))
    assert len(media.read_clip(path, fps=12)[0]) == len(preprocess.frame_indices(total, 12))


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
@pytest.mark.parametrize("durations", [[5000, 100, 100, 100, 100, 100], [100, 100, 100, 100, 100, 5000]])
def test_a_long_frame_of_a_moving_picture_counts_as_long_as_it_is_shown(tmp_path, suffix, durations):
    images = [Image.fromarray(frame) for frame in numbered(6)]
    path = tmp_path / f"x{suffix}"
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations)
    frames, _, total = media.read_clip(path)
    seen = [number(frame, 6) for frame in frames]
    assert total == 6 and len(frames) == 65
    assert seen.count(durations.index(5000)) == pytest.approx(65 * 5 / 5.5, abs=2) and set(seen) >= {0, 5}


@pytest.mark.parametrize(("delay", "fps"), [(0, 10), (1, 10), (2, 50), (10, 10)])
def test_a_gif_plays_as_in_a_browser(tmp_path, delay, fps):
    assert media.read_clip(gif(tmp_path / "x.gif", 7, delay=delay), pick=every).fps == pytest.approx(fps)


# Orientation, shape, transparency

TURNED = {
    "rot90": lambda clip: np.rot90(clip, -1, (1, 2)),
    "hflip": lambda clip: clip[:, :, ::-1],
    "vflip": lambda clip: clip[:, ::-1],
    "transpose": lambda clip: clip.transpose(0, 2, 1, 3),
}


@pytest.mark.parametrize("name", TURNED)
def test_the_display_matrix(name):
    plain, turned = (media.read_clip(CASES / f"{n}.mp4", pick=every)[0] for n in ("plain", name))
    np.testing.assert_array_equal(turned, TURNED[name](plain))


def test_all_eight_orientations_of_a_video_are_those_of_pictures(tmp_path):
    """One video with eight display matrices, and one picture with eight EXIF orientations."""
    import struct

    data = bytearray((CASES / "plain.mp4").read_bytes())
    at = data.find(b"tkhd") + 44
    plain = media.read_clip(CASES / "plain.mp4", pick=every)[0]
    one = 1 << 16
    signs = {1: (one, 0, 0, one), 2: (-one, 0, 0, one), 3: (-one, 0, 0, -one), 4: (one, 0, 0, -one)}
    signs |= {5: (0, one, one, 0), 6: (0, one, -one, 0), 7: (0, -one, -one, 0), 8: (0, -one, one, 0)}
    for orientation, (a, b, c, d) in signs.items():
        data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        turned = media.read_clip(bytes(data), pick=every)[0]
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / "x.png"
        Image.fromarray(plain[3]).save(path, exif=exif)
        np.testing.assert_array_equal(media.load_image(path), turned[3], err_msg=str(orientation))


@pytest.mark.parametrize(
    ("aspect", "width"),
    [(Fraction(4), 256), (Fraction(4, 3), 85), (Fraction(8, 9), 57), (Fraction(1, 2), 32), (Fraction(1), 64)],
)
@pytest.mark.parametrize("name", ["x.mp4", "x.mkv"])
def test_anamorphic_clips_have_their_display_shape(tmp_path, aspect, width, name):
    path = video(tmp_path / name, numbered(5), range(5), Fraction(1, 12), rate=12, aspect=aspect)
    assert media.read_clip(path, pick=every)[0].shape == (5, 48, width, 3)


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "options"),
    [
        ("x.mov", "qtrle", "argb", {}),
        ("x.mov", "prores_ks", "yuva444p10le", {}),
        ("x.mov", "png", "rgba", {}),
        ("x.mkv", "ffv1", "bgra", {}),
        ("x.webm", "libvpx-vp9", "yuva420p", {"auto-alt-ref": "0"}),
        ("x.webm", "libvpx", "yuva420p", {"auto-alt-ref": "0"}),
    ],
)
def test_transparency_of_a_video_is_white(tmp_path, name, codec, pixels, options):
    clip = np.zeros((13, 48, 64, 4), np.uint8)
    clip[..., 1] = 255  # green, hidden on the left and half hidden in the middle
    clip[:, :, 20:40, 3], clip[:, :, 40:, 3] = 128, 255
    path = video(tmp_path / name, clip, range(13), Fraction(1, 12), codec, None, pixels, 12, **options)
    frames = media.read_clip(path)[0]
    assert len(frames) == 13
    for column, level in ((8, (255, 255, 255)), (30, (127, 255, 127)), (56, (0, 255, 0))):
        assert np.abs(frames[:, 24, column].astype(int) - level).max() <= 6, column


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".avif"])
def test_transparency_of_a_moving_picture_is_white(tmp_path, suffix):
    frame = np.zeros((48, 64, 4), np.uint8)
    frame[..., 1], frame[:, 32:, 3] = 255, 255
    images = [Image.fromarray(frame), Image.new("RGBA", (64, 48), (255, 0, 0, 255))]
    path = tmp_path / f"x{suffix}"
    images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    frames = media.read_clip(path, pick=every)[0].astype(int)
    for (i, column), level in {(0, 8): (255, 255, 255), (0, 56): (0, 255, 0), (1, 8): (255, 0, 0)}.items():
        assert np.abs(frames[i, 24, column] - level).max() <= 3


# Cut files


@pytest.mark.parametrize(
    ("name", "codec"), [("x.mkv", "libx264"), ("x.webm", "libvpx"), ("x.flv", "flv"), ("x.ts", "libx264")]
)
def test_a_cut_video_says_how_much_was_read(tmp_path, caplog, name, codec):
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 64, 3), np.uint8)
    kind = "mpegts" if name.endswith(".ts") else None
    whole = video(tmp_path / name, noise, range(48), Fraction(1, 12), codec, kind, rate=12).read_bytes()
    assert media.read_clip(whole).note is None
    with caplog.at_level(logging.WARNING, "lance_core"):
        clip = media.read_clip(whole[: len(whole) * 6 // 10])
    assert 10 < clip.total < 40 and len(clip.frames) > 8
    assert "cut off" in clip.note and "seconds" in clip.note and clip.note in caplog.text
    if kind is None:  # a transport stream does not say how long it should be
        with pytest.raises(MediaError, match="cut off|no frames|cannot be read"):
            media.read_clip(whole[: len(whole) // 30])


@pytest.mark.parametrize("suffix", [".gif", ".png"])
def test_a_cut_moving_picture_gives_its_whole_frames(tmp_path, suffix):
    images = [Image.fromarray(f) for f in np.random.default_rng(0).integers(0, 256, (8, 40, 40, 3), np.uint8)]
    path = tmp_path / f"x{suffix}"
    images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    data, whole = path.read_bytes(), media.read_clip(path, pick=every)
    clip = media.read_clip(data[: len(data) * 6 // 10], pick=every)
    assert (clip.total, "first 4 frames" in clip.note) == (4, True)
    np.testing.assert_array_equal(clip.frames, whole.frames[:4])
    with pytest.raises(MediaError, match="ends early"):
        media.read_clip(data[: len(data) // 10])
