"""A workflow written once -> its API form and its UI form (litegraph 0.4), laid out in columns from left to
right.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMAS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "workflow_nodes.json").read_text(encoding="utf-8")
)

NOTE = "MarkdownNote"
NOTE_COLORS = {"color": "#432", "bgcolor": "#653"}
GROUP_COLORS = ("#88A", "#3f789e", "#8A8", "#b58b2a", "#a1309b", "#A88")
PACK_ID, STOCK_ID = "comfyui-lance", "comfy-core"  # where managers find missing nodes

# Width and height that show everything: texts without scrolling, pictures large enough to judge. Measured in
# the browser.
SIZES: dict[str, tuple[int, int]] = {
    NOTE: (340, 220),
    "LanceLoader": (340, 130),
    "LoadImage": (340, 350),
    "LoadVideo": (340, 350),
    "LanceVisionEncode": (420, 300),
    "LanceTextEncode": (420, 360),
    "EmptyLanceLatent": (420, 240),
    "LanceImageToVideoLatent": (420, 250),
    "LanceSampler": (340, 410),
    "KSampler": (340, 290),
    "ModelSamplingSD3": (340, 70),
    "LanceVAEDecode": (340, 70),
    "VAEDecode": (340, 70),
    "SaveImage": (340, 340),
    "SaveVideo": (340, 340),
    "LanceUnderstand": (420, 600),
    "LanceScore": (420, 560),
    "LanceEnhancePrompt": (420, 560),
    "LanceKeyframes": (420, 130),
    "LanceExtendVideo": (420, 520),
    "PreviewAny": (400, 300),
}
STRETCHED = (
    "SaveImage",
    "SaveVideo",
    "PreviewAny",
    "LanceUnderstand",
    "LanceEnhancePrompt",
)  # down to the group's end, when last in their column
# Of litegraph: the bar above a node, outside its size; and the distances kept here.
TITLE, GAP, INNER, GROUP_GAP, GROUP_TOP = 30, 24, 40, 40, 54
LEGIBLE = 0.62  # the scale below which frontends leave out the texts

Link = tuple["Node", int]
OPEN = object()  # stands for an input that a blueprint leaves to be connected from outside

# What app mode shows (docs.comfy.org: App Mode), by kind of node: its widgets, and which nodes are results.
APP_INPUTS = {
    "LoadImage": ("image",),
    "LoadVideo": ("file",),
    "LanceTextEncode": ("prompt",),
    "EmptyLanceLatent": ("size", "aspect", "frames"),
    "LanceImageToVideoLatent": ("size", "frames"),
    "LanceUnderstand": ("question",),
    "LanceEnhancePrompt": ("wish",),
    "LanceExtendVideo": ("prompts", "seed"),
    "LanceSampler": ("seed",),
    "KSampler": ("seed",),
}
APP_OUTPUTS = ("SaveImage", "SaveVideo", "PreviewAny")


def is_widget(spec: list) -> bool:
    """Whether an input of the snapshot is set on the node rather than connected."""
    return spec[1] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


@dataclass(eq=False)
class Node:
    """One node; node[i] is its i-th output, to be given as another node's input."""

    id: int
    kind: str
    title: str
    inputs: dict[str, Any] = field(default_factory=dict)
    pos: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.size = SIZES[self.kind]

    def __getitem__(self, output: int) -> Link:
        return self, output

    @property
    def specs(self) -> list[list]:
        """[name, type, {details}] of every input, in the schema's order."""
        return SCHEMAS[self.kind]["inputs"]


class Graph:
    """A workflow under construction: nodes go into the current column of the current group."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.after_run = "randomize"  # what seeds do
        self.nodes: list[Node] = []
        self.groups: list[tuple[str, list[list[Node]], int]] = []

    def group(self, title: str, width: int = 0) -> None:
        """Start a group to the right of the last, its columns at least `width` wide."""
        self.groups.append((title, [[]], width))

    def column(self) -> None:
        """Start a column in the current group."""
        self.groups[-1][1].append([])

    def add(self, kind: str, title: str = "", **inputs: Any) -> Node:
        """A node. Inputs not given have their defaults; links are given as node[output].

        Raises:
            KeyError: the node has no such input, or one without a default was not given.
        """
        schema = SCHEMAS[kind]
        unknown = set(inputs) - {spec[0] for spec in schema["inputs"]}
        if unknown:
            raise KeyError(f"{kind} has no input {sorted(unknown)}")
        node = self._place(Node(len(self.nodes) + 1, kind, title or schema["title"]))
        for name, _, details in schema["inputs"]:
            if name in inputs or "default" in details:
                node.inputs[name] = inputs.get(name, details.get("default"))
            elif not details.get("optional"):
                raise KeyError(f"{kind} needs {name}")
        return node

    def note(self, text: str) -> None:
        """Text on the canvas."""
        self._place(Node(len(self.nodes) + 1, NOTE, "Read me", {"": text}))

    def _place(self, node: Node) -> Node:
        self.nodes.append(node)
        self.groups[-1][1][-1].append(node)
        return node

    # -- API form --------------------------------------------------------------------------------------------

    def api(self) -> dict[str, Any]:
        """What /prompt takes, as the browser exports it."""
        return {str(node.id): self._api_node(node) for node in self.nodes if node.kind != NOTE}

    @staticmethod
    def _api_node(node: Node) -> dict[str, Any]:
        inputs = {
            name: [str(value[0].id), value[1]] if isinstance(value, tuple) else value
            for name, value in node.inputs.items()
        }
        return {"inputs": inputs, "class_type": node.kind, "_meta": {"title": node.title}}

    # -- UI form ---------------------------------------------------------------------------------------------

    def ui(self) -> dict[str, Any]:
        """What the browser opens and saves."""
        groups = self.lay_out()
        links = self.links()
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-lance/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(links),
            "nodes": [ui_node(node, links, self.after_run) for node in self.nodes],
            "links": links,
            "groups": groups,
            "config": {},
            "extra": {"ds": self._view(groups), "linearData": self._app()},
            "version": 0.4,
        }

    def lay_out(self) -> list[dict[str, Any]]:
        """Give every node its place; returns the groups, all of one height."""
        groups, x, bottom = [], 0, 0
        for number, (title, columns, width) in enumerate(self.groups, 1):
            left, x = x, x + GAP
            for column in columns:
                y, wide = GROUP_TOP, max(width, *(node.size[0] for node in column))
                for node in column:
                    node.pos, node.size = (x, y + TITLE), (wide, node.size[1])
                    y += TITLE + node.size[1] + GAP
                bottom = max(bottom, y)
                x += wide + INNER
            x += GAP - INNER
            color = GROUP_COLORS[(number - 1) % len(GROUP_COLORS)]
            groups.append(
                {
                    "id": number,
                    "title": f"{number} · {title}",
                    "bounding": [left, 0, x - left, 0],
                    "color": color,
                    "font_size": 24,
                }
            )
            x += GROUP_GAP
        for _, columns, _ in self.groups:
            for last in (column[-1] for column in columns):
                if last.kind in STRETCHED:
                    last.size = (last.size[0], bottom - GAP - last.pos[1])
        for group in groups:
            group["bounding"][3] = bottom
            group["flags"] = {}
        return groups

    def _app(self) -> dict[str, Any]:
        """What app mode shows of it: the inputs that people change, and the results. Frontends without app
        mode ignore it; the workflow opens as a graph in all.
        """
        video = any(node.kind == "SaveVideo" for node in self.nodes)
        inputs = [
            [node.id, name]
            for node in self.nodes
            for name in APP_INPUTS.get(node.kind, ())
            if name != "frames" or video
        ]
        return {"inputs": inputs, "outputs": [n.id for n in self.nodes if n.kind in APP_OUTPUTS]}

    @staticmethod
    def _view(groups: list[dict[str, Any]]) -> dict[str, Any]:
        """Scale and offset that show all of it in a window of 1600 by 900, or its left part where texts would
        become too small.
        """
        width = groups[-1]["bounding"][0] + groups[-1]["bounding"][2]
        height = groups[0]["bounding"][3]
        scale = round(max(LEGIBLE, min(0.9, 1430 / width, 700 / height)), 3)
        return {"scale": scale, "offset": [round(80 / scale), round(100 / scale)]}

    def links(self) -> list[list]:
        """[id, from node, from output, to node, to input, type]; inputs are counted widgets included, as
        frontends since 1.16 do.
        """
        links: list[list] = []
        for node in self.nodes:
            for slot, (name, _, _) in enumerate(slots(node)):
                value = node.inputs.get(name)
                if isinstance(value, tuple):
                    origin, index = value
                    links.append(
                        [
                            len(links) + 1,
                            origin.id,
                            index,
                            node.id,
                            slot,
                            SCHEMAS[origin.kind]["outputs"][index][1],
                        ]
                    )
        return links


def ui_node(node: Node, links: list[list], after_run: str) -> dict[str, Any]:
    """One node of the UI form; after_run: what seeds do."""
    note = node.kind == NOTE
    ui: dict[str, Any] = {
        "id": node.id,
        "type": node.kind,
        "pos": list(node.pos),
        "size": list(node.size),
    }
    ui |= {"flags": {}, "order": node.id - 1, "mode": 0}
    ui["inputs"] = [] if note else [_input(node, slot, spec, links) for slot, spec in enumerate(slots(node))]
    ui["outputs"] = (
        []
        if note
        else [_output(node, slot, spec, links) for slot, spec in enumerate(SCHEMAS[node.kind]["outputs"])]
    )
    if note or node.title != SCHEMAS[node.kind]["title"]:  # a title that is saved is not translated
        ui["title"] = node.title
    ui["properties"] = (
        {}
        if note
        else {"cnr_id": PACK_ID if "Lance" in node.kind else STOCK_ID, "Node name for S&R": node.kind}
    )
    ui["widgets_values"] = list(node.inputs.values()) if note else _widget_values(node, after_run)
    return ui | (NOTE_COLORS if note else {})


def slots(node: Node) -> list[list]:
    """Inputs in the order of the frontend's slots: what is connected first, then what is set."""
    if node.kind == NOTE:
        return []
    return sorted(node.specs, key=is_widget)


def _input(node: Node, slot: int, spec: list, links: list[list]) -> dict[str, Any]:
    name, kind, details = spec
    made: dict[str, Any] = {"name": name, "type": kind}
    if details.get("optional"):
        made["shape"] = 7
    if is_widget(spec):
        made["widget"] = {"name": name}
    return made | {"link": next((link[0] for link in links if (link[3], link[4]) == (node.id, slot)), None)}


def _output(node: Node, slot: int, spec: list, links: list[list]) -> dict[str, Any]:
    return {
        "name": spec[0],
        "type": spec[1],
        "links": [link[0] for link in links if (link[1], link[2]) == (node.id, slot)],
    }


def _widget_values(node: Node, after_run: str) -> list:
    """Values in the order of the widgets, those the frontend adds included: what happens to a seed, the
    upload button.
    """
    values = []
    for spec in filter(is_widget, node.specs):
        name, _, details = spec
        value = node.inputs[name]
        values.append(details.get("default", "") if isinstance(value, tuple) else value)  # not set: connected
        if details.get("control"):
            values.append(after_run)
    return [*values, *(["image"] for spec in node.specs if spec[2].get("upload"))][: len(values) + 1]


def compact(info: dict[str, Any], kinds: list[str]) -> dict[str, Any]:
    """A host's /object_info -> what is kept of it here."""
    return {kind: _compact_node(info[kind]) for kind in kinds}


def _compact_node(info: dict[str, Any]) -> dict[str, Any]:
    inputs = []
    for part in ("required", "optional"):
        for name in info["input_order"].get(part, []):
            kind, given = [*info["input"][part][name], {}][:2]
            details: dict[str, Any] = {"optional": True} if part == "optional" else {}
            details |= {
                key: given[key]
                for key in ("default", "multiline")
                if given.get(key) is not None and given.get(key) is not False
            }
            if given.get("control_after_generate") or (name in ("seed", "noise_seed") and kind == "INT"):
                details["control"] = True
            if given.get("image_upload") or given.get("video_upload"):
                details["upload"] = True
            inputs.append([name, "COMBO" if isinstance(kind, list) else kind, details])
    return {
        "title": info["display_name"],
        "inputs": inputs,
        "outputs": [list(pair) for pair in zip(info["output_name"], info["output"], strict=True)],
    }
