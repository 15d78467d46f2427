"""OpenAI's requests as ours: what is asked, within a server's limits. Nothing here knows HTTP or Ray.

Names besides OpenAI's are those of `Lance.generate` and `Lance.understand` (steps, cfg, seed, ...).
"""

from __future__ import annotations

import base64
import binascii
import http.client
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import checks
from ..checks import shown
from ..config import OUTPUT_FPS
from ..errors import MediaError, RequestError
from ..inputs import tasks
from .row_forms import check_options
from .rows import GENERATION_OPTIONS, TEXT_OPTIONS
from .serve_config import Limits

FETCH_SECONDS = 20.0
SAMPLING = {
    name for name in GENERATION_OPTIONS if name not in ("width", "height", "num_frames", "batch_size")
}
IGNORED = {"user", "model", "quality", "style", "background", "moderation", "output_compression", "metadata"}
IGNORED |= {"store", "service_tier", "input_fidelity", "partial_images", "frequency_penalty", "n", "stop"}
IGNORED |= {"presence_penalty", "stream", "stream_options", "response_format", "output_format"}


@dataclass(frozen=True)
class Asked:
    """A request for a model. media: of the task's kind, contents of files, in order."""

    task: str
    prompt: str
    media: list[bytes] = field(default_factory=list, repr=False)
    options: dict[str, Any] = field(default_factory=dict)


def image(body: Mapping[str, Any], pictures: Sequence[bytes], limits: Limits) -> Asked:
    """images/generations and, with pictures, images/edits: one is edited, several are subjects.

    Raises:
        RequestError: a value is wrong or beyond a limit.
    """
    task = "t2i" if not pictures else "image_edit" if len(pictures) == 1 else "subject_image"
    options = _options(body, SAMPLING, {"prompt", "size", "image", "mask"})
    if body.get("mask") is not None:
        raise RequestError("mask is not known here: say in the prompt what is to change")
    options["batch_size"] = checks.whole("n", _number(body.get("n", 1)), 1, limits.results)
    if task != "image_edit":
        options |= _size(body.get("size"), limits)
    return _within(Asked(task, _prompt(body.get("prompt"), limits), [*pictures], options), limits)


def video(body: Mapping[str, Any], pictures: Sequence[bytes], limits: Limits) -> Asked:
    """videos: from text or, with a picture, from its first frame.

    Raises:
        RequestError: a value is wrong or beyond a limit.
    """
    if len(pictures) > 1:
        raise RequestError("input_reference is one picture, the first frame")
    options = _options(body, SAMPLING, {"prompt", "size", "seconds", "input_reference", "frames"})
    if body.get("frames") is not None:
        frames = checks.whole("frames", _number(body["frames"]), 1, limits.frames)
    else:
        most = limits.frames / OUTPUT_FPS
        seconds = checks.real("seconds", _number(body.get("seconds", 4)), 0, most, above=0)
        frames = min(int(seconds * OUTPUT_FPS) + 1, limits.frames)
    options["num_frames"] = frames
    task = "i2v" if pictures else "t2v"
    if task == "t2v":
        options |= _size(body.get("size"), limits)
    return _within(Asked(task, _prompt(body.get("prompt"), limits), [*pictures], options), limits)


def chat(body: Mapping[str, Any], hosts: Sequence[str], limits: Limits) -> Asked:
    """chat/completions: one question about one picture or clip, and perhaps a system message.

    Raises:
        RequestError: a value is wrong or beyond a limit.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise RequestError("messages: expected a list of messages")
    system = [_text_of(one) for one in messages if one.get("role") in ("system", "developer")]
    asked = [one for one in messages if one.get("role") not in ("system", "developer")]
    if len(asked) != 1 or asked[0].get("role") != "user":
        raise RequestError("messages: expected one message of the user; earlier turns are not known here")
    content = asked[0].get("content")
    parts = content if isinstance(content, list) else []
    found = {kind: _urls(parts, kind) for kind in ("image_url", "video_url")}
    urls = [*found["image_url"], *found["video_url"]]
    if len(urls) != 1:
        raise RequestError(
            f"the question has {len(urls)} pictures and clips, expected one (image_url or video_url)"
        )
    options = _options(body, set(TEXT_OPTIONS), {"messages", "max_tokens", "max_completion_tokens"})
    tokens = body.get("max_completion_tokens", body.get("max_tokens"))
    tokens = options.pop("max_new_tokens", min(256, limits.tokens)) if tokens is None else tokens
    options["max_new_tokens"] = checks.whole("max_tokens", tokens, 1, limits.tokens)
    if system:
        options["system_prompt"] = "\n".join(system)
    task = "x2t_image" if found["image_url"] else "x2t_video"
    prompt = _prompt(_text_of(asked[0]), limits)
    media = [source(urls[0], hosts, limits)]
    return _within(Asked(task, prompt, media, options), limits)


def source(url: Any, hosts: Sequence[str], limits: Limits) -> bytes:
    """The contents of a data URL or, from one of these hosts, of an address.

    Raises:
        RequestError: it is neither, too large, or cannot be fetched.
    """
    if not isinstance(url, str):
        raise RequestError(f"{shown(url)} is no URL")
    if url.startswith("data:"):
        head, comma, data = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RequestError("a data URL: expected data:TYPE;base64,...")
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise RequestError("a data URL whose base64 is damaged") from None
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.hostname not in hosts:
        raise RequestError("URLs are not fetched here; send the file itself, as a data URL or an upload")
    return _fetched(url, parts.hostname, limits)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect could lead to a host that is not allowed."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        """None: it is an error."""
        return


def _fetched(url: str, host: str, limits: Limits) -> bytes:
    """What an address of an allowed host gives."""
    try:
        with urllib.request.build_opener(_NoRedirects).open(url, timeout=FETCH_SECONDS) as reply:
            data = reply.read(limits.upload_bytes + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise RequestError(f"{host} gives nothing ({str(error)[:150]})") from None
    if len(data) > limits.upload_bytes:
        raise RequestError(f"{host} gives more than {limits.upload_bytes} bytes")
    return data


def sources(urls: Sequence[Any], hosts: Sequence[str], limits: Limits) -> list[bytes]:
    """The contents of several."""
    return [source(url, hosts, limits) for url in urls]


def _within(asked: Asked, limits: Limits) -> Asked:
    """The request, checked as the model would check it, so that what is wrong never waits in a queue."""
    kind = tasks.TASKS[asked.task]
    check_options(kind, asked.options)
    steps = asked.options.get("steps", 1)
    if steps > limits.steps:
        raise RequestError(f"steps is {steps}, expected at most {limits.steps} here")
    return asked


def _options(body: Mapping[str, Any], known: set[str], own: set[str]) -> dict[str, Any]:
    strange = sorted(map(str, body.keys() - known - own - IGNORED - {"max_new_tokens"}))
    if strange:
        raise RequestError(f"{shown(strange[0])} is not known here")
    return {name: _number(body[name]) for name in known & body.keys() if body[name] is not None}


def _number(value: Any) -> Any:
    """A form's text as the number it is; anything else as it came."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def _size(size: Any, limits: Limits) -> dict[str, int]:
    """{width, height} of "WxH"; nothing for "auto" and none.

    Raises:
        RequestError: no size, or too many pixels.
    """
    if size in (None, "auto"):
        return {}
    width, x, height = str(size).lower().partition("x")
    if not x or not width.isdecimal() or not height.isdecimal() or max(len(width), len(height)) > 6:
        raise RequestError(f"size is {shown(size)}, expected WIDTHxHEIGHT or auto")
    if int(width) * int(height) > limits.pixels:
        raise RequestError(f"size is {size}, expected at most {limits.pixels} pixels here")
    wide, tall = tasks.check_size(int(width), int(height))
    return {"width": wide, "height": tall}


def _prompt(prompt: Any, limits: Limits) -> str:
    text = tasks.check_text("prompt", prompt)
    if len(text) > limits.prompt_characters:
        raise RequestError(
            f"the prompt has {len(text)} characters, expected at most {limits.prompt_characters}"
        )
    return text


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(
            str(p.get("text", "")) for p in content if isinstance(p, dict) and p.get("type") == "text"
        )
    return checks.text("content", content)


def _urls(parts: Sequence[Any], kind: str) -> list[Any]:
    found = [part.get(kind) for part in parts if isinstance(part, dict) and part.get("type") == kind]
    return [one.get("url") if isinstance(one, dict) else one for one in found]


def as_error(error: BaseException) -> str:
    """What to tell a client: what is wrong with its request, and of anything else only that it went wrong."""
    own = isinstance(error, RequestError | MediaError)
    return str(error)[:500] if own else "the server failed; its log says how"
