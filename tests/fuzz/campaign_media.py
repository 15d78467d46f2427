"""Damaged pictures and clips of every container the libraries here can write, under right and wrong names."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import av
import numpy as np
from mutate import damage
from PIL import Image

from lance_core import media
from lance_core.errors import MediaError

PICTURES = {"png": {}, "jpeg": {}, "gif": {}, "webp": {}, "tiff": {}, "bmp": {}, "avif": {}}
CLIPS = {
    "mp4": "libx264",
    "mkv": "libx264",
    "webm": "libvpx-vp9",
    "avi": "mpeg4",
    "mpegts": "mpeg2video",
    "mov": "png",
}
NAMES = ["{}", "x.png", "x.jpg", "x.gif", "x.mp4", "x.webm", "x", "x.avif", "x.tiff"]


def _pictures() -> dict[str, bytes]:
    """Still and moving pictures, with and without alpha, palettes, EXIF and 16 bits."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8).repeat(1, 0))
    kinds = {
        "rgb": rgb,
        "rgba": rgb.convert("RGBA"),
        "p": rgb.convert("P"),
        "l": rgb.convert("L"),
        "1": rgb.convert("1"),
    }
    kinds["i16"] = Image.fromarray(rng.integers(0, 65536, (24, 32), np.uint16))
    kinds["la"] = rgb.convert("LA")
    frames = [Image.fromarray(np.roll(np.asarray(rgb), i, 1)) for i in range(5)]
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    found = {}
    for form in PICTURES:
        for kind, image in kinds.items():
            for options in (
                {},
                {"exif": exif},
                {"save_all": True, "append_images": frames[1:], "duration": 80},
            ):
                buffer = io.BytesIO()
                try:
                    image.save(buffer, form, **options)
                except (OSError, KeyError, ValueError, TypeError, RuntimeError):
                    continue  # a mode or an option that this format does not have
                found[f"{kind}_{'_'.join(options)[:8]}.{form}"] = buffer.getvalue()
    return found


def _clips() -> dict[str, bytes]:
    """A dozen frames in each container whose encoder is there."""
    rng, found = np.random.default_rng(1), {}
    for form, codec in CLIPS.items():
        buffer = io.BytesIO()
        try:
            with av.open(buffer, "w", format={"mkv": "matroska"}.get(form, form)) as container:
                stream = container.add_stream(codec, rate=12)
                stream.width, stream.height = 48, 32
                stream.pix_fmt = "rgba" if codec == "png" else "yuv420p"
                for _ in range(12):
                    frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (32, 48, 3), np.uint8), "rgb24")
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
        except (av.FFmpegError, ValueError):  # this build lacks the encoder
            continue
        found[f"clip.{form}"] = buffer.getvalue()
    return found


def prepare(folder: Path) -> None:
    """Write the whole files that cases damage."""
    for name, data in (_pictures() | _clips()).items():
        (folder / name).write_bytes(data)


def load(folder: Path) -> dict[str, Any]:
    """What a worker keeps: the whole files, and a place for damaged ones of its own."""
    import tempfile

    whole = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    return {"whole": whole, "place": Path(tempfile.mkdtemp(dir=folder))}


def case(n: int, seed: int, shared: dict[str, Any]) -> None:
    """One damaged file, read in every way there is; the last of the errors counts, an untyped one at once."""
    rng = random.Random(f"{seed}/{n}")
    names = list(shared["whole"])
    name = rng.choice(names)
    data = damage(shared["whole"][name], rng, shared["whole"][rng.choice(names)])
    path = shared["place"] / rng.choice(NAMES).format(name)
    path.write_bytes(data)
    failed: MediaError | None = None
    try:
        for read in (media.load_image, media.read_clip, media.load_video, media.read_metadata):
            for source in (path, data) if read is media.load_image else (path,):
                try:
                    read(source if isinstance(source, Path) else io.BytesIO(source))
                except MediaError as error:
                    failed = error
    finally:
        path.unlink()
    if failed is not None:
        raise failed
