"""Videos that were asked for: made one after another by whichever model is free, kept for downloading."""

from __future__ import annotations

import asyncio
import logging
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .http_forms import HttpError
from .openai_requests import Asked, as_error
from .serve_config import ServeConfig

_log = logging.getLogger(__name__)


@dataclass
class Video:
    """One. `file` once it is there."""

    id: str
    asked: Asked
    created: int
    status: str = "queued"
    progress: int = 0
    completed: int | None = None
    error: str | None = None
    file: Path | None = None
    size: str = ""
    task: Any = field(default=None, repr=False)


class Videos:
    """The list. events: carries out a request, event by event.

    Raises (where one is named that is not there, or not yet):
        HttpError
    """

    def __init__(
        self, config: ServeConfig, events: Callable[[Asked, str], AsyncIterator[dict[str, Any]]]
    ) -> None:
        self._config, self._events = config, events
        self._folder = tempfile.TemporaryDirectory(prefix="lance-videos-")
        self._videos: dict[str, Video] = {}

    def __len__(self) -> int:
        return len(self._videos)

    def create(self, asked: Asked) -> dict[str, Any]:
        """Begin one; returns what a client sees of it."""
        video = Video(f"video_{secrets.token_hex(16)}", asked, int(time.time()))
        self._videos[video.id] = video
        video.task = asyncio.get_running_loop().create_task(self._make(video))
        self._forget()
        return self._shown(video)

    async def _make(self, video: Video) -> None:
        try:
            async for event in self._events(video.asked, "mp4"):
                video.status = "in_progress"
                video.progress = event.get("progress", video.progress)
                if "files" in event:
                    file = Path(self._folder.name) / f"{video.id}.mp4"
                    await asyncio.to_thread(file.write_bytes, event["files"][0])
                    video.file, video.size = file, f"{event['width']}x{event['height']}"
            video.status, video.progress, video.completed = "completed", 100, int(time.time())
        except Exception as error:
            if not isinstance(error, HttpError):
                _log.error("a video failed", exc_info=error)
            video.status = "failed"
            video.error = str(error) if isinstance(error, HttpError) else as_error(error)

    def _forget(self) -> None:
        """Keep so many finished videos, the newest."""
        ended = [video for video in self._videos.values() if video.status in ("completed", "failed")]
        for video in ended[: max(len(ended) - self._config.videos, 0)]:
            self._drop(video)

    def _drop(self, video: Video) -> None:
        self._videos.pop(video.id, None)
        if video.task is not None and not video.task.done():
            video.task.cancel()
        if video.file is not None:
            video.file.unlink(missing_ok=True)

    def _found(self, name: str) -> Video:
        video = self._videos.get(name)
        if video is None:
            raise HttpError(404, "there is no such video", "not_found")
        return video

    def _shown(self, video: Video) -> dict[str, Any]:
        frames = video.asked.options.get("num_frames", 0)
        about: dict[str, Any] = {"id": video.id, "object": "video", "model": self._config.model}
        about |= {"status": video.status, "progress": video.progress, "created_at": video.created}
        about |= {"completed_at": video.completed, "expires_at": None, "prompt": video.asked.prompt}
        about |= {"size": video.size, "seconds": str(frames // 12), "remixed_from_video_id": None}
        return about | {"error": {"code": "failed", "message": video.error} if video.error else None}

    def show(self, name: str) -> dict[str, Any]:
        """What a client sees of one."""
        return self._shown(self._found(name))

    def list(self) -> dict[str, Any]:
        """What a client sees of all, the newest first."""
        shown = [self._shown(video) for video in reversed(self._videos.values())]
        return {"object": "list", "data": shown, "has_more": False}

    def delete(self, name: str) -> dict[str, Any]:
        """Stop making one, or remove it."""
        self._drop(self._found(name))
        return {"id": name, "object": "video.deleted", "deleted": True}

    def file(self, name: str) -> Path:
        """Where one lies."""
        video = self._found(name)
        if video.file is None:
            raise HttpError(409, f"the video is not there: it is {video.status}", "not_ready")
        return video.file
