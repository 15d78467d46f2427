"""workflows/: generated, complete, and free of what belongs to one machine. Opened and run in
tests/host/test_workflows.py.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "workflows"
BLUEPRINTS = ROOT / "subgraphs"
SCHEMAS = json.loads((ROOT / "scripts" / "workflow_nodes.json").read_text(encoding="utf-8"))
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
TASKS = {
    "lance_text_to_image": "Lance_3B",
    "lance_stock_sampler": "Lance_3B",
    "lance_text_to_video": "Lance_3B_Video",
    "lance_image_to_video": "Lance_3B_Video",
    "lance_image_edit": "Lance_3B",
    "lance_video_edit": "Lance_3B_Video",
    "lance_subject_to_image": "Lance_3B",
    "lance_subject_to_video": "Lance_3B_Video",
    "lance_image_question": "Lance_3B",
    "lance_video_question": "Lance_3B_Video",
    "lance_multi_turn_edit": "Lance_3B",
    "lance_best_of_n": "Lance_3B",
    "lance_chat_then_edit": "Lance_3B",
    "lance_enhance_to_video": "Lance_3B_Video",
    "lance_first_and_last_frame": "Lance_3B_Video",
    "lance_minute_of_video": "Lance_3B_Video",
    "lance_storyboard": "Lance_3B_Video",
}


def ui(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def api(name: str) -> dict:
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def run_script(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(root / "scripts" / "workflows.py"), "check"], capture_output=True, text=True
    )


def test_every_task_has_one():
    assert sorted(TASKS) == NAMES == sorted(path.stem for path in (FOLDER / "api").glob("*.json"))


def test_files_are_what_the_script_writes():
    done = run_script(ROOT)
    assert done.returncode == 0, done.stderr


def test_an_edit_by_hand_is_noticed(tmp_path):
    (tmp_path / "scripts").mkdir()
    for path in [*(ROOT / "scripts").glob("workflow*"), ROOT / "scripts" / "blueprints.py"]:
        if path.is_file():
            (tmp_path / "scripts" / path.name).write_bytes(path.read_bytes())
    for path in [*FOLDER.rglob("*.json"), *BLUEPRINTS.glob("*.json")]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    assert run_script(tmp_path).returncode == 0
    edited = tmp_path / "workflows" / "lance_image_edit.json"
    edited.write_text(edited.read_text(encoding="utf-8").replace("polka dots", "stripes"), encoding="utf-8")
    (tmp_path / "workflows" / "api" / "lance_text_to_image.json").unlink()
    (tmp_path / "workflows" / "stray.json").write_text("{}")
    (tmp_path / "subgraphs" / "Old (Lance).json").write_text("{}")
    done = run_script(tmp_path)
    assert done.returncode == 1
    named = ("lance_image_edit.json", "lance_text_to_image.json", "stray.json", "Old (Lance).json")
    assert [name in done.stderr for name in named] == [True] * 4


@pytest.mark.parametrize("name", NAMES)
def test_thumbnail(name):
    data = (FOLDER / f"{name}.jpg").read_bytes()
    assert data[:3] == b"\xff\xd8\xff"
    assert len(data) < 100_000
    at = 2
    while data[at + 1] not in (0xC0, 0xC2):  # segments up to the frame header
        at += 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
    height, width = struct.unpack(">HH", data[at + 5 : at + 9])
    assert min(width, height) >= 400


def test_the_clip_of_the_video_workflows():
    """Small, as long as a video of Lance's, and named by every workflow that loads one."""
    from lance_core.inputs import media

    file = FOLDER / "lance_example.mp4"
    assert file.stat().st_size < 100_000
    frames = media.read_clip(file)[0]
    assert len(frames) % 4 == 1 and len(frames) == 37
    assert (frames[0] != frames[-1]).any()
    loaded = [n["inputs"]["file"] for w in NAMES for n in api(w).values() if n["class_type"] == "LoadVideo"]
    assert loaded == [file.name] * 2


def test_no_other_thumbnails():
    assert sorted(path.stem for path in FOLDER.glob("*.jpg")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_note_says_where_the_models_go(name):
    (text,) = [node["widgets_values"][0] for node in ui(name)["nodes"] if node["type"] == "MarkdownNote"]
    for part in (
        f"models/lance/{TASKS[name]}/",
        "models/lance/Qwen2.5-VL-ViT",
        "models/lance/Wan2.2_VAE.pth",
    ):
        assert f"`{part}" in text
    assert "https://huggingface.co/bytedance-research/Lance" in text
    (loader,) = [node for node in api(name).values() if node["class_type"] == "LanceLoader"]
    assert loader["inputs"]["checkpoint"] == TASKS[name]
    asks_for_clip = any(node["class_type"] == "LoadVideo" for node in api(name).values())
    assert ("Choose a clip" in text) == asks_for_clip


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_one_machine(name):
    for path in (FOLDER / f"{name}.json", FOLDER / "api" / f"{name}.json"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'"(/|~|[A-Za-z]:\\|\\\\)', text), "an absolute path"
        assert not re.search(r"127\.0\.0\.1|localhost|/(home|root|tmp)/", text)


@pytest.mark.parametrize("name", NAMES)
def test_released_settings(name):
    for node in api(name).values():
        inputs = node["inputs"]
        if node["class_type"] in ("LanceSampler", "KSampler"):
            assert (inputs["steps"], inputs["cfg"]) == (30, 4.0)
        if "shift" in inputs:
            assert inputs["shift"] == 3.5
        if node["class_type"] == "LanceExtendVideo":
            assert (inputs["steps"], inputs["cfg"], inputs["size"]) == (30, 4.0, "video_480p")
        elif name == "lance_storyboard" and "frames" in inputs:
            assert (inputs["size"], inputs["frames"]) == ("video_480p", 1)  # pictures that clips start with
        elif "frames" in inputs:
            assert (inputs["size"], inputs["frames"]) == (
                ("video_480p", 49) if TASKS[name].endswith("Video") else ("image_768res", 1)
            )
        if inputs.get("aspect") and TASKS[name].endswith("Video"):
            assert inputs["aspect"] == "16:9"  # 848 x 480


@pytest.mark.parametrize("name", NAMES)
def test_links_are_sound(name):
    """Each link is written at both of its ends, and says what the API form says."""
    graph, nodes = ui(name), {node["id"]: node for node in ui(name)["nodes"]}
    found = set()
    for number, origin, output, target, slot, kind in graph["links"]:
        assert number in nodes[origin]["outputs"][output]["links"]
        assert nodes[origin]["outputs"][output]["type"] == kind
        assert nodes[target]["inputs"][slot]["link"] == number
        assert nodes[target]["inputs"][slot]["type"] in (kind, "*")
        found.add((str(target), nodes[target]["inputs"][slot]["name"], str(origin), output))
    wanted = {
        (key, name, *value)
        for key, node in api(name).items()
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    }
    assert found == wanted


@pytest.mark.parametrize("name", NAMES)
def test_left_to_right_without_overlap(name):
    graph = ui(name)
    boxes = {
        node["id"]: (
            node["pos"][0],
            node["pos"][1] - 30,
            node["pos"][0] + node["size"][0],
            node["pos"][1] + node["size"][1],
        )
        for node in graph["nodes"]
    }
    ids = sorted(boxes)
    for a in ids:
        for b in ids[ids.index(a) + 1 :]:
            (l1, t1, r1, b1), (l2, t2, r2, b2) = boxes[a], boxes[b]
            assert r1 <= l2 or r2 <= l1 or b1 <= t2 or b2 <= t1, f"nodes {a} and {b} overlap"
    for _, origin, _, target, _, _ in graph["links"]:
        assert boxes[origin][0] <= boxes[target][0], f"the link from {origin} to {target} runs to the left"
    for left, top, right, bottom in boxes.values():
        inside = [
            x <= left and y <= top and right <= x + w and bottom <= y + h
            for x, y, w, h in (g["bounding"] for g in graph["groups"])
        ]
        assert sum(inside) == 1


def test_three_turns_on_one_subject():
    """Each turn's encode sees the picture the turn before decoded."""
    graph = api("lance_multi_turn_edit")
    sources = [
        graph[node["inputs"]["image"][0]]["class_type"]
        for node in graph.values()
        if node["class_type"] == "LanceVisionEncode"
    ]
    assert sources == ["LoadImage", "LanceVAEDecode", "LanceVAEDecode"]


def test_stock_variant_uses_stock_nodes():
    kinds = {node["class_type"] for node in api("lance_stock_sampler").values()}
    assert {"KSampler", "ModelSamplingSD3", "VAEDecode"} <= kinds
    assert not {"LanceSampler", "LanceVAEDecode"} & kinds


# -- app mode ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_app_mode_shows_what_people_change(name):
    """Widgets that the nodes have, the prompt or question among them, and every node that shows a result."""
    graph = ui(name)
    nodes, shown = {node["id"]: node for node in graph["nodes"]}, graph["extra"]["linearData"]
    for number, widget in shown["inputs"]:
        spec = next(s for s in SCHEMAS[nodes[number]["type"]]["inputs"] if s[0] == widget)
        assert spec[1] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
    assert {"prompt", "prompts", "question"} & {widget for _, widget in shown["inputs"]}
    results = [n["id"] for n in graph["nodes"] if n["type"] in ("SaveImage", "SaveVideo", "PreviewAny")]
    assert shown["outputs"] == results and results
    assert "linearMode" not in graph["extra"], "templates open as graphs"


# -- blueprints ----------------------------------------------------------------------------------------------

TITLES = ["Ask (Lance)", "Edit (Lance)", "Image to video (Lance)", "Text to image (Lance)"]


def blueprint(title: str) -> tuple[dict, dict]:
    """The one node of the file, and the subgraph in it."""
    content = json.loads((BLUEPRINTS / f"{title}.json").read_text(encoding="utf-8"))
    (node,), (inside,) = content["nodes"], content["definitions"]["subgraphs"]
    return node, inside


def test_the_blueprints_there_are():
    assert sorted(path.stem for path in BLUEPRINTS.glob("*")) == TITLES
    ids = [inside["id"] for _, inside in map(blueprint, TITLES)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("title", TITLES)
def test_blueprint_nodes_are_as_their_schemas_say(title):
    _, inside = blueprint(title)
    for node in inside["nodes"]:
        schema = SCHEMAS[node["type"]]
        specs = {name: (kind, details) for name, kind, details in schema["inputs"]}
        assert {i["name"]: i["type"] for i in node["inputs"]} == {n: k for n, (k, _) in specs.items()}
        assert [[o["name"], o["type"]] for o in node["outputs"]] == schema["outputs"]
        widgets = [n for n, (kind, _) in specs.items() if kind in ("INT", "FLOAT", "STRING", "COMBO")]
        extra = sum(bool(details.get("control")) for _, details in specs.values())
        assert len(node["widgets_values"]) == len(widgets) + extra
        for put in node["inputs"]:
            kind, details = specs[put["name"]]
            needed = not details.get("optional") and put["name"] not in widgets
            assert not needed or put["link"] is not None, f"{node['type']} lacks {put['name']}"


@pytest.mark.parametrize("title", TITLES)
def test_blueprint_links_are_sound(title):
    """Each is at both of its ends, and of one type there; none is left over, and no input is open."""
    outer, inside = blueprint(title)
    nodes = {node["id"]: node for node in inside["nodes"]}
    seen = []
    for link in inside["links"]:
        number, kind = link["id"], link["type"]
        seen.append(number)
        if link["origin_id"] == -10:
            origin = inside["inputs"][link["origin_slot"]]
            assert number in origin["linkIds"]
        else:
            origin = nodes[link["origin_id"]]["outputs"][link["origin_slot"]]
            assert number in origin["links"]
        if link["target_id"] == -20:
            target = inside["outputs"][link["target_slot"]]
            assert target["linkIds"] == [number]
        else:
            target = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            assert target["link"] == number
        assert origin["type"] == kind == target["type"]
    assert sorted(seen) == list(range(1, len(seen) + 1))
    assert all(end["linkIds"] for end in (*inside["inputs"], *inside["outputs"]))
    for side in ("inputs", "outputs"):
        assert [(s["name"], s["type"]) for s in outer[side]] == [(s["name"], s["type"]) for s in inside[side]]


@pytest.mark.parametrize("title", TITLES)
def test_blueprint_node_shows_its_widgets(title):
    outer, inside = blueprint(title)
    assert outer["type"] == inside["id"] and outer["title"] == inside["name"] == title
    nodes = {str(node["id"]): node for node in inside["nodes"]}
    shown = outer["properties"]["proxyWidgets"]
    for number, name in shown:
        assert name == "control_after_generate" or name in [i["name"] for i in nodes[number]["inputs"]]
    widgets = [put["name"] for put in outer["inputs"] if "widget" in put]
    assert [name for _, name in shown if name != "control_after_generate"] == widgets
    assert {"prompt", "question"} & set(widgets) and "checkpoint" in widgets
    assert inside["description"] and "/" in inside["category"]
