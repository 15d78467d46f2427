"""A prompt written by a service that speaks OpenAI's chat completions, where the user has set one up.

Nothing is sent unless the variables are set. The key goes into the Authorization header of that one address
and
nowhere else: redirects are not followed, and no message repeats what the service said.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from ..errors import RequestError

KEY, MODEL, URL = "LANCE_REWRITE_API_KEY", "LANCE_REWRITE_MODEL_NAME", "LANCE_REWRITE_BASE_URL"
TIMEOUT = 60.0  # seconds for everything, from connecting to the last byte
POLL = 0.2  # seconds between looks at whether to stop
MAX_REPLY = 1 << 20  # bytes
LONGEST_SIDE = 1024  # pixels of a picture that is sent


class Unanswered(Exception):
    """The service gave no prompt; the message says why, and never holds the key."""


@dataclass(frozen=True)
class Endpoint:
    """A service: the address before /chat/completions, the model's name there, and the key ("" for none)."""

    url: str = field(repr=False)
    model: str
    key: str = field(default="", repr=False)

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] | None = None) -> Endpoint | None:
        """The service the released variables describe, None where neither address nor model is set.

        Raises:
            RequestError: one of the two without the other, or an address that is none.
        """
        known = os.environ if variables is None else variables
        url, model = known.get(URL, "").strip(), known.get(MODEL, "").strip()
        if not url and not model:
            return None
        if not url or not model:
            missing, there = (URL, MODEL) if model else (MODEL, URL)
            raise RequestError(
                f"{there} is set and {missing} is not; set both, or neither for the model itself"
            )
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RequestError(f"{URL} is no address; expected one like https://host/v1")
        return cls(url.rstrip("/"), model, known.get(KEY, "").strip())

    @property
    def host(self) -> str:
        """The service's name for messages, without anything secret an address can hold."""
        return urlsplit(self.url).hostname or "the service"

    def ask(
        self,
        system: str,
        text: str,
        pictures: Sequence[np.ndarray] = (),
        *,
        temperature: float,
        seed: int,
        timeout: float = TIMEOUT,
        waiting: Callable[[], None] | None = None,
    ) -> str:
        """What the service answers. pictures: uint8 [H, W, 3]. waiting: called several times a second until
        then; raise in it to stop.

        Raises:
            Unanswered: it refuses, takes longer than `timeout` seconds, or sends what is no answer.
        """
        body = self._body(system, text, pictures, temperature, seed)
        # A thread, because a service that sends a byte now and then never exceeds a socket's own time limit.
        done: list[str | Exception] = []
        worker = threading.Thread(target=lambda: done.append(self._tried(body, timeout)), daemon=True)
        worker.start()
        end = time.monotonic() + timeout
        while worker.is_alive() and (left := end - time.monotonic()) > 0:
            worker.join(min(left, POLL))
            if waiting is not None:
                waiting()
        if not done:
            raise Unanswered(f"{self.host} did not answer within {timeout:g} seconds")
        if isinstance(done[0], Exception):
            raise done[0]
        return done[0]

    def _body(
        self, system: str, text: str, pictures: Sequence[np.ndarray], temperature: float, seed: int
    ) -> bytes:
        content: Any = text
        if pictures:
            content = [{"type": "image_url", "image_url": {"url": data_url(p)}} for p in pictures]
            content.append({"type": "text", "text": text})
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        asked = {"model": self.model, "messages": messages, "temperature": temperature, "seed": seed}
        return json.dumps(asked | {"stream": False}).encode()

    def _tried(self, body: bytes, timeout: float) -> str | Exception:
        """The answer, or the `Unanswered` that says why there is none."""
        try:
            return _content(self._post(body, timeout))
        except Unanswered as error:
            return error
        except urllib.error.HTTPError as error:
            return Unanswered(f"{self.host} refused with status {error.code}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None)
            kind = type(reason if isinstance(reason, Exception) else error).__name__
            return Unanswered(f"{self.host} cannot be reached ({kind})")

    def _post(self, body: bytes, timeout: float) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers, method="POST")
        with urllib.request.build_opener(_Stay).open(request, timeout=timeout) as reply:
            found = reply.read(MAX_REPLY + 1)
        if len(found) > MAX_REPLY:
            raise Unanswered(f"{self.host} sent more than {MAX_REPLY >> 20} MiB")
        return found


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would take the key elsewhere."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _content(reply: bytes) -> str:
    """The text of a chat completion."""
    try:
        text = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise Unanswered("the service sent something that is no chat completion")
    return text


def data_url(picture: np.ndarray) -> str:
    """A picture as a JPEG inside a URL, at most LONGEST_SIDE pixels a side."""
    image = Image.fromarray(picture)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
