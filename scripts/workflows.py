"""The files in workflows/ and subgraphs/: written from workflow_graphs.py and blueprints.py, never by hand.

python scripts/workflows.py write         workflows/*.json (for the browser), workflows/api/*.json
                                          (for /prompt) and subgraphs/*.json (blueprints)
python scripts/workflows.py check         exit 1 and a line for each file that `write` would change
python scripts/workflows.py nodes         take the node descriptions anew from a ComfyUI (comfyui.py
                                          finds it)
python scripts/workflows.py thumbnails    workflows/*.jpg and docs/images/*.png, drawn by ComfyUI in a
                                          browser
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blueprints
import workflow_layout
from workflow_graphs import MAKERS, build

ROOT = Path(__file__).absolute().parents[1]
FOLDER = ROOT / "workflows"
BLUEPRINTS = ROOT / "subgraphs"
CLIP = FOLDER / "lance_example.mp4"  # drawn by example_clip.py
NODES = Path(__file__).with_name("workflow_nodes.json")

NAMES = list(MAKERS)


def graph(name: str) -> workflow_layout.Graph:
    """One of the workflows."""
    return build(name, workflow_layout.Graph(name))


def files() -> Iterator[tuple[Path, str]]:
    """Every file and what belongs into it."""
    for name in NAMES:
        made = graph(name)
        yield FOLDER / f"{name}.json", _text(made.ui())
        yield FOLDER / "api" / f"{name}.json", _text(made.api())
    for title, make in blueprints.MAKERS.items():
        yield BLUEPRINTS / f"{title}.json", _text(make().file())


def _text(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write() -> int:
    for path, text in files():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    return check()


def check() -> int:
    """0 when every file is what `write` would write, and no others are there."""
    wanted = dict(files())
    wrong = [
        path
        for path, text in wanted.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    there = [*FOLDER.glob("*.json"), *FOLDER.glob("api/*.json"), *BLUEPRINTS.glob("*.json")]
    wrong += [path for path in there if path not in wanted]
    for path in wrong:
        print(
            f"{path.relative_to(ROOT)} is not what scripts/workflows.py makes: run `python "
            "scripts/workflows.py write`",
            file=sys.stderr,
        )
    return 1 if wrong else 0


def snapshot(info: dict[str, Any]) -> str:
    """The text of workflow_nodes.json for a ComfyUI's /object_info."""
    kinds = sorted(kind for kind in workflow_layout.SIZES if kind != workflow_layout.NOTE)
    rows = [
        f"{json.dumps(kind)}: {json.dumps(node)}"
        for kind, node in workflow_layout.compact(info, kinds).items()
    ]
    return "{\n" + ",\n".join(rows) + "\n}\n"


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("write", "check", "nodes", "thumbnails"))
    command = parser.parse_args(argv).command
    if command in ("write", "check"):
        return write() if command == "write" else check()
    import workflow_pictures  # needs a ComfyUI, and for pictures a browser

    if command == "nodes":
        NODES.write_text(snapshot(workflow_pictures.object_info()), encoding="utf-8", newline="\n")
        return write()
    workflow_pictures.draw(NAMES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
