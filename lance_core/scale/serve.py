"""`python -m lance_core serve`: the model as Ray Serve deployments behind OpenAI's endpoints.

Two deployments: `Model`, one replica a GPU, scaled between two numbers while requests wait; and `Front`, one
process that speaks HTTP. Ray Serve starts them again when they die.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import RequestError
from .front import Front
from .http_forms import HttpError
from .ray_start import connected
from .replica import Replica
from .serve_config import LOOPBACK, ServeConfig

FRONT_REQUESTS = 10_000  # at once: connections, not work
NAME = "lance"

_log = logging.getLogger(__name__)


def run(config: ServeConfig, ready: Callable[[str], None]) -> None:
    """Serve until interrupted. ready: called with the server's address once it answers.

    Raises:
        RequestError: Ray Serve is not installed, the port is taken, or the model does not start.
    """
    config = replace(config, device=config.device or _device())
    config = replace(config, checkpoint=str(Path(config.checkpoint).absolute()))
    _open_once(config)
    if config.host not in LOOPBACK and not config.api_key:
        _log.warning("Everybody who reaches %s may use this server: it has no API key.", config.host)
    serve, ray = _ray_serve(config.address)
    try:
        serve.start(http_options={"host": config.host, "port": config.port})
        serve.run(application(serve, config), name=NAME, route_prefix="/")
        ready(f"http://{config.host}:{config.port}")
        while True:
            time.sleep(3600)
    except (OSError, RuntimeError) as error:
        told = " ".join(str(error).split())[:300]
        raise RequestError(f"the server does not start ({told})") from error
    finally:
        if config.address:  # a Ray of our own ends whole, with all that runs in it
            serve.delete(NAME)
        ray.shutdown()


def application(serve: Any, config: ServeConfig) -> Any:
    """Both deployments, bound."""
    gpu = str(config.device).startswith("cuda")
    scaling = {"min_replicas": config.replicas, "max_replicas": config.most_replicas}
    model = serve.deployment(
        name="Model",
        ray_actor_options={"num_gpus": 1 if gpu else 0, "num_cpus": 1},
        autoscaling_config=scaling | {"target_ongoing_requests": 1},
        max_ongoing_requests=1,
        max_queued_requests=config.queue + config.most_replicas,
    )(Replica)
    front = serve.deployment(
        name="Front",
        num_replicas=1,
        max_ongoing_requests=FRONT_REQUESTS,
        ray_actor_options={"num_cpus": 0},
    )(Ingress)
    return front.bind(config.plain(), model.bind(config.plain()))


class Ingress:
    """`Front` as a deployment. model: the handle of the others."""

    def __init__(self, config: dict[str, Any], model: Any) -> None:
        self._model = model.options(stream=True)
        self._front = Front(config, self._work)

    async def __call__(self, request: Any) -> Any:
        return await self._front.answer(request)

    async def _work(self, asked: dict[str, Any], kind: str) -> AsyncIterator[dict[str, Any]]:
        """Carry out a request with whichever model is free.

        Raises:
            HttpError: too many wait already, or the model died.
        """
        from ray.exceptions import RayError
        from ray.serve.exceptions import BackPressureError

        try:
            async for event in self._model.work.remote(asked, kind):
                yield event
        except BackPressureError:
            raise HttpError(429, "the server is full; try again in a few seconds", "full") from None
        except RayError as error:
            _log.error("a model is lost", exc_info=error)
            raise HttpError(503, "the model was lost while it worked; try again", "lost") from None


def _ray_serve(address: str | None) -> tuple[Any, Any]:
    """Ray Serve, and Ray connected.

    Raises:
        RequestError: they are not installed, or no cluster answers.
    """
    ray = connected(address, "serve", "serve")
    try:
        from ray import serve
    except ImportError as error:
        ray.shutdown()
        raise RequestError(
            f"serve needs Ray Serve, which is not installed ({error}): pip install 'comfyui-lance[serve]'"
        ) from None
    return serve, ray


def _open_once(config: ServeConfig) -> None:
    """Look at the checkpoints here, where an error can be read, and not in a replica that is started over and
    over.
    """
    from ..checkpoint.checkpoint import Checkpoint

    for path in (config.checkpoint, config.video_checkpoint):
        if path is not None:
            Checkpoint(path)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
