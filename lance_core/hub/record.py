"""What a file must be, and the record of a folder: which commit it is of, and what was found right.

Everything here comes from a file or a server, so every value is checked before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from ..files import read_bytes, written
from .released import RELEASED, REPO, ours

RECORD = ".lance-download.json"
MAX_RECORD = 16 << 20  # bytes
MAX_SIZE = 1 << 46  # bytes of one file


class Expected(NamedTuple):
    """What a file must be: its size in bytes, and the SHA-256 of its content or (40 digits) the SHA-1 of its
    git blob.
    """

    size: int
    digest: str

    def hasher(self) -> Any:
        """A new hash object whose hexdigest will be `digest`."""
        return (
            hashlib.sha256()
            if len(self.digest) == 64
            else hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        )


def expected(size: Any, digest: Any) -> Expected:
    """Both checked.

    Raises:
        ValueError: the size is no number of bytes, or the digest no SHA-256 or SHA-1 in hexadecimal.
    """
    if type(size) is not int or not 0 <= size <= MAX_SIZE:
        raise ValueError(f"a size of {str(size)[:40]!r}")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest):
        raise ValueError(f"a hash of {str(digest)[:80]!r}")
    return Expected(size, digest)


def is_commit(text: Any) -> bool:
    """Whether it is a commit's full name."""
    return isinstance(text, str) and bool(re.fullmatch(r"[0-9a-f]{40}", text))


def read_record(root: Path) -> dict[str, Any]:
    """What was resolved and found right in a folder. An unreadable record is as good as none: files are
    hashed once more.
    """
    failures = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
    with contextlib.suppress(*failures):
        found = json.loads(read_bytes(root / RECORD, MAX_RECORD))
        listing = {path: expected(*entry) for path, entry in found["listing"].items() if ours(path)}
        verified = {
            path: [expected(size, digest).size, time, digest]
            for path, (size, time, digest) in found["verified"].items()
            if type(time) is int
        }
        if found["repo"] == REPO and is_commit(found["commit"]) and isinstance(found["revision"], str):
            kept = {key: found[key] for key in ("repo", "revision", "commit")}
            return kept | {"listing": listing, "verified": verified}
    return {"repo": REPO, "revision": "", "commit": "", "listing": {}, "verified": {}}


def save_record(root: Path, record: dict[str, Any]) -> None:
    """Write the record whole."""
    with written(root / RECORD) as file:
        file.write(json.dumps(record, indent=1).encode())


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
