"""Video files by PyAV (its own FFmpeg, no external program): counted, timed, then decoded keeping only what
was picked.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import Interpolation
from PIL import Image

from ..errors import MediaError
from . import limits
from .clips import Clip, Pick, Progress, Times, choose, stack
from .files import decoded, decoding, name_of, opened, refused
from .pixels import check_pixels, rgb_from_image

# Containers only: a playlist (HLS, concat, ...) could name other files and addresses.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,ogg,asf,h264,hevc,ivf,"
    "yuv4mpegpipe,mxf,nut"
)
# max_pixels also holds for the frames FFmpeg decodes while it opens a file
READ_OPTIONS = {"format_whitelist": CONTAINERS, "max_pixels": str(limits.MAX_VIDEO_PIXELS)}
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own leave the transparency out
STRANGEST_ASPECT = 8  # a pixel shape beyond this is a damaged header's
LEAST_ASPECT = 1.1  # pixels nearer to square than this stay as the released reader gives them
MOST_STATED_FPS = 1000
UNTURNED = (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
TS_PACKETS = (
    188,
    192,
    204,
)  # bytes of a transport stream's packets; with a time stamp; with error correction


class Stream(NamedTuple):
    """What the packets of a clip say: its frames, their times, and how much of the file is there."""

    total: int
    times: Times | None
    stated: float | None
    note: str | None


def read_video(source: Any, fps: float | None, pick: Pick | None, progress: Progress | None) -> Clip:
    """A video file as a clip; see `media.read_clip`.

    Containers misstate their frames and rates, so packets are counted and timed. Where those lie too (fields,
    frames outside an edit list), the first decoding finds out and a second one works with the true frames.
    """
    name = name_of(source)
    found = _count(source, name, progress)
    total, times = found.total, found.times
    for _ in range(2):
        picks, rate = choose(pick, total, fps, found.stated, times, name)
        frames, shown = _decode(source, picks, total, name, progress)
        if shown is None or len(shown) == total:
            return Clip.of(frames, float(rate), total, found.note)
        total, times = len(shown), _times(shown, [])
    raise MediaError(f"{name} decodes to a different number of frames each time; re-encode it.")


def video_comment(source: Any) -> str | None:
    """The comment in a video file's metadata."""
    with opened_video(source) as container, decoding(name_of(source)):
        return {key.lower(): value for key, value in container.metadata.items()}.get("comment")


@contextmanager
def opened_video(source: Any) -> Iterator[Any]:
    """A video file's container; it is closed again.

    Raises:
        MediaError: missing, damaged, or no video.
    """
    name = name_of(source)
    # As an open file: a name would be searched for a protocol by FFmpeg
    with opened(source, "a video") as file:
        with decoding(name):
            container = av.open(file, "r", options=READ_OPTIONS, metadata_errors="replace")
        try:
            yield container
        finally:
            container.close()


def _count(source: Any, name: str, progress: Progress | None) -> Stream:
    """Read all packets, without decoding."""
    with opened_video(source) as container:
        stream = _stream(container, name)
        times: list[float | None] = []
        lengths: list[float] = []
        written = 0
        begin, end = float("inf"), float("-inf")  # of all streams: sound may go on after the picture
        for packet in decoded(container.demux(), name):
            if not packet.size:
                continue
            at = packet.pts if packet.pts is not None else packet.dts
            unit = packet.time_base
            length = float((packet.duration or 0) * unit) if unit else 0.0
            seconds = float(at * unit) if at is not None and unit else None
            if seconds is not None:
                begin, end = min(begin, seconds), max(end, seconds + length)
            if packet.stream_index != stream.index:
                continue
            written += 1
            if packet.is_discard:
                continue
            times.append(seconds)
            lengths.append(length)
            if len(times) % limits.COUNTED_AT_ONCE == 0:
                if len(times) > limits.MAX_VIDEO_FRAMES:
                    raise refused(f"{name} has more than {limits.MAX_VIDEO_FRAMES:,} frames; cut it first.")
                if progress is not None:
                    progress(0, len(times))
        if "mp4" in container.format.name and written < stream.frames:
            # its table lists every frame that was written
            raise refused(
                f"{name} is cut off after {written} of {stream.frames} frames; copy or download it again."
            )
        stated = float(stream.average_rate or 0)
        declared = (container.duration or 0) / av.time_base
        broken = container.format.name == "mpegts" and all(container.size % size for size in TS_PACKETS)
    read = max(end - begin, 0.0)
    note = _cut(name, declared, read) if times and end >= begin else None
    if broken and not note:
        note = f"{name} is cut off: it ends inside a packet; {read:.1f} seconds were read."
    known = stated if 0 < stated <= MOST_STATED_FPS else None
    return Stream(len(times), _times(times, lengths), known, note)


def _cut(name: str, declared: float, read: float) -> str | None:
    """What to say of a file whose header tells of more seconds than its packets have."""
    if read >= declared - max(0.25, declared / 100):
        return None
    told = f"{name} is cut off: {read:.1f} of {declared:.1f} seconds are there"
    if read < declared / 20:
        raise refused(f"{told}. Copy or download it again.")
    return f"{told} and were read."


def _times(times: list[float | None], lengths: list[float]) -> Times | None:
    """Times in the order in which frames are shown; None where a frame has none."""
    starts = sorted(t for t in times if t is not None)
    if not starts or len(starts) < len(times):
        return None
    gaps = np.diff(starts)
    usual = float(np.median(gaps)) if len(gaps) else 0.0
    # A header's wrong rate makes packets too short as well
    last = max(lengths[times.index(starts[-1])] if lengths else 0.0, usual)
    return Times(starts, starts[-1] + last)


def _stream(container: Any, name: str) -> Any:
    """The video stream to read, within the limits.

    Raises:
        MediaError: none, or its frames are too large.
    """
    streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not streams:
        raise refused(f"{name} has no video stream; expected a clip with pictures.")
    stream = streams[0]
    context = stream.codec_context
    if context is None:
        raise refused(f"{name} has a video stream that FFmpeg here cannot decode; re-encode it as H.264.")
    check_pixels(context.width, context.height, limits.MAX_VIDEO_PIXELS, name)
    return stream


def _decode(
    source: Any, picks: list[int], total: int, name: str, progress: Progress | None
) -> tuple[np.ndarray, list[float | None] | None]:
    """The picked frames, and when every frame is shown; None for the latter when no pick is near the end, so
    that the rest was not decoded.
    """
    shown: list[float | None] = []
    done = False

    def frames(container: Any) -> Iterator[np.ndarray]:
        nonlocal done
        stream = _stream(container, name)
        kept = 0
        matrix: tuple[int, ...] = ()
        for frame in decoded(_frames(container, stream), name):
            if kept < len(picks) and picks[kept] == len(shown):
                with decoding(name):
                    matrix = matrix or _matrix(frame)
                    pixels = _pixels(frame, _aspect(stream), matrix)
                while kept < len(picks) and picks[kept] == len(shown):  # a slow clip shows a frame repeatedly
                    kept += 1
                    yield pixels
            shown.append(frame.time)
            if progress is not None:
                progress(min(len(shown), total), total)
            if kept == len(picks) and picks[-1] < total - 1:
                done = True
                return

    with opened_video(source) as container:
        stacked = stack(frames(container), len(picks), name)
    return stacked, None if done else shown


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Every frame of a stream."""
    context = stream.codec_context
    pixels = context.width * context.height
    other = ALPHA_DECODERS.get(context.name) if stream.metadata.get("alpha_mode") == "1" else None
    if other in av.codecs_available:
        context = av.CodecContext.create(other, "r")
    context.thread_count = next((threads for limit, threads in limits.THREADS if pixels <= limit), 1)
    context.thread_type = "AUTO"
    context.options = {"max_pixels": str(limits.MAX_VIDEO_PIXELS)}
    for packet in container.demux(stream):
        if packet.size or packet.dts is None:
            yield from context.decode(packet if packet.size else None)


def _aspect(stream: Any) -> Fraction:
    """Width of a pixel over its height; 1 where that is nearly so, or nonsense."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    distortion = max(aspect, 1 / aspect) if aspect > 0 else 1
    return aspect if LEAST_ASPECT < distortion <= STRANGEST_ASPECT else Fraction(1)


def _matrix(frame: Any) -> tuple[int, ...]:
    """A frame's display matrix, which turns and mirrors it.

    Asked of one frame of a clip only: PyAV makes a frame and its side data refer to each other, which keeps
    their memory until Python's next search for such cycles.
    """
    found = frame.side_data.get(SideData.DISPLAYMATRIX)
    return struct.unpack("=9i", bytes(found)) if found is not None else UNTURNED


def _pixels(frame: Any, aspect: Fraction, matrix: tuple[int, ...]) -> np.ndarray:
    """A decoded frame as upright uint8 [H, W, 3], with square pixels and transparency on white."""
    alpha = frame.format.has_palette or any(c.is_alpha for c in frame.format.components)
    size = {} if aspect == 1 else {"width": max(round(frame.width * aspect), 1), "height": frame.height}
    levels = frame.to_ndarray(
        format="rgba" if alpha else "rgb24", interpolation=Interpolation.BICUBIC, **size
    )
    return _turned(rgb_from_image(Image.fromarray(levels)) if alpha else levels, matrix)


def _turned(pixels: np.ndarray, matrix: tuple[int, ...]) -> np.ndarray:
    """A frame as its display matrix (rows a b u, c d v, x y w) shows it: x' = a x + c y, y' = b x + d y.

    The signs of the larger pair say which of the eight turns and mirrors it is.
    """
    a, b, _, c, d = matrix[:5]
    if abs(a) + abs(d) >= abs(b) + abs(c):
        across, down = a, d
    else:
        pixels = pixels.transpose(1, 0, 2)
        across, down = c, b
    if across < 0:
        pixels = pixels[:, ::-1]
    if down < 0:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
