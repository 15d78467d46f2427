"""Answers that are no success, and the bodies of forms, by the standard library."""

from __future__ import annotations

from typing import Any


class HttpError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def form(data: bytes, kind: str) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """Fields and files of a multipart/form-data body. kind: its Content-Type.

    Raises:
        HttpError: it is none.
    """
    boundary = kind.partition("boundary=")[2].partition(";")[0].strip().strip('"')
    parts = (b"\r\n" + data).split(b"\r\n--" + boundary.encode())
    if not boundary or len(parts) < 2 or not parts[-1].startswith(b"--"):
        raise HttpError(400, "the body is no whole form")
    fields: dict[str, Any] = {}
    files: dict[str, list[bytes]] = {}
    for part in parts[1:-1]:
        head, _, value = part.partition(b"\r\n\r\n")
        text = head.decode(errors="replace")
        name = _attribute(text, "name")
        if name is None:
            raise HttpError(400, "a part of the form has no name")
        if _attribute(text, "filename") is not None:
            files.setdefault(name, []).append(value)
        else:
            fields[name] = value.decode(errors="replace")
    return fields, files


def _attribute(head: str, name: str) -> str | None:
    """A quoted attribute of a part's Content-Disposition."""
    _, found, rest = head.partition(f'; {name}="')
    return rest.partition('"')[0] if found else None
