"""What a server allows and where it listens: a JSON file, checked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .. import checks
from ..checks import shown
from ..errors import RequestError
from ..files import read_bytes

KEY_VARIABLE = "LANCE_API_KEY"
MAX_CONFIG = 1 << 20  # bytes
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST = 1 << 40


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for."""

    pixels: int = 1 << 20  # of a picture, or of a frame
    frames: int = 121
    steps: int = 100
    results: int = 4
    tokens: int = 1024  # of an answer
    upload_bytes: int = 64 << 20  # of a request's body
    prompt_characters: int = 20_000


@dataclass(frozen=True)
class ServeConfig:
    """A server.

    checkpoint: for all tasks; video_checkpoint: for those that make or read a video, where it is another.
    replicas, most_replicas: of the model, one a GPU; Ray Serve starts more while requests wait, up to the
    most. queue: requests that may wait for one; beyond, 429. hosts: from which a picture's URL in a request
    may be fetched; none by default. videos: finished ones that are kept for downloading.
    """

    checkpoint: str = ""
    video_checkpoint: str | None = None
    device: str | None = None
    dtype: str = "bfloat16"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    replicas: int = 1
    most_replicas: int = 1
    queue: int = 16
    hosts: tuple[str, ...] = ()
    videos: int = 100
    address: str | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def model(self) -> str:
        """What clients call the model."""
        return Path(self.checkpoint).name

    def plain(self) -> dict[str, Any]:
        """As JSON, for another process."""
        return asdict(self)


def read_config(path: str | os.PathLike | None, **given: Any) -> ServeConfig:
    """The configuration in a file, with what is given besides winning; the key may come from LANCE_API_KEY.

    Raises:
        RequestError: the file or a value in it is wrong.
    """
    raw: Any = {}
    if path is not None:
        try:
            raw = json.loads(read_bytes(path, MAX_CONFIG))
        except (OSError, ValueError, RecursionError) as error:
            told = getattr(error, "strerror", None) or str(error)
            raise RequestError(f"{str(path)[-200:]} cannot be read as JSON ({told[:150]})") from None
    if not isinstance(raw, dict):
        raise RequestError(f"{str(path)[-200:]} holds {shown(raw)}, expected an object")
    raw = raw | {key: value for key, value in given.items() if value is not None}
    return config_of({"api_key": os.environ.get(KEY_VARIABLE) or None} | raw)


def config_of(raw: Mapping[str, Any]) -> ServeConfig:
    """A configuration from plain values.

    Raises:
        RequestError: an unknown name, or a value of the wrong kind.
    """
    _known(raw, ServeConfig, "the configuration")
    limits = raw.get("limits", {})
    if not isinstance(limits, Mapping):
        raise RequestError(f"limits is {shown(limits)}, expected an object")
    _known(limits, Limits, "limits")
    values = dict(raw)
    values["limits"] = Limits(**{k: checks.whole(f"limits.{k}", v, 1, MOST) for k, v in limits.items()})
    for name, low in (("port", 1), ("replicas", 0), ("most_replicas", 1), ("queue", 0), ("videos", 1)):
        if name in values:
            most = 65535 if name == "port" else 100_000
            values[name] = checks.whole(name, values[name], low, most)
    for name in ("checkpoint", "video_checkpoint", "device", "dtype", "host", "api_key", "address"):
        if values.get(name) is not None:
            checks.text(name, values[name])
    if not values.get("checkpoint"):
        raise RequestError("the configuration names no checkpoint; give one, or -m")
    checks.choice("dtype", values.get("dtype", "bfloat16"), ("bfloat16", "float16", "float32"))
    hosts = values.get("hosts", ())
    if not isinstance(hosts, list | tuple) or not all(isinstance(host, str) for host in hosts):
        raise RequestError(f"hosts is {shown(hosts)}, expected a list of host names")
    values["hosts"] = tuple(hosts)
    least = values.get("replicas", 1)
    values["most_replicas"] = max(values.get("most_replicas", 1), least, 1)
    return ServeConfig(**values)


def _known(raw: Mapping[str, Any], kind: Any, where: str) -> None:
    names = {one.name for one in fields(kind)}
    strange = sorted(map(str, raw.keys() - names))
    if strange:
        raise RequestError(f"{where} has {shown(strange[0])}; known are {', '.join(sorted(names))}")
