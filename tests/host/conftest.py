"""Fixtures for tests in a real ComfyUI. Where there is none to be had, these tests skip and say why.

``LANCE_HOST=auto`` (default) builds a missing ComfyUI, once, before the first test: minutes and 5 GB below
~/.cache/comfyui-lance. ``LANCE_HOST=ready`` uses one that is there and builds nothing. ``LANCE_HOST=off``
skips all of these tests. ``LANCE_COMFYUI=oldest`` (default), ``newest`` or ``both`` says which version.
``LANCE_CHROMIUM`` names a browser where none is found on the path. scripts/comfyui.py says where ComfyUI
comes from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import comfyui as comfyui_script
import pytest

# Those run in ComfyUI's own Python, by way of test_inproc.py.
collect_ignore = ["inproc"]

_FIXTURES_IN_NEED = {"host"}


def _versions() -> tuple[str, ...]:
    """The pinned versions to run in; an unknown LANCE_COMFYUI stops pytest with a sentence."""
    try:
        return comfyui_script.versions()
    except comfyui_script.HostUnavailableError as error:
        raise pytest.UsageError(str(error)) from error


VERSIONS = _versions()


def _obtain(version: str) -> comfyui_script.Host | str:
    """ComfyUI, or the reason why there is none."""
    mode = os.environ.get("LANCE_HOST", "auto")
    if mode not in ("auto", "ready", "off"):
        return f"LANCE_HOST={mode} is none of auto, ready, off"
    if mode == "off":
        return "LANCE_HOST=off"
    try:
        return comfyui_script.prepare(version, may_build=mode == "auto")
    except comfyui_script.HostUnavailableError as error:
        return f"no ComfyUI to test in ({version}): {error}"


_obtained: dict[str, comfyui_script.Host | str] = {}


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build before the first test rather than in a fixture: it is no test's time, and its progress can be
    seen.
    """
    wanted = any(_FIXTURES_IN_NEED & set(getattr(item, "fixturenames", ())) for item in session.items)
    if wanted and not _obtained and not session.config.option.collectonly:
        capture = session.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            _obtained.update({version: _obtain(version) for version in VERSIONS})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Skipping everything for want of ComfyUI must not look like passing."""
    lacking = [reason for reason in _obtained.values() if isinstance(reason, str)]
    if lacking:
        terminalreporter.section("host tests skipped", sep="!", red=True)
        for reason in lacking:
            terminalreporter.line(reason)


@pytest.fixture(scope="session", params=VERSIONS if len(VERSIONS) > 1 else None)
def host(request: pytest.FixtureRequest) -> comfyui_script.Host:
    """The ComfyUI under test; with LANCE_COMFYUI=both, one after the other."""
    version = getattr(request, "param", VERSIONS[0])
    obtained = _obtained[version] if version in _obtained else _obtain(version)
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
    """A newer frontend than ComfyUI's."""
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
