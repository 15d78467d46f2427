"""Picture files: opened by Pillow within the limits, read whole or refused, and written with settings."""

from __future__ import annotations

import struct
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import av
import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..errors import MediaError, RequestError
from . import embedded, limits
from .files import (
    damaged,
    decoding,
    early_end,
    name_of,
    opened,
    picture_format,
    refused,
    replacing,
)
from .pixels import check_pixels, rgb_from_array, rgb_from_image

IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# What Pillow may open. Not EPS, WMF and others that start programs, nor containers of further pictures.
PILLOW_FORMATS = ["PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "QOI", "TGA"]
JPEG_FILL = 128  # the level libjpeg gives to blocks whose data is missing
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> samples a pixel

_pillow_lock = threading.Lock()


def load_image(source: Any) -> np.ndarray:
    """One picture as uint8 [H, W, 3]: upright, transparency on white. Of a moving picture, the first frame.

    A JPEG of more than `limits.MAX_PIXELS` is decoded at half its size.

    Args:
        source: a path, bytes, a binary file, a PIL image, or an array or tensor [H, W], [H, W, 1..4] or
            [1, H, W, 1..4] with floats (see `pixels.pictures`), uint8 or uint16 over their whole range, or
            booleans.

    Raises:
        MediaError: missing, damaged, cut off, too large, NaN, or of a shape that is no picture.
    """
    if isinstance(source, Image.Image):
        return rgb_from_image(source)
    if isinstance(source, np.ndarray | Tensor):
        return rgb_from_array(source)
    with opened_picture(source) as (image, file):
        reduce_jpeg(image, name_of(source))
        load_whole(image, file, name_of(source))
        return rgb_from_image(image, name_of(source))


def save_image(path: str | Path, frame: Any, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a picture (anything `load_image` takes) with metadata inside, as JSON; whole or not at all.

    Raises:
        RequestError: unknown extension, or metadata that is not JSON.
        MediaError: a frame that is no picture, or the file cannot be written.
    """
    path = Path(path)
    image = Image.fromarray(load_image(frame))
    kind = embedded.known_format(path, IMAGE_FORMATS, "image")
    text = embedded.to_json(metadata)
    options: dict[str, Any] = {} if kind == "PNG" else {"quality": 95}
    if text is not None and kind == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text(embedded.KEY, text)
    elif text is not None:
        if len(text) > embedded.MAX_EXIF:
            raise RequestError(
                f"{len(text)} characters of metadata do not fit into a {kind} file; save as .png instead."
            )
        options["exif"] = Image.Exif()
        options["exif"][embedded.EXIF_DESCRIPTION] = embedded.wrap(text)
    with replacing(path) as temporary:
        image.save(temporary, format=kind, **options)
    return path


def picture_metadata(source: Any) -> dict[str, Any] | None:
    """What `save_image` stored in a picture file; None where there is none of ours."""
    with opened_picture(source) as (image, _), decoding(name_of(source)):
        found = image.info.get(embedded.KEY)
        if found is not None:
            return embedded.from_json(found)
        return embedded.unwrap(image.getexif().get(embedded.EXIF_DESCRIPTION))


class TimedFile:
    """A binary file that decoders read from, until they have used up their processor time.

    A progressive JPEG of a thousand scans is small and decodes for minutes. Only what Pillow asks for is
    here: no descriptor, which would let libtiff read past this.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file = file
        self.name = name
        self.restart()

    def restart(self) -> None:
        """Count from now on; a moving picture gets its time for every frame."""
        self.until = time.thread_time() + limits.MAX_DECODE_SECONDS

    def read(self, size: int = -1) -> bytes:
        """Read, or stop a decoder that has taken too long."""
        if time.thread_time() > self.until:
            raise refused(
                f"{self.name} takes more than {limits.MAX_DECODE_SECONDS:g} seconds to decode; open it in a "
                "viewer and save it again."
            )
        return self.file.read(size)

    def readline(self, size: int = -1) -> bytes:
        """One line, as text headers have them."""
        return self.file.readline(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move as in the file."""
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        """Where the file is."""
        return self.file.tell()


@contextmanager
def opened_picture(source: Any) -> Iterator[tuple[Image.Image, TimedFile]]:
    """A picture whose header is read, and its file; both are closed again. Nothing is decoded yet.

    Raises:
        MediaError: missing, or not a picture of a format in `PILLOW_FORMATS`.
    """
    name = name_of(source)
    with opened(source, "an image") as plain:
        kind = picture_format(plain)
        if kind == "HEIC":
            raise refused(f"{name} is a HEIC picture, which cannot be read here; save it as JPEG or PNG.")
        file = TimedFile(plain, name)
        image = _open(file, name, kind)
        with image:
            yield image, file


def _open(file: TimedFile, name: str, kind: str | None) -> Image.Image:
    Image.init()
    formats = [f for f in PILLOW_FORMATS if f in Image.OPEN]
    try:
        # Pillow's own limit would refuse JPEGs that are read at half size: lifted for the header only
        with _pillow_lock:
            theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return Image.open(cast(Any, file), formats=formats)
            finally:
                Image.MAX_IMAGE_PIXELS = theirs
    except MediaError:
        raise
    except Image.UnidentifiedImageError as error:
        if kind in formats:  # the first bytes are right
            raise damaged(name, ValueError(f"its {kind} header makes no sense")) from error
        known = ", ".join(formats)
        raise refused(
            f"{name} cannot be read: it is no picture of a format that is expected here ({known}). If it is "
            "a video, give it as a clip; else open it in a viewer and save it again."
        ) from error
    except Exception as error:  # Pillow's plugins raise whatever a damaged file makes them stumble over
        raise damaged(name, error) from error


def reduce_jpeg(image: Image.Image, name: str) -> None:
    """Refuse a picture of too many pixels before anything is decoded; a JPEG is set to half size instead.

    Raises:
        MediaError: it has too many.
    """
    limit = limits.MAX_JPEG2000_PIXELS if image.format == "JPEG2000" else limits.MAX_PIXELS
    too_large = image.width * image.height > limit
    # A progressive JPEG is held whole in memory while it is decoded, at any size
    if too_large and isinstance(image, JpegImageFile) and not image.info.get("progressive"):
        check_pixels(image.width, image.height, limits.MAX_JPEG_PIXELS, name)
        with decoding(name):
            image.draft(image.mode, ((image.width + 1) // 2, (image.height + 1) // 2))
    check_pixels(image.width, image.height, limit, name)


def load_whole(image: Image.Image, file: TimedFile, name: str) -> None:
    """Decode a picture, and refuse one whose data ends before its last row.

    Raises:
        MediaError: damaged, or it ends early.
    """
    file.restart()
    tiles = list(getattr(image, "tile", ()))
    with decoding(name):
        if ImageFile.LOAD_TRUNCATED_IMAGES:  # other programs' wish; here missing rows are an error
            with _pillow_lock:
                ImageFile.LOAD_TRUNCATED_IMAGES = False
                try:
                    image.load()
                finally:
                    ImageFile.LOAD_TRUNCATED_IMAGES = True
        else:
            image.load()
        early = (
            (image.format == "TIFF" and not _covered(tiles, image))
            or (image.format == "PNG" and _ends_blank(image) and not _png_is_whole(file))
            or (isinstance(image, JpegImageFile) and _ends_grey(image) and not _jpeg_is_whole(file))
        )
    if early:
        raise early_end(name)


def _covered(tiles: list[Any], image: Image.Image) -> bool:
    """Whether the strips of a TIFF reach over the whole picture; libtiff's one tile always does."""
    boxes = {tuple(tile[1]) for tile in tiles}
    return not boxes or sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes) >= image.width * image.height


def _ends_blank(image: Image.Image) -> bool:
    """Whether one of the last two rows is all 0, as rows are that were never decoded (two: interlacing)."""
    rows = [image.crop((0, y, image.width, y + 1)) for y in range(max(image.height - 2, 0), image.height)]
    return any(not np.asarray(row).any() for row in rows)


def _png_is_whole(file: TimedFile) -> bool:
    """Whether the compressed rows of a PNG are as many as its header says."""
    position = file.tell()
    file.seek(8)
    inflate, found, wanted = zlib.decompressobj(), 0, None
    while found < (wanted or 1):
        head = file.read(8)
        if len(head) < 8:
            break
        size, kind = struct.unpack(">I4s", head)
        if kind == b"IHDR":
            wanted = png_bytes(*struct.unpack(">IIBBBBB", file.read(13)))
            file.seek(4, 1)
        elif kind == b"IDAT":
            found += inflated(inflate, file, size, (wanted or 1) - found)
            file.seek(4, 1)
        else:
            file.seek(size + 4, 1)
    file.seek(position)
    return wanted is not None and found >= wanted


def inflated(inflate: Any, file: TimedFile, size: int, enough: int) -> int:
    """How many bytes the next `size` bytes of a compressed stream hold, counting up to `enough`."""
    found = 0
    while size > 0:
        data = file.read(min(size, 1 << 16))
        if not data:
            break
        size -= len(data)
        while data and found < enough and not inflate.eof:
            found += len(inflate.decompress(data, 1 << 20))
            data = inflate.unconsumed_tail
    return found


def png_bytes(width: int, height: int, bits: int, colour: int, _: int, __: int, interlaced: int) -> int:
    """Bytes of a PNG's rows before compression, each with its filter byte; arguments as IHDR has them."""

    def rows(w: int, h: int) -> int:
        return h * ((w * bits * PNG_CHANNELS.get(colour, 1) + 7) // 8 + 1) if w and h else 0

    if not interlaced:
        return rows(width, height)
    return sum(rows(-((x - width) // dx), -((y - height) // dy)) for x, y, dx, dy in ADAM7)


def _ends_grey(image: Image.Image) -> bool:
    """Whether the last corner has the one level that libjpeg fills in where data is missing."""
    corner = image.crop((max(image.width - 4, 0), max(image.height - 4, 0), image.width, image.height))
    return bool((np.asarray(corner.convert("RGB")) == JPEG_FILL).all()) or image.mode == "CMYK"


def _jpeg_is_whole(file: TimedFile) -> bool:
    """Whether FFmpeg, told to forgive nothing, finds data for every block of a JPEG; libjpeg only warns.

    What FFmpeg has no decoder for counts as whole.
    """
    position = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(position)
    context = av.CodecContext.create("mjpeg", "r")
    context.options = {"err_detect": "explode", "max_pixels": str(limits.MAX_JPEG_PIXELS)}
    context.thread_count = 1
    try:
        return bool([*context.decode(av.Packet(data)), *context.decode(None)])
    except av.error.PatchWelcomeError:
        return True
    except av.FFmpegError:
        return False
