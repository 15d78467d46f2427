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
    for path in (ROOT / "scripts").glob("workflow*"):
        if path.is_file():
            (tmp_path / "scripts" / path.name).write_bytes(path.read_bytes())
    for path in FOLDER.rglob("*.json"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    assert run_script(tmp_path).returncode == 0
    edited = tmp_path / "workflows" / "lance_image_edit.json"
    edited.write_text(edited.read_text(encoding="utf-8").replace("polka dots", "stripes"), encoding="utf-8")
    (tmp_path / "workflows" / "api" / "lance_text_to_image.json").unlink()
    (tmp_path / "workflows" / "stray.json").write_text("{}")
    done = run_script(tmp_path)
    assert done.returncode == 1
    assert [
        name in done.stderr for name in ("lance_image_edit.json", "lance_text_to_image.json", "stray.json")
    ] == [True] * 3


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
