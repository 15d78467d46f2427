"""ComfyUI inside the test's own process: no server, real nodes, real executor, and the values themselves in
hand.

Runs only in the host's Python (see ../test_inproc.py). ComfyUI parses its arguments and fixes its folders at
import, so there is one such host per process, made by `conftest.py`; everything of ComfyUI (comfy, nodes,
execution, ...) is importable once it is.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

Workflow = dict[str, dict[str, Any]]
Link = tuple[str, int]

_CAPTURE = "TestCapture"


class RejectedError(ValueError):
    """ComfyUI's validation refused a workflow. `node_errors` is its own account."""

    def __init__(self, error: dict[str, Any] | None, node_errors: dict[str, Any]) -> None:
        self.node_errors = node_errors
        super().__init__(f"{error}\n{node_errors}")


class NodeFailedError(RuntimeError):
    """A node raised. `data` is the execution_error message."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.message = str(data.get("exception_message")).strip()
        trace = "".join(data.get("traceback") or [])
        super().__init__(f"{data.get('node_type')}: {data.get('exception_type')}: {self.message}\n{trace}")


class InterruptedRunError(RuntimeError):
    """The run was interrupted."""


@dataclass
class Result:
    """ui: what output nodes show, by node id. values: what the asked-for links carried. sent: (event, data)
    as sent to the client.
    """

    ui: dict[str, Any]
    values: list[Any]
    sent: list[tuple[Any, Any]] = field(default_factory=list)

    @property
    def progress(self) -> list[tuple[str, float, float]]:
        """(node, value, max) as reported."""
        return [
            (data["node"], data["value"], data["max"]) for event, data in self.sent if event == "progress"
        ]

    @property
    def cached(self) -> set[str]:
        return {
            str(node) for event, data in self.sent if event == "execution_cached" for node in data["nodes"]
        }


class InProcessComfy:
    """Import ComfyUI from `checkout` with a --base-directory laid out by scripts/comfyui.py, and load its
    nodes and the pack in it.
    """

    def __init__(self, checkout: Path, base_arguments: Sequence[str]) -> None:
        if "folder_paths" in sys.modules:
            raise RuntimeError("ComfyUI is already imported: there can be one per process")
        sys.path.insert(0, str(checkout))
        given, sys.argv = sys.argv, ["main.py", *base_arguments]
        try:
            import main  # what `python main.py` runs, short of listening
        finally:
            sys.argv = given
        import execution

        import nodes

        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        said = _Messages()
        logging.getLogger().addHandler(said)
        _, self.server, _ = main.start_comfyui(self.loop)
        logging.getLogger().removeHandler(said)
        #: What ComfyUI logged while starting, and of that what it could not load.
        self.start_log: list[str] = said.lines
        self.load_failures = [
            line
            for line in said.lines
            if any(mark in line for mark in ("FAILED", "Cannot import", "comfy_entrypoint"))
        ]
        self.nodes = nodes.NODE_CLASS_MAPPINGS
        self.sent: list[tuple[Any, Any]] = []
        self.server.send_sync = lambda event, data, sid=None: self.sent.append((event, data))
        self.nodes[_CAPTURE] = _Capture
        self._execution = execution
        # Results stay until `forget`: newer hosts want to be told so, or they drop results when memory is
        # short.
        newer = "cache_args" in inspect.signature(execution.PromptExecutor).parameters
        self._executor = execution.PromptExecutor(
            self.server, **({"cache_args": dict.fromkeys(("lru", "ram", "ram_inactive"), 0)} if newer else {})
        )

    def run(self, workflow: Workflow, want: Sequence[Link] = ()) -> Result:
        """Validate and execute. `want`: (node id, output index) whose values to return, e.g. [("3", 0)] for a
        sampler's latent.

        Results are cached between runs as in a server; `forget()` drops them. Raises RejectedError,
        NodeFailedError, InterruptedRunError.
        """
        workflow = {node: {**spec, "inputs": dict(spec.get("inputs", {}))} for node, spec in workflow.items()}
        for index, (node, output) in enumerate(want):
            workflow[f"capture{index}"] = {
                "class_type": _CAPTURE,
                "inputs": {"value": [node, output], "slot": index},
            }
        prompt_id = uuid.uuid4().hex
        valid, error, outputs, node_errors = asyncio.run(
            self._execution.validate_prompt(prompt_id, workflow, None)
        )
        if not valid or node_errors:
            raise RejectedError(error, node_errors)
        self.sent.clear()
        _Capture.values.clear()
        self._executor.execute(workflow, prompt_id, {"client_id": "test"}, outputs)
        for event, data in self._executor.status_messages:
            if event == "execution_error":
                raise NodeFailedError(data)
            if event == "execution_interrupted":
                raise InterruptedRunError(str(data))
        values = [_Capture.values[index] for index in range(len(want))]
        return Result(self._executor.history_result["outputs"], values, list(self.sent))

    def value(self, workflow: Workflow, node: str, output: int = 0) -> Any:
        """What one output of a workflow carries."""
        return self.run(workflow, [(node, output)]).values[0]

    def forget(self) -> None:
        """Drop cached results and unload models, as the browser's "free" does."""
        import comfy.model_management

        self._executor.reset()
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class _Capture:
    """An output node that keeps what flows into it."""

    values: ClassVar[dict[int, Any]] = {}
    OUTPUT_NODE = True
    RETURN_TYPES = ()
    FUNCTION = "keep"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*",), "slot": ("INT", {"default": 0})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True  # any type

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")  # never cached

    def keep(self, value, slot):
        self.values[slot] = value
        return ()
