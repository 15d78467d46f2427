"""Fixtures for tests in a real ComfyUI. Where there is none to be had, these tests skip and say why.

``LANCE_HOST=auto`` (default) builds a missing host, once, before the first test: minutes and 5 GB below
~/.cache/comfyui-lance. ``LANCE_HOST=ready`` uses one that is there and builds nothing. ``LANCE_HOST=off``
skips all of these tests. ``LANCE_CHROMIUM`` names a browser where none is found on the path. See
scripts/comfyui.py for how the host is chosen.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "scripts")]

import comfyui as comfyui_script  # noqa: E402

# Those run in ComfyUI's own Python, by way of test_inproc.py.
collect_ignore = ["inproc"]

_FIXTURES_IN_NEED = {"host"}


def _obtain() -> comfyui_script.Host | str:
    """The host, or the reason why there is none."""
    mode = os.environ.get("LANCE_HOST", "auto")
    if mode not in ("auto", "ready", "off"):
        return f"LANCE_HOST={mode} is none of auto, ready, off"
    if mode == "off":
        return "LANCE_HOST=off"
    try:
        return comfyui_script.prepare(may_build=mode == "auto")
    except comfyui_script.HostUnavailableError as error:
        return f"no ComfyUI to test in: {error}"


_obtained: list[comfyui_script.Host | str] = []


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build before the first test rather than in a fixture: it is no test's time, and its progress can be
    seen.
    """
    wanted = any(_FIXTURES_IN_NEED & set(getattr(item, "fixturenames", ())) for item in session.items)
    if wanted and not _obtained and not session.config.option.collectonly:
        capture = session.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            _obtained.append(_obtain())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Skipping everything for want of a host must not look like passing."""
    if _obtained and isinstance(_obtained[0], str):
        terminalreporter.section("host tests skipped", sep="!", red=True)
        terminalreporter.line(_obtained[0])


@pytest.fixture(scope="session")
def host() -> comfyui_script.Host:
    """The ComfyUI under test."""
    obtained = _obtained[0] if _obtained else _obtain()
    if isinstance(obtained, str):
        pytest.skip(obtained)
    return obtained


@pytest.fixture(scope="session")
def models() -> dict[str, Path]:
    """What to link below models/ for the session's servers. Override where there are checkpoints to offer."""
    return {}


@pytest.fixture(scope="session")
def make_server(
    host: comfyui_script.Host, tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]
) -> Iterator:
    """Start servers with arguments of their own; they end with the session."""
    harness = pytest.importorskip("harness")
    started = []

    def make(**options):
        server = harness.ComfyServer(
            host, tmp_path_factory.mktemp("comfyui"), **{"models": models, **options}
        )
        started.append(server)
        return server.start()

    yield make
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def server(make_server):
    """A ComfyUI with the pack in it, shared by the session."""
    return make_server()


@pytest.fixture
def client(server) -> Iterator:
    """A fresh connection to the shared server."""
    client_module = pytest.importorskip("client")
    with client_module.Client(server.url) as connected:
        yield connected


@pytest.fixture(scope="session")
def frontend_root(host: comfyui_script.Host) -> Path:
    """A newer frontend than the host's own."""
    return _part(comfyui_script.frontend_root)


@pytest.fixture(scope="session")
def make_cli(host: comfyui_script.Host, tmp_path_factory: pytest.TempPathFactory):
    """comfy-cli: `make_cli(server)` talks to that server."""
    harness = pytest.importorskip("harness")
    program = _part(comfyui_script.comfy_cli)
    return lambda server: harness.ComfyCli(program, tmp_path_factory.mktemp("cli-home"), server)


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """Chromium. `browser.open(server)` gives a page with ComfyUI ready in it."""
    browser_module = pytest.importorskip("browser", reason="playwright is not installed")
    try:
        started = browser_module.Browser()
    except browser_module.NoBrowserError as error:
        pytest.skip(str(error))
    yield started
    started.close()


def _part(get) -> Path:
    try:
        return get(may_build=os.environ.get("LANCE_HOST", "auto") == "auto")
    except comfyui_script.HostUnavailableError as error:
        pytest.skip(str(error))
