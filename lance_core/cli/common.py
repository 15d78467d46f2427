"""What all commands share: options, progress bars, output that always gets out, targets checked first."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..errors import RequestError

if TYPE_CHECKING:
    import torch

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class Bars:
    """Progress bars on stderr, one a stage, shown once the stage has lasted a second."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.stage: str | None = None
        self.bar: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self.enabled:
            return
        if self.bar is None or stage != self.stage or done < self.bar.n:
            self.close()
            self.stage, self.bar = stage, tqdm(total=total, desc=stage, delay=1, leave=False, file=sys.stderr)
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.close()

    def note(self, text: str) -> None:
        """A line on stderr, above the bar."""
        tqdm.write(text, file=sys.stderr)

    def status(self, text: str) -> None:
        """Show a few words behind the bar."""
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


# -- options ------------------------------------------------------------------------------------------------


def output_options(parser: argparse.ArgumentParser) -> None:
    """--json and --quiet."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bars")


def part_options(parser: argparse.ArgumentParser) -> None:
    """Where the parts are that lie neither inside nor beside the checkpoint."""
    parser.add_argument(
        "--vit", metavar="FILE", help="vision tower, if it is not inside or beside the checkpoint"
    )
    parser.add_argument("--vae", metavar="FILE", help="VAE, if it is not beside the checkpoint")


def model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, where and how it runs."""
    parser.add_argument(
        "-m",
        "--model",
        "--checkpoint",
        metavar="DIR",
        help="checkpoint folder; default: models/lance/Lance_3B, or Lance_3B_Video for video",
    )
    part_options(parser)
    parser.add_argument("--device", help="torch device; default: cuda where there is one, else cpu")
    names = [*DTYPES, *DTYPES.values()]
    parser.add_argument(
        "--dtype",
        choices=names,
        default="bf16",
        metavar="{" + ",".join(DTYPES) + "}",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--compile", action="store_true", help="fuse small steps with torch.compile: takes minutes once"
    )
    parser.add_argument(
        "--overlap",
        action="store_true",
        help="run the understanding expert's few tokens beside the rest; CUDA only",
    )


def dtype_of(name: str) -> torch.dtype:
    """The dtype of an option's value, by either of its names."""
    import torch

    return getattr(torch, DTYPES.get(name, name))


def device_of(name: str | None) -> str:
    """The device asked for, or else the best there is."""
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


# -- output -------------------------------------------------------------------------------------------------


def prepare_output() -> None:
    """Let every character out: what the terminal's or file's encoding lacks is written as its escape."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # no real file, closed, or none at all
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def to_json(value: dict[str, Any]) -> str:
    """One line of JSON; in ASCII where stdout cannot hold every character as it is."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "").replace("_", "")
    return json.dumps(value, ensure_ascii=encoding not in ("utf8", "utf16", "utf32"))


# -- targets ------------------------------------------------------------------------------------------------


def check_target(path: str | os.PathLike) -> Path:
    """A file that is to be written, refused before any work if it could not be.

    Raises:
        RequestError: no such folder, one that cannot be written, a name too long, or a target that is no
            regular file or cannot be replaced.
    """
    target = Path(path)
    folder = target.absolute().parent
    try:
        if not folder.is_dir():
            raise RequestError(f"{target}: the folder {target.parent} does not exist; make it first")
        try:
            mode = os.stat(target).st_mode
        except FileNotFoundError:
            mode = None
        if mode is not None:
            if stat.S_ISDIR(mode):
                raise RequestError(f"{target} is a folder; name a file in it")
            if not stat.S_ISREG(mode):
                raise RequestError(f"{target} is no regular file and would not be replaced; name another")
            os.close(os.open(target, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0)))
        with tempfile.TemporaryFile(dir=folder):  # gone at once, also if we are killed
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(
            f"{_short(target)} cannot be written ({reason}); name another file or folder"
        ) from None
    return target


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:200]}…"
