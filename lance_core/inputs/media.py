"""Images and clips from files and memory as 8-bit RGB arrays, and results back to files with their settings
inside.

The only module that opens picture or video files: Pillow for images, PyAV (its own FFmpeg, no external
program) for video. What the models make of the frames is preprocess.py's. A frame is uint8 [height, width,
3].
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..config import OUTPUT_FPS
from ..errors import MediaError, RequestError
from .preprocess import frame_indices, rgb_from_array, rgb_from_image

MAX_PIXELS = 400_000_000  # of one picture: 20,000 x 20,000, 1.2 GB as RGB
MAX_CLIP_BYTES = 8 << 30  # of the frames kept of one clip
ASSUMED_FPS = 24.0  # of a file that does not say; the released code's assumption
METADATA_KEY = "lance"
EXIF_DESCRIPTION = 0x010E
IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
VIDEO_FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
PICTURE_SUFFIXES = {*IMAGE_FORMATS, ".apng", ".bmp", ".gif", ".tif", ".tiff"}  # Pillow's, moving ones too
# Containers only: a playlist (HLS, concat, ...) could name other files and addresses.
READ_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,ogg,asf,h264,hevc,ivf,y4m"
}
ROTATIONS = {0: 0, 90: 1, -90: -1, 180: 2, -180: 2}  # degrees counter-clockwise -> quarter turns of np.rot90

Pick = Callable[[int, float], list[int]]
Progress = Callable[[int, int], None]
_bomb_lock = threading.Lock()


def load_image(source: Any) -> np.ndarray:
    """One picture as uint8 [H, W, 3]: upright, transparency on white.

    Args:
        source: a path, a binary file, a PIL image, or an array or tensor [H, W], [H, W, 1 | 3 | 4] or [1, H,
            W, 3] with floats in 0..1 (clamped), uint8 or uint16 over their whole range, or booleans.

    Raises:
        MediaError: missing, damaged, too large, NaN, or of a shape that is no picture.
    """
    if isinstance(source, Image.Image):
        return rgb_from_image(source)
    if isinstance(source, np.ndarray | Tensor):
        return rgb_from_array(source)
    with _open_picture(source) as image:
        return rgb_from_image(image, _name(source))


def read_clip(
    source: Any, fps: float | None = None, pick: Pick = frame_indices, progress: Progress | None = None
) -> tuple[np.ndarray, float, int]:
    """The frames of a clip that the model sees; the others are never held in memory.

    Args:
        source: a path or binary file (video, or moving GIF, WebP, PNG), a list of pictures, an array or
            tensor [T, H, W, C] (see `load_image`), or a pair (array or list, fps).
        fps: frames per second, overriding the file's; a list or an array without it plays at 12, as results
            of ours do.
        pick: (frames in all, fps) -> increasing frame numbers.
        progress: (frames decoded, frames in all) of a video file; raise in it to stop.

    Returns: picked frames uint8 [n, H, W, 3], frames per second, frames in all.

    Raises:
        MediaError: missing, damaged, without picture, or too large.
    """
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], Real):
        source, fps = source[0], fps or source[1]
    if isinstance(source, np.ndarray | Tensor | list | tuple):
        return _read_memory(source, fps, pick)
    if _is_picture(source):
        return _read_moving_picture(source, fps, pick)
    return _read_video(source, fps, pick, progress)


def load_video(source: Any, fps: float | None = None) -> tuple[np.ndarray, float]:
    """Every frame of a short clip, uint8 [n, H, W, 3], and its frames per second; see `read_clip`."""
    frames, rate, _ = read_clip(source, fps, lambda total, _: list(range(total)))
    return frames, rate


def save_image(path: str | Path, frame: Any, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a picture (anything `load_image` takes) with `metadata` inside, as JSON; whole or not at all.

    Raises:
        RequestError: unknown extension, or metadata that is not JSON.
        MediaError: a frame that is no picture, or the file cannot be written.
    """
    path = Path(path)
    image = Image.fromarray(load_image(frame))
    kind = _format(path, IMAGE_FORMATS, "image")
    text = _to_json(metadata)
    options: dict[str, Any] = {} if kind == "PNG" else {"quality": 95}
    if text is not None and kind == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text(METADATA_KEY, text)
    elif text is not None:
        options["exif"] = Image.Exif()
        options["exif"][EXIF_DESCRIPTION] = _wrap(text)
        if len(text) > 60_000:
            raise RequestError(
                f"{len(text)} characters of metadata do not fit into a {kind} file; save as .png instead."
            )
    with _replacing(path) as temporary:
        image.save(temporary, format=kind, **options)
    return path


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
    kind = _format(path, VIDEO_FORMATS, "video")
    if not (isinstance(fps, Real) and 0 < fps <= 1000):
        raise RequestError(f"fps is {fps!r}; expected a number above 0, at most 1000.")
    text = _to_json(metadata)
    options = (
        {} if kind == "matroska" else {"movflags": "+faststart"}
    )  # the index first, so that browsers play while loading
    with (
        _replacing(path) as temporary,
        av.open(str(temporary), "w", format=kind, options=options) as container,
    ):
        if text is not None:
            container.metadata["comment"] = _wrap(text)
        stream, first = None, None
        for frame in frames:
            pixels = load_image(frame)
            if stream is None:
                first, stream = (
                    pixels.shape,
                    _video_stream(container, pixels.shape, Fraction(fps).limit_denominator(1001)),
                )
            if pixels.shape != first:
                raise MediaError(
                    f"a frame of {_wxh(pixels)} came after one of {first[1]}x{first[0]}; resize them to one "
                    "size first."
                )
            if pixels.shape[0] % 2 or pixels.shape[1] % 2:
                pixels = np.pad(
                    pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), mode="edge"
                )
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            picture = picture.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, interpolation=Interpolation.BICUBIC
            )
            container.mux(stream.encode(picture))
        if stream is None:
            raise MediaError(f"no frames came for {path}; at least one is needed.")
        container.mux(stream.encode())
    return path


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """What `save_image` or `save_video` stored in a file; None where there is none of ours.

    Raises:
        MediaError: the file is missing or unreadable.
    """
    if _is_picture(path):
        with _open_picture(path) as image:
            found = image.info.get(METADATA_KEY)
            return _from_json(found) if found is not None else _unwrap(image.getexif().get(EXIF_DESCRIPTION))
    with _open_video(path) as container:
        tags = {key.lower(): value for key, value in container.metadata.items()}
    return _unwrap(tags.get("comment"))


def _is_picture(source: Any) -> bool:
    return isinstance(source, str | os.PathLike) and Path(source).suffix.lower() in PICTURE_SUFFIXES


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else "the file given"


def _wxh(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def _existing(source: Any, what: str) -> Any:
    """A path or binary file, ready to open."""
    if hasattr(source, "read"):
        return source
    if not isinstance(source, str | os.PathLike):
        raise MediaError(
            f"a {type(source).__name__} came; expected a path, a binary file, an array or PIL pictures "
            f"({what})."
        )
    if not Path(source).is_file():
        raise MediaError(f"{source} does not exist or is no file; expected {what}. Check the path.")
    return Path(source).resolve()


@contextmanager
def _open_picture(source: Any) -> Iterator[Image.Image]:
    """A picture opened lazily and closed again; whatever its decoder raises is a MediaError."""
    file = _existing(source, "an image")
    try:
        # Pillow's limit is a module global below ours: lifted for reading the header only, then ours decides
        with _bomb_lock:
            theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(file)
            finally:
                Image.MAX_IMAGE_PIXELS = theirs
    except Exception as error:  # Pillow's plugins raise whatever a damaged file makes them stumble over
        raise _damaged(source, error) from error
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise MediaError(
                f"{_name(source)} has {image.width}x{image.height} pixels, more than {MAX_PIXELS:,}; scale "
                "it down first "
                "(the models work below 1,200 pixels a side)."
            )
        yield image


def _damaged(source: Any, error: Exception) -> MediaError:
    return MediaError(
        f"{_name(source)} cannot be read ({type(error).__name__}: {error}); expected a whole PNG, JPEG, "
        "WebP, ... "
        "or MP4, WebM, ... file. Open it in a viewer, and save or download it again."
    )


def _choose(pick: Pick, total: int, fps: float, name: str) -> list[int]:
    if total < 1:
        raise MediaError(f"{name} holds no frames; expected a clip of at least one.")
    picks = list(pick(total, fps))
    if not picks or picks != sorted(picks) or picks[0] < 0 or picks[-1] >= total:
        raise RequestError(
            f"frames {picks} were asked of {total} in {name}; expected increasing numbers from 0 to "
            f"{total - 1}."
        )
    return picks


def _stack(frames: Iterable[np.ndarray], count: int, name: str) -> np.ndarray:
    """Frames of one size in one array, allocated once."""
    out = None
    for i, frame in enumerate(frames):
        if out is None:
            if count * frame.nbytes > MAX_CLIP_BYTES:
                raise MediaError(
                    f"{count} frames of {_wxh(frame)} from {name} take {count * frame.nbytes >> 20:,} MiB, "
                    "more than "
                    f"{MAX_CLIP_BYTES >> 20:,}; shorten the clip or scale it down."
                )
            out = np.empty((count, *frame.shape), np.uint8)
        if frame.shape != out.shape[1:]:
            raise MediaError(
                f"{name} changes size from {_wxh(out[0])} to {_wxh(frame)}; re-encode it at one size."
            )
        out[i] = frame
    return out


def _read_memory(frames: Any, fps: float | None, pick: Pick) -> tuple[np.ndarray, float, int]:
    fps = OUTPUT_FPS if fps is None else fps
    if isinstance(frames, np.ndarray | Tensor) and frames.ndim != 4:
        raise MediaError(
            f"an array of shape {list(frames.shape)} came; expected a clip [frames, height, width, 3]."
        )
    picks = _choose(pick, len(frames), fps, "the clip given")
    return (
        _stack((load_image(frames[i]) for i in picks), len(picks), "the clip given"),
        float(fps),
        len(frames),
    )


def _read_moving_picture(source: Any, fps: float | None, pick: Pick) -> tuple[np.ndarray, float, int]:
    """GIF, WebP and PNG, which Pillow composes (transparency, partial frames) and FFmpeg reads only in part."""
    name = _name(source)
    with _open_picture(source) as image:
        total = getattr(image, "n_frames", 1)
        if fps is None:  # the file gives each frame's duration in milliseconds
            duration = 0.0
            for i in range(total if total > 1 else 0):
                _seek(image, i, name)
                image.load()
                duration += float(image.info.get("duration", 0))
            fps = total * 1000 / duration if duration > 0 else ASSUMED_FPS
        picks = _choose(pick, total, fps, name)

        def frames() -> Iterator[np.ndarray]:
            for i in picks:
                _seek(image, i, name)
                yield rgb_from_image(image, name)

        return _stack(frames(), len(picks), name), float(fps), total


def _seek(image: Image.Image, i: int, name: str) -> None:
    try:
        image.seek(i)
    except Exception as error:  # as in _open_picture
        raise _damaged(name, error) from error


@contextmanager
def _open_video(source: Any) -> Iterator[Any]:
    file = _existing(source, "a video")
    handle = (
        file.open("rb") if isinstance(file, Path) else file
    )  # a name would be searched for a protocol by FFmpeg
    try:
        handle.seek(0)
        with av.open(handle, "r", options=READ_OPTIONS, metadata_errors="replace") as container:
            yield container
    except (av.FFmpegError, OSError) as error:
        raise _damaged(source, error) from error
    finally:
        if handle is not file:
            handle.close()


def _read_video(
    source: Any, fps: float | None, pick: Pick, progress: Progress | None
) -> tuple[np.ndarray, float, int]:
    """Count, then decode keeping only what was picked.

    Containers misstate their frames, so packets are counted; where those lie too (fields, frames outside an
    edit list), the first decoding finds out and a second one works with the true number.
    """
    name = _name(source)
    with _open_video(source) as container:
        if not container.streams.video:
            raise MediaError(f"{name} has no video stream; expected a clip with pictures.")
        stream = container.streams.video[0]
        rate = fps or float(stream.average_rate or 0) or ASSUMED_FPS
        packets = [not packet.is_discard for packet in container.demux(stream) if packet.size]
        if (
            "mp4" in container.format.name and len(packets) < stream.frames
        ):  # its table lists every frame that was written
            raise MediaError(
                f"{name} is cut off after {len(packets)} of {stream.frames} frames; copy or download it "
                "again."
            )
        total = sum(packets)
    for _ in range(2):
        picks = _choose(pick, total, rate, name)
        frames, seen = _decode(source, picks, total, name, progress)
        if seen == total:
            return frames, rate, total
        total = seen
    raise MediaError(f"{name} decodes to a different number of frames each time; re-encode it.")


def _decode(
    source: Any, picks: list[int], total: int, name: str, progress: Progress | None
) -> tuple[np.ndarray | None, int]:
    """The picked frames, and how many there are in truth (`total` is believed when no pick is near the end)."""
    seen, kept = 0, 0

    def frames(container: Any) -> Iterator[np.ndarray]:
        nonlocal seen, kept
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            if kept < len(picks) and picks[kept] == seen:
                pixels = _pixels(frame)
                while kept < len(picks) and picks[kept] == seen:  # a slow clip shows a frame more than once
                    kept += 1
                    yield pixels
            seen += 1
            if progress is not None:
                progress(min(seen, total), total)
            if kept == len(picks) and picks[-1] < total - 1:
                seen = total
                return

    with _open_video(source) as container:
        stacked = _stack(frames(container), len(picks), name)
    return stacked, seen


def _pixels(frame: Any) -> np.ndarray:
    """A decoded frame as upright uint8 [H, W, 3]."""
    turns = ROTATIONS.get(frame.rotation, 0)
    return np.rot90(frame.to_ndarray(format="rgb24", interpolation=Interpolation.BICUBIC), turns)


def _video_stream(container: Any, shape: tuple[int, ...], rate: Fraction) -> Any:
    h264 = "libx264" in av.codecs_available  # some builds of FFmpeg leave it out
    stream = container.add_stream("libx264" if h264 else "mpeg4", rate=rate)
    stream.height, stream.width = shape[0] + shape[0] % 2, shape[1] + shape[1] % 2
    stream.pix_fmt = "yuv420p"
    if h264:
        stream.options = {"crf": "17", "preset": "medium"}
    else:
        stream.bit_rate = max(int(stream.width * stream.height * rate / 2), 400_000)
    context = stream.codec_context  # say BT.709, so that players do not guess by size
    context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
    return stream


def _format(path: Path, known: Mapping[str, str], what: str) -> str:
    kind = known.get(path.suffix.lower())
    if kind is None:
        raise RequestError(
            f"{path} has extension {path.suffix!r}; a {what} can be saved as {', '.join(known)}."
        )
    return kind


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when all went well and is gone otherwise."""
    temporary = path.absolute().with_name(f".{uuid.uuid4().hex}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, av.FFmpegError) as error:
        raise MediaError(
            f"{path} cannot be written ({error}); check that its folder exists and has space."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _to_json(metadata: Mapping[str, Any] | None) -> str | None:
    if metadata is None:
        return None
    try:
        return json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"metadata cannot be written as JSON ({error}); expected strings, finite numbers, lists, objects."
        ) from error


def _from_json(text: Any) -> dict[str, Any] | None:
    try:
        data = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _wrap(text: str) -> str:
    """Our JSON under our name, for fields that other programs write too."""
    return f'{{"{METADATA_KEY}": {text}}}'


def _unwrap(text: Any) -> dict[str, Any] | None:
    inner = (_from_json(text) or {}).get(METADATA_KEY)
    return inner if isinstance(inner, dict) else None
