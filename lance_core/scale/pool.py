"""Rows handed to workers that may be lost at any time: every row is drawn once, or becomes an error's line.

What a worker is does not matter here: `processes.py` and `ray_engine.py` have one each.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Protocol

from ..errors import RequestError
from .results import Line, line_of
from .rows import Row

MAX_ATTEMPTS = 3  # at a row whose worker was lost
MAX_LOSSES = 2 * MAX_ATTEMPTS  # of workers in sequence, without a single row drawn: then none can work here
IN_FLIGHT = 2  # rows a worker has: the one it draws and the one whose media it reads
REST = 2.0  # seconds before a worker is started again where one could not even begin
PATIENCE = 60.0  # seconds without a single worker that can begin

_log = logging.getLogger(__name__)


class Worker(Protocol):
    """Takes rows and posts, for each in order, {"line": ...}; or {"stop": why} for the end of the run, or,
    once it is gone, {"lost": why}, or {"away": why} if it never began with its first row.
    """

    def give(self, row: Row) -> None:
        """One more row. A worker that is gone already posts so; this never raises."""

    def stop(self) -> None:
        """End it now, whatever it does."""


Start = Callable[[int, Callable[[dict[str, Any]], None]], Worker]  # (place, post) -> a started worker


class Pending:
    """Rows that nobody has yet, by checkpoint, task and size, so that a worker seldom changes any of them."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._groups: dict[tuple[str, ...], deque[Row]] = {}
        for row in rows:
            self._groups.setdefault(row.group, deque()).append(row)

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def put_back(self, row: Row) -> None:
        """A row that its worker did not finish, to be the next of its kind."""
        self._groups.setdefault(row.group, deque()).appendleft(row)

    def take(self, last: tuple[str, ...] | None = None) -> Row:
        """The next row for a worker whose last one was of the group `last`: of the same group, else of the
        same checkpoint, else of the checkpoint with the most rows left.
        """
        if last in self._groups:
            return self._pop(last)
        sizes: dict[str, int] = {}
        for group, rows in self._groups.items():
            sizes[group[0]] = sizes.get(group[0], 0) + len(rows)
        wanted = last[0] if last and last[0] in sizes else max(sizes, key=lambda name: sizes[name])
        return self._pop(next(group for group in self._groups if group[0] == wanted))

    def _pop(self, group: tuple[str, ...]) -> Row:
        rows = self._groups[group]
        row = rows.popleft()
        if not rows:
            del self._groups[group]
        return row


def grouped(rows: Iterable[Row]) -> Iterator[Row]:
    """Rows in the order one worker draws them."""
    pending, last = Pending(rows), None
    while len(pending):
        row = pending.take(last)
        last = row.group
        yield row


class _Place:
    """A worker's place: who has it, and the rows it has not finished."""

    def __init__(self) -> None:
        self.worker: Worker | None = None
        self.rows: deque[Row] = deque()
        self.last: tuple[str, ...] | None = None
        self.number = 0  # of the worker, so that what a lost one posted late counts no more
        self.rest = 0.0  # until when no worker is started here


class Pool:
    """`count` workers and the rows they draw. Lines come in the order they are made.

    Raises (while iterated):
        RequestError: the output takes nothing more, or one worker after the other is lost.
    """

    def __init__(self, rows: Iterable[Row], start: Start, count: int) -> None:
        self._start = start
        self._pending = Pending(rows)
        self._places = [_Place() for _ in range(min(count, max(len(self._pending), 1)))]
        self._events: queue.Queue[tuple[_Place, int, dict[str, Any]]] = queue.Queue()
        self._attempts: dict[int, int] = {}
        self._losses = 0
        self._since = time.monotonic()  # the last line, or the last time that somebody could work

    def lines(self) -> Generator[Line, None, None]:
        """The line of every row."""
        try:
            while True:
                self._hand_out()
                if not any(place.rows for place in self._places) and not self._pending:
                    return
                try:
                    place, number, event = self._events.get(timeout=REST)
                except queue.Empty:
                    continue
                if number != place.number:
                    continue
                if "stop" in event:
                    raise RequestError(event["stop"])
                if "line" in event:
                    place.rows.popleft()
                    self._losses, self._since = 0, time.monotonic()
                    yield event["line"]
                elif "away" in event:
                    self._away(place, event["away"])
                else:
                    yield from self._lost(place, event["lost"])
        finally:
            for place in self._places:
                if place.worker is not None:
                    place.worker.stop()

    def _hand_out(self) -> None:
        """A row to whoever has none, then, while there are enough for all, one more to read meanwhile."""
        for held in range(IN_FLIGHT):
            for i, place in enumerate(self._places):
                enough = len(self._pending) > (0 if held == 0 else len(self._places) - 1)
                if len(place.rows) == held and enough and place.rest <= time.monotonic():
                    self._give(i, place)

    def _give(self, i: int, place: _Place) -> None:
        row = self._pending.take(place.last)
        place.rows.append(row)
        place.last = row.group
        if place.worker is None:
            place.number += 1
            number = place.number
            place.worker = self._start(i, lambda event: self._events.put((place, number, event)))
        place.worker.give(row)

    def _leave(self, place: _Place) -> None:
        if place.worker is not None:
            place.worker.stop()
        place.worker, place.number = None, place.number + 1

    def _away(self, place: _Place, why: str) -> None:
        """Nobody can work in a place: its rows go back, and later it is tried again.

        Raises:
            RequestError: so it is in all places, and has been for long.
        """
        self._leave(place)
        self._put_back(place)
        now = time.monotonic()
        place.rest = now + REST
        if any(other.rows for other in self._places):
            self._since = now
        elif now - self._since > PATIENCE:
            raise RequestError(f"nobody has been there to work for {PATIENCE:.0f} seconds: {why}")

    def _put_back(self, place: _Place) -> None:
        for row in reversed(place.rows):
            self._pending.put_back(row)
        place.rows.clear()

    def _lost(self, place: _Place, why: str) -> Iterator[Line]:
        """A worker is gone: the row it was drawing is tried again, or given up; the others go back."""
        self._leave(place)
        self._losses += 1
        if self._losses >= MAX_LOSSES:
            raise RequestError(
                f"{self._losses} workers in sequence ended without a result, the last one so: {why}. Try one "
                "row without --workers to see what is wrong; the rows done so far are kept"
            )
        if not place.rows:
            return
        row = place.rows.popleft()
        self._put_back(place)
        attempts = self._attempts[row.number] = self._attempts.get(row.number, 0) + 1
        _log.warning("The worker at row %s is lost (%s); another takes its place.", row.id, why)
        if attempts < MAX_ATTEMPTS:
            self._pending.put_back(row)
            return
        error = f"{attempts} workers ended while they made this row, the last one so: {why}"
        yield line_of(row.id, row.task, error=error[:500])
