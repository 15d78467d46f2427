"""What people see: the answer on the node, the line on the latent nodes, help and Chinese labels, in a real
browser and on two frontends.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[2]
CHECKPOINT = PACK / "tests" / "golden" / "checkpoint"
PHOTO = PACK / "tests" / "golden" / "cases" / "inputs" / "photo.png"
DOCS = PACK / "web" / "docs"
SCRIPT = (PACK / "web" / "js" / "lance.js").read_text(encoding="utf-8")
LABELS = json.loads((PACK / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))

HOSTILE = "<img src=x onerror=window.__pwned=1><script>window.__pwned=2</script> & </textarea><b>bold</b>"
ASK = {
    "1": {"class_type": "LanceLoader", "inputs": {"checkpoint": "Lance_3B", "weight_dtype": "default"}},
    "2": {"class_type": "LoadImage", "inputs": {"image": PHOTO.name}},
    "3": {
        "class_type": "LanceVisionEncode",
        "inputs": {"lance": ["1", 1], "image": ["2", 0], "role": "question", "resolution": "image_256res"},
    },
    "4": {
        "class_type": "LanceUnderstand",
        "inputs": {
            "lance": ["1", 1],
            "vision": ["3", 0],
            "question": "What is this?",
            "system_prompt": "",
            "max_new_tokens": 12,
            "temperature": 0.0,
            "top_p": 1.0,
            "seed": 0,
        },
    },
}
LATENT = {"size": "video_480p", "aspect": "16:9", "width": 768, "height": 768, "frames": 49, "batch_size": 1}

_NODE = (
    "const node = app.graph.getNodeById(id); const widget = name => node.widgets.find(widget => "
    "widget.name === name);"
)
_ADD = """type => {
  app.graph.clear();
  const node = LiteGraph.createNode(type);
  app.graph.add(node);
  node.pos = [650, 450];
  Object.assign(app.canvas.ds, {scale: 1, offset: [0, 0]});
  app.canvas.draw(true, true); // where the node is, for its toolbox
  app.canvas.selectNode(node);
  return node.id;
}"""
_WATCH = """id => {
  const node = app.graph.getNodeById(id), show = node.lanceAnswer;
  window.__seen = [];
  node.lanceAnswer = text => {
    show(text);
    window.__seen.push(node.widgets.find(widget => widget.name === 'lance_answer').value);
  };
}"""
_SAY = """([kind, text]) => window.comfyAPI.api.api.dispatchCustomEvent(kind, kind === 'progress_text'
  ? {nodeId: '4', text} : {node: '4', display_node: '4', output: {text: [text]}, prompt_id: 'test'})"""
_HARM = "() => [window.__pwned ?? null, document.querySelectorAll('img[onerror], [src=x]').length]"


def complaints(page) -> list[str]:
    """What went wrong on a page. Frontends look for NodeId/en.md before NodeId.md, which serves every
    language without its own.
    """
    return [line for line in page.complaints if not line.endswith("/en.md")]


def settled(page, script: str, argument=None) -> None:
    page.page.wait_for_function(script, arg=argument, timeout=20_000)


@pytest.fixture(scope="module")
def server(make_server) -> Iterator:
    """A ComfyUI with the tiny checkpoint and the frontend it brings."""
    started = make_server(models={"lance": CHECKPOINT})
    shutil.copy(PHOTO, started.input)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def newer(make_server, frontend_root) -> Iterator:
    """The same, under the newest frontend."""
    started = make_server(models={"lance": CHECKPOINT}, front_end_root=frontend_root)
    shutil.copy(PHOTO, started.input)
    yield started
    started.stop()


@pytest.fixture(scope="module", params=["server", "newer", "newer with Vue nodes"])
def page(request, browser) -> Iterator:
    """A page of each frontend; of the newest, also in the mode that draws nodes as HTML."""
    which, _, vue = request.param.partition(" with ")
    with browser.open(request.getfixturevalue(which)) as opened:
        if vue:
            opened.set_setting("Comfy.VueNodes.Enabled", True)
            opened.load()
        yield opened
        if vue:
            opened.set_setting("Comfy.VueNodes.Enabled", False)
        assert complaints(opened) == []


@pytest.fixture(scope="module", params=["server", "newer"])
def chinese(request, browser) -> Iterator:
    """A page in Chinese."""
    with browser.open(request.getfixturevalue(request.param), locale="zh-CN") as opened:
        opened.set_setting("Comfy.Locale", "zh")
        opened.load()
        yield opened
        opened.set_setting("Comfy.Locale", "en")
        assert complaints(opened) == []


@pytest.fixture(scope="module")
def descriptions(server) -> dict:
    """Our nodes as the server describes them."""
    from client import Client

    with Client(server.url) as client:
        found = {name: info for name, info in client.object_info().items() if info["category"] == "Lance"}
    assert len(found) >= 11
    return found


def inputs(info: dict) -> dict:
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def saved_graph(page) -> dict:
    """The graph as a file would hold it (the browser hands over null for what was undefined)."""
    return json.loads(page.page.evaluate("() => JSON.stringify(app.graph.serialize())"))


def value(page, node: int, name: str):
    return page.page.evaluate(f"([id, name]) => {{ {_NODE} return widget(name).value; }}", [node, name])


def line(page, node: int) -> list[str]:
    """The two halves of the live line."""
    parts = "[...widget('lance_info').element.children].map(part => part.textContent)"
    script = f"id => {{ {_NODE} return {parts}; }}"
    return page.page.evaluate(script, node)


def open_help(page, node_type: str):
    """Select a node, press its info button; the help's panel."""
    page.page.evaluate(_ADD, node_type)
    page.page.get_by_test_id("info-button").click(timeout=15_000)
    panel = page.page.locator(".node-help-content").first
    panel.locator("table").first.wait_for(timeout=15_000)
    return panel


# -- without a host ------------------------------------------------------------------------------------------


def test_the_script_has_no_numbers_of_its_own():
    """Sizes, limits and bytes come with the node's schema; what is left are roundings."""
    code = re.sub(r"//.*|/\*.*?\*/", "", SCRIPT[SCRIPT.index("function gigabytes") :], flags=re.DOTALL)
    code = code.partition("/** Grey")[0].partition("function greyOut")[0]
    assert set(re.findall(r"(?<![\w.])\d[\d.e_]*", code)) <= {"0", "1", "1e9"}


def test_the_schema_tells_the_canvas_what_sizes_mean(descriptions):
    """As the core has it: a step's memory by the script's own formula is DenoisingMemory's."""
    from lance_core.config import RELEASED_LLM
    from lance_core.inputs.sizes import PRESETS
    from lance_core.inputs.tasks import SIZES
    from lance_core.model.experts import expert_parameters
    from lance_core.model.memory import DenoisingMemory

    facts = descriptions["EmptyLanceLatent"]["input"]["required"]["size"][1]["lance"]
    assert facts["sizes"] == {p: {a: list(size) for a, size in sizes.items()} for p, sizes in SIZES.items()}
    assert facts["sides"] == {p: PRESETS[p][0] for p in ("video_480p", "video_360p", "video_192p")}
    assert (facts["cell"], facts["max_side"], facts["max_frames"], facts["fps"]) == (16, 1024, 121, 12)
    memory = facts["memory"]
    assert memory["weights"] == 2 * expert_parameters(RELEASED_LLM) == pytest.approx(12.35e9, rel=0.01)
    core = DenoisingMemory.of(RELEASED_LLM, 2)
    for tokens in (2304, 49_290):
        rows, some = memory["rows"], lambda count: min(count, memory["chunk"])
        attending = rows * (tokens * memory["attending"] + some(tokens) * memory["rotating"])
        feeding = rows * tokens * memory["feeding"] + some(rows * tokens) * memory["widening"]
        by_script = tokens * (memory["key_value"] + memory["residual"]) + max(attending, feeding)
        assert by_script == core.step(2, tokens, [0])


def test_the_script_makes_no_html():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|DOMParser", SCRIPT)


# -- help and labels, as served ------------------------------------------------------------------------------


def test_every_node_has_help_in_both_languages(server, descriptions):
    import requests

    assert (
        {path.stem for path in DOCS.glob("*.md")}
        == {path.parent.name for path in DOCS.glob("*/zh.md")}
        == set(descriptions)
    )
    for name, info in descriptions.items():
        for path in (f"{name}.md", f"{name}/zh.md"):
            reply = requests.get(f"{server.url}/extensions/ComfyUI-Lance/docs/{path}", timeout=30)
            assert reply.status_code == 200, path
            text = reply.content.decode("utf-8")
            outputs = (
                [entry["name"] for entry in LABELS[name]["outputs"].values()]
                if path.endswith("zh.md")
                else info["output_name"]
            )
            lost = [key for key in inputs(info) if f"`{key}`" not in text] + [
                label for label in outputs if label not in text
            ]
            assert not lost, f"{path} says nothing of {lost}"
            named = set(
                re.findall(
                    r"^\| [^|]*`(\w+)` \|", text.partition("\n## ")[2].partition("\n## ")[0], re.MULTILINE
                )
            )
            assert named == set(inputs(info)), f"{path} speaks of inputs that are not there"


def test_every_label_is_in_chinese(descriptions):
    assert set(LABELS) == set(descriptions)
    for name, info in descriptions.items():
        labels = LABELS[name]
        seeded = any(spec[1].get("control_after_generate") for spec in inputs(info).values())
        assert set(labels["inputs"]) == set(inputs(info)) | ({"control_after_generate"} if seeded else set())
        assert set(labels["outputs"]) == {str(index) for index in range(len(info["output"]))}
        for entry in (*labels["inputs"].values(), *labels["outputs"].values()):
            assert entry["name"]
            assert "`" not in entry.get("tooltip", "")
        assert re.search("[一-鿿]", labels["display_name"] + labels["description"])


def test_every_input_explains_itself(descriptions):
    assert [
        f"{name}.{key}"
        for name, info in descriptions.items()
        for key, spec in inputs(info).items()
        if not spec[1].get("tooltip")
    ] == []


# -- in the browser ------------------------------------------------------------------------------------------


def test_nodes_are_in_the_library(page, descriptions):
    page.page.evaluate(
        "() => app.extensionManager.command.execute('Workspace.ToggleSidebarTab.node-library')"
    )
    page.page.locator("input[placeholder*=Search]").first.fill("Lance")
    for info in descriptions.values():
        page.page.get_by_text(info["display_name"], exact=True).first.wait_for(
            state="attached", timeout=15_000
        )
    page.page.evaluate(
        "() => app.extensionManager.command.execute('Workspace.ToggleSidebarTab.node-library')"
    )


def test_answer_is_written_on_the_node_and_kept(page, tmp_path, request):
    page.load_graph(ASK)
    question = request.node.name  # another one for each page, or the answer would come out of the cache
    page.set_widget(4, "question", question)
    assert page.missing_nodes() == []
    page.page.evaluate(_WATCH, 4)
    page.run()
    settled(page, "() => app.graph.getNodeById(4).properties.lance_answer")
    answer = value(page, 4, "lance_answer")
    seen = page.page.evaluate("() => window.__seen")
    assert answer
    assert len(set(seen)) > 3, "the answer did not grow on the node"
    assert (
        page.page.evaluate(
            "() => app.graph.getNodeById(4).widgets.filter(widget => widget.name.startsWith('$$')).length"
        )
        == 0
    )
    assert page.screenshot(tmp_path / "answer.png").stat().st_size > 10_000

    assert "lance_answer" not in page.prompt()["4"]["inputs"]
    saved = saved_graph(page)
    stored = next(node for node in saved["nodes"] if node["id"] == 4)
    assert stored["widgets_values"][:5] == [question, "", 12, 0, 1]
    # With the seed, by now another one, what becomes of it, and the positions
    assert len(stored["widgets_values"]) == 8
    page.page.evaluate("() => app.graph.clear()")
    page.load_graph(saved)
    assert value(page, 4, "lance_answer") == answer


def test_a_hostile_answer_stays_text(page, tmp_path):
    page.load_graph(ASK)
    for kind in ("progress_text", "executed"):
        page.page.evaluate(_SAY, [kind, f"{kind} {HOSTILE}"])
        page.page.wait_for_timeout(500)
        assert value(page, 4, "lance_answer") == f"{kind} {HOSTILE}"
        shown = page.page.evaluate("() => [...document.querySelectorAll('textarea')].map(area => area.value)")
        assert f"{kind} {HOSTILE}" in shown
        assert page.page.evaluate(_HARM) == [None, 0]
    page.load_graph(saved_graph(page))
    page.screenshot(tmp_path / "hostile.png")
    assert value(page, 4, "lance_answer").endswith(HOSTILE)
    assert page.page.evaluate(_HARM) == [None, 0]


def test_the_live_line_follows_the_values(page, tmp_path):
    page.load_graph({"1": {"class_type": "EmptyLanceLatent", "inputs": LATENT}})
    assert line(page, 1) == ["848 × 480 · 49 frames · 4.1 s", "20,670 tokens · ≈ 15 GB (bf16)"]
    page.screenshot(tmp_path / "line.png")
    page.page.evaluate(
        f"id => {{ {_NODE} widget('frames').value = 50; }}", 1
    )  # as a file might have it: typed in, it is rounded
    changes = [
        ("batch_size", 1, ["848 × 480 · 50 → 49 frames (4k+1) · 4.1 s", "20,670 tokens · ≈ 15 GB (bf16)"]),
        (
            "batch_size",
            2,
            ["848 × 480 · 50 → 49 frames (4k+1) · 4.1 s", "2 × 20,670 tokens · ≈ 16 GB (bf16)"],
        ),
        ("frames", 1, ["848 × 480 · 1 image", "2 × 1,590 tokens · ≈ 13 GB (bf16)"]),
        ("size", "custom", ["768 × 768 · 1 image", "2 × 2,304 tokens · ≈ 13 GB (bf16)"]),
        ("width", 1168, ["more than 1024 pixels a side: will be refused", ""]),
        ("height", 496, ["1168 × 496 · 1 image", "2 × 2,263 tokens · ≈ 13 GB (bf16)"]),
    ]
    for name, new, expected in changes:
        page.set_widget(1, name, new)
        assert line(page, 1) == expected
        greyed = page.page.evaluate(
            f"id => {{ {_NODE} return ['width', 'height', 'aspect'].map(name => !!widget(name).disabled); }}",
            1,
        )
        assert greyed == ([False, False, True] if value(page, 1, "size") == "custom" else [True, True, False])
    sent = page.prompt()["1"]["inputs"]
    assert sent == {
        "size": "custom",
        "aspect": "16:9",
        "width": 1168,
        "height": 496,
        "frames": 1,
        "batch_size": 2,
    }
    (saved,) = page.nodes()
    assert saved["widgets_values"] == ["custom", "16:9", 1168, 496, 1, 2]


def test_the_live_line_with_a_picture_and_with_links(page):
    node = page.page.evaluate(_ADD, "LanceImageToVideoLatent")
    assert line(page, node) == ["≈ 640 × 640 · 49 frames · 4.1 s", "20,800 tokens · ≈ 15 GB (bf16)"]
    page.set_widget(node, "size", "video_360p")
    assert line(page, node)[0].startswith("≈ 480 × 480 · ")
    connect = f"""id => {{ {_NODE}
      const number = LiteGraph.createNode('PrimitiveInt');
      app.graph.add(number);
      const slot = node.inputs.findIndex(input => input.name === 'frames');
      number.connect(0, node, slot);
      return slot;
    }}"""
    slot = page.page.evaluate(connect, node)
    assert line(page, node) == ["size comes from a connected input", ""]
    page.page.evaluate("([id, slot]) => app.graph.getNodeById(id).disconnectInput(slot)", [node, slot])
    assert "20,800" not in line(page, node)[1]
    assert "tokens" in line(page, node)[1]


def test_help_is_shown(page, tmp_path):
    text = open_help(page, "EmptyLanceLatent").inner_text()
    page.page.screenshot(path=tmp_path / "help.png")
    assert "Connect it" in text
    assert "batch_size" in text


def test_chinese_is_shown(chinese, tmp_path):
    page = chinese
    text = open_help(page, "EmptyLanceLatent").inner_text()
    page.page.screenshot(path=tmp_path / "zh.png")
    assert "连接示例" in text
    node = page.nodes()[0]["id"]
    title, outputs, widgets = page.page.evaluate(
        f"id => {{ {_NODE} return [node.title, "
        "node.outputs.map(slot => slot.label ?? slot.localized_name ?? slot.name), "
        "Object.fromEntries(node.widgets.map(widget => [widget.name, widget.label]))]; }",
        node,
    )
    labels = LABELS["EmptyLanceLatent"]
    assert (title, outputs) == (labels["display_name"], [labels["outputs"]["0"]["name"]])
    assert {name: widgets[name] for name in labels["inputs"]} == {
        name: entry["name"] for name, entry in labels["inputs"].items()
    }
    assert line(page, node) == ["768 × 768 · 1 张图像", "2,304 个 token · ≈ 13 GB（bf16）"]


# -- blueprints and app mode ---------------------------------------------------------------------------------

BLUEPRINTS = sorted((PACK / "subgraphs").glob("*.json"))
SMALL = {"size": "custom", "width": 64, "height": 64, "steps": 1, "max_new_tokens": 4, "frames": 5}
SMALL |= {"prompt": "a red fox", "resolution": "image_256res"}
# A picture into the blueprint's first input where it takes one, and what comes out into a node that shows it.
_AROUND = """([photo, shown]) => {
  const node = app.graph.nodes[0];
  if (node.inputs.some(input => input.type === 'IMAGE')) {
    const load = LiteGraph.createNode('LoadImage');
    app.graph.add(load);
    load.widgets.find(widget => widget.name === 'image').value = photo;
    load.connect(0, node, node.inputs.findIndex(input => input.type === 'IMAGE'));
  }
  const show = LiteGraph.createNode(shown);
  app.graph.add(show);
  node.connect(0, show, 0);
  return node.id;
}"""


def takes_blueprints(server) -> bool:
    """Whether this ComfyUI lists them; 0.3.64 does not."""
    import requests

    reply = requests.get(f"{server.url}/global_subgraphs", timeout=30)
    listed = reply.json() if reply.status_code == 200 else {}
    ours = {one["name"] for one in listed.values() if one["info"]["node_pack"].endswith("ComfyUI-Lance")}
    assert reply.status_code == 404 or ours == {path.stem for path in BLUEPRINTS}
    return bool(listed)


def test_blueprints_are_found_by_search(page, server):
    if not takes_blueprints(server):
        pytest.skip("this ComfyUI has no blueprints of packs")
    page.page.evaluate("() => app.graph.clear()")
    page.page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.page.wait_for_timeout(800)
    page.page.keyboard.type("Text to image (Lance)", delay=20)
    page.page.wait_for_timeout(1500)
    page.page.keyboard.press("Enter")
    page.page.wait_for_timeout(1000)
    page.page.mouse.click(700, 500)  # newer frontends put it where one clicks
    settled(page, "() => app.graph.nodes.length === 1")
    assert [node["class_type"] for node in page.prompt().values()][-1] == "LanceVAEDecode"
    assert len(page.prompt()) == 5


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_a_blueprint_opens_and_runs(page, path):
    """Its inputs are the inner nodes', and what comes out is a picture, a video or an answer."""
    page.load_graph(path, path.stem)
    assert page.missing_nodes() == [] and page.nodes_with_errors() == []
    shown = {"Ask": "PreviewAny", "Image to video": "SaveVideo"}.get(path.stem.removesuffix(" (Lance)"))
    number = page.page.evaluate(_AROUND, [PHOTO.name, shown or "PreviewImage"])
    for name, new in SMALL.items():
        if name in page.widgets(number):
            page.set_widget(number, name, new)
    sent = {node["class_type"]: node["inputs"] for node in page.prompt().values()}
    for inputs_sent in sent.values():
        for name in inputs_sent.keys() & SMALL.keys() & page.widgets(number).keys():
            assert inputs_sent[name] == SMALL[name], name
    said = page.run()
    done = [message["detail"]["output"] for message in said if message["type"] == "executed"]
    assert any(out.get("images") or out.get("text") for out in done)


def test_app_mode_shows_the_prompt(browser, newer, tmp_path):
    """The newest frontend finds every widget and result that the workflow names for it."""
    with browser.open(newer) as opened:
        warned = []
        opened.page.on(
            "console", lambda said: warned.append(said.text) if "app config" in said.text else None
        )
        opened.load_graph(PACK / "workflows" / "lance_text_to_image.json", "app")
        opened.page.evaluate("() => app.extensionManager.command.execute('Comfy.ToggleLinear')")
        opened.page.wait_for_timeout(2000)
        opened.page.screenshot(path=str(tmp_path / "app.png"))
        texts = opened.page.evaluate(
            "() => [...document.querySelectorAll('textarea')].filter(area => area.checkVisibility())"
            ".map(area => area.value)"
        )
        assert any("ginger cat" in text for text in texts)
        kept = opened.page.evaluate("() => app.graph.extra.linearData")
        assert [name for _, name, *_ in kept["inputs"]] == ["prompt", "size", "aspect", "seed"]
        assert len(kept["outputs"]) == 1 and warned == []
