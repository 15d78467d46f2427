"""The harness itself, on stock nodes: a failure here says that the tests of the pack mean nothing."""

from __future__ import annotations

import json
import time

import pytest

# Any directory with the entry point that ComfyUI expects will do as a pack.
STUB_PACK = """
import time
import comfy.utils
from server import PromptServer


class StubSlow:
    RETURN_TYPES = ("INT",)
    FUNCTION = "go"
    CATEGORY = "testing"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        required = {"steps": ("INT", {"default": 3}), "fail": ("BOOLEAN", {"default": False})}
        return {"required": required, "hidden": {"node": "UNIQUE_ID"}}

    def go(self, steps, fail, node):
        from PIL import Image
        bar = comfy.utils.ProgressBar(steps)
        for step in range(steps):
            time.sleep(0.02)
            bar.update_absolute(step + 1, steps, ("JPEG", Image.new("RGB", (8, 8)), 8))
            PromptServer.instance.send_progress_text(f"step {step} \\u00e4\\u4e2d", node)
        if fail:
            raise ValueError("on purpose")
        return (steps,)


NODE_CLASS_MAPPINGS = {"StubSlow": StubSlow}
"""


def slow(steps: int = 3, fail: bool = False) -> dict:
    return {"1": {"class_type": "StubSlow", "inputs": {"steps": steps, "fail": fail}}}


def image(color: int = 0xFF0000, width: int = 64) -> dict:
    return {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": width, "height": 32, "batch_size": 1, "color": color},
        },
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "harness"}},
    }


@pytest.fixture(scope="module")
def server(make_server, tmp_path_factory):
    """A ComfyUI with a stub in the pack's place: these tests must not depend on the pack."""
    stub = tmp_path_factory.mktemp("stub")
    (stub / "__init__.py").write_text(STUB_PACK, encoding="utf-8")
    return make_server(pack=stub, models={"stub": stub})


def test_server_is_clean_and_its_own(server):
    server.assert_clean_start()
    assert server.seconds_to_start < 120
    assert (server.base / "models" / "stub" / "__init__.py").exists()
    assert server.held()["resident"] > 2**28


def test_a_broken_pack_is_noticed(make_server, tmp_path):
    (tmp_path / "__init__.py").write_text("raise RuntimeError('broken on purpose')", encoding="utf-8")
    broken = make_server(pack=tmp_path)
    with pytest.raises(AssertionError, match="broken on purpose"):
        broken.assert_clean_start()
    broken.stop()
    assert not broken.running


def test_run_returns_outputs_and_files(client, server):
    run = client.run(image())
    (file,) = run.files("2")
    assert client.fetch(file)[:4] == b"\x89PNG"
    assert (server.output / file["filename"]).exists()
    assert run.executed == {"1", "2"}
    assert client.run(image()).cached == {"1", "2"}


def test_overhead_is_small(client):
    began = time.monotonic()
    for color in range(1, 6):
        client.run(image(color))
    assert (time.monotonic() - began) / 5 < 1


def test_invalid_workflow_names_the_node(client):
    from client import PromptRejectedError

    with pytest.raises(PromptRejectedError, match=r"node 1 \(EmptyImage\).*smaller than min") as caught:
        client.queue(image(width=0))
    assert "1" in caught.value.node_errors


def test_node_error_carries_its_text(client):
    from client import ExecutionFailedError

    with pytest.raises(ExecutionFailedError, match="on purpose") as caught:
        client.run(slow(1, fail=True))
    assert (caught.value.type, caught.value.message) == ("ValueError", "on purpose")


@pytest.mark.parametrize("metadata", [True, False])
def test_progress_texts_and_previews(server, metadata):
    from client import Client

    with Client(server.url, preview_metadata=metadata) as client:
        run = client.run(slow(4 + metadata))
        assert run.progress("1") == [(step, 4 + metadata) for step in range(1, 5 + metadata)]
        assert run.texts("1")[0] == "step 0 ä中"
        assert run.previews[0][:2] == b"\xff\xd8"


def test_interrupt(client):
    from client import InterruptedRunError

    run = client.queue(slow(1000))
    run.wait_for("progress")
    client.interrupt()
    with pytest.raises(InterruptedRunError):
        run.wait(20)


def test_upload(client, server):
    source = client.fetch(client.run(image(0x00FF00)).files()[0])
    name = client.upload_image(source)
    assert (server.input / name).read_bytes() == source
    client.run({"1": {"class_type": "LoadImage", "inputs": {"image": name}}, "2": {**image()["2"]}})


def test_restart(make_server):
    from client import Client

    bare = make_server(pack=None)
    bare.restart()
    bare.assert_clean_start()
    with Client(bare.url) as client:
        assert client.object_info("StubSlow") == {}
    bare.stop()
    bare.stop()


def test_comfy_cli(make_cli, server, tmp_path):
    from harness import CliError

    cli = make_cli(server)
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(image(0x0000FF)), encoding="utf-8")
    before = set(server.output.iterdir())
    events = cli.run(path)
    assert events
    assert set(server.output.iterdir()) - before
    path.write_text(json.dumps(slow(1, fail=True)), encoding="utf-8")
    with pytest.raises(CliError) as caught:
        cli.run(path)
    assert caught.value.code


@pytest.fixture(scope="module")
def newer(make_server, frontend_root, server):
    """The same, under a frontend newer than ComfyUI's."""
    return make_server(
        pack=(server.base / "custom_nodes" / "ComfyUI-Lance").resolve(), front_end_root=frontend_root
    )


@pytest.mark.parametrize("which", ["server", "newer"])
def test_browser_runs_a_workflow(which, browser, request, tmp_path):
    server = request.getfixturevalue(which)
    with browser.open(server) as page:
        page.load_graph(image(0x123456))
        assert page.missing_nodes() == []
        assert page.widgets(1)["width"] == 64
        page.set_widget(1, "width", 96)
        assert page.prompt()["1"]["inputs"]["width"] == 96
        assert any(message["type"] == "executed" for message in page.run())
        assert page.screenshot(tmp_path / f"{which}.png").stat().st_size > 10_000
        page.load_graph({"1": {"class_type": "NoSuchNode", "inputs": {}}})
        assert page.missing_nodes() == ["NoSuchNode"]
        page.page.keyboard.press("Escape")
        unknown = {
            "id": 7,
            "type": "Unheard",
            "pos": [0, 0],
            "size": [100, 50],
            "inputs": [],
            "outputs": [],
            "widgets_values": [],
        }
        page.load_graph(
            {"nodes": [unknown], "links": [], "version": 0.4, "last_node_id": 7, "last_link_id": 0}
        )
        assert page.missing_nodes() == ["Unheard"]
        (tmp_path / "dropped.json").write_text(json.dumps(image(width=80)), encoding="utf-8")
        page.drop_file(tmp_path / "dropped.json")
        assert page.widgets(1)["width"] == 80
        assert page.complaints == []


@pytest.mark.parametrize("which", ["server", "newer"])
def test_browser_sees_errors_and_texts(which, browser, request):
    from browser import ExecutionError

    server = request.getfixturevalue(which)
    with browser.open(server) as page:
        page.load_graph(slow(2))
        page.run()
        assert page.said("progress_text")
        page.load_graph(slow(2, fail=True))
        with pytest.raises(ExecutionError, match="on purpose"):
            page.run()
        page.page.keyboard.press("Escape")
        page.load_graph(image(width=0))
        with pytest.raises(ExecutionError):
            page.run(20)
