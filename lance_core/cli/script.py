"""A story's script: TOML -> shots with the defaults in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import shown
from ..errors import RequestError

# Options of the run, not of a shot.
WHOLE = {"model", "checkpoint", "device", "dtype", "vit", "vae", "compile", "overlap"}
ELSEWHERE = {"output", "json", "quiet", "batch", "num-frames", "keep", "keyframe"}
MAX_SCRIPT, MAX_SHOTS = 1 << 20, 999


@dataclass(frozen=True)
class Shot:
    """A shot: its files begin with `stem`. options by their long names."""

    stem: Path
    prompt: str
    references: tuple[str, ...]
    options: dict[str, Any]

    def file(self, ending: str) -> Path:
        """One of its files."""
        return self.stem.with_name(f"{self.stem.name}_{ending}")


def read(script: Path, folder: Path) -> tuple[dict[str, Any], list[Shot]]:
    """The options of the whole run, and the shots with the defaults in them.

    Raises:
        RequestError: no such file, no TOML, or no shots in it.
    """
    data = _toml(script)
    unknown = sorted(set(data) - {"defaults", "shot"})
    if unknown:
        raise RequestError(f"{script} has {shown(unknown[0])}; expected [defaults] and [[shot]] only")
    defaults, listed = data.get("defaults", {}), data.get("shot", [])
    if not isinstance(defaults, dict) or not isinstance(listed, list) or not listed:
        raise RequestError(f"{script} has no shots; write each as [[shot]] with a prompt")
    if len(listed) > MAX_SHOTS:
        raise RequestError(
            f"{script} has {len(listed)} shots, at most {MAX_SHOTS} are possible; write two stories"
        )
    common = _dashed(defaults, "[defaults]")
    whole = {name: value for name, value in common.items() if name in WHOLE}
    common = {name: value for name, value in common.items() if name not in WHOLE}
    shots = []
    for i, one in enumerate(listed, 1):
        where = f"shot {i}"
        own = _dashed(one, where) if isinstance(one, dict) else {}
        misplaced = sorted(WHOLE & set(own))
        if misplaced:
            raise RequestError(
                f"{where} has {misplaced[0]}, which holds for the whole story; put it in [defaults]"
            )
        merged = common | own
        prompt = merged.pop("prompt", None)
        if not isinstance(prompt, str) or not prompt.strip():
            raise RequestError(f'{where} has no prompt; write prompt = "..." in it')
        files = merged.pop("references", [])
        if not isinstance(files, list) or not all(isinstance(f, str) for f in files):
            raise RequestError(f"the references of {where} are {shown(files)}; expected a list of files")
        references = tuple(str(script.parent / f) for f in files)
        shots.append(Shot(folder / f"{i:02d}", prompt, references, merged))
    return whole, shots


def _toml(script: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        try:
            import tomli as tomllib  # type: ignore[no-redef, import-not-found]
        except ModuleNotFoundError:
            raise RequestError(
                "story needs Python 3.11 or newer, or the package tomli: pip install tomli"
            ) from None
    from ..files import read_bytes

    try:
        return tomllib.loads(read_bytes(script, MAX_SCRIPT).decode())
    except (OSError, ValueError) as error:  # a TOMLDecodeError is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{script} cannot be read as TOML: {str(reason)[:200]}") from None


def _dashed(options: dict[str, Any], where: str) -> dict[str, Any]:
    """Options by their long names, whichever of - and _ was written."""
    out = {name.replace("_", "-"): value for name, value in options.items()}
    misplaced = sorted(ELSEWHERE & set(out))
    if misplaced:
        raise RequestError(f"{where} has {misplaced[0]}, which a story decides itself; leave it out")
    return out
