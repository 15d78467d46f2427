"""Every workflow of workflows/ in a real ComfyUI: through HTTP, through comfy-cli, and in the browser by the
Run button.

They run with the tiny checkpoint and with settings made small by `small`, which changes values only and never
the structure. LANCE_SCREENSHOTS names a folder to keep the screenshots in.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

import workflows as script  # scripts/workflows.py

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
INPUTS = GOLDEN / "cases" / "inputs"
NAMES = script.NAMES
DESCRIBED = "0.3.64"  # whose descriptions of stock nodes are kept
LONGER = ("lance_first_and_last_frame", "lance_minute_of_video", "lance_storyboard")
VIDEOS = [name for name in NAMES if name.endswith(("to_video", "video_edit")) or name in LONGER]
TALKING = {"LanceUnderstand", "LanceScore", "LanceEnhancePrompt"}  # show texts on the way to a picture
FILES = {"lance_multi_turn_edit": 3, "lance_best_of_n": 2}
ANSWERS = [name for name in NAMES if name.endswith("question")]

SMALL: dict[str, dict[str, Any]] = {
    "EmptyLanceLatent": {"size": "custom", "width": 64, "height": 48},
    "LanceImageToVideoLatent": {"size": "custom", "width": 64, "height": 48, "frames": 5},
    "LanceSampler": {"steps": 2},
    "KSampler": {"steps": 2},
    "LanceUnderstand": {"max_new_tokens": 8},
    "LanceScore": {"resolution": "image_256res"},
    "LanceExtendVideo": {"frames": 4, "steps": 2, "size": "video_192p", "prompts": "it goes on"},
    "LoadVideo": {"file": "clip.mp4"},
}
# What comes out: width, height, and a video's frames. Edits take the shape of what they start from.
SIZE: dict[str, tuple[int, ...]] = {name: (64, 48, 5) if name in VIDEOS else (64, 48) for name in NAMES}
SIZE |= {
    "lance_image_edit": (256, 256),
    "lance_multi_turn_edit": (256, 256),
    "lance_video_edit": (304, 224, 9),
    "lance_chat_then_edit": (256, 256),
    "lance_minute_of_video": (256, 256, 5),
    "lance_storyboard": (304, 224, 10),
}


def api(name: str) -> dict[str, Any]:
    return json.loads((script.FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def small(graph: dict[str, Any], seed: int | None = None) -> dict[tuple[str, str], Any]:
    """(node id, widget) -> value, for settings that run in a moment."""
    video = any(node["class_type"] in ("SaveVideo", "LoadVideo") for node in graph.values())
    changes: dict[tuple[str, str], Any] = {}
    for key, node in graph.items():
        wanted = dict(SMALL.get(node["class_type"], {}))
        if node["class_type"] == "LanceVisionEncode":
            wanted["resolution"] = "video_192p" if video else "image_256res"
        if node["class_type"] == "EmptyLanceLatent" and node["inputs"]["frames"] > 1:
            wanted["frames"] = 5
        if seed is not None and "seed" in node["inputs"]:
            wanted["seed"] = seed
        assert not set(wanted) - set(node["inputs"]), "structure is kept"
        changes |= {(key, name): value for name, value in wanted.items()}
    return changes


def made_small(name: str, seed: int) -> dict[str, Any]:
    graph = api(name)
    for (key, widget), value in small(graph, seed).items():
        graph[key]["inputs"][widget] = value
    return graph


def comparable(prompt: dict[str, Any]) -> dict[str, Any]:
    """A prompt without what frontends and hosts differ in: notes on where nodes come from, widgets of theirs
    that the node does not have, and how ComfyUI's nodes are called."""
    kept = {}
    for key, node in prompt.items():
        known = {spec[0] for spec in script.workflow_layout.SCHEMAS[node["class_type"]]["inputs"]}
        inputs = {name: value for name, value in node["inputs"].items() if name in known}
        title = node["_meta"]["title"] if "Lance" in node["class_type"] else None
        kept[key] = {"class_type": node["class_type"], "inputs": inputs, "title": title}
    return kept


# -- servers and pages ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def offer(host):
    """Put into a server's input folder what a fresh ComfyUI has there, and a clip."""

    def fill(server):
        example = host.path / "input" / "example.png"
        shutil.copy(example if example.is_file() else INPUTS / "photo.png", server.input / "example.png")
        shutil.copy(INPUTS / "clip.mp4", server.input)
        return server

    return fill


@pytest.fixture(scope="module")
def server(make_server, offer):
    """With the tiny checkpoint, under the frontend the host brings."""
    return offer(make_server(models={"lance": GOLDEN / "checkpoint"}))


@pytest.fixture(scope="module")
def cli(make_cli, server):
    """comfy-cli for that server."""
    return make_cli(server)


@pytest.fixture(scope="module")
def newer(make_server, offer, frontend_root):
    """The same under the newest frontend."""
    return offer(make_server(models={"lance": GOLDEN / "checkpoint"}, front_end_root=frontend_root))


@pytest.fixture(scope="module", params=["pinned", "newest"])
def page(request, browser):
    """One page per frontend, for all workflows."""
    server = request.getfixturevalue({"pinned": "server", "newest": "newer"}[request.param])
    with browser.open(server, size=(1900, 1000)) as opened:
        opened.server, opened.frontend = server, request.param
        opened.set_setting("Comfy.Minimap.Visible", False)
        yield opened


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory) -> Path:
    folder = Path(os.environ.get("LANCE_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# -- what came out -------------------------------------------------------------------------------------------


def check_outputs(name: str, outputs: dict[str, dict[str, Any]], server, host) -> None:
    """The outputs of a run, {node id: what it shows}, and the files they name."""
    graph = api(name)
    outputs = {key: ui for key, ui in outputs.items() if ui}  # what came out of the cache shows nothing
    shown = {graph[key]["class_type"]: [] for key in outputs}
    for key, ui in outputs.items():
        shown[graph[key]["class_type"]].append(ui)
    if name in ANSWERS:
        assert set(shown) == {"LanceUnderstand", "PreviewAny"}
        texts = {"".join(ui["text"]) for uis in shown.values() for ui in uis}
        assert len(texts) == 1 and all(texts), "both show the same answer, and it is not empty"
        return
    saver = "SaveVideo" if name in VIDEOS else "SaveImage"
    assert set(shown) - TALKING == {saver}
    assert all("".join(ui["text"]) for kind in TALKING & set(shown) for ui in shown[kind])
    files = [item for ui in shown[saver] for item in ui["images"]]
    paths = [server.output / item["subfolder"] / item["filename"] for item in files]
    assert len(paths) == FILES.get(name, 1)
    check_files(name, paths, host)


def check_files(name: str, paths: list[Path], host) -> None:
    if name in VIDEOS:
        check_video(name, paths[0], host)
        return
    for path in paths:
        assert png_size(path) == SIZE[name]
    assert len({path.read_bytes() for path in paths}) == len(paths), "no turn's picture is another's"


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def check_video(name: str, path: Path, host) -> None:
    """Decoded by the PyAV of ComfyUI's environment."""
    probe = (
        "import av, sys; c = av.open(sys.argv[1]); s = c.streams.video[0]; print(s.width, s.height, "
        "s.average_rate, sum(1 for _ in c.decode(s)))"
    )
    done = subprocess.run([host.python, "-c", probe, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    width, height, rate, frames = map(int, done.stdout.split())
    assert (width, height, frames) == SIZE[name]
    assert rate == 12


# -- tests ---------------------------------------------------------------------------------------------------


def test_node_descriptions_are_the_hosts(server, host):
    """The committed node descriptions, from which the files are written, are those of the oldest ComfyUI; of
    our own nodes, of any.
    """
    from client import Client

    with Client(server.url) as client:
        now = json.loads(script.snapshot(client.object_info()))
    kept = json.loads(script.NODES.read_text(encoding="utf-8"))
    # Another version of ComfyUI may describe its own nodes differently.
    ours_only = host.source != "cache" or host.version != DESCRIBED
    for kind in kept:
        if not ours_only or "Lance" in kind:
            assert now[kind] == kept[kind], f"{kind} has changed: run `python scripts/workflows.py nodes`"


@pytest.mark.parametrize("name", NAMES)
def test_through_http(name, server, client, host):
    run = client.run(made_small(name, 1))
    check_outputs(name, run.outputs, server, host)


@pytest.mark.parametrize("name", ["lance_video_edit", "lance_video_question"])
def test_the_example_clip_is_there_from_the_start(name, server, client, host):
    """The video workflows run as they come: the pack has put their clip into the input folder."""
    assert (server.input / "lance_example.mp4").read_bytes() == script.CLIP.read_bytes()
    graph = made_small(name, 5)
    (loader,) = [key for key, node in graph.items() if node["class_type"] == "LoadVideo"]
    graph[loader] = api(name)[loader]
    assert graph[loader]["inputs"]["file"] == "lance_example.mp4"
    run = client.run(graph)
    if name == "lance_video_question":
        check_outputs(name, run.outputs, server, host)
    else:
        assert len(run.outputs) == 1


@pytest.mark.parametrize("name", NAMES)
def test_through_comfy_cli(name, server, cli, host, tmp_path):
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(made_small(name, 2)), encoding="utf-8")
    before = set(server.output.rglob("*.*"))
    (end,) = [event["data"] for event in cli.run(path) if event.get("type") == "envelope"]
    made = sorted(set(server.output.rglob("*.*")) - before)
    assert end["status"] == "completed"
    assert len(end["outputs"]) == len(made)
    if name not in ANSWERS:
        check_files(name, made, host)
        return
    told = cli("jobs", "status", end["prompt_id"], "--host", "127.0.0.1", "--port", str(server.port))
    (status,) = [event["data"] for event in told if event.get("type") == "envelope"]
    assert status["text_outputs"], "the answer can be had"


# Nodes that are smaller than what is in them, and texts that would have to be scrolled. A note has a second,
# hidden text for editing; a Load Video asks for the width of its longest file name, which it shortens well
# enough.
_CUT = """() => {
  const small = app.graph.nodes.filter(node => {
    const [w, h] = node.computeSize();
    return (w > node.size[0] + 1 && node.type !== 'LoadVideo') || h > node.size[1] + 1;
  });
  const texts = [...document.querySelectorAll('textarea, .comfy-markdown-content')].filter(text =>
    !text.matches('.comfy-markdown textarea') && text.checkVisibility() && text.clientHeight &&
    text.scrollHeight > text.clientHeight + 2);
  return [...small.map(node => `${node.type} needs ${node.computeSize()}, has ${node.size}`),
    ...texts.map(text => text.value ?? text.innerText)];
}"""
_OVERLAPS = """() => {
  const boxes = app.graph.nodes.map(node => [node.type,
    node.pos[0], node.pos[1] - 30, node.pos[0] + node.size[0], node.pos[1] + node.size[1]]);
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(
    b => a[1] < b[3] && b[1] < a[3] && a[2] < b[4] && b[2] < a[4]).map(b => [a[0], b[0]]));
}"""


@pytest.mark.parametrize("name", NAMES)
def test_in_the_browser(page, name, screenshots, host):
    """Opened: nothing missing, red, cut or overlapping, and what Run would send is the API form. Then run."""
    heard = len(page.complaints)
    page.load_graph(script.FOLDER / f"{name}.json", name)
    page.page.wait_for_timeout(300)
    assert page.missing_nodes() == []
    assert page.nodes_with_errors() == []
    assert comparable(page.prompt()) == comparable(api(name))
    assert page.page.evaluate(_CUT) == []
    assert page.page.evaluate(_OVERLAPS) == []
    page.screenshot(screenshots / f"{name}-{page.frontend}.png")
    for (key, widget), value in small(api(name), seed=3 if page.frontend == "pinned" else 4).items():
        page.set_widget(key, widget, value)
    said = page.run()
    outputs = {
        str(message["detail"]["node"]): message["detail"]["output"]
        for message in said
        if message["type"] == "executed"
    }
    check_outputs(name, outputs, page.server, host)
    for key, node in api(name).items():
        if node["class_type"] in TALKING:
            assert page.page.evaluate("id => app.graph.getNodeById(id).properties.lance_answer", int(key))
    page.screenshot(screenshots / f"{name}-{page.frontend}-run.png")
    assert page.nodes_with_errors() == []
    assert page.complaints[heard:] == []


def test_dropped_file_opens(page):
    page.drop_file(script.FOLDER / "lance_subject_to_image.json")
    page.page.wait_for_timeout(500)
    assert comparable(page.prompt()) == comparable(api("lance_subject_to_image"))
    assert page.missing_nodes() == []


# Pictures of templates that have been loaded; they are read into blobs, so only their texts tell whose they
# are.
_PICTURES = """names => [...document.images].filter(
    image => names.includes(image.alt) && image.naturalWidth === 640).map(image => image.alt)"""


def test_template_browser_shows_and_opens_them(page, screenshots):
    page.page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.page.get_by_text("ComfyUI-Lance", exact=True).first.click(timeout=20_000)
    page.page.wait_for_function(f"names => ({_PICTURES})(names).length >= 3", arg=NAMES, timeout=20_000)
    page.page.screenshot(path=str(screenshots / f"templates-{page.frontend}.png"))
    name = page.page.evaluate(_PICTURES, NAMES)[0]
    page.page.locator(f'img[alt="{name}"]').first.click()
    page.page.wait_for_function(
        "count => app.graph.nodes.length === count", arg=len(script.graph(name).nodes), timeout=20_000
    )
    page.page.wait_for_timeout(500)
    assert comparable(page.prompt()) == comparable(api(name))
    assert page.missing_nodes() == []
