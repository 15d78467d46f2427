"""Find or build a ComfyUI to test this pack in. Standard library only, so any Python can run it.

Where ComfyUI comes from, first match wins:

1. ``COMFYUI_PATH``: a checkout of yours. Its Python is ``COMFYUI_PYTHON``, else ``<path>/venv`` or
   ``<path>/.venv``, else a venv built here.
2. The ComfyUI whose ``custom_nodes`` this pack lies in (same choice of Python).
3. A clone of ComfyUI at one of two pinned commits, and a venv for it, below ``LANCE_CACHE`` (default
   ``~/.cache/comfyui-lance``). ``--version`` or ``LANCE_COMFYUI`` says which: ``oldest`` (the oldest version
   that is supported) or ``newest`` (the newest that was tested).

The versions pinned here are those of the test environment and of nothing else: the pack itself pins none of
ComfyUI's packages. Every part lies in a folder named after a hash of what was asked for and is stamped when
complete, so a half-finished install is redone and a changed pin never meets an old install.

    python scripts/comfyui.py prepare [--all]     build what is missing; --all also the newest frontend and
                                                  comfy-cli
    python scripts/comfyui.py path | python | info
    python scripts/comfyui.py start [--port N] [--models DIR] [-- ComfyUI arguments]
    python scripts/comfyui.py prune               remove parts that no pin asks for any more

`start` takes the newest version and falls back to the oldest; all others take the oldest unless told.
Exit status 3 and one line on stderr mean that there is no ComfyUI to be had.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACK = Path(__file__).absolute().parents[1]
PACK_LINK = "ComfyUI-Lance"  # the folder name a user's custom_nodes has it under

COMFYUI_URL = "https://github.com/Comfy-Org/ComfyUI"
PINS = {
    "oldest": "a125cd84b054a57729b5eecab930ca9408719832",  # 0.3.64 and a few days
    "newest": "783545f689a0af730065994b46b382ae24844c99",  # 0.33.0
}
OLDEST, NEWEST = PINS
# Megabytes of other models' vocabularies, and ComfyUI's own tests: nothing here reads them.
COMFYUI_LEAVE_OUT = (
    "/comfy/text_encoders/llama_tokenizer/",
    "/comfy/text_encoders/qwen35_tokenizer/vocab.json",
    "/tests/",
    "/tests-unit/",
)

# One release's trio; without the constraint, ComfyUI's open "torch" pulls in whatever is newest. PyPI's
# torchvision and torchaudio are linked against CUDA, so the CPU build of torch does not serve, and torch
# itself does not import without the nvidia-* packages.
TORCH_PINS = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
HOST_EXTRAS = (
    "requests",
    "pytest",
    "pytest-timeout",
)  # 0.3.64 imports requests without requiring it; pytest is for tests/host/inproc
FRONTEND = "comfyui-frontend-package==1.58.1"  # newer than what the pinned ComfyUI brings
COMFY_CLI = "comfy-cli==1.23.0"

EXIT_UNAVAILABLE = 3


class HostUnavailableError(RuntimeError):
    """There is no ComfyUI to be had, and why, in one line."""


@dataclass(frozen=True)
class Host:
    """A ComfyUI checkout and the Python that runs it."""

    path: Path
    python: Path
    source: str  # "COMFYUI_PATH", "custom_nodes" or "cache"

    @property
    def version(self) -> str:
        """ComfyUI's version, "unknown" where the checkout does not say."""
        try:
            text = (self.path / "comfyui_version.py").read_text(encoding="utf-8")
        except OSError:
            return "unknown"
        return text.partition("__version__")[2].strip(" =\"'\n") or "unknown"


def say(text: str) -> None:
    """Progress goes to stderr; stdout is for answers."""
    print(f"[comfyui] {text}", file=sys.stderr, flush=True)


def cache_dir() -> Path:
    """Where built parts live."""
    return (
        Path(os.environ.get("LANCE_CACHE") or Path.home() / ".cache" / "comfyui-lance")
        .expanduser()
        .absolute()
    )


def _key(*asked: str) -> str:
    return hashlib.sha256("\0".join((*asked, sys.platform)).encode()).hexdigest()[:10]


def _python_tag() -> str:
    return f"py{sys.version_info.major}.{sys.version_info.minor}"


def _run(command: Sequence[object], what: str, *, cwd: Path | None = None) -> None:
    """Run a command whose output matters only if it fails. Raises HostUnavailableError with its last line."""
    try:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except OSError as error:
        raise HostUnavailableError(f"{what}: {error}") from error
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        telling = (
            [line for line in lines if line.lower().startswith(("error", "fatal"))]
            or lines[-1:]
            or ["no output"]
        )
        raise HostUnavailableError(f"{what} failed ({done.returncode}): {telling[-1][:300]}")


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    """One builder at a time; the others wait and then find the work done."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows: builds are not expected to race there
        yield
        return
    with open(cache_dir() / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _built(target: Path, what: str, build: Callable[[Path], None], *, may_build: bool) -> Path:
    """`target`, after running `build(target)` unless it is stamped complete."""
    stamp = target / ".complete.json"
    if stamp.is_file():
        return target
    if not may_build:
        raise HostUnavailableError(f"{what}: not installed (python scripts/comfyui.py prepare --all)")
    with _lock():
        if stamp.is_file():
            return target
        if target.exists():
            say(f"{what}: an interrupted install is redone")
            shutil.rmtree(target)
        say(f"{what}: building {target}")
        began = time.monotonic()
        try:
            build(target)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
        stamp.write_text(
            json.dumps({"what": what, "seconds": round(time.monotonic() - began, 1)}) + "\n", encoding="utf-8"
        )
        say(f"{what}: ready after {time.monotonic() - began:.0f} s")
    return target


def _venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _pip(python: Path, *arguments: object, what: str) -> None:
    _run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments], what)


def versions() -> tuple[str, ...]:
    """The pins to test in, by LANCE_COMFYUI: oldest (default), newest or both; one with a checkout given."""
    asked = os.environ.get("LANCE_COMFYUI") or OLDEST
    if asked not in (*PINS, "both"):
        raise HostUnavailableError(f"LANCE_COMFYUI={asked} is none of oldest, newest, both")
    if asked == "both":
        return (OLDEST,) if _find_checkout()[0] else tuple(PINS)
    return (asked,)


def _checkout_target(version: str) -> Path:
    return cache_dir() / f"comfyui-{PINS[version][:10]}"


def _clone(target: Path, commit: str) -> None:
    _run(
        ["git", "clone", "--quiet", "--no-checkout", "--filter=blob:none", COMFYUI_URL, target],
        "cloning ComfyUI",
    )
    _run(
        ["git", "sparse-checkout", "set", "--no-cone", "/*", *("!" + path for path in COMFYUI_LEAVE_OUT)],
        "cloning ComfyUI",
        cwd=target,
    )
    _run(
        ["git", "checkout", "--quiet", "--detach", commit],
        f"checking out ComfyUI {commit[:10]}",
        cwd=target,
    )


def _venv_target(checkout: Path) -> Path:
    requirements = (checkout / "requirements.txt").read_text(encoding="utf-8")
    return cache_dir() / f"venv-{_key(requirements, *TORCH_PINS, *HOST_EXTRAS, _python_tag())}"


def _venv_for(checkout: Path, *, may_build: bool) -> Path:
    """The Python of a venv that holds what `checkout` requires, and what the pack requires besides."""

    def build(target: Path) -> None:
        _run([sys.executable, "-m", "venv", target], "making a venv")
        constraints = target / "constraints.txt"
        constraints.write_text("\n".join(TORCH_PINS) + "\n", encoding="utf-8")
        wanted = ("-r", checkout / "requirements.txt", *HOST_EXTRAS)
        _pip(_venv_python(target), "-c", constraints, *wanted, what="installing ComfyUI's requirements")

    venv = _built(
        _venv_target(checkout), "ComfyUI's Python packages (5 GB, minutes)", build, may_build=may_build
    )
    if may_build:
        _install_pack_requirements(venv)
    return _venv_python(venv)


def _install_pack_requirements(venv: Path) -> None:
    """What a user's `pip install -r requirements.txt` does, under the same constraints; once per content of
    that file.
    """
    listed = PACK / "requirements.txt"
    if not listed.is_file():
        return
    stamp = venv / f".pack-{_key(listed.read_text(encoding='utf-8'))}"
    if not stamp.exists():
        with _lock():
            _pip(
                _venv_python(venv),
                "-c",
                venv / "constraints.txt",
                "-r",
                listed,
                what="installing the pack's requirements",
            )
            stamp.touch()


def _own_python(checkout: Path) -> Path | None:
    """The Python its owner runs `checkout` with, None where it has none."""
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        found = shutil.which(named)
        if not found:
            raise HostUnavailableError(f"COMFYUI_PYTHON={named} is not a program")
        return Path(found)
    for name in ("venv", ".venv"):
        python = _venv_python(checkout / name)
        if python.exists():
            return python
    return None


def _is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy").is_dir() and (path / "nodes.py").is_file()


def _enclosing_comfyui() -> Path | None:
    for start in (PACK, PACK.resolve()):
        for folder in start.parents:
            if folder.name == "custom_nodes" and _is_comfyui(folder.parent):
                return folder.parent
    return None


def _find_checkout() -> tuple[Path | None, str]:
    named = os.environ.get("COMFYUI_PATH")
    if named:
        path = Path(named).expanduser().absolute()
        if not _is_comfyui(path):
            raise HostUnavailableError(
                f"COMFYUI_PATH={named} is not a ComfyUI checkout (it has no main.py, nodes.py and comfy/)"
            )
        return path, "COMFYUI_PATH"
    return (enclosing, "custom_nodes") if (enclosing := _enclosing_comfyui()) else (None, "cache")


def prepare(version: str | None = None, *, may_build: bool = True) -> Host:
    """ComfyUI and its Python, built where they are missing.

    version: "oldest" or "newest", None for what LANCE_COMFYUI says (the first of both). It chooses among the
    pins and says nothing about a checkout of yours. With `may_build` false nothing is installed or
    downloaded: what is not there yet raises. Raises HostUnavailableError with a one-line reason.
    """
    checkout, source = _find_checkout()
    python = _own_python(checkout) if checkout else None
    if checkout is None:
        version = version or versions()[0]
        commit = PINS[version]
        checkout = _built(
            _checkout_target(version),
            f"ComfyUI {commit[:10]} ({version})",
            lambda target: _clone(target, commit),
            may_build=may_build,
        )
    return Host(checkout, python or _venv_for(checkout, may_build=may_build), source)


def prepare_newest(*, may_build: bool = True) -> Host:
    """The newest version, or the oldest where it cannot be had; LANCE_COMFYUI decides where it is set."""
    if os.environ.get("LANCE_COMFYUI"):
        return prepare(may_build=may_build)
    try:
        return prepare(NEWEST, may_build=may_build)
    except HostUnavailableError as error:
        say(f"no newest ComfyUI ({error}); trying the oldest supported")
        return prepare(OLDEST, may_build=may_build)


def frontend_root(*, may_build: bool = True) -> Path:
    """The static folder of a frontend newer than ComfyUI's, for --front-end-root."""

    def build(target: Path) -> None:
        _pip(Path(sys.executable), "--no-deps", "--target", target, FRONTEND, what=f"installing {FRONTEND}")

    target = _built(cache_dir() / f"frontend-{_key(FRONTEND)}", FRONTEND, build, may_build=may_build)
    return target / "comfyui_frontend_package" / "static"


def comfy_cli(*, may_build: bool = True) -> Path:
    """The `comfy` program, in a venv of its own: its many requirements are kept away from everything else."""

    def build(target: Path) -> None:
        _run([sys.executable, "-m", "venv", target], "making a venv")
        _pip(_venv_python(target), COMFY_CLI, what=f"installing {COMFY_CLI}")

    venv = _built(
        cache_dir() / f"comfy-cli-{_key(COMFY_CLI, _python_tag())}", COMFY_CLI, build, may_build=may_build
    )
    return _venv_python(venv).with_name("comfy.exe" if os.name == "nt" else "comfy")


def lay_out(base: Path, *, pack: Path | None = PACK, models: dict[str, Path] | None = None) -> Path:
    """Make `base` a --base-directory: folders of its own, the pack linked into custom_nodes, models linked by
    folder name.
    """
    for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    links = {base / "models" / name: Path(source) for name, source in (models or {}).items()}
    if pack is not None:
        links[base / "custom_nodes" / PACK_LINK] = pack
    for link, source in links.items():
        if link.is_symlink():
            link.unlink()
        link.symlink_to(source.absolute(), target_is_directory=True)
    return base


def arguments(base: Path, *, cpu: bool = True) -> list[str]:
    """ComfyUI's arguments for running out of `base` and touching nothing of the checkout."""
    database = f"sqlite:///{(base / 'user' / 'comfyui.db').as_posix()}"
    given = [
        "--base-directory",
        str(base),
        "--database-url",
        database,
        "--disable-auto-launch",
        "--disable-api-nodes",
    ]
    return [*given, "--cpu"] if cpu else given


def _info(version: str | None) -> dict[str, str]:
    host = prepare(version, may_build=False)
    return {
        "path": str(host.path),
        "python": str(host.python),
        "source": host.source,
        "version": host.version,
        "cache": str(cache_dir()),
    }


def base_folder(pack: Path = PACK) -> Path:
    """The --base-directory of `start`: one for each checkout of the pack."""
    return cache_dir() / f"base-{_key(str(pack))}"


@contextlib.contextmanager
def in_use(base: Path) -> Iterator[int]:
    """Hold `base` for one server; gives the lock's descriptor, for the server to inherit.

    A server that outlives this script then keeps the folder. Raises HostUnavailableError while it is held.
    """
    base.mkdir(parents=True, exist_ok=True)
    with open(base / "in-use.lock", "a+") as handle:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise HostUnavailableError(
                f"a ComfyUI that was started from this checkout still runs (it uses {base}): stop it first"
            ) from error
        yield handle.fileno()


def _start(version: str | None, port: int, models: Path | None, extra: list[str]) -> int:
    base = base_folder()
    with in_use(base) as held:
        host = prepare(version) if version else prepare_newest()
        lay_out(base, models={"lance": models} if models else None)
        command = [
            str(host.python),
            str(host.path / "main.py"),
            *arguments(base, cpu="--gpu" not in extra),
            "--port",
            str(port),
            *(argument for argument in extra if argument not in ("--", "--gpu")),
        ]
        return subprocess.call(command, pass_fds=() if os.name == "nt" else (held,))


def _prune() -> None:
    checkouts = [_checkout_target(version) for version in PINS]
    keep = {
        *(checkout.name for checkout in checkouts),
        f"frontend-{_key(FRONTEND)}",
        f"comfy-cli-{_key(COMFY_CLI, _python_tag())}",
    }
    for checkout in filter(None, (*checkouts, _find_checkout()[0])):
        if (checkout / "requirements.txt").is_file():
            keep.add(_venv_target(checkout).name)
    for folder in sorted(cache_dir().glob("*-*/")):
        if folder.name not in keep and folder.name.split("-")[0] in ("comfyui", "venv", "frontend", "comfy"):
            say(f"removing {folder}")
            shutil.rmtree(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare").add_argument(
        "--all", action="store_true", help="also the newest frontend and comfy-cli"
    )
    for name in ("path", "python", "info", "prune"):
        commands.add_parser(name)
    start = commands.add_parser("start")
    start.add_argument("--port", type=int, default=8188)
    start.add_argument("--models", type=Path, help="folder to link as models/lance")
    start.add_argument("extra", nargs=argparse.REMAINDER, help="passed on to ComfyUI; --gpu leaves out --cpu")
    for name in ("prepare", "path", "python", "info", "start"):
        commands.choices[name].add_argument("--version", choices=tuple(PINS), help="which pinned ComfyUI")
    given = parser.parse_args(argv)
    try:
        if given.command == "prepare":
            host = prepare(given.version)
            if given.all:
                frontend_root(), comfy_cli()
            print(host.path, host.python, sep="\n")
        elif given.command == "info":
            print(json.dumps(_info(given.version), indent=2))
        elif given.command in ("path", "python"):
            print(getattr(prepare(given.version, may_build=False), given.command))
        elif given.command == "start":
            return _start(given.version, given.port, given.models, given.extra)
        else:
            _prune()
    except HostUnavailableError as error:
        say(str(error))
        return EXIT_UNAVAILABLE
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
