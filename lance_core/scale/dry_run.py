"""Every row of a batch looked at, nothing drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..errors import LanceError
from .comfyui import Plan
from .rows import Row
from .selection import Work
from .workflow import filled

Progress = Callable[[str, int, int], None]


def checked(work: Work, plan: Plan | None, progress: Progress | None) -> dict[str, Any]:
    """Every row's media opened, every workflow filled; nothing is written."""
    errors = {row.id: row.error for row in work.bad}
    for done, (row, error) in enumerate(_opened(work.rows, plan), 1):
        if error is not None:
            errors[row.id] = str(error)
        if progress is not None:
            progress("checking", done, len(work.rows))
    return {"rows": work.total, "failed": len(errors), "errors": errors}


def _opened(rows: Iterable[Row], plan: Plan | None) -> Iterator[tuple[Row, LanceError | None]]:
    from ..inputs import media

    for row in rows:
        try:
            if plan is not None:
                filled(plan.workflows[row.task], row, row.paths, "")
            for path in row.paths:
                if row.kind.takes == "video":
                    media.read_clip(path, pick=lambda total, _: [0])
                else:
                    media.load_image(path)
            yield row, None
        except LanceError as error:
            yield row, error
