"""Results as text and Markdown: one table writer for every measurement, and the words for times and bytes.

A document is a list of blocks: a paragraph (str), `Notes` or a `Table`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; columns in which no row has anything are left out."""

    head: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)

    def used(self) -> list[list[str]]:
        """The head and the rows, without empty columns."""
        every = [list(self.head), *self.rows]
        keep = [i for i in range(len(self.head)) if i == 0 or any(row[i] for row in self.rows)]
        return [[row[i] for i in keep] for row in every]

    def text(self) -> str:
        """Aligned, the first column to the left."""
        rows = self.used()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for first, *rest in rows:
            cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
        return "\n".join(lines)

    def markdown(self) -> str:
        """With pipes."""
        rows = self.used()
        head, *body = (f"| {' | '.join(row)} |" for row in rows)
        return "\n".join([head, "|---|" + "--:|" * (len(rows[0]) - 1), *body])


@dataclass(frozen=True)
class Notes:
    """Short lines, a list in Markdown."""

    lines: list[str]


Block = str | Table | Notes


def text(blocks: Iterable[Block]) -> str:
    """A document for people."""

    def one(block: Block) -> str:
        if isinstance(block, Table):
            return block.text()
        return "\n".join(block.lines) if isinstance(block, Notes) else block

    return "\n\n".join(map(one, blocks))


def markdown(blocks: Iterable[Block]) -> str:
    """A document as Markdown."""

    def one(block: Block) -> str:
        if isinstance(block, Table):
            return block.markdown()
        if isinstance(block, Notes):
            return "\n".join(f"- {line}" for line in block.lines)
        return block.replace("\n", "  \n")

    return "\n\n".join(map(one, blocks))


def seconds_text(seconds: float) -> str:
    """A duration with a unit that suits it."""
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    for unit, size in (("s", 1), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)):
        if seconds >= (0.1 * size if unit == "ms" else size):
            return f"{seconds / size:.{1 if unit in ('µs', 'ns') else 2}f} {unit}"
    return f"{seconds * 1e12:.1f} ps" if seconds else "0 s"


def mebibytes(count: int | None) -> str:
    """Bytes in MiB, "?" where nobody counted."""
    return "?" if count is None else f"{count / 2**20:.0f} MiB"


def gigabytes(count: float, digits: int = 1) -> str:
    """Bytes in units of 10^9, the unit left out."""
    return f"{count / 1e9:.{digits}f}"
