"""What a training tells while it runs: a JSON line a step, validation losses, and a plot of both."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..errors import RequestError
from ..files import open_append, written

STEPS, VALIDATION, PLOT = "training.jsonl", "validation.jsonl", "loss.png"
SIZE, MARGIN = (960, 540), (80, 50, 30, 60)  # pixels; left, top, right, bottom
INK, SOFT, GRID, RAW, SMOOTH, HELD = "#1f2933", "#7b8794", "#e4e7eb", "#b7d7d3", "#0f766e", "#e8a33d"
SMOOTHING = 0.05  # of the steps so far, the width of the running mean


class Journal:
    """The files of a training's folder that people read.

    Raises:
        RequestError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def step(self, line: dict[str, Any]) -> None:
        """Add a step's line."""
        self._append(STEPS, line)

    def validation(self, line: dict[str, Any]) -> None:
        """Add a validation's line."""
        self._append(VALIDATION, line)

    def cut(self, step: int) -> None:
        """Forget what came after `step` steps, which will be told again."""
        for name in (STEPS, VALIDATION):
            kept = [line for line in self.lines(name) if line["step"] <= step]
            with self._said(name), written(self.folder / name) as file:
                file.write("".join(f"{json.dumps(line)}\n" for line in kept).encode())

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The lines of a file so far; one that a killed run left unfinished is left out."""
        try:
            text = (self.folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        found = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict) and isinstance(value.get("step"), int):
                    found.append(value)
        return found

    def plot(self) -> None:
        """Draw the losses so far."""
        trained = [(line["step"], line["loss"]) for line in self.lines(STEPS) if "loss" in line]
        held = [(line["step"], line["loss"]) for line in self.lines(VALIDATION) if "loss" in line]
        if len(trained) + len(held) < 2:
            return
        with self._said(PLOT), written(self.folder / PLOT) as file:
            draw(trained, held).save(file, format="PNG")

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with self._said(name), open_append(self.folder / name) as file:
            file.write(f"{json.dumps(line)}\n".encode())

    @contextlib.contextmanager
    def _said(self, name: str) -> Any:
        try:
            yield
        except OSError as error:
            raise RequestError(
                f"{self.folder / name} cannot be written ({error.strerror or error})"
            ) from None


Points = Sequence[tuple[int, float]]


def smoothed(points: Points) -> list[tuple[int, float]]:
    """The running mean of the last 5 % of the points so far, at least of one."""
    out, sums = [], [0.0]
    for i, (step, value) in enumerate(points, 1):
        sums.append(sums[-1] + value)
        width = max(1, math.ceil(i * SMOOTHING))
        out.append((step, (sums[i] - sums[i - width]) / width))
    return out


def draw(trained: Points, held: Points) -> Image.Image:
    """A plot of loss by step: each step's, their running mean, and the validation loss."""
    trained = [p for p in trained if math.isfinite(p[1])]
    held = [p for p in held if math.isfinite(p[1])]
    values = [value for _, value in (*trained, *held)] or [0.0]
    last = max([step for step, _ in (*trained, *held)] or [1]) or 1
    low, high = min(values), max(values)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - room, high + room
    left, top, right, bottom = MARGIN[0], MARGIN[1], SIZE[0] - MARGIN[2], SIZE[1] - MARGIN[3]

    def place(point: tuple[float, float]) -> tuple[float, float]:
        step, value = point
        share = (value - low) / (high - low)
        return left + (right - left) * step / last, bottom - (bottom - top) * share

    image = Image.new("RGB", SIZE, "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default()

    def say(x: float, y: float, text: str, colour: str, side: float) -> None:
        """Text centred on y; `side`: the share of its width left of x."""
        _, upper, _, lower = font.getbbox(text)
        pen.text((x - side * font.getlength(text), y - (upper + lower) / 2), text, fill=colour, font=font)

    for tick in ticks(low, high):
        y = place((0, tick))[1]
        pen.line([(left, y), (right, y)], fill=GRID)
        say(left - 10, y, f"{tick:g}", SOFT, 1)
    for tick in ticks(0, last):
        say(place((tick, low))[0], bottom + 16, f"{tick:g}", SOFT, 0.5)
    say(right, bottom + 40, "step", SOFT, 1)
    for points, colour, width in ((trained, RAW, 1), (smoothed(trained), SMOOTH, 2), (held, HELD, 2)):
        if len(points) > 1:
            pen.line([place(p) for p in points], fill=colour, width=width)
        for x, y in [place(p) for p in points] if colour == HELD else []:
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
    x = left
    for name, colour in (("loss of a step", RAW), ("running mean", SMOOTH), ("validation", HELD)):
        pen.line([(x, 26), (x + 24, 26)], fill=colour, width=3)
        say(x + 32, 26, name, INK, 0)
        x += 60 + int(font.getlength(name))
    return image


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two, about five."""
    unit = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(unit * n for n in (1, 2, 5, 10) if (high - low) / (unit * n) <= 6)
    first = math.ceil(low / step)
    return [round(n * step, 12) for n in range(first, math.floor(high / step) + 1)]
