"""The released weights, fetched from the Hugging Face hub: resumable, checked, and only when asked.

Pinned are `REVISION`, a commit of the repository, and the SHA-256 of its large files, so that no mirror can
pass off others; the hub's own sizes and hashes at that commit stand for the rest. What was resolved is
recorded beside the files (`.lance-download.json`) and holds for every later try in that folder, until another
revision is asked for.

A file has its final name only when it is complete and its hash right; until then it is `NAME.HASH.part`, to
which the next try appends. So a kill at any moment leaves whole files and resumable parts, never half a
checkpoint.

Listing and files are asked for by one client (`http`). huggingface_hub only says where its cache and its
token are; its environment counts: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN.
"""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .job import Job
from .record import RECORD as RECORD
from .record import missing
from .released import MIRROR_HINT as MIRROR_HINT
from .released import RELEASED, DownloadError, label
from .released import REPO as REPO
from .released import REVISION as REVISION
from .released import name_of as name_of
from .watch import Progress, Watch, locked

LOCK = ".lance-download.lock"


def download(
    name: str,
    root: str | os.PathLike,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    check: Callable[[], None] | None = None,
    endpoint: str | None = None,
    verify: bool = False,
) -> dict[str, Any]:
    """Make a released checkpoint complete in `root`, fetching what is not there yet. Complete already, it
    needs no network.

    Args:
        name: a key of RELEASED.
        root: the folder that has, or will have, Lance_3B, Qwen2.5-VL-ViT, Wan2.2_VAE.pth and so on in it.
        revision: branch, tag or commit; None keeps the one recorded in the folder, or else takes REVISION.
        progress: called four times a second with (what, bytes done, bytes in all).
        check: called four times a second; an exception from it, as from `progress`, stops the download and
            passes through.
        endpoint: the hub's address; default: HF_ENDPOINT, else huggingface.co.
        verify: hash the files that are there once more, although they were found right before.

    Returns:
        name, folder, commit, and lists of paths: fetched, reused, damaged (there before, but wrong; fetched
            again).

    Raises:
        DownloadError: see its `reason`; the message ends with how to get the files by hand.
    """
    if name not in RELEASED:
        raise DownloadError(
            "name", f"There is no released checkpoint {name!r}; there are {', '.join(RELEASED)}."
        )
    job = Job(name, Path(root), endpoint, Watch(progress, check))
    try:
        if verify or not job.complete(revision):
            job.root.mkdir(parents=True, exist_ok=True)
            with locked(job.root / LOCK, job.watch):
                job.run(revision, verify)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
        where = f": {Path(error.filename).name}" if isinstance(error.filename, str) else ""
        why = f"{error.strerror or error}{where}"
        job.fail("disk", "Its disk is full." if full else f"The folder cannot be read or written ({why}).")
    files = job.wanted()
    done = {
        "fetched": job.fetched,
        "reused": [p for p in files if p not in job.fetched],
        "damaged": job.damaged,
    }
    return {"name": name, "folder": str(job.root / name), "commit": job.record["commit"], **done}


# -- the command ---------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    parser.add_argument(
        "name",
        nargs="?",
        choices=RELEASED,
        help="what to fetch; without it, what is there and what is not is listed",
    )
    parser.add_argument(
        "--to", default="models/lance", metavar="DIR", help="folder to put it into; default: %(default)s"
    )
    parser.add_argument(
        "--revision", help="branch, tag or commit; default: the one the folder has, or else the pinned one"
    )
    parser.add_argument("--verify", action="store_true", help="hash the files that are there once more")


def run(args: argparse.Namespace, progress: Progress | None = None) -> dict[str, Any]:
    """The command `download`: fetch what is named; with no name, fetch nothing and say what is there.

    Raises:
        DownloadError: as `download`.
    """
    if args.name is None:
        absent = missing(args.to)
        return {
            "folder": args.to,
            "complete": [n for n in RELEASED if n not in absent],
            "missing": {n: label(n) for n in absent},
        }
    return download(args.name, args.to, revision=args.revision, progress=progress, verify=args.verify)


def report(result: dict[str, Any]) -> str:
    """The result for people."""
    if "missing" in result:
        return "\n".join(
            [f"{result['folder']}:", *(f"  {n}" for n in (*result["complete"], *result["missing"].values()))]
        )
    lines = [
        f"{result['folder']} is complete and checked, at commit {result['commit']}; fetched: "
        f"{', '.join(result['fetched']) or 'nothing'}"
    ]
    lines += (
        [f"  were damaged: {', '.join(result['damaged'])} (what others had changed is kept as FILE.damaged)"]
        if result["damaged"]
        else []
    )
    return "\n".join(lines)
