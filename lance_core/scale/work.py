"""One worker's part: a model, rows one after another, the next one's media read while one is drawn."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import OUTPUT_FPS
from ..errors import LanceError, MediaError
from ..files import written
from .results import Line, StorageFullError, key_of, line_of, made_line, place, storage_error
from .rows import Row

if TYPE_CHECKING:
    from ..pipeline import Lance

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Where results go, and how a model is opened. All of it is JSON."""

    folder: str
    device: str = "cpu"
    dtype: str = "bfloat16"
    vit: str | None = None
    vae: str | None = None
    compile: bool = False
    overlap: bool = False


@dataclass(frozen=True)
class Read:
    """A row with its media in memory, or with what is wrong with them."""

    row: Row
    key: str
    media: Any = None
    error: LanceError | None = None


def open_lance(checkpoint: str, settings: Settings) -> Lance:
    """The checkpoint, opened as the settings say."""
    import torch

    from ..pipeline import load

    options = {name: getattr(settings, name) for name in ("vit", "vae", "compile", "overlap")}
    return load(checkpoint, settings.device, getattr(torch, settings.dtype), **options)


class Session:
    """Draws rows. The model stays loaded until a row of another checkpoint comes.

    opener: opens a checkpoint, for tests.
    """

    def __init__(self, settings: Settings, opener: Callable[[str, Settings], Lance] = open_lance) -> None:
        self.settings, self._open = settings, opener
        self.folder = Path(settings.folder)
        self._checkpoint: str | None = None
        self._lance: Any = None

    def lance(self, checkpoint: str) -> Lance:
        """The opened checkpoint; one at a time."""
        if checkpoint != self._checkpoint:
            self._lance = self._checkpoint = None
            self._lance = self._open(checkpoint, self.settings)
            self._checkpoint = checkpoint
        return self._lance

    def read(self, row: Row) -> Read:
        """A row's media, decoded as the model will see them."""
        from ..inputs import media

        key = key_of(row)
        try:
            if row.kind.takes == "video":
                # Played at 12 a second, the frames picked now are the ones that would be picked again
                return Read(row, key, (media.read_clip(row.media).frames, float(OUTPUT_FPS)))
            pictures = [media.load_image(path) for path in row.paths]
        except Exception as error:
            if not isinstance(error, LanceError):
                _log.warning("the media of row %s", row.id, exc_info=error)
                error = MediaError(f"its media cannot be read ({type(error).__name__}: {str(error)[:150]})")
            return Read(row, key, error=error)
        one = row.kind.takes == "image"
        return Read(row, key, pictures[0] if one else pictures or None)

    def draw(self, read: Read) -> Line:
        """Make a row's results and write them; returns its line, an error's when the row is at fault.

        Raises:
            StorageFullError: the output takes nothing more.
        """
        began = time.perf_counter()
        row = read.row
        try:
            if read.error is not None:
                raise read.error
            about = self._answer(read) if row.kind.output == "text" else self._generate(read)
        except Exception as error:
            told = storage_error(error) if read.error is None else None
            if told is not None:
                raise StorageFullError.of(self.folder, told) from error
            if not isinstance(error, LanceError):
                if "CUDA error" in str(error):  # the device is lost to this process
                    raise
                _log.warning("row %s failed", row.id, exc_info=error)
            message = str(error) if isinstance(error, LanceError) else f"{type(error).__name__}: {error}"
            return line_of(row.id, row.task, read.key, error=message[:500], seconds=_since(began))
        return made_line(row, read.key, self.folder, about, _since(began))

    def _about(self, read: Read) -> dict[str, Any]:
        names = [Path(path).name for path in read.row.paths]
        own: dict[str, Any] = {"id": read.row.id, "row": read.key}
        return own | ({str(read.row.kind.takes): names} if names else {})

    def _source(self, read: Read) -> dict[str, Any]:
        return {read.row.kind.takes: read.media} if read.row.kind.takes else {}

    def _answer(self, read: Read) -> dict[str, Any]:
        row = read.row
        lance = self.lance(str(row.checkpoint))
        answer = lance.understand(row.prompt, **self._source(read), **row.options)
        about = {"task": row.task, "prompt": row.prompt, **row.options, **self._about(read)}
        about |= {"checkpoint": Path(str(row.checkpoint)).name, "text": answer.text}
        about["token_ids"] = answer.token_ids
        with written(place(self.folder, row.files[0])) as file:
            file.write(json.dumps(about, ensure_ascii=True).encode() + b"\n")
        return about

    def _generate(self, read: Read) -> dict[str, Any]:
        from ..inputs import media

        row = read.row
        made = self.lance(str(row.checkpoint)).generate(
            row.task, row.prompt, **self._source(read), **row.options
        )
        clips = made.frames if made.frames.dim() == 5 else made.frames[None]
        about = {k: v for k, v in made.request.items() if v is not None} | self._about(read)
        for name, text in row.beside.items():
            with written(place(self.folder, name)) as file:
                file.write(text.encode())
        for i, (name, clip) in enumerate(zip(row.files, clips, strict=False)):
            own = about | {"seed": about["seed"] + i}
            if row.kind.output == "image":
                media.save_image(place(self.folder, name), clip[0], own)
            else:
                media.save_video(place(self.folder, name), clip, made.fps, own)
        if row.grid:
            media.save_image(place(self.folder, row.grid), grid(clips[:, 0]), about)
        return about


def grid(pictures: Any) -> Any:
    """Pictures [n, H, W, 3] side by side, the whole root of n in a row; black fills up the last row."""
    import torch

    n, height, width = pictures.shape[:3]
    across = max(int(n**0.5), 1)
    down = -(-n // across)
    sheet = torch.zeros(down * height, across * width, 3, dtype=pictures.dtype)
    for i, picture in enumerate(pictures):
        y, x = divmod(i, across)
        sheet[y * height : (y + 1) * height, x * width : (x + 1) * width] = picture
    return sheet


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 3)


class Ahead:
    """Rows given one after another, each one's media read by a thread from the moment it is given."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._reader = ThreadPoolExecutor(1, "media")
        self._coming: queue.Queue[Future[Read] | None] = queue.Queue()

    def give(self, row: Row) -> None:
        """One more row."""
        self._coming.put(self._reader.submit(self.session.read, row))

    def end(self) -> None:
        """No row comes after those that were given."""
        self._coming.put(None)

    def lines(self) -> Generator[Line, None, None]:
        """The line of each row, once it is drawn, in the order given."""
        try:
            while (coming := self._coming.get()) is not None:
                yield self.session.draw(coming.result())
        finally:
            self._reader.shutdown(wait=False, cancel_futures=True)


def here(rows: Iterable[Row], session: Session) -> Generator[Line, None, None]:
    """Draw rows in this process."""
    ahead = Ahead(session)
    left = iter(rows)

    def give() -> None:
        row = next(left, None)
        ahead.end() if row is None else ahead.give(row)

    give()
    give()
    with contextlib.closing(ahead.lines()) as lines:
        for line in lines:
            yield line
            give()
