"""The released weights, fetched from the Hugging Face hub: resumable, checked, and only when asked.

Pinned are `REVISION`, a commit of the repository, and the SHA-256 of its large files, so that no mirror can
pass off others; the hub's own sizes and hashes at that commit stand for the rest. What was resolved is
recorded beside the files (`.lance-download.json`) and holds for every later try in that folder, until another
revision is asked for.

A file has its final name only when it is complete and its hash right; until then it is `NAME.HASH.part`, to
which the next try appends. So a kill at any moment leaves whole files and resumable parts, never half a
checkpoint.

huggingface_hub says what the repository holds, and its token, cache and environment count (HF_HOME,
HF_HUB_CACHE, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN). The bytes are fetched by `transfer`: the library's own
downloads notice an interrupt only when a read returns (hf_xet not at all), compare no hashes, and resume by
rules of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import re
import shutil
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ..errors import LanceError
from . import http
from .http import Entry, Part, Progress, Transient, Watch, WrongSize, locked, receive

REPO = "bytedance-research/Lance"
# of 2026-05-28; LANCE_REVISION in the environment goes before it
REVISION = "7395315758865e6f56ab87ad06a88c7ac172f056"
# of large files at REVISION, as several public lists have them; the ViT's is in one only and left to the hub
SHA256 = {
    "Lance_3B/model.safetensors": "a2cfed3992486699aa550c1ea9b3519bd19dde475a0992daf2249f2486b268a3",
    "Lance_3B_Video/model.safetensors": "7f0550e1d1511b29a4740a67c1e18e176302a4ecb3177c8a5850ff5fe6447c25",
    "Wan2.2_VAE.pth": "20eb789667fa5e60e7516bf509512f6cb61f01b0aa0695eadaea930c13892b36",
}
_SHARED = {
    "Qwen2.5-VL-ViT/config.json": 1_000,
    "Qwen2.5-VL-ViT/vit.safetensors": 1_340_000_000,
    "Wan2.2_VAE.pth": 2_818_839_170,
}
_TEXTS = {
    "llm_config.json": 2_000,
    "tokenizer.json": 7_000_000,
    "vocab.json": 2_800_000,
    "merges.txt": 1_700_000,
}
RELEASED: dict[str, dict[str, int]] = {
    name: {f"{name}/model.safetensors": size}
    | {f"{name}/{text}": small for text, small in _TEXTS.items()}
    | _SHARED
    for name, size in {"Lance_3B": 12_370_600_000, "Lance_3B_Video": 14_211_300_000}.items()
}
"""Checkpoint -> the files it needs, by their path in repository and folder alike, and their bytes at REVISION, roughly."""

RECORD, LOCK = ".lance-download.json", ".lance-download.lock"
MARGIN = 1 << 30  # bytes to leave free on the disk
RETRIES = 6  # failures in a row that brought less than a transfer.CHUNK each
BACKOFF = 1.0  # seconds before the first retry; doubles up to 30
LOG = logging.getLogger(__name__)


class DownloadError(LanceError):
    """A download that cannot go on; what is on disk stays, and the next try resumes from it.

    `reason` is one of "install", "name", "offline", "network", "refused", "absent", "mismatch", "disk".
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def missing(root: str | os.PathLike) -> list[str]:
    """The released checkpoints that are not complete in `root`. Looks at names and recorded sizes only, so it
    is fast.
    """
    root, verified = Path(root), read_record(Path(root))["verified"]

    def there(path: str) -> bool:
        with contextlib.suppress(OSError):
            size = (root / path).stat().st_size
            return size == verified.get(path, [size])[0]
        return path.endswith("/model.safetensors") and (root / path).with_name("ema.safetensors").is_file()

    return [name for name, files in RELEASED.items() if not all(map(there, files))]


def label(name: str) -> str:
    """How a checkpoint that is not on disk is listed: "Lance_3B (download, 17 GB)". `name_of` is the way
    back.
    """
    return f"{name} (download, {sum(RELEASED[name].values()) / 1e9:.0f} GB)"


def name_of(text: str) -> str | None:
    """The checkpoint a `label` stands for, whatever size it says; None if the text is no label."""
    name, mark, _ = text.partition(" (download")
    return name if mark and name in RELEASED else None


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
    job = _Job(name, Path(root), endpoint, Watch(progress, check))
    try:
        if verify or not job.complete(revision):
            job.root.mkdir(parents=True, exist_ok=True)
            with locked(job.root / LOCK, job.watch):
                job.run(revision, verify)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
        job.fail(
            "disk", f"The disk of {root} is full." if full else f"{root} cannot be read or written ({error})."
        )
    files = job.wanted()
    done = {
        "fetched": job.fetched,
        "reused": [p for p in files if p not in job.fetched],
        "damaged": job.damaged,
    }
    return {"name": name, "folder": str(job.root / name), "commit": job.record["commit"], **done}


def read_record(root: Path) -> dict[str, Any]:
    """What was resolved and found right in a folder. An unreadable record is as good as none: files are
    hashed once more.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        found = json.loads((root / RECORD).read_text(encoding="utf-8"))
        found["listing"] = {
            path: Entry(int(size), str(digest))
            for path, (size, digest) in found["listing"].items()
            if _ours(path)
        }
        found["verified"] = {
            path: [int(size), int(mtime), str(digest)]
            for path, (size, mtime, digest) in found["verified"].items()
        }
        if found["repo"] == REPO and isinstance(found["commit"] + found["revision"], str):
            return found
    return {"repo": REPO, "revision": "", "commit": "", "listing": {}, "verified": {}}


def _ours(path: str) -> bool:
    """Whether a path of the repository may be fetched: what RELEASED lists, and small texts beside the
    models.
    """
    beside = re.fullmatch(r"([\w.-]+)/\w[\w.-]*\.(json|txt)", path)
    return any(path in files for files in RELEASED.values()) or bool(beside and beside[1] in RELEASED)


class _Job:
    """One call of `download`."""

    def __init__(self, name: str, root: Path, endpoint: str | None, watch: Watch) -> None:
        self.name, self.root, self.watch, self.record = name, root, watch, read_record(root)
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self.fetched: list[str] = []
        self.damaged: list[str] = []

    def fail(self, reason: str, message: str) -> NoReturn:
        where = f"{self.endpoint}/{REPO}/tree/{self.record['commit'] or REVISION}"
        raise DownloadError(
            reason,
            f"{message} What is here already stays, and starting again goes on from there. By hand: get the "
            f"folders {self.name} and "
            f"Qwen2.5-VL-ViT and the file Wan2.2_VAE.pth from {where} (at least "
            f"{', '.join(RELEASED[self.name])}) and put them into "
            f"{self.root}.",
        ) from None

    # -- what there should be --------------------------------------------------------------------------------

    def wanted(self) -> dict[str, Entry]:
        """The files of this checkpoint, small ones first: the model comes last, so a folder with it has all
        else.
        """
        mine = [
            (p, e)
            for p, e in self.record["listing"].items()
            if p in RELEASED[self.name] or p.startswith(f"{self.name}/")
        ]
        return dict(sorted(mine, key=lambda item: (item[0].endswith("/model.safetensors"), item[1].size)))

    def complete(self, revision: str | None) -> bool:
        """Whether every file was found right before and has not been touched since."""
        known = self.record["commit"] and revision in (None, self.record["commit"])
        return bool(
            known and all(self.stamp(path) == self.record["verified"].get(path, 0) for path in self.wanted())
        )

    def stamp(self, path: str) -> list | None:
        with contextlib.suppress(OSError):
            stat = (self.root / path).stat()
            return [stat.st_size, stat.st_mtime_ns, self.record["listing"][path].digest]

    def save(self) -> None:
        temporary = self.root / f"{RECORD}.tmp"
        temporary.write_text(json.dumps(self.record, indent=1), encoding="utf-8")
        os.replace(temporary, self.root / RECORD)

    def run(self, revision: str | None, verify: bool) -> None:
        self.record = read_record(self.root)  # another process may have been at work
        try:
            import huggingface_hub.constants
        except ImportError:
            self.fail("install", "Downloading needs huggingface_hub: pip install huggingface_hub.")
        self.hub, env = huggingface_hub, os.environ.get
        self.offline = huggingface_hub.constants.HF_HUB_OFFLINE or env("HF_HUB_OFFLINE", "").upper() in (
            "1",
            "ON",
            "YES",
            "TRUE",
        )
        home = env("HF_HOME") and Path(env("HF_HOME")).expanduser() / "hub"
        self.cache = env("HF_HUB_CACHE") or home or huggingface_hub.constants.HF_HUB_CACHE
        if not self.record["commit"] or revision not in (None, self.record["commit"]):
            self.resolve(revision or env("LANCE_REVISION") or REVISION)
        wanted = self.wanted()
        absent = {path: entry for path, entry in wanted.items() if not self.sound(path, entry, verify)}
        self.check_disk(absent)
        self.watch.total = total = sum(entry.size for entry in wanted.values())
        done = total - sum(entry.size for entry in absent.values())
        for path, entry in absent.items():
            self.watch.stage(f"downloading {path}", done, total)
            self.fetch(path, entry)
            self.fetched.append(path)
            done += entry.size
        self.watch.stage(f"{self.name} is complete", total, total)

    def resolve(self, revision: str) -> None:
        """Learn the commit `revision` stands for and its files, from the hub or, offline, from its cache, and
        record them.
        """
        commit, listing = self.from_cache(revision) if self.offline else self.from_hub(revision)
        if re.fullmatch(r"[0-9a-f]{40}", revision) and commit != revision:
            self.fail(
                "mismatch", f"{self.endpoint} answered with commit {commit} where {revision} was asked for."
            )
        listing = {path: entry for path, entry in listing.items() if _ours(path)}
        lacking = [path for path in RELEASED[self.name] if path not in listing]
        if lacking:
            self.fail(
                "absent",
                f"{REPO} has no {', '.join(lacking)} at revision {revision}; try --revision {REVISION}, or "
                "main.",
            )
        for path, sha256 in SHA256.items() if revision == REVISION else ():
            if path in listing and listing[path].digest != sha256:
                self.fail(
                    "mismatch",
                    f"{self.endpoint} offers a {path} that is not the released one (SHA-256 "
                    f"{listing[path].digest}).",
                )
        self.record |= {"revision": revision, "commit": commit, "listing": listing}
        self.save()

    def from_hub(self, revision: str) -> tuple[str, dict[str, Entry]]:
        api = self.hub.HfApi(endpoint=self.endpoint)
        for failures in range(3):
            info, error = self.watch.outcome(
                lambda: api.model_info(REPO, revision=revision, files_metadata=True, timeout=http.STALL)
            )
            if error is None:
                break
            status = getattr(getattr(error, "response", None), "status_code", 0) or 0
            if status and status < 500 and status not in (408, 429):
                self.refuse(status, f"{REPO} at revision {revision}")
            if failures == 2:
                self.fail(
                    "network",
                    f"{self.endpoint} cannot be reached ({type(error).__name__}: {str(error)[:200]}).",
                )
            self.watch.sleep(BACKOFF * 2**failures)
        try:
            lfs = {s.rfilename: s.lfs["sha256"] for s in info.siblings if s.lfs}
            return info.sha, {
                s.rfilename: Entry(int(s.size), lfs.get(s.rfilename) or str(s.blob_id)) for s in info.siblings
            }
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            self.fail(
                "mismatch",
                f"{self.endpoint} does not answer as a hub does: no sizes and hashes of files ({error!r}).",
            )

    def from_cache(self, revision: str) -> tuple[str, dict[str, Entry]]:
        """In the hub's cache a file is a link to one named by its hash."""
        known = self.hub.try_to_load_from_cache(
            REPO, "Wan2.2_VAE.pth", cache_dir=self.cache, revision=revision
        )
        if not isinstance(known, str):
            self.fail(
                "offline", f"HF_HUB_OFFLINE is set, and {REPO} at revision {revision} is not in {self.cache}."
            )
        snapshot = Path(known).parent
        blobs = {
            file.relative_to(snapshot).as_posix(): file.resolve()
            for file in snapshot.rglob("*")
            if file.is_file()
        }
        hashed = {
            p: blob for p, blob in blobs.items() if re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", blob.name)
        }
        return snapshot.name, {path: Entry(blob.stat().st_size, blob.name) for path, blob in hashed.items()}

    def refuse(self, status: int, what: str) -> NoReturn:
        if status in (401, 403):
            self.fail(
                "refused",
                f"{self.endpoint} refuses {what} (HTTP {status}); set HF_TOKEN to a token that may read it.",
            )
        if status == 404:
            self.fail("absent", f"{self.endpoint} has no {what} (HTTP 404); try --revision main.")
        self.fail("refused", f"{self.endpoint} answered HTTP {status} for {what}.")

    # -- what there is ---------------------------------------------------------------------------------------

    def sound(self, path: str, entry: Entry, verify: bool) -> bool:
        """Whether the file is here and right. A wrong one is named and put out of the way: one of ours goes,
        another's is kept.
        """
        target, stamp = self.root / path, self.stamp(path)
        if stamp is None:
            return False
        seen = self.record["verified"].get(path, [])
        if seen == stamp and not verify:
            return True
        hasher = entry.hasher()
        if (
            stamp[0] == entry.size
            and self.watch.hash_into(hasher, target) == entry.size
            and hasher.hexdigest() == entry.digest
        ):
            self.believe(path)
            return True
        LOG.warning(
            "%s is damaged or of another revision (%d bytes, expected %d); it is fetched again",
            target,
            stamp[0],
            entry.size,
        )
        self.damaged.append(path)
        os.replace(target, target.with_name(f"{target.name}.damaged"))
        if seen[:2] == stamp[:2]:  # as this left it
            target.with_name(f"{target.name}.damaged").unlink()
        return False

    def believe(self, path: str) -> None:
        self.record["verified"][path] = self.stamp(path)
        self.save()

    def part(self, path: str, entry: Entry) -> Path:
        """Where an unfinished file is. The hash in its name keeps the bytes of two revisions apart."""
        return (self.root / path).with_name(f"{Path(path).name}.{entry.digest[:12]}.part")

    def check_disk(self, absent: dict[str, Entry]) -> None:
        need = 0
        for path, entry in absent.items():
            part, blob = self.part(path, entry), self.cached(path, entry)
            linked = blob is not None and blob.stat().st_dev == self.root.stat().st_dev
            need += 0 if linked else entry.size - (part.stat().st_size if part.is_file() else 0)
        free = shutil.disk_usage(self.root).free
        if need and need + MARGIN > free:
            gb = [f"{n / 1e9:.1f} GB" for n in (need, MARGIN, free, need + MARGIN - free)]
            self.fail(
                "disk",
                f"{self.root} needs {gb[0]} and {gb[1]} to spare but has {gb[2]} free: free {gb[3]} or use "
                "another disk.",
            )

    # -- getting it ------------------------------------------------------------------------------------------

    def fetch(self, path: str, entry: Entry) -> None:
        """Make the part whole, by the hub's cache or the network, and give it its name if its hash is right."""
        target, part = self.root / path, Part(self.part(path, entry), entry)
        target.parent.mkdir(parents=True, exist_ok=True)
        base = self.watch.done
        try:
            for second in (False, True):
                if not second and (blob := self.cached(path, entry)):
                    part.start_as(blob, self.watch)
                self.fill(path, part, base)
                if part.hasher.hexdigest() == entry.digest:
                    break
                LOG.warning("%s arrived damaged; it is fetched once more", path)
                part.restart()
            else:
                self.fail(
                    "mismatch",
                    f"{path} arrived damaged twice (its hash is not {entry.digest}); a proxy may alter it.",
                )
            _, error = self.watch.outcome(part.close, True)
        finally:
            part.close()
        if error:
            raise error
        os.replace(part.path, target)
        self.believe(path)
        for other in target.parent.glob(f"{target.name}.*.part"):  # of other revisions
            other.unlink()

    def cached(self, path: str, entry: Entry) -> Path | None:
        """The file in the hub's cache, if it is there at this commit and of the right size."""
        known = self.hub.try_to_load_from_cache(
            REPO, path, cache_dir=self.cache, revision=self.record["commit"]
        )
        blob = Path(known).resolve() if isinstance(known, str) else None
        return blob if blob and blob.stat().st_size == entry.size else None

    def fill(self, path: str, part: Part, base: int) -> None:
        """Bring the part to its full size, retrying until RETRIES failures in a row have brought next to
        nothing.
        """
        part.path.touch()
        if part.path.stat().st_size > part.entry.size:
            part.restart()
        elif not part.size:
            part.size = self.watch.hash_into(part.hasher, part.path)
        url = self.hub.hf_hub_url(REPO, path, revision=self.record["commit"], endpoint=self.endpoint)
        token = self.hub.get_token()
        headers = {"User-Agent": "comfyui-lance"} | ({"Authorization": f"Bearer {token}"} if token else {})
        failures = 0
        while part.size < part.entry.size:
            if self.offline:
                self.fail(
                    "offline", f"HF_HUB_OFFLINE is set, and {path} is neither here nor in {self.cache}."
                )
            before = part.size
            self.watch.done = base + before
            try:
                receive(url, headers, part, self.watch)
            except WrongSize as error:
                self.fail("mismatch", f"{error}; a proxy or a login page may answer instead.")
            except urllib.error.HTTPError as error:
                self.refuse(error.code, path)
            except Transient as error:
                failures = 0 if part.size - before >= http.CHUNK else failures + 1
                if failures > RETRIES:
                    self.fail(
                        "network",
                        f"{path} stopped at {part.size} of {part.entry.size} bytes, {failures} times in a "
                        f"row ({error}).",
                    )
                LOG.warning("%s: %s at byte %d; trying again", path, error, part.size)
                self.watch.sleep(min(BACKOFF * 2 ** max(0, failures - 1), 30.0))


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
