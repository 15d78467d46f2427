"""OpenAI's endpoints over HTTP: who may ask, what is too much, and answers in OpenAI's words.

One process, which holds the list of videos (videos.py); the models are elsewhere (replica.py), as many as
there are.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from typing import Any

from ..errors import LanceError
from . import openai_requests as requests
from .http_forms import HttpError, form
from .openai_requests import Asked
from .serve_config import ServeConfig, config_of
from .videos import Videos

RETRY_AFTER = "5"  # seconds
FORMATS = ("png", "jpeg", "webp")
Work = Callable[[dict[str, Any], str], AsyncIterator[dict[str, Any]]]

_log = logging.getLogger(__name__)


class Front:
    """The endpoints. work: carries out a request with a model, event by event (`Replica.work`)."""

    def __init__(self, config: dict[str, Any], work: Work) -> None:
        self.config: ServeConfig = config_of(config)
        self._work = work
        self._videos = Videos(self.config, self._events)
        self._working = 0
        self._counts: Counter[tuple[str, int]] = Counter()
        self._seconds: Counter[str] = Counter()

    async def answer(self, request: Any) -> Any:
        """The response to a Starlette request."""
        from starlette.responses import JSONResponse

        began, route, status = time.monotonic(), "other", 500
        try:
            self._let_in(request)
            route, handler = self._route(request)
            response = await handler(request)
            status = response.status_code
            return response
        except HttpError as error:
            status = error.status
            told = {"message": str(error), "type": _TYPES.get(status, "server_error"), "code": error.code}
            headers = {"Retry-After": RETRY_AFTER} if status == 429 else {}
            return JSONResponse({"error": told | {"param": None}}, status, headers)
        except asyncio.CancelledError:
            status = 499
            raise
        finally:
            self._counts[route, status] += 1
            self._seconds[route] += time.monotonic() - began  # type: ignore[assignment]

    def _let_in(self, request: Any) -> None:
        key = self.config.api_key
        if not key or request.url.path == "/health":
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            raise HttpError(401, "the API key is missing or wrong", "invalid_api_key")

    def _route(self, request: Any) -> tuple[str, Any]:
        path, method = request.url.path.rstrip("/") or "/", request.method
        found = _ROUTES.get((method, path))
        if found is not None:
            return path, getattr(self, found)
        parts = path.split("/")
        if parts[1:3] == ["v1", "videos"] and len(parts) in (4, 5):
            name = {("GET", 4): "_video", ("DELETE", 4): "_delete_video", ("GET", 5): "_content"}.get(
                (method, len(parts))
            )
            if name and (len(parts) == 4 or parts[4] == "content"):
                return "/v1/videos/ID", getattr(self, name)
        raise HttpError(404, f"there is nothing at {method} {path[:100]}", "not_found")

    # -- bodies ----------------------------------------------------------------------------------------------

    async def _body(self, request: Any) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
        """Fields and files of a JSON or form body, read as far as the limit allows."""
        most = self.config.limits.upload_bytes
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise HttpError(413, f"the request has {length} bytes, expected at most {most}", "too_large")
        data = b""
        async for part in request.stream():
            data += part
            if len(data) > most:
                raise HttpError(413, f"the request has more than {most} bytes", "too_large")
        kind = request.headers.get("content-type", "")
        if kind.startswith("multipart/form-data"):
            return form(data, kind)
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError):
            raise HttpError(400, "the body is no JSON") from None
        if not isinstance(fields, dict):
            raise HttpError(400, "the body is no JSON object")
        return fields, {}

    async def _checked(self, build: Callable[[], Asked]) -> Asked:
        """A request built from a body, in a thread, as it may fetch a picture."""
        try:
            return await asyncio.to_thread(build)
        except LanceError as error:
            raise HttpError(400, str(error)) from None

    # -- work ------------------------------------------------------------------------------------------------

    def _room(self) -> None:
        """Refuse what would wait behind more than may wait.

        Raises:
            HttpError: so it is.
        """
        if self._working >= self.config.queue + self.config.most_replicas:
            raise HttpError(429, "the server is full; try again in a few seconds", "full")

    async def _events(self, asked: Asked, kind: str = "png") -> AsyncIterator[dict[str, Any]]:
        """What a model tells while it works.

        Raises:
            HttpError: all are busy and as many wait as may, or the model failed.
        """
        self._room()
        self._working += 1
        try:
            async for event in self._work(asdict(asked), kind):
                if "error" in event:
                    if event.get("fault") != "client":
                        _log.error("a request failed: %s", event.get("detail"))
                    raise HttpError(400 if event.get("fault") == "client" else 500, event["error"])
                yield event
        finally:
            self._working -= 1

    async def _images(self, request: Any, edit: bool = False) -> Any:
        from starlette.responses import JSONResponse

        fields, files = await self._body(request)
        given = fields.get("image")
        urls = given if isinstance(given, list) else [given] if given is not None else []
        pictures = [*files.get("image", ()), *files.get("image[]", ())]
        limits, hosts = self.config.limits, self.config.hosts
        kind = str(fields.get("output_format") or "png")
        if kind not in FORMATS:
            raise HttpError(400, f"output_format is {kind[:20]!r}, expected one of {', '.join(FORMATS)}")
        if edit and not pictures and not urls:
            raise HttpError(400, "an edit needs an image")
        if not edit and (pictures or urls):
            raise HttpError(400, "pictures belong to images/edits")
        asked = await self._checked(
            lambda: requests.image(fields, [*pictures, *requests.sources(urls, hosts, limits)], limits)
        )
        done: dict[str, Any] = {}
        async for event in self._events(asked, kind):
            done = event
        encoded = [base64.b64encode(one).decode() for one in done["files"]]
        name = {"url": "url", "b64_json": "b64_json"}.get(str(fields.get("response_format")), "b64_json")
        head = f"data:image/{kind};base64," if name == "url" else ""
        data = [{name: head + one} for one in encoded]
        size = f"{done['width']}x{done['height']}"
        return JSONResponse({"created": _now(), "data": data, "output_format": kind, "size": size})

    async def _edits(self, request: Any) -> Any:
        return await self._images(request, edit=True)

    async def _chat(self, request: Any) -> Any:
        from starlette.responses import JSONResponse, StreamingResponse

        fields, _ = await self._body(request)
        limits, hosts = self.config.limits, self.config.hosts
        asked = await self._checked(lambda: requests.chat(fields, hosts, limits))
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": _now(), "model": self.config.model}
        events = self._events(asked)
        if fields.get("stream"):
            first = await anext(events)  # so that a full server is said so in the status
            return StreamingResponse(_stream(head, first, events), media_type="text/event-stream")
        text, end = "", {}
        async for event in events:
            text += event.get("text", "")
            end = event
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None}
        choice["finish_reason"] = end["ended"]
        usage = {"prompt_tokens": 0, "completion_tokens": end["tokens"], "total_tokens": end["tokens"]}
        return JSONResponse(head | {"object": "chat.completion", "choices": [choice], "usage": usage})

    # -- videos ----------------------------------------------------------------------------------------------

    async def _create_video(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        fields, files = await self._body(request)
        given = fields.pop("input_reference", None)
        if isinstance(given, dict):
            given = given.get("image_url", given.get("url"))
        pictures, limits, hosts = files.get("input_reference", []), self.config.limits, self.config.hosts
        urls = [given] if given is not None else []
        asked = await self._checked(
            lambda: requests.video(fields, [*pictures, *requests.sources(urls, hosts, limits)], limits)
        )
        self._room()
        return JSONResponse(self._videos.create(asked))

    async def _video(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        return JSONResponse(self._videos.show(_name(request)))

    async def _delete_video(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        return JSONResponse(self._videos.delete(_name(request)))

    async def _content(self, request: Any) -> Any:
        from starlette.responses import FileResponse

        return FileResponse(self._videos.file(_name(request)), media_type="video/mp4")

    async def _list_videos(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        return JSONResponse(self._videos.list())

    # -- about the server ------------------------------------------------------------------------------------

    async def _models(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        one = {"id": self.config.model, "object": "model", "created": 0, "owned_by": "local"}
        return JSONResponse({"object": "list", "data": [one]})

    async def _health(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        return JSONResponse({"status": "ok", "working": self._working})

    async def _metrics(self, request: Any) -> Any:
        from starlette.responses import PlainTextResponse

        lines = ["# TYPE lance_requests_total counter"]
        lines += [
            f'lance_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self._counts.items())
        ]
        lines += ["# TYPE lance_request_seconds_total counter"]
        lines += [
            f'lance_request_seconds_total{{route="{route}"}} {seconds:.3f}'
            for route, seconds in sorted(self._seconds.items())
        ]
        lines += ["# TYPE lance_working gauge", f"lance_working {self._working}"]
        lines += ["# TYPE lance_videos gauge", f"lance_videos {len(self._videos)}", ""]
        return PlainTextResponse("\n".join(lines), media_type="text/plain; version=0.0.4")


_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "invalid_request_error"}
_TYPES |= {409: "invalid_request_error", 413: "invalid_request_error", 429: "rate_limit_error"}
_ROUTES = {
    ("POST", "/v1/images/generations"): "_images",
    ("POST", "/v1/images/edits"): "_edits",
    ("POST", "/v1/chat/completions"): "_chat",
    ("POST", "/v1/videos"): "_create_video",
    ("GET", "/v1/videos"): "_list_videos",
    ("GET", "/v1/models"): "_models",
    ("GET", "/health"): "_health",
    ("GET", "/metrics"): "_metrics",
}


def _name(request: Any) -> str:
    """The video that a path names."""
    return request.url.path.split("/")[3]


def _now() -> int:
    return int(time.time())


async def _stream(
    head: dict[str, Any], first: dict[str, Any], events: AsyncIterator[dict[str, Any]]
) -> AsyncIterator[str]:
    """Server-sent events of a chat completion."""

    def chunk(delta: dict[str, Any], end: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": end}
        return f"data: {json.dumps(head | {'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"

    def told(event: dict[str, Any]) -> str:
        return chunk({}, event["ended"]) if "ended" in event else chunk({"content": event["text"]})

    yield chunk({"role": "assistant", "content": ""})
    yield told(first)
    try:
        async for event in events:
            yield told(event)
    except HttpError as error:
        yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error'}})}\n\n"
    yield "data: [DONE]\n\n"
