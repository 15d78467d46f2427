"""The subgraph blueprints in subgraphs/: one node each for a task, found in ComfyUI's node library.

Written by workflows.py. A blueprint is a workflow file with a single node, whose inside is a subgraph; the
format is ComfyUI's (docs.comfy.org/custom-nodes/subgraph_blueprints). Links inside are objects, and those
that come from or go to the node's own inputs and outputs have the ids -10 and -20 at that end.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import workflow_graphs as tasks
from workflow_layout import OPEN, PACK_ID, SCHEMAS, Graph, Link, Node, is_widget, slots, ui_node

INPUTS, OUTPUTS = -10, -20
ROW = 20  # pixels between the slots of the subgraph's own ends


class Blueprint:
    """A subgraph under construction: nodes go into `graph`, and what is set or connected from outside is told
    by `expose` and `give`.
    """

    def __init__(self, title: str, category: str, description: str) -> None:
        self.title, self.category, self.description = title, category, description
        self.graph = Graph(title)
        self.graph.group("")
        self.inputs: list[tuple[Node, str]] = []
        self.outputs: list[tuple[Link, str]] = []

    def expose(self, node: Node, *names: str) -> None:
        """Make inputs of a node the blueprint's, in this order."""
        self.inputs += [(node, name) for name in names]

    def give(self, link: Link, name: str) -> None:
        """Make a node's output the blueprint's."""
        self.outputs.append((link, name))

    def file(self) -> dict[str, Any]:
        """What belongs into subgraphs/."""
        inside = self._inside()
        number = len(self.graph.nodes) + 1
        node = {
            "id": number,
            "type": inside["id"],
            "pos": [0, 0],
            "size": [420, 460],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [
                {"name": name, "type": kind, "link": None} | ({"widget": {"name": name}} if widget else {})
                for _, name, kind, widget in map(self._described, self.inputs)
            ],
            "outputs": [{"name": o["name"], "type": o["type"], "links": []} for o in inside["outputs"]],
            "properties": {
                "proxyWidgets": [[str(node.id), name] for node, name in self._widgets()],
                "cnr_id": PACK_ID,
            },
            "widgets_values": [],
            "title": self.title,
        }
        return {
            "id": _uuid(self.title, "file"),
            "revision": 0,
            "last_node_id": number,
            "last_link_id": 0,
            "nodes": [node],
            "links": [],
            "version": 0.4,
            "definitions": {"subgraphs": [inside]},
            "extra": {"BlueprintDescription": self.description, "BlueprintSearchAliases": ["lance"]},
        }

    def _widgets(self) -> list[tuple[Node, str]]:
        """What is set on the node; what becomes of a seed after a run comes last, and is no input."""
        described = [self._described(exposed) for exposed in self.inputs]
        shown = [(node, name) for node, name, _, widget in described if widget]
        return shown + [(node, "control_after_generate") for node, name in shown if name == "seed"]

    @staticmethod
    def _described(exposed: tuple[Node, str]) -> tuple[Node, str, str, bool]:
        node, name = exposed
        spec = next(spec for spec in node.specs if spec[0] == name)
        return node, name, spec[1], is_widget(spec)

    def _inside(self) -> dict[str, Any]:
        """The subgraph."""
        self.graph.lay_out()
        links = self._links()
        nodes = [ui_node(node, links, self.graph.after_run) for node in self.graph.nodes]
        left = min(node.pos[0] for node in self.graph.nodes)
        right = max(node.pos[0] + node.size[0] for node in self.graph.nodes)
        ends = []
        for end, x, count in (
            (INPUTS, left - 200, len(self.inputs)),
            (OUTPUTS, right + 80, len(self.outputs)),
        ):
            ends.append({"id": end, "bounding": [x, 100, 120, 40 + ROW * count]})
        return {
            "id": _uuid(self.title, "subgraph"),
            "version": 1,
            "state": {
                "lastGroupId": 0,
                "lastNodeId": len(self.graph.nodes) + 1,
                "lastLinkId": len(links),
                "lastRerouteId": 0,
            },
            "revision": 0,
            "config": {},
            "name": self.title,
            "inputNode": ends[0],
            "outputNode": ends[1],
            "inputs": [
                self._end(
                    name, kind, [link for link in links if link[1:3] == [INPUTS, index]], left - 100, index
                )
                for index, (_, name, kind, _) in enumerate(map(self._described, self.inputs))
            ],
            "outputs": [
                self._end(
                    name,
                    SCHEMAS[node.kind]["outputs"][output][1],
                    [link for link in links if link[3:5] == [OUTPUTS, index]],
                    right + 100,
                    index,
                )
                for index, ((node, output), name) in enumerate(self.outputs)
            ],
            "widgets": [],
            "nodes": nodes,
            "groups": [],
            "links": [dict(zip(_LINK, link, strict=True)) for link in links],
            "extra": {},
            "category": self.category,
            "description": self.description,
        }

    def _end(self, name: str, kind: str, links: list[list], x: int, index: int) -> dict[str, Any]:
        return {
            "id": _uuid(self.title, f"{x}/{name}"),
            "name": name,
            "type": kind,
            "linkIds": [link[0] for link in links],
            "pos": [x, 120 + ROW * index],
        }

    def _links(self) -> list[list]:
        """[id, from node, from output, to node, to input, type] of all, the ends included."""
        links = self.graph.links()
        for index, (node, name) in enumerate(self.inputs):
            slot = next(i for i, spec in enumerate(slots(node)) if spec[0] == name)
            links.append([len(links) + 1, INPUTS, index, node.id, slot, self._described((node, name))[2]])
        for index, ((node, output), _) in enumerate(self.outputs):
            kind = SCHEMAS[node.kind]["outputs"][output][1]
            links.append([len(links) + 1, node.id, output, OUTPUTS, index, kind])
        return links


_LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")


def _uuid(*parts: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(("comfyui-lance/blueprints", *parts))))


# -- the blueprints ------------------------------------------------------------------------------------------

MAKERS: dict[str, Callable[[], Blueprint]] = {}
GENERATION = "Image generation and editing"
VIDEO = "Video generation and editing"


def _blueprint(title: str, category: str, description: str) -> Callable:
    """Register what fills a blueprint of this title."""

    def register(fill: Callable[[Blueprint], None]) -> Callable:
        def make() -> Blueprint:
            made = Blueprint(title, category, description)
            fill(made)
            return made

        MAKERS[title] = make
        return fill

    return register


def _end(made: Blueprint, loader: Node, text: Node, latent: Link, frames: bool) -> Node:
    """Sampler and decoder; returns the sampler."""
    made.graph.column()
    sampled = tasks.sample(made.graph, loader, text, latent)
    decoded = made.graph.add("LanceVAEDecode", vae=loader[tasks.VAE], samples=sampled[0])
    if frames:
        made.give(decoded[tasks.FRAMES_AS_VIDEO], "video")
    made.give(decoded[tasks.IMAGES], "images")
    return sampled


@_blueprint(
    "Text to image (Lance)",
    f"{GENERATION}/Text to image",
    "Makes an image from a prompt, at a size Lance was trained for.",
)
def _text_to_image(made: Blueprint) -> None:
    graph = made.graph
    loader = graph.add("LanceLoader", checkpoint=tasks.IMAGE)
    graph.column()
    text = tasks.encode(graph, loader, "", "image")
    latent = graph.add("EmptyLanceLatent", size="image_768res", aspect="1:1", frames=1)
    sampled = _end(made, loader, text, latent[0], False)
    made.expose(text, "prompt", "negative_prompt")
    made.expose(latent, "size", "aspect", "width", "height", "batch_size")
    made.expose(sampled, "seed", "steps", "cfg")
    made.expose(loader, "checkpoint", "weight_dtype")


@_blueprint(
    "Edit (Lance)",
    f"{GENERATION}/Edit image",
    "Changes an image as the prompt says and keeps the rest.",
)
def _edit(made: Blueprint) -> None:
    graph = made.graph
    loader = graph.add("LanceLoader", checkpoint=tasks.IMAGE)
    graph.column()
    vision = tasks.see(graph, loader, "edit source", image=OPEN)
    text = tasks.encode(graph, loader, "", "image", vision)
    sampled = _end(made, loader, text, vision[tasks.LATENT], False)
    made.expose(vision, "image")
    made.expose(text, "prompt")
    made.expose(vision, "resolution")
    made.expose(sampled, "seed", "steps", "cfg")
    made.expose(loader, "checkpoint", "weight_dtype")


@_blueprint(
    "Ask (Lance)",
    "Text generation/Image captioning",
    "Answers a question about an image.",
)
def _ask(made: Blueprint) -> None:
    graph = made.graph
    graph.after_run = "fixed"
    loader = graph.add("LanceLoader", checkpoint=tasks.IMAGE)
    graph.column()
    vision = tasks.see(graph, loader, "question", image=OPEN)
    graph.column()
    answer = graph.add("LanceUnderstand", lance=loader[tasks.LANCE], vision=vision[tasks.VISION])
    made.give(answer[0], "answer")
    made.expose(vision, "image")
    made.expose(answer, "question", "max_new_tokens")
    made.expose(loader, "checkpoint", "weight_dtype")


@_blueprint(
    "Image to video (Lance)",
    f"{VIDEO}/Image to video",
    "Makes a video that starts with an image, at 12 frames a second.",
)
def _image_to_video(made: Blueprint) -> None:
    graph = made.graph
    loader = graph.add("LanceLoader", checkpoint=tasks.VIDEO)
    graph.column()
    text = tasks.encode(graph, loader, "", "video")
    latent = graph.add(
        "LanceImageToVideoLatent", vae=loader[tasks.VAE], start_image=OPEN, size="video_480p", frames=49
    )
    sampled = _end(made, loader, text, latent[0], True)
    made.expose(latent, "start_image")
    made.expose(text, "prompt")
    made.expose(latent, "size", "frames")
    made.expose(sampled, "seed", "steps", "cfg")
    made.expose(loader, "checkpoint", "weight_dtype")
