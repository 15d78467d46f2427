"""Hostile and broken files: refused in a sentence, at once and in little memory, or read whole."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from made_media import chunk, every, gif, numbered, png, video
from PIL import Image, ImageFile

from lance_core.errors import LanceError, MediaError
from lance_core.inputs import limits, media

CASES = Path(__file__).parent / "cases"
SECONDS, MEBIBYTES = 5, 1500  # what anything accepted may take

# Runs in a process of its own, so that its peak memory is its own
MEASURED = """
import sys, time
from lance_core.errors import MediaError
from lance_core.inputs import media
started = time.process_time()
try:
    shape = getattr(media, sys.argv[1])(sys.argv[2])
    shape = (shape if sys.argv[1] == "load_image" else shape[0]).shape
except MediaError as error:
    shape = str(error)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(time.process_time() - started, int(status["VmHWM"].split()[0]) // 1024, shape, sep="|")
"""


def measured(call: str, path: Path) -> str:
    """The shape or message that a call gave, within the time and memory that any call may take."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from Linux' /proc")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, call, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    seconds, mebibytes, result = done.stdout.strip().split("|")
    assert float(seconds) < SECONDS and int(mebibytes) < MEBIBYTES, (path.name, done.stdout)
    return result


def quick(call, *args, **options) -> str:
    """The message of a call that is refused at once."""
    started = time.process_time()
    with pytest.raises(MediaError) as refused:
        call(*args, **options)
    assert time.process_time() - started < 1 and len(str(refused.value)) < 500
    return str(refused.value)


# Too many pixels


@pytest.mark.parametrize(
    ("width", "height", "colour"), [(30, 10_813_470, 4), (20_000, 20_000, 6), (50_000, 50_000, 2)]
)
def test_a_picture_bomb_is_refused_from_its_header(tmp_path, width, height, colour):
    path = png(tmp_path / "x.png", width, height, 1, colour)
    for call in (media.load_image, media.read_clip):
        assert f"{width}x{height}" in quick(call, path)
    assert "30x8257566" in quick(media.load_image, CASES / "tall_bomb.png")


@pytest.mark.parametrize(("colour", "bits"), [(6, 8), (4, 8), (2, 16), (0, 16), (0, 1)])
def test_the_largest_pictures_stay_within_time_and_memory(tmp_path, colour, bits):
    path = png(tmp_path / "x.png", 8000, 8000, 8000, colour, bits)
    assert measured("load_image", path) == "(8000, 8000, 3)"


@pytest.mark.parametrize("suffix", [".webp", ".jpg", ".tif"])
def test_the_largest_pictures_of_other_formats(tmp_path, suffix):
    options = {".webp": {"lossless": True, "quality": 0, "method": 0}, ".tif": {"compression": "tiff_lzw"}}
    mode = "RGB" if suffix == ".jpg" else "RGBA"
    Image.new(mode, (8000, 8000), "orange").save(tmp_path / f"x{suffix}", **options.get(suffix, {}))
    assert measured("load_image", tmp_path / f"x{suffix}") == "(8000, 8000, 3)"


def test_a_large_jpeg_is_decoded_at_half_size(tmp_path):
    ramp = Image.linear_gradient("L").resize((12_000, 9_000))
    ramp.save(tmp_path / "x.jpg")  # what a phone of 108 million pixels takes
    small = media.load_image(tmp_path / "x.jpg")
    assert small.shape == (4500, 6000, 3)
    assert np.abs(small[::500, 0, 0].astype(int) - np.asarray(ramp)[::1000, 0]).max() <= 3
    assert measured("load_image", tmp_path / "x.jpg") == "(4500, 6000, 3)"
    ramp.save(tmp_path / "y.jpg", progressive=True)  # held whole while it is decoded
    assert "12000x9000" in quick(media.load_image, tmp_path / "y.jpg")


def test_a_picture_within_the_limit_is_not_reduced(tmp_path):
    Image.new("RGB", (6000, 4000)).save(tmp_path / "x.jpg")
    assert media.load_image(tmp_path / "x.jpg").shape == (4000, 6000, 3)


def test_a_picture_that_decodes_for_ever_is_stopped(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.jpg", progressive=True)
    monkeypatch.setattr(limits, "MAX_DECODE_SECONDS", 0.01)
    with pytest.raises(MediaError, match=r"x\.jpg takes more than 0\.01 seconds"):
        media.load_image(tmp_path / "x.jpg")


def test_moving_pictures_have_limits_too(tmp_path):
    assert "60000x60000" in quick(media.read_clip, gif(tmp_path / "a.gif", 5, 60_000, 60_000))
    assert "4000 frames" in quick(media.read_clip, gif(tmp_path / "b.gif", 4000, 1000, 1000))
    assert "more than 20,000 frames" in quick(media.read_clip, gif(tmp_path / "c.gif", 200_000))
    pages = [Image.new("L", (80, 80)), Image.new("L", (5000, 5000))]
    pages[0].save(tmp_path / "d.tif", save_all=True, append_images=pages[1:], compression="tiff_deflate")
    assert "5000x5000" in quick(media.read_clip, tmp_path / "d.tif", pick=every)


def test_counting_many_frames_can_be_watched_and_stopped(tmp_path):
    path, told = gif(tmp_path / "x.gif", 5000), []
    media.read_clip(path, progress=lambda done, total: told.append((done, total)))
    assert told[:5] == [(0, 1000 * i) for i in range(1, 6)]
    assert told[5:] == [(i, 5000) for i in range(1, 5001)]

    class Stopped(Exception):
        pass

    def stop(done, total):
        raise Stopped

    for source in (path, CASES / "plain.mp4", CASES / "anim.avif"):
        with pytest.raises(Stopped):
            media.read_clip(source, progress=stop)


def test_a_video_of_huge_frames_is_refused(tmp_path):
    """By the size in the container's header, and by the stream's own where the header says less."""
    frames = [np.zeros((6000, 7000, 3), np.uint8)]
    speed = {"preset": "ultrafast", "threads": "1", "bframes": "0", "ref": "1", "rc-lookahead": "0"}
    path = video(tmp_path / "x.mp4", frames, [0], Fraction(1, 12), rate=12, **speed)
    data = bytearray(path.read_bytes())
    at = data.index(b"avc1", data.index(b"stsd")) + 28
    data[at : at + 4] = b"\0\x40\0\x30"  # 64 x 48
    for source in (path, bytes(data)):
        assert "7000x6000" in quick(media.read_clip, source)


def test_frames_that_are_too_many_are_reduced_while_decoding(tmp_path, monkeypatch):
    clip, quickly = numbered(13, 1440, 2560), {"preset": "ultrafast"}
    path = video(tmp_path / "x.mp4", clip, range(13), Fraction(1, 12), rate=12, **quickly)
    whole = media.read_clip(path)[0]
    monkeypatch.setattr(limits, "MAX_CLIP_BYTES", whole.nbytes - 1)
    frames, fps, total = media.read_clip(path)
    assert (frames.shape, fps, total) == ((13, 720, 1280, 3), 12, 13)
    assert np.abs(frames.astype(int) - whole[:, ::2, ::2]).mean() < 2
    monkeypatch.setattr(limits, "MAX_CLIP_BYTES", whole.nbytes // 5)  # would leave less than the models see
    with pytest.raises(MediaError, match="13 frames of 2560x1440"):
        media.read_clip(path)


# Data that ends early


@pytest.mark.parametrize("rows", [0, 1, 30, 63])
@pytest.mark.parametrize(("colour", "bits"), [(2, 8), (6, 8), (4, 8), (0, 8), (0, 1), (0, 16)])
def test_a_png_with_too_few_rows(tmp_path, rows, colour, bits):
    path = png(tmp_path / "x.png", 40, 64, rows, colour, bits)
    assert "ends early" in quick(media.load_image, path) and "ends early" in quick(media.read_clip, path)
    assert (media.load_image(png(tmp_path / "y.png", 40, 64, 64, colour, bits)) == 255).all()


def test_black_pictures_are_whole(tmp_path):
    for mode in ("L", "RGB", "RGBA", "P", "1", "I;16"):
        Image.new(mode, (33, 17)).save(tmp_path / "x.png")
        assert media.load_image(tmp_path / "x.png").shape == (17, 33, 3)
    Image.new("RGB", (33, 17)).save(tmp_path / "x.tif")
    Image.new("RGB", (40, 40), (128, 128, 128)).save(tmp_path / "grey.jpg")
    Image.new("CMYK", (40, 40), (1, 2, 3, 4)).save(tmp_path / "cmyk.jpg")
    for name in ("x.tif", "grey.jpg", "cmyk.jpg"):
        media.load_image(tmp_path / name)


def test_an_interlaced_png_is_counted_pass_by_pass(tmp_path):
    """Seven passes of 5 x 5: 1 + 1 + 2 + 4 + 6 + 6 + 10 pixels on 11 rows, and a byte for each row."""
    from lance_core.inputs.images import png_bytes

    assert png_bytes(5, 5, 8, 0, 0, 0, 1) == 25 + 11
    whole = png(tmp_path / "x.png", 5, 5, 6, 0, 8, 1, level=0)  # 36 bytes of rows
    assert media.load_image(whole).shape == (5, 5, 3)
    assert "ends early" in quick(media.load_image, png(tmp_path / "y.png", 5, 5, 5, 0, 8, 1, level=0))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("part", [0.5, 0.8, 0.9])
def test_a_jpeg_that_is_ended_before_its_end(tmp_path, mode, part):
    """libjpeg fills what is missing with grey, and only warns."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, "JPEG", quality=95)
    data = file.getvalue()
    media.load_image(data)
    assert "ends early" in quick(media.load_image, data[: int(len(data) * part)] + b"\xff\xd9")


SAVED = {
    "png": {},
    "jpeg": {"quality": 95},
    "gif": {},
    "bmp": {},
    "tiff": {},
    "webp": {"lossless": True},
    "avif": {},
    "ppm": {},
    "jpeg2000": {},
    "tga": {},
}


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("forgiving", [False, True])
def test_a_cut_picture_of_any_format(kind, forgiving, monkeypatch):
    """Also where another program has told Pillow to accept them."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", forgiving)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind.upper(), **SAVED[kind])
    data = file.getvalue()
    assert media.load_image(data).shape == (64, 64, 3)
    for part in (0.3, 0.6, 0.9):
        quick(media.load_image, data[: int(len(data) * part)])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is forgiving


def test_a_tiff_whose_strips_do_not_reach_its_last_row(tmp_path):
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    tags = ImageFileDirectory_v2()
    Image.new("L", (40, 64), 200).save(tmp_path / "x.tif", tiffinfo=tags)
    data = bytearray((tmp_path / "x.tif").read_bytes())
    at = data.index(b"\x01\x01\x04\0\x01\0\0\0") + 8 if b"\x01\x01\x04\0\x01\0\0\0" in data else 0
    at = at or data.index(b"\x01\x01\x03\0\x01\0\0\0") + 8
    data[at : at + 2] = (90).to_bytes(2, "little")  # ImageLength
    with pytest.raises(MediaError):
        media.load_image(bytes(data))


@pytest.mark.parametrize(
    "name", ["short_data.png", "damaged.tiff", "damaged_apng.png", "damaged_exif.png", "tall_bomb.png"]
)
def test_the_damaged_cases(name):
    quick(media.read_clip, CASES / name, pick=every)
    for call in (media.load_image, media.read_metadata):
        try:
            call(CASES / name)
        except MediaError as error:
            assert len(str(error)) < 500
    if name not in ("damaged.tiff", "damaged_apng.png"):  # whose first picture is whole
        quick(media.load_image, CASES / name)


# What is no file of pictures


def test_no_program_is_started(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript: not a format that is opened, whatever a file is called."""

    def started(*args, **options):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(os, "system", started)
    for name in ("x.eps", "x.png", "x.jpg"):
        (tmp_path / name).write_bytes(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
        )
        for call in (media.load_image, media.read_clip, media.read_metadata):
            quick(call, tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_pipes_devices_and_folders_are_a_sentence_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    for path, says in {
        tmp_path / "pipe.png": "a pipe or device",
        tmp_path / "link.png": "a pipe or device",
        "/dev/zero": "a pipe or device",
        "/dev/tty": "a pipe or device",
        tmp_path / "folder.mp4": "a folder",
        tmp_path / "empty.png": "is empty",
        tmp_path / "none.png": "does not exist",
        tmp_path / "empty.png" / "x": "does not exist",
        "a\0b.png": "cannot be opened",
        "x" * 5000 + ".png": "cannot be opened",
    }.items():
        for call in (media.load_image, media.read_clip, media.read_metadata):
            assert says in quick(call, path), path


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(tmp_path):
    (tmp_path / "x.png").write_bytes(b"x")
    (tmp_path / "x.png").chmod(0)
    assert "permissions" in quick(media.load_image, tmp_path / "x.png")


def test_files_in_memory(tmp_path):
    assert "empty" in quick(media.load_image, b"")
    assert "empty" in quick(media.read_clip, io.BytesIO())
    assert "text" in quick(media.load_image, io.StringIO("x"))
    assert "read" in quick(media.load_image, io.BufferedWriter(io.BytesIO()))  # type: ignore[arg-type]


# Whatever Pillow and FFmpeg raise


def _seeds(folder: Path) -> dict[str, bytes]:
    images = [Image.fromarray(frame) for frame in numbered(4, 20, 24)]
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "x" * 40, 6
    kinds = {
        "a.png": {"exif": exif},
        "b.jpg": {"exif": exif},
        "c.webp": {"exif": exif},
        "d.tif": {"exif": exif},
        "e.bmp": {},
        "f.jp2": {},
        "g.tga": {},
        "h.ppm": {},
    }
    moving = ("m.png", "m.gif", "m.webp", "m.tif", "m.avif")
    for name, options in kinds.items():
        images[0].save(folder / name, **options)
    for name in moving:
        images[0].save(folder / name, save_all=True, append_images=images[1:], duration=40)
    for name, codec in (("v.mp4", "libx264"), ("v.mkv", "ffv1"), ("v.webm", "libvpx"), ("v.avi", "mpeg4")):
        if codec in av.codecs_available:
            pixels = "bgra" if codec == "ffv1" else "yuv420p"
            clip = numbered(6, 32, 32)
            video(folder / name, clip, range(6), Fraction(1, 12), codec, pixels=pixels, rate=12)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _damaged(data: bytes, rng: random.Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(min(len(spoilt), rng.choice([64, 400, 1 << 30])))
        kind = rng.randrange(5)
        if kind == 0:
            spoilt[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            spoilt[at : at + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\0\0\0\1"])
        elif kind == 2:
            del spoilt[at : at + rng.choice([1, 4, 60])]
        elif kind == 3:
            spoilt[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
        else:
            del spoilt[max(at, 16) :]
        if not spoilt:
            break
    return bytes(spoilt)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow tells of what it passes over
def test_damaged_files_end_in_a_media_error_or_a_picture(tmp_path):
    """A short run, the same every time; LANCE_FUZZ asks for more rounds."""
    rng = random.Random(11)
    seeds = _seeds(tmp_path)
    for turn in range(int(os.environ.get("LANCE_FUZZ", "1200"))):
        name = rng.choice(sorted(seeds))
        data = _damaged(seeds[name], rng)
        for call in (media.load_image, media.read_clip, media.read_metadata):
            started = time.thread_time()
            try:
                call(data)
            except LanceError as error:
                assert isinstance(error, MediaError) and 20 < len(str(error)) < 500, (name, turn)
            assert time.thread_time() - started < 20, (name, turn)


def test_a_chunk_of_text_is_no_bomb(tmp_path):
    """300 MB of text in a small PNG."""
    import zlib

    text = b"lance\0\0" + zlib.compress(bytes(300 << 20), 1)
    whole = png(tmp_path / "x.png", 4, 4, 4).read_bytes()
    (tmp_path / "x.png").write_bytes(whole[:33] + chunk(b"zTXt", text) + whole[33:])
    measured("load_image", tmp_path / "x.png")
