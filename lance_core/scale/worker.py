"""The child's side of processes.py: `python -m lance_core.scale.worker`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from typing import Any

from .results import StorageFullError
from .rows import Row
from .work import Ahead, Session, Settings


def main() -> None:
    """Read settings and rows from stdin, and write a line for each row, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the batch decides when its workers end
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no answer of ours

    def tell(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    first = sys.stdin.readline()
    if not first:
        return
    ahead = Ahead(Session(Settings(**json.loads(first))))

    def listen() -> None:
        for line in sys.stdin:
            ahead.give(Row(**json.loads(line)))
        os._exit(0)  # nobody wants the rest; a file that is being written has not its name yet

    threading.Thread(target=listen, daemon=True).start()
    code = 0
    try:
        for line in ahead.lines():
            tell({"line": line})
    except StorageFullError as error:
        tell({"stop": str(error)})
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)  # the thread above holds stdin, which Python would wait for


if __name__ == "__main__":
    main()
