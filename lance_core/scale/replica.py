"""One model behind a server: one request at a time, told of as it goes, ended when nobody waits for it."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from ..errors import MediaError, RequestError
from ..inputs.tasks import TASKS
from .openai_requests import Asked, as_error
from .serve_config import ServeConfig, config_of
from .work import Settings, open_lance

Event = dict[
    str, Any
]  # {"progress": percent}, {"text": piece}, {"files": [bytes]}, {"ended": why}, {"error": ...}


class _NobodyWaits(Exception):
    """The client has gone."""


class Replica:
    """The model. config: as `ServeConfig.plain` gives it."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config: ServeConfig = config_of(config)
        self._opened: dict[str, Any] = {}
        self._one = asyncio.Lock()
        self._lance("t2i")  # what is wrong with the checkpoint is said at the start

    def _lance(self, task: str) -> Any:
        config = self.config
        path = (config.video_checkpoint if TASKS[task].is_video else None) or config.checkpoint
        if path not in self._opened:
            self._opened[path] = open_lance(path, Settings("", config.device or _device(), config.dtype))
        return self._opened[path]

    async def work(self, asked: dict[str, Any], kind: str = "png") -> AsyncIterator[Event]:
        """What happens while a request is carried out; the last event has the result or an error."""
        request, gone = Asked(**asked), threading.Event()
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | None] = asyncio.Queue()

        def tell(event: Event | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        async with self._one:
            thread = loop.run_in_executor(None, self._carry_out, request, kind, tell, gone)
            try:
                while (event := await events.get()) is not None:
                    yield event
            finally:
                gone.set()
                await asyncio.shield(thread)

    def _carry_out(
        self, asked: Asked, kind: str, tell: Callable[[Event | None], None], gone: threading.Event
    ) -> None:
        """In a thread of its own: draw or answer, and tell of it."""
        try:
            if TASKS[asked.task].output == "text":
                self._answer(asked, tell, gone)
            else:
                self._generate(asked, kind, tell, gone)
        except _NobodyWaits:
            tell({"error": "cancelled", "fault": "client"})
        except Exception as error:
            fault = "client" if isinstance(error, RequestError | MediaError) else "server"
            detail = f"{type(error).__name__}: {error}"[:500]
            tell({"error": as_error(error), "fault": fault, "detail": detail})
        finally:
            tell(None)

    def _source(self, asked: Asked) -> dict[str, Any]:
        takes = TASKS[asked.task].takes
        if takes is None:
            return {}
        return {takes: list(asked.media) if takes == "references" else asked.media[0]}

    def _answer(self, asked: Asked, tell: Callable[[Event], None], gone: threading.Event) -> None:
        def piece(text: str) -> None:
            if gone.is_set():
                raise _NobodyWaits
            if text:
                tell({"text": str(text)})

        lance = self._lance(asked.task)
        answer = lance.understand(asked.prompt, **self._source(asked), **asked.options, on_token=piece)
        full = len(answer.token_ids) >= asked.options.get("max_new_tokens", 256)
        tell({"ended": "length" if full else "stop", "tokens": len(answer.token_ids)})

    def _generate(
        self, asked: Asked, kind: str, tell: Callable[[Event], None], gone: threading.Event
    ) -> None:
        def step(i: int, total: int, _: Any) -> None:
            if gone.is_set():
                raise _NobodyWaits
            tell({"progress": 100 * i // (total + 1)})

        lance = self._lance(asked.task)
        made = lance.generate(asked.task, asked.prompt, **self._source(asked), **asked.options, callback=step)
        clips = made.frames if made.frames.dim() == 5 else made.frames[None]
        about = {key: value for key, value in made.request.items() if value is not None}
        files = [
            _file(clip, made.fps, about | {"seed": about["seed"] + i}, kind) for i, clip in enumerate(clips)
        ]
        tell({"files": files, "width": about["width"], "height": about["height"]})


def _file(clip: Any, fps: int, about: dict[str, Any], kind: str) -> bytes:
    """A result as a file's contents, its request inside."""
    from ..inputs import media

    with tempfile.TemporaryDirectory(prefix="lance-serve-") as folder:
        path = Path(folder) / f"result.{kind}"
        if kind == "mp4":
            media.save_video(path, clip, fps, about)
        else:
            media.save_image(path, clip[0], about)
        return path.read_bytes()


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
