"""Moving pictures: GIF, WebP, APNG, AVIF and TIFF, which Pillow composes (transparency, partial frames) and
FFmpeg reads only in part.

Frames are counted and timed from the file's blocks, without decoding, so that a million of them can be
refused or interrupted.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from . import limits
from .clips import Clip, Pick, Progress, Times, choose, stack
from .files import decoded, decoding, early_end, name_of, refused
from .images import TimedFile, inflated, load_whole, opened_picture, png_bytes, reduce_jpeg
from .pixels import check_pixels, rgb_from_image

# What browsers make of a frame that is shown for 10 ms or less
SHORTEST_MS, INSTEAD_MS = 10, 100


@dataclass
class Frames:
    """The frames of a moving picture: how long each is shown in milliseconds, which number Pillow gives the
    first, and whether the file ends before the last.
    """

    durations: list[float] = field(default_factory=list)
    first: int = 0
    cut: bool = False


def count_moving(source: Any) -> int:
    """How many frames a picture file holds, 1 for a still one; nothing is decoded."""
    with opened_picture(source) as (image, file):
        return len(_frames(image, file, name_of(source), None).durations)


def read_moving(source: Any, fps: float | None, pick: Pick | None, progress: Progress | None) -> Clip:
    """A picture file as a clip, a still one as a clip of one frame; see `media.read_clip`."""
    name = name_of(source)
    with opened_picture(source) as (image, file):
        found = _frames(image, file, name, progress)
        total = len(found.durations)
        if total == 1:
            reduce_jpeg(image, name)
        times = None
        if total > 1:
            check_pixels(image.width, image.height, limits.MAX_MOVING_PIXELS, name)
            _check_work(image, total, name)
            shown = [d if d > SHORTEST_MS else INSTEAD_MS for d in found.durations]
            ends = np.cumsum(shown) / 1000
            times = Times([0.0, *ends[:-1].tolist()], float(ends[-1]))
        picks, rate = choose(pick, total, fps, None, times, name)
        frames = stack(_decode(image, file, name, picks, found.first, progress, total), len(picks), name)
    note = f"{name} is cut off: its first {total} frames were read." if found.cut else None
    return Clip.of(frames, float(rate), total, note)


def _decode(
    image: Any,
    file: TimedFile,
    name: str,
    picks: list[int],
    first: int,
    progress: Progress | None,
    total: int,
) -> Iterator[np.ndarray]:
    """The picked frames. Every frame before is visited: most are stored as changes to the one before."""
    wanted = {i: picks.count(i) for i in picks}
    if getattr(image, "rawmode", "") == "RGBX" and total > 1 and hasattr(image, "_mode"):
        # What no frame of a WebP covers is transparent even where its header speaks of no transparency
        image.rawmode = image._mode = "RGBA"
    for i in range(picks[-1] + 1):
        file.restart()
        with decoding(name):
            if first + i or image.tell():
                image.seek(first + i)
        limit = limits.MAX_PIXELS if total == 1 else limits.MAX_MOVING_PIXELS
        check_pixels(image.width, image.height, limit, name)  # a TIFF's pages have sizes of their own
        if i in wanted or image.format == "WEBP":  # WebP decodes up to here only when it is loaded
            load_whole(image, file, name)
        if progress is not None:
            progress(i + 1, total)
        if i in wanted:
            frame = rgb_from_image(image, name)
            for _ in range(wanted[i]):
                yield frame


def _frames(image: Image.Image, file: TimedFile, name: str, progress: Progress | None) -> Frames:
    """Count the frames of an opened picture; the file is left where it was.

    Raises:
        MediaError: damaged, or more frames than may be.
    """
    found = Frames()
    scans = {"GIF": _scan_gif, "PNG": _scan_png, "WEBP": _scan_webp}
    scan = scans.get(image.format or "")
    position = file.tell()
    file.restart()
    if scan is not None:
        steps = scan(file, found)
    elif image.format in ("TIFF", "AVIF"):
        steps = _visit(image, file, name)
    else:
        return Frames([0.0])
    for duration in decoded(steps, name):
        found.durations.append(duration)
        count = len(found.durations)
        if count > limits.MAX_MOVING_FRAMES:
            raise refused(
                f"{name} has more than {limits.MAX_MOVING_FRAMES:,} frames; save it as MP4 or shorten it."
            )
        if progress is not None and count % limits.COUNTED_AT_ONCE == 0:
            progress(0, count)
    if scan is not None:
        file.seek(position)
    if not found.durations:
        raise early_end(name)
    return found


def _visit(image: Any, file: TimedFile, name: str) -> Iterator[float]:
    """Frames that only Pillow can count: a TIFF's pages by seeking, an AVIF's times by decoding."""
    known = image.n_frames if image.format == "AVIF" else None
    if known == 1:
        yield 0.0
        return
    if known:
        check_pixels(image.width, image.height, limits.MAX_MOVING_PIXELS, name)
        _check_work(image, known, name)
    count = 0
    while known is None or count < known:
        file.restart()
        try:
            image.seek(count)
        except EOFError:
            break
        if known:
            image.load()
        count += 1
        yield float(image.info.get("duration", 0))
    image.seek(0)


def _check_work(image: Image.Image, total: int, name: str) -> None:
    if image.width * image.height * total > limits.MAX_MOVING_WORK:
        raise refused(
            f"{name} has {total} frames of {image.width}x{image.height}, more than a moving picture may have "
            "here; save it as MP4."
        )


def _scan_gif(file: TimedFile, found: Frames) -> Iterator[float]:
    """The delays of the frames of a GIF whose data is all there."""
    file.seek(10)
    _skip_palette(file, file.read(3)[0])
    delay, strange = 0, 0
    while True:
        kind = file.read(1)
        if kind == b";":
            return
        if kind == b"!":
            label, size = file.read(1), file.read(1)
            if label == b"\xf9" and size == b"\x04":
                delay = struct.unpack_from("<xH", file.read(4))[0]
                size = file.read(1)
            whole = _skip_blocks(file, size)
        elif kind == b",":
            _skip_palette(file, file.read(9)[8])
            file.read(1)
            whole = _skip_blocks(file, file.read(1))
            if whole:
                yield delay * 10.0
            delay = 0
        else:  # what Pillow passes over as well
            strange += 1
            whole = bool(kind) and strange < 1000
        if not whole:
            found.cut = True
            return


def _skip_palette(file: TimedFile, packed: int) -> None:
    if packed & 0x80:
        file.seek(3 << (packed & 7) + 1, 1)


def _skip_blocks(file: TimedFile, size: bytes) -> bool:
    """Go past blocks, each led by its size, to the empty one; False if the file ends before that."""
    while size and size[0]:
        if len(file.read(size[0])) < size[0]:
            return False
        size = file.read(1)
    return bool(size)


def _scan_png(file: TimedFile, found: Frames) -> Iterator[float]:
    """The delays of the frames of an APNG whose rows are all there; one of a still PNG.

    A picture that comes before the first frame's header is for programs that show no movement.
    """
    header: tuple[int, ...] = ()
    stated, there = 0, 0
    missing, inflate, waiting = 0, zlib.decompressobj(), 0.0
    file.seek(8)
    while True:
        head = file.read(8)
        whole = len(head) == 8
        size, kind = struct.unpack(">I4s", head) if whole else (0, b"IEND")
        end = file.tell() + size + 4
        if kind == b"IHDR":
            header = struct.unpack(">IIBBBBB", file.read(13))
        elif kind == b"acTL":
            stated = struct.unpack(">I", file.read(4))[0]
        elif kind == b"IEND" or (kind == b"IDAT" and not stated):
            break
        elif kind == b"IDAT" and not missing:
            found.first = 1
        elif kind == b"fcTL":
            _, width, height, _, _, over, under = struct.unpack(">5I2H", file.read(24))
            missing, inflate = png_bytes(width, height, *header[2:]), zlib.decompressobj()
            waiting = 1000 * over / (under or 100)
        elif kind in (b"IDAT", b"fdAT") and missing:
            skipped = len(file.read(4)) if kind == b"fdAT" else 0
            missing -= inflated(inflate, file, size - skipped, missing)
            if missing <= 0:
                missing = 0
                there += 1
                file.restart()
                if there <= stated:
                    yield waiting
        file.seek(end)
    if not stated:
        yield 0.0
    elif there < stated and whole:
        raise ValueError(f"{there} of its {stated} frames are there")
    found.cut = there < stated


def _scan_webp(file: TimedFile, _: Frames) -> Iterator[float]:
    """The durations of the frames of a WebP."""
    moving = False
    file.seek(12)
    while len(head := file.read(8)) == 8:
        size = struct.unpack("<I", head[4:])[0]
        end = file.tell() + size + size % 2
        if head[:4] == b"ANMF":
            moving = True
            yield float(int.from_bytes(file.read(15)[12:15], "little"))
        file.seek(end)
    if not moving:
        yield 0.0
