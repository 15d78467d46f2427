"""Clips written as H.264 by PyAV: the same frames give the same file, which appears whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation

from ..errors import MediaError, RequestError
from . import embedded
from .files import name_of, refused, replacing
from .images import load_image

VIDEO_FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
# x264's macroblock tree reads past the end of its rows where it uses AVX-512 and a row is no multiple of 8
# macroblocks, so one clip gave several files. The number of threads changes the file too: it is fixed.
H264_OPTIONS = {"crf": "17", "preset": "medium", "x264-params": "mbtree=0", "threads": "4"}
MAX_FPS = 1000


def save_video(
    path: str | Path, frames: Iterable[Any], fps: float, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write frames (pictures of one size, taken one at a time) as H.264, with `metadata` inside; whole or not
    at all.

    Odd sizes gain a row or column that repeats the last: the usual pixel format has colour per 2x2 pixels.

    Raises:
        RequestError: unknown extension, bad fps, or metadata that is not JSON.
        MediaError: no frames, frames of several sizes, or the file cannot be written.
    """
    path = Path(path)
    kind = embedded.known_format(path, VIDEO_FORMATS, "video")
    if not (isinstance(fps, Real) and 0 < fps <= MAX_FPS):
        raise RequestError(f"fps is {str(fps)[:50]!r}; expected a number above 0, at most {MAX_FPS}.")
    text = embedded.to_json(metadata)
    # Without the date and the random number that Matroska would store
    options = {"fflags": "+bitexact"}
    if kind != "matroska":
        options["movflags"] = "+faststart"  # the index first, so that browsers play while loading
    with replacing(path) as temporary:
        try:
            with av.open(str(temporary), "w", format=kind, options=options) as container:
                if text is not None:
                    container.metadata["comment"] = embedded.wrap(text)
                _encode(container, frames, Fraction(fps).limit_denominator(1001), name_of(path))
        except av.FFmpegError as error:
            raise refused(
                f"{name_of(path)} cannot be written ({str(error)[:150]}); check that its folder exists and "
                "has space."
            ) from error
    return path


def _encode(container: Any, frames: Iterable[Any], rate: Fraction, name: str) -> None:
    stream, first = None, (0, 0, 0)
    for frame in frames:
        pixels = load_image(frame)
        height, width, _ = pixels.shape
        if stream is None:
            first, stream = pixels.shape, _stream(container, height, width, rate)
        if pixels.shape != first:
            raise MediaError(
                f"a frame of {width}x{height} came after one of {first[1]}x{first[0]}; resize them to one "
                "size first."
            )
        if height % 2 or width % 2:
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        picture = picture.reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, interpolation=Interpolation.BICUBIC
        )
        container.mux(stream.encode(picture))
    if stream is None:
        raise MediaError(f"no frames came for {name}; at least one is needed.")
    container.mux(stream.encode())


def _stream(container: Any, height: int, width: int, rate: Fraction) -> Any:
    h264 = "libx264" in av.codecs_available  # some builds of FFmpeg leave it out
    stream = container.add_stream("libx264" if h264 else "mpeg4", rate=rate)
    stream.height, stream.width = height + height % 2, width + width % 2
    stream.pix_fmt = "yuv420p"
    if h264:
        stream.options = dict(H264_OPTIONS)
    else:
        stream.bit_rate = max(int(stream.width * stream.height * rate / 2), 400_000)
    context = stream.codec_context  # say BT.709, so that players do not guess by size
    context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
    return stream
