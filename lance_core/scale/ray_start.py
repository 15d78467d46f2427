"""Ray, connected: a cluster at an address, or one of this machine that ends with this process."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

from ..errors import RequestError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def connected(address: str | None, need: str, extra: str) -> Any:
    """The package ray, connected. need: what cannot be done without it; extra: what to install then.

    Raises:
        RequestError: it is not installed, or nothing answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise RequestError(
            f"{need} needs the package ray, which is not installed: pip install 'comfyui-lance[{extra}]'"
        ) from None
    _look(address)
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    options: dict[str, Any] = {"runtime_env": {"env_vars": {"PYTHONPATH": path}}, "log_to_driver": False}
    options |= {"address": address} if address else {"address": "local", "include_dashboard": False}
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        ray.init(configure_logging=False, **options)
    except Exception as error:  # a ConnectionError, ValueError, RuntimeError, or Ray's own
        told = " ".join(str(error).split())[:250]
        raise RequestError(f"Ray cannot be used at {address or 'this machine'} ({told})") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # Ray's own would abort the process
                signal.signal(number, handler)
    return ray


def _look(address: str | None) -> None:
    """Whether anybody is at a cluster's HOST:PORT; Ray itself would wait for minutes.

    Raises:
        RequestError: nobody.
    """
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), 10).close()
        except (OSError, OverflowError) as error:
            raise RequestError(f"Ray cannot be used at {address}: nobody answers ({error})"[:400]) from None
