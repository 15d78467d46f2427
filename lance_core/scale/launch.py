"""The processes of a split request: started, watched, and ended together.

Each runs the same command; RANK and WORLD_SIZE in its environment say that it is one of several, as they do
when torchrun starts them. The first one prints and writes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from ..errors import RequestError
from .processes import ending

STORE = "LANCE_SPLIT_STORE"  # where processes that we started find each other
LOST = 75  # exit code of one that lost the others: whoever ended first has the reason
GRACE = 3.0  # seconds for the others to end by themselves
ERROR = 2  # exit code of a typed error, which has been printed


def is_rank() -> bool:
    """Whether this process is one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Which one."""
    return int(os.environ["RANK"])


def device(asked: str | None) -> str:
    """This process's device: a GPU of its own where there are some and no other was asked for."""
    import torch

    if asked not in (None, "cuda") or not (asked or torch.cuda.is_available()):
        return asked or "cpu"
    place = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if place >= torch.cuda.device_count():
        raise RequestError(
            f"process {place + 1} of this machine has no GPU, of which there are "
            f"{torch.cuda.device_count()}; start fewer --workers"
        )
    torch.cuda.set_device(place)
    return f"cuda:{place}"


@contextlib.contextmanager
def member(device: str) -> Iterator[None]:
    """Around what a process does as one of several: torch.distributed is up.

    Raises:
        LostError: another one is gone; not when we started it, as then its starter has the word.
    """
    import torch.distributed as dist

    from .groups import TIMEOUT, LostError, told

    store = os.environ.get(STORE)
    if store:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started us decides
        threading.Thread(target=_end_with_the_starter, daemon=True).start()
    backend = "nccl" if device.startswith("cuda") else "gloo"
    place = Path(store).as_uri() if store else "env://"
    own, size = rank(), int(os.environ["WORLD_SIZE"])
    try:
        told(lambda: dist.init_process_group(backend, place, TIMEOUT, size, own))
        try:
            yield
        finally:
            dist.destroy_process_group()
    except LostError:
        if store:
            os._exit(LOST)
        raise


def _end_with_the_starter() -> None:
    """End this process when its stdin does: whoever started it is gone."""
    with contextlib.suppress(OSError, ValueError):
        while os.read(0, 1 << 10):
            pass
    os._exit(LOST)


def count_for(mode: str, asked: str | int | None) -> int:
    """How many processes: as asked, else all GPUs, or 2.

    Raises:
        RequestError: no number, or one that the mode does not fit.
    """
    import torch

    from .groups import check_count
    from .processes import worker_count

    count = worker_count(asked, 0) if asked not in (None, "all") else max(torch.cuda.device_count(), 2)
    if asked is None and mode == "guidance":
        count = 2
    check_count(mode, count)
    return count


def run(arguments: Sequence[str], count: int, module: str = "lance_core") -> int:
    """Run `python -m MODULE ARGUMENTS` as `count` processes of one group; returns the exit code.

    Raises:
        RequestError: one of them ended before its time; the others have been ended too.
    """
    with tempfile.TemporaryDirectory(prefix="lance-split-") as folder, contextlib.ExitStack() as stack:
        errors = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        started: list[subprocess.Popen] = []
        stack.callback(_end, started)
        for i in range(count):
            started.append(_start([*arguments], module, i, count, Path(folder) / "store", errors[i]))
        return _watched(started, errors)


def _start(
    arguments: list[str], module: str, i: int, count: int, store: Path, errors: IO[bytes]
) -> subprocess.Popen:
    root = str(Path(__file__).resolve().parents[2])
    environment = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // count, 1))} | os.environ
    environment |= {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(count), STORE: str(store)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this machine
    try:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=None if i == 0 else subprocess.DEVNULL,
            stderr=None if i == 0 else errors,
            env=environment,
        )
    except OSError as error:
        raise RequestError(f"no process can be started ({error.strerror or error})") from None


def _watched(started: Sequence[subprocess.Popen], errors: Sequence[IO[bytes]]) -> int:
    """Wait until all have ended well, or one has not."""
    while True:
        codes = [child.poll() for child in started]
        if all(code == 0 for code in codes):
            return 0
        bad = [i for i, code in enumerate(codes) if code]
        if bad or codes[0] == 0:
            break
        time.sleep(0.05)
    until = time.monotonic() + GRACE
    while time.monotonic() < until and any(child.poll() is None for child in started):
        time.sleep(0.05)
    ended = [child.poll() for child in started]
    if not bad and not any(ended):  # the first has its result; the others only had to go
        return 0
    if ended[0] == ERROR and all(codes[i] in (ERROR, LOST) for i in bad):
        return ERROR  # it has said what is wrong
    first = next((i for i in bad if codes[i] != LOST), bad[0] if bad else 0)
    said = _last_line(errors[first])
    raise RequestError(
        f"process {first + 1} of {len(started)}: {ending(codes[first] or ended[first] or 0)}"
        f"{f', saying: {said}' if said else ''}. The others were ended too, and there is no result; start it "
        "again"
    )


def _end(started: list[subprocess.Popen]) -> None:
    for child in started:
        child.kill()
    for child in started:
        with contextlib.suppress(OSError, ValueError):
            child.stdin.close()  # type: ignore[union-attr]
        child.wait()


def _last_line(file: IO[bytes]) -> str:
    file.seek(0)
    lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")
