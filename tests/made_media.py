"""Small pictures and clips made for a test: moving gradients in any container, GIFs and PNGs byte by byte."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest


def every(total: int, fps: float) -> list[int]:
    """The pick of all frames."""
    return list(range(total))


def numbered(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames whose blue tells their number, on a gradient across and down: uint8 [count, h, w, 3]."""
    t, y, x = np.mgrid[:count, :height, :width].astype(float)
    clip = np.stack([x / width, y / height, t / max(count - 1, 1)], axis=-1)
    return np.rint(clip * 255).astype(np.uint8)


def number(frame: np.ndarray, count: int) -> int:
    """Which frame of `numbered` this is."""
    return round(float(frame[..., 2].mean()) / 255 * (count - 1))


def video(
    path: Path,
    frames: Iterable[np.ndarray],
    times: Iterable[int],
    unit: Fraction = Fraction(1, 1000),
    codec: str = "libx264",
    kind: str | None = None,
    pixels: str = "yuv420p",
    rate: int = 24,
    aspect: Fraction | None = None,
    **options: str,
) -> Path:
    """Write frames (RGB or RGBA) at times in `unit`; `rate` is what the header claims."""
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    with av.open(str(path), "w", format=kind) as container:
        stream: Any = None
        for frame, time in zip(frames, times, strict=False):
            if stream is None:
                stream = container.add_stream(codec, rate=rate, options=options)
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = pixels
                stream.time_base = stream.codec_context.time_base = unit
                if aspect:
                    stream.codec_context.sample_aspect_ratio = aspect
            shape = "rgba" if frame.shape[2] == 4 else "rgb24"
            picture = av.VideoFrame.from_ndarray(frame, format=shape).reformat(format=pixels)
            picture.pts, picture.time_base = int(time), unit
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def gif(path: Path, count: int, width: int = 8, height: int = 8, delay: int = 4, cut: int = 0) -> Path:
    """A GIF of frames that change one pixel, `delay` hundredths of a second each."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes([0, 0, 0, 255, 255, 255])
    control = b"!\xf9\x04\x04" + struct.pack("<H", delay) + b"\0\0"
    frame = control + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    data = head + frame * count + b";"
    path.write_bytes(data[: len(data) - cut])
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    path: Path,
    width: int,
    height: int,
    rows: int,
    colour: int = 2,
    bits: int = 8,
    interlaced: int = 0,
    level: int = 255,
) -> Path:
    """A PNG whose header promises `height` rows and whose data has `rows`, of one level."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    row = b"\0" + bytes([level]) * ((width * channels * bits + 7) // 8)
    squeeze = zlib.compressobj(1)
    data = b"".join(squeeze.compress(row) for _ in range(rows)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
    return path
