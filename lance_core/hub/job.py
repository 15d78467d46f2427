"""One download: what there should be, what is there, and the rest of it fetched (for `download`)."""

from __future__ import annotations

import logging
import os
import re
import shutil
import urllib.error
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

from . import released
from . import watch as watching
from .http import BadRedirect, Client, PartFile, Transient, WrongFile
from .record import Expected, expected, is_commit, read_record, save_record
from .released import MIRROR_HINT, RELEASED, REPO, REVISION, DownloadError, ours
from .watch import Watch

MARGIN = 1 << 30  # bytes to leave free on the disk
RETRIES = 6  # failures in a row that brought less than a watch.CHUNK each
BACKOFF = 1.0  # seconds before the first retry; doubles up to 30
LOG = logging.getLogger(__name__)
USER_AGENT = {"User-Agent": "comfyui-lance"}


class Job:
    """One call of `download`. Nothing is asked of the network before `run`."""

    client: Client
    offline: bool
    cache: str

    def __init__(self, name: str, root: Path, endpoint: str | None, watch: Watch) -> None:
        self.name, self.root, self.watch, self.record = name, root, watch, read_record(root)
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self.fetched: list[str] = []
        self.damaged: list[str] = []

    def fail(self, reason: str, message: str) -> NoReturn:
        """Raise a DownloadError that ends with how to get the files by hand."""
        where = f"{self.endpoint[:80]}/{REPO}/tree/{self.record['commit'] or REVISION}"
        by_hand = (
            f" Files here stay. By hand: get the folders {self.name} (with {self.name}/model.safetensors) "
            f"and Qwen2.5-VL-ViT and the file Wan2.2_VAE.pth from {where} into {self.root}."
        )
        room = max(120, 499 - len(by_hand))
        message = message if len(message) <= room else f"{message[: room - 2]}…."
        raise DownloadError(reason, message + by_hand) from None

    # -- what there should be --------------------------------------------------------------------------------

    def wanted(self) -> dict[str, Expected]:
        """The files of this checkpoint, small ones first: the model comes last, so a folder with it has all
        else.
        """
        mine = [
            (p, e)
            for p, e in self.record["listing"].items()
            if p in RELEASED[self.name] or p.startswith(f"{self.name}/")
        ]
        return dict(sorted(mine, key=lambda item: (item[0].endswith("/model.safetensors"), item[1].size)))

    def lacking(self, listing: dict[str, Expected]) -> list[str]:
        """What the checkpoint needs and a listing has not."""
        return [path for path in RELEASED[self.name] if path not in listing]

    def complete(self, revision: str | None) -> bool:
        """Whether every file was found right before and has not been touched since."""
        known = self.record["commit"] and revision in (None, self.record["commit"])
        return bool(
            known
            and not self.lacking(self.record["listing"])
            and all(self.stamp(path) == self.record["verified"].get(path, 0) for path in self.wanted())
        )

    def stamp(self, path: str) -> list[Any] | None:
        """Size, time and hash of a file as it is, for the record; None if it is not there."""
        try:
            stat = (self.root / path).stat()
        except OSError:
            return None
        return [stat.st_size, stat.st_mtime_ns, self.record["listing"][path].digest]

    def run(self, revision: str | None, verify: bool) -> None:
        """Fetch what is not there or not right.

        Raises:
            DownloadError: see its `reason`.
        """
        self.record = read_record(self.root)  # another process may have been at work
        self.set_up()
        kept = self.record["commit"]
        if not kept or revision not in (None, kept) or self.lacking(self.record["listing"]):
            self.resolve(revision or kept or os.environ.get("LANCE_REVISION") or REVISION)
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

    def set_up(self) -> None:
        """What the environment says: cache, token, proxies, offline."""
        try:
            import huggingface_hub.constants
        except ImportError:
            self.fail("install", "Downloading needs huggingface_hub: pip install huggingface_hub.")
        self.hub, env = huggingface_hub, os.environ.get
        on = ("1", "ON", "YES", "TRUE")
        self.offline = huggingface_hub.constants.HF_HUB_OFFLINE or env("HF_HUB_OFFLINE", "").upper() in on
        home = env("HF_HOME", "")
        hub = str(Path(home).expanduser() / "hub") if home else huggingface_hub.constants.HF_HUB_CACHE
        self.cache = env("HF_HUB_CACHE") or hub
        try:
            parts = urlsplit(self.endpoint)
            if parts.scheme not in ("http", "https") or not parts.hostname or (parts.port or 1) < 1:
                raise ValueError
        except ValueError:
            self.fail(
                "network", f"The hub's address {self.endpoint[:80]!r} is no https address (HF_ENDPOINT)."
            )
        try:
            self.client = Client()
        except ValueError as error:
            self.fail("network", f"No download is possible: {error}.")

    def headers(self) -> dict[str, str]:
        token = self.hub.get_token()
        if token and not re.fullmatch(r"[!-~]+", token):
            self.fail("refused", "HF_TOKEN is no token: it has other characters in it; set it again.")
        return USER_AGENT | ({"Authorization": f"Bearer {token}"} if token else {})

    def resolve(self, revision: str) -> None:
        """Learn the commit `revision` stands for and its files, from the hub or, offline, from its cache, and
        record them.
        """
        commit, listing = self.from_cache(revision) if self.offline else self.from_hub(revision)
        if is_commit(revision) and commit != revision:
            self.fail(
                "mismatch", f"{self.endpoint} answered with commit {commit} where {revision} was asked for."
            )
        lacking = self.lacking(listing)
        if lacking:
            more = f" (and {len(lacking) - 2} more)" if len(lacking) > 2 else ""
            self.fail(
                "absent",
                f"{REPO} has no {', '.join(lacking[:2])}{more} at revision {revision[:60]}; try --revision "
                f"{'main' if revision == REVISION else REVISION}.",
            )
        for path, sha256 in released.SHA256.items() if commit == REVISION else ():
            if path in listing and listing[path].digest != sha256:
                self.fail(
                    "mismatch",
                    f"{self.endpoint} offers a {path} that is not the released one (SHA-256 "
                    f"{listing[path].digest}).",
                )
        self.record |= {"revision": revision, "commit": commit, "listing": listing}
        save_record(self.root, self.record)

    def from_hub(self, revision: str) -> tuple[str, dict[str, Expected]]:
        """The commit and its files that may be fetched, as the hub lists them."""
        url = f"{self.endpoint}/api/models/{REPO}/revision/{quote(revision, safe='')}?blobs=true"
        told = None
        for failures in range(3):
            try:
                told = self.client.json(url, self.headers(), self.watch)
                break
            except urllib.error.HTTPError as error:
                self.refuse(error.code, f"{REPO} at revision {revision[:60]}")
            except (BadRedirect, WrongFile) as error:
                self.fail("mismatch", f"{self.endpoint} does not answer as a hub does: {error}.")
            except Transient as error:
                if failures == 2:
                    self.fail("network", f"{self.endpoint} cannot be reached; {MIRROR_HINT} ({error}).")
                self.watch.sleep(BACKOFF * 2**failures)
        try:
            if not is_commit(told["sha"]):  # type: ignore[index]
                raise ValueError(f"a commit of {str(told['sha'])[:60]!r}")  # type: ignore[index]
            files = {one["rfilename"]: one for one in told["siblings"]}  # type: ignore[index]
            return told["sha"], {  # type: ignore[index]
                path: expected(one["size"], one["lfs"]["sha256"] if one.get("lfs") else one["blobId"])
                for path, one in files.items()
                if ours(path)
            }
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            self.fail(
                "mismatch",
                f"{self.endpoint} does not answer as a hub does: no sizes and hashes of files "
                f"({type(error).__name__}: {str(error)[:100]}).",
            )

    def from_cache(self, revision: str) -> tuple[str, dict[str, Expected]]:
        """As `from_hub`, from the hub's cache, where a file is a link to one named by its hash."""
        known = self.in_cache("Wan2.2_VAE.pth", revision)
        if known is None:
            self.fail(
                "offline", f"HF_HUB_OFFLINE is set, and {REPO} at revision {revision} is not in {self.cache}."
            )
        listing = {}
        for file in known.parent.rglob("*"):
            path = file.relative_to(known.parent).as_posix()
            if ours(path) and file.is_file() and is_digest(file.resolve().name):
                listing[path] = expected(file.stat().st_size, file.resolve().name)
        return known.parent.name, listing

    def in_cache(self, path: str, revision: str) -> Path | None:
        """A file in the hub's cache (a link)."""
        try:
            known = self.hub.try_to_load_from_cache(REPO, path, cache_dir=self.cache, revision=revision)
        except (ValueError, TypeError):  # a revision that can be none
            return None
        return Path(known) if isinstance(known, str) else None

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

    def sound(self, path: str, entry: Expected, verify: bool) -> bool:
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
        save_record(self.root, self.record)

    def part(self, path: str, entry: Expected) -> Path:
        """Where an unfinished file is. The hash in its name keeps the bytes of two revisions apart."""
        return (self.root / path).with_name(f"{Path(path).name}.{entry.digest[:12]}.part")

    def check_disk(self, absent: dict[str, Expected]) -> None:
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

    def fetch(self, path: str, entry: Expected) -> None:
        """Make the part whole, by the hub's cache or the network, and name it if its hash is right."""
        target, part = self.root / path, PartFile(self.part(path, entry), entry)
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

    def cached(self, path: str, entry: Expected) -> Path | None:
        """The file in the hub's cache, if it is there at this commit and of the right size."""
        known = self.in_cache(path, self.record["commit"])
        blob = known.resolve() if known else None
        return blob if blob and blob.is_file() and blob.stat().st_size == entry.size else None

    def fill(self, path: str, part: PartFile, base: int) -> None:
        """Bring the part to its full size, retrying until RETRIES failures in a row have brought next to
        nothing.
        """
        part.resume(self.watch)
        commit = self.record["commit"]
        url = f"{self.endpoint}/{REPO}/resolve/{quote(commit, safe='')}/{quote(path)}"
        headers = self.headers()
        failures = 0
        while part.size < part.expected.size:
            if self.offline:
                self.fail(
                    "offline", f"HF_HUB_OFFLINE is set, and {path} is neither here nor in {self.cache}."
                )
            before = part.size
            self.watch.done = base + before
            try:
                self.client.receive(url, headers, part, self.watch)
            except WrongFile as error:
                self.fail("mismatch", f"{error}; a proxy or a login page may answer instead.")
            except BadRedirect as error:
                self.fail("refused", f"{path} cannot be fetched: {error}.")
            except urllib.error.HTTPError as error:
                self.refuse(error.code, path)
            except Transient as error:
                failures = 0 if part.size - before >= watching.CHUNK else failures + 1
                if failures > RETRIES:
                    self.fail(
                        "network",
                        f"{path} stopped at {part.size} of {part.expected.size} bytes, {failures} times in a "
                        f"row ({error}).",
                    )
                LOG.warning("%s: %s at byte %d; trying again", path, error, part.size)
                self.watch.sleep(min(BACKOFF * 2 ** max(0, failures - 1), 30.0))


def is_digest(name: str) -> bool:
    """Whether a name is a SHA-1 or SHA-256 in hexadecimal."""
    return bool(re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", name))
