"""The folder beside a result: made, found again, or put aside, so that nothing of an earlier run is lost."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from ..errors import RequestError
from ..files import kind_of
from . import parallel

ENDING, CACHE = ".training", "cache"


def folder_of(output: Path) -> Path:
    """Where a result's states, lines, samples and plot are."""
    return output.with_name(output.stem + ENDING)


def prepare(output: Path, resume: bool) -> Path:
    """The folder of a training, made. One of an earlier run that is not gone on with is renamed
    NAME.training-1, -2, ...; its cache of latents moves on to the new one.

    Raises:
        RequestError: the result or the folder cannot be written.
    """
    _check(output)
    folder = folder_of(output)
    if parallel.rank() == 0:
        try:
            if folder.is_dir() and not resume and any(p.name != CACHE for p in folder.iterdir()):
                _put_aside(folder)
            folder.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise RequestError(f"{folder} cannot be written ({error.strerror or error})") from None
    return folder


def _check(output: Path) -> None:
    if output.suffix.lower() != ".safetensors":
        raise RequestError(f"{output}: the result is a safetensors file; give it that ending")
    try:
        if not output.absolute().parent.is_dir():
            raise RequestError(f"{output}: the folder {output.parent} does not exist; make it first")
        if output.exists() and not output.is_file():
            raise RequestError(f"{output} is {kind_of(output.stat().st_mode)}; name another file")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise RequestError(f"{str(output)[:200]} cannot be written ({error})") from None


def _put_aside(folder: Path) -> None:
    number = 1
    while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    folder.rename(aside)
    with contextlib.suppress(FileNotFoundError):
        cache = aside / CACHE
        if cache.is_dir():
            folder.mkdir()
            cache.rename(folder / CACHE)
