"""ComfyUI as people see it: Chromium, the real frontend, real clicks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import Page as PlaywrightPage
from playwright.sync_api import TimeoutError as PlaywrightTimeout
from playwright.sync_api import sync_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-dev-shm-usage",
)

# Said on pages of a stock ComfyUI: optional files and (new frontend, old core) routes that are not there,
# outside hosts that are blocked, and one slip each of the frontends of 0.3.64 and of 1.58 on their first
# page. Nothing that names a pack's file is ever taken for noise.
NOISE = (
    "Failed to load resource",
    "JobsApiError",
    "Failed to fetch",
    "https://huggingface.co",
    "(reading 'id')",
    "graph accessed before initialization",
)

_READY = "() => window.app?.graph && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 50"
# `comfyAPI` is the frontend's own door for extensions; its api object is an EventTarget of what the server
# says.
_LISTEN = """() => {
  window.__said = [];
  const api = window.comfyAPI.api.api;
  const types = ['execution_success', 'execution_error', 'execution_interrupted', 'progress_text',
    'executed'];
  for (const type of types)
    api.addEventListener(type, event => window.__said.push({type, detail: event.detail}));
}"""
# `wanted`: older frontends leave unknown nodes out when they convert an API workflow, so the graph alone does
# not tell.
_MISSING = """wanted => [...new Set([...wanted,
    ...(app.graph.nodes ?? app.graph._nodes).map(node => node.type)])]
  .filter(type => !LiteGraph.registered_node_types[type])"""
_HAVING_ERRORS = (
    "() => (app.graph.nodes ?? app.graph._nodes).filter(node => node.has_errors).map(node => node.type)"
)
_WIDGETS = """() => Object.fromEntries((app.graph.nodes ?? app.graph._nodes).map(node =>
  [node.id, Object.fromEntries((node.widgets ?? []).map(widget => [widget.name, widget.value ?? null]))]))"""


class NoBrowserError(RuntimeError):
    """There is no browser to drive, and why."""


class ExecutionError(RuntimeError):
    """The run failed, as the page was told."""


class Browser:
    """One Chromium process."""

    def __init__(self) -> None:
        program = os.environ.get("LANCE_CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)
        self._playwright = sync_playwright().start()
        try:
            # Without a program of the system's, playwright's own is used if it has been installed.
            self._browser = self._playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        except PlaywrightError as error:
            self._playwright.stop()
            raise NoBrowserError(f"no browser: {str(error).strip().splitlines()[0]}") from error

    def open(
        self, server: Any, *, locale: str = "en-US", size: tuple[int, int] = (1600, 1000), timeout: float = 90
    ) -> ComfyPage:
        """A page in a profile of its own, with ComfyUI of `server` (anything with .url) ready for use."""
        context = self._browser.new_context(locale=locale, viewport={"width": size[0], "height": size[1]})
        context.route(
            "**/*", lambda route: route.continue_() if _is_local(route.request.url) else route.abort()
        )
        page = ComfyPage(context.new_page(), server.url)
        page.load(timeout)
        return page

    def close(self) -> None:
        self._browser.close()
        self._playwright.stop()


class ComfyPage:
    """One browser page. `page` is playwright's own, for whatever is not here."""

    def __init__(self, page: PlaywrightPage, url: str) -> None:
        self.page = page
        self.url = url
        self._complaints: list[str] = []
        self._api_types: list[str] = []
        page.on("pageerror", lambda error: self._complaints.append(f"uncaught: {error} {error.stack or ''}"))
        page.on("console", self._note)
        page.on(
            "dialog", lambda dialog: self._complaints.append(f"dialog: {dialog.message}") or dialog.dismiss()
        )

    def __enter__(self) -> ComfyPage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.page.context.close()

    def load(self, timeout: float = 90) -> None:
        """(Re)load and wait until nodes are registered and the first dialog is out of the way."""
        self.page.goto(self.url, wait_until="domcontentloaded", timeout=timeout * 1000)
        self.page.wait_for_function(_READY, timeout=timeout * 1000)
        self.page.wait_for_timeout(1500)  # a first visit opens the template browser
        self.page.keyboard.press("Escape")
        self.page.wait_for_timeout(300)
        self.page.evaluate(_LISTEN)

    @property
    def complaints(self) -> list[str]:
        """Errors the page reported, without what a stock ComfyUI always says."""
        return [
            line
            for line in self._complaints
            if _names_a_pack(line) or not any(noise in line for noise in NOISE)
        ]

    def _note(self, said: Any) -> None:
        if said.type == "error":
            self._complaints.append(f"console: {said.text} {said.location.get('url', '')}")

    def set_setting(self, name: str, value: Any) -> None:
        """Change a frontend setting, e.g. ("Comfy.Locale", "zh"); `load()` again where it matters."""
        self.page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])

    def load_graph(self, graph: dict[str, Any] | Path, name: str = "test") -> None:
        """Load a workflow in UI format, or API format (recognised by its class_type)."""
        content = json.loads(graph.read_text(encoding="utf-8")) if isinstance(graph, Path) else graph
        self._api_types = [] if "nodes" in content else [node["class_type"] for node in content.values()]
        if "nodes" in content:
            self.page.evaluate(
                "([graph, name]) => app.loadGraphData(graph, true, true, name)", [content, name]
            )
        else:
            self.page.evaluate("([graph, name]) => app.loadApiJson(graph, name)", [content, name])
        self.page.wait_for_timeout(300)

    def drop_file(self, path: Path, mime: str = "application/json") -> None:
        """Drop a file on the canvas as a user would."""
        transfer = self.page.evaluate_handle(
            """async ([bytes, name, mime]) => {
              const transfer = new DataTransfer();
              transfer.items.add(new File([new Uint8Array(bytes)], name, {type: mime}));
              return transfer;
            }""",
            [list(path.read_bytes()), path.name, mime],
        )
        self.page.dispatch_event(
            "#graph-canvas", "drop", {"dataTransfer": transfer, "clientX": 400, "clientY": 400}
        )
        self.page.wait_for_timeout(1000)

    def missing_nodes(self) -> list[str]:
        """Types in the loaded workflow that the frontend does not know."""
        return self.page.evaluate(_MISSING, self._api_types)

    def nodes_with_errors(self) -> list[str]:
        """Types of nodes drawn as faulty."""
        return self.page.evaluate(_HAVING_ERRORS)

    def nodes(self) -> list[dict[str, Any]]:
        """The graph as it would be saved: its nodes."""
        return self.page.evaluate("() => app.graph.serialize().nodes")

    def graph(self) -> dict[str, Any]:
        """The graph as it would be saved."""
        # By way of JSON, as saving goes: the page's undefined is dropped, not turned into null.
        return json.loads(self.page.evaluate("() => JSON.stringify(app.graph.serialize())"))

    def prompt(self) -> dict[str, Any]:
        """The API-format workflow that Run would send."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def widgets(self, node: int | str | None = None) -> dict[str, Any]:
        """Widget values by name of one node, or of all nodes by id."""
        values = self.page.evaluate(_WIDGETS)
        return values if node is None else values[str(node)]

    def set_widget(self, node: int | str, name: str, value: Any) -> None:
        """Set a widget's value as its control would, its callback included."""
        self.page.evaluate(
            """([id, name, value]) => {
              const node = (app.graph.nodes ?? app.graph._nodes).find(node => String(node.id) === id);
              const widget = node.widgets.find(widget => widget.name === name);
              widget.value = value;
              widget.callback?.(value, app.canvas, node);
            }""",
            [str(node), name, value],
        )

    def press_run(self) -> None:
        """Click Run."""
        self.page.evaluate("() => { window.__said = []; }")
        button = self.page.locator('[data-testid="queue-button"]').first
        inner = button.locator("button").first
        (inner if inner.count() else button).click(timeout=15_000)

    def run(self, timeout: float = 120) -> list[dict[str, Any]]:
        """Press Run and wait for the end. Returns what the page was told; raises ExecutionError (also for a
        rejected workflow).
        """
        self.press_run()
        return self.wait_for_end(timeout)

    def wait_for_end(self, timeout: float = 120) -> list[dict[str, Any]]:
        """Until the run that was started succeeds."""
        ended = (
            "() => window.__said.find(said => said.type.startsWith('execution_')) || "
            "Object.keys(app.lastNodeErrors ?? {}).length"
        )
        try:
            self.page.wait_for_function(ended, timeout=timeout * 1000)
        except PlaywrightTimeout as error:
            raise ExecutionError(
                f"no end of the run within {timeout} s; the page says {self.complaints}"
            ) from error
        self.page.wait_for_timeout(200)
        said = self.said()
        if not any(message["type"] == "execution_success" for message in said):
            failed = [message["detail"] for message in said if message["type"].startswith("execution_")]
            raise ExecutionError(json.dumps(failed or self.page.evaluate("() => app.lastNodeErrors"))[:4000])
        return said

    def said(self, kind: str | None = None) -> list[dict[str, Any]]:
        """What the server told the page since Run was pressed: {"type", "detail"}."""
        return [
            message
            for message in self.page.evaluate("() => window.__said")
            if kind in (None, message["type"])
        ]

    def screenshot(self, path: Path) -> Path:
        """Take a picture of the page, the whole graph in view."""
        self.page.evaluate(
            "async () => { try { await app.extensionManager.command.execute('Comfy.Canvas.FitView') } catch "
            "{} }"
        )
        self.page.wait_for_timeout(700)
        self.page.screenshot(path=str(path))
        return path


def _names_a_pack(line: str) -> bool:
    return "/extensions/" in line.replace("/extensions/core/", "")


def _is_local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1", "ws://127.0.0.1", "http://localhost", "data:", "blob:"))
