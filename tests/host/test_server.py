"""The pack in a real server: how it is installed and imported, what a client sees of it over many jobs."""

from __future__ import annotations

import io
import os
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
import small  # the same graphs as in process

HERE = Path(__file__).parent
PACK, CHECKPOINT = HERE.parents[1], HERE.parent / "golden" / "checkpoint"
INPUTS = HERE.parent / "golden" / "cases" / "inputs"
node = small.node


@pytest.fixture(scope="module")
def server(make_server):
    """A ComfyUI with the golden checkpoint and the golden inputs."""
    started = make_server(models={"lance": CHECKPOINT}, extra=("--preview-method", "latent2rgb"))
    for source in INPUTS.iterdir():
        shutil.copy(source, started.input)
    return started


def picture(seed: int = 7, **changes) -> dict:
    graph = small.lance(small.t2i(), seed=seed, **changes)
    graph["decoded"] = node("LanceVAEDecode", vae=["loader", 2], samples=["sampler", 0])
    return {**graph, "save": node("SaveImage", images=["decoded", 0], filename_prefix="picture")}


def edited(seed: int = 7) -> dict:
    graph = small.lance(small.edit(), seed=seed, steps=2)
    graph["decoded"] = node("VAEDecode", vae=["loader", 2], samples=["sampler", 0])
    return {**graph, "save": node("SaveImage", images=["decoded", 0], filename_prefix="edited")}


def video(seed: int = 7) -> dict:
    graph = small.lance(small.i2v(frames=5), seed=seed, steps=2)
    graph["decoded"] = node("LanceVAEDecode", vae=["loader", 2], samples=["sampler", 0])
    return {
        **graph,
        "save": node("SaveVideo", video=["decoded", 1], filename_prefix="video", format="mp4", codec="h264"),
    }


def asked(seed: int = 7) -> dict:
    return small.question(f"What is number {seed}?")


# -- guest manners -------------------------------------------------------------------------------------------


def test_import_is_quick_and_clean(server):
    server.assert_clean_start()
    found = re.search(r"([\d.]+) seconds:.*custom_nodes/ComfyUI-Lance", server.log())
    assert found and float(found[1]) < 1, server.log_tail()


GUARDED_IMPORT = """
import asyncio, importlib.util, sys
sys.path.insert(0, {comfyui!r})
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import folder_paths
import torch
import comfy.model_management as mm

def guard(*args, **kwargs):
    raise AssertionError("touched a device")

torch.cuda._lazy_init = torch.Tensor.cuda = mm.load_models_gpu = mm.get_torch_device = guard
pack = {pack!r}
places = {{"submodule_search_locations": [pack]}}
spec = importlib.util.spec_from_file_location("pack", pack + "/__init__.py", **places)
pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
nodes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
[node.GET_SCHEMA() for node in nodes]
print(len(nodes), torch.cuda.is_initialized())
"""


def test_import_leaves_the_devices_alone(host):
    code = GUARDED_IMPORT.format(comfyui=str(host.path), pack=str(PACK))
    done = subprocess.run([str(host.python), "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    count, initialised = done.stdout.split()[-2:]
    assert int(count) >= 11 and initialised == "False"


def test_every_input_is_explained(client):
    ours = {k: v for k, v in client.object_info().items() if v.get("category") == "Lance"}
    assert {
        "LanceLoader",
        "LanceVisionEncode",
        "LanceTextEncode",
        "EmptyLanceLatent",
        "LanceImageToVideoLatent",
        "LanceSampler",
    } <= ours.keys()
    assert {"LanceScheduler", "LanceGuider", "LanceVAEDecode", "LanceUnderstand"} <= ours.keys()
    for name, info in ours.items():
        assert info["description"] and info["display_name"] != name
        for kind in ("required", "optional"):
            for field, spec in info["input"].get(kind, {}).items():
                assert len(spec) > 1 and spec[1].get("tooltip"), f"{name}.{field}"


@pytest.mark.parametrize("package", ["einops", "tokenizers"])
def test_a_missing_package_is_named_in_one_line(make_server, tmp_path, package):
    """A copy of the pack from which a dependency is hidden: the server starts and its log says what to
    install.
    """
    shutil.copytree(
        PACK,
        tmp_path / "pack",
        symlinks=True,
        ignore=lambda folder, names: [n for n in names if n.startswith(".") or n in ("tests", "demo")],
    )
    init = tmp_path / "pack" / "__init__.py"
    init.write_text(
        f"import sys\nsys.modules[{package!r}] = None\n"
        + init.read_text(encoding="utf-8").replace("from __future__", "#"),
        encoding="utf-8",
    )
    # The host itself needs these packages: they are hidden from the pack alone, after ComfyUI is up.
    broken = make_server(pack=tmp_path / "pack")
    log = broken.log()
    broken.stop()
    said = [line for line in log.splitlines() if "ImportError: ComfyUI-Lance was not loaded" in line]
    assert len(said) >= 1 and f"'{package}'" in said[0] and "pip install -r requirements.txt" in said[0], log[
        -3000:
    ]


def test_requirements_change_no_installed_version(host):
    """What `pip install -r requirements.txt` would do to a ComfyUI that has run with the pack: nothing."""

    def pip(*arguments):
        done = subprocess.run(
            [str(host.python), "-m", "pip", *arguments], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    before = pip("freeze", "--all")
    would = pip("install", "--dry-run", "--disable-pip-version-check", "-r", str(PACK / "requirements.txt"))
    assert "Would install" not in would, would
    pip("install", "--disable-pip-version-check", "-r", str(PACK / "requirements.txt"))
    assert pip("freeze", "--all") == before
    pinned = [
        line for line in (PACK / "requirements.txt").read_text().splitlines() if re.search(r"==|<|~=", line)
    ]
    assert not pinned, "a guest pins nothing"


# -- jobs ----------------------------------------------------------------------------------------------------


def pixels(client, run):
    from PIL import Image

    with Image.open(io.BytesIO(client.fetch(run.files("save")[0]))) as image:
        return image.convert("RGB").tobytes()


def test_progress_previews_and_the_answer_arrive(client):
    run = client.run(picture(seed=1))
    assert run.progress("sampler")[-1] == (3, 3) and len(run.previews) >= 3
    told = client.run(asked(1))
    answer = told.outputs["answer"]["text"][0]
    assert told.texts("answer") and answer.startswith(told.texts("answer")[0][:1])
    assert not any("<" in text for text in told.texts("answer"))


def test_interrupt_and_go_on(client):
    from client import InterruptedRunError

    wanted = pixels(client, client.run(picture(seed=2)))
    run = client.queue(picture(seed=2, steps=1000))
    run.wait_for(lambda m: m.type == "progress" and str(m.data.get("node")) == "sampler")
    client.interrupt()
    with pytest.raises(InterruptedRunError):
        run.wait(30)
    client.free()
    assert pixels(client, client.run(picture(seed=2))) == wanted


def test_the_same_seed_makes_the_same_file(client):
    def made(after=()):
        client.free()
        for job in after:
            client.run(job)
        return client.fetch(client.run(picture(seed=3)).files("save")[0])

    first = made()
    client.run(picture(seed=4))
    # The file holds the workflow, too, which is the same.
    assert made() == first
    assert made(after=(asked(3), edited(3), video(3))) == first


SOAK = int(os.environ.get("LANCE_SOAK_JOBS", "35"))


@pytest.mark.timeout(420 + 6 * SOAK)
def test_many_jobs_in_a_row(client, server):
    """Mixed jobs, nothing cached between them: memory, descriptors and threads stay as after two rounds.

    Seven jobs a round. LANCE_SOAK_JOBS says how many in all; `make fuzz` runs 150.
    """
    jobs, held, outputs = (picture, edited, video, asked, picture, asked), [], []
    for turn in range(max(5, -(-SOAK // 7))):
        for place, job in enumerate(jobs):
            run = client.run(job(seed=1000 * turn + place))
            assert run.outputs
        outputs.append(pixels(client, client.run(picture(seed=5))))
        client.free()
        client.run(
            {
                "1": node("EmptyImage", width=16, height=16, batch_size=1, color=turn),
                "2": node("PreviewImage", images=["1", 0]),
            }
        )
        held.append(server.held())
    print("after each round:", [{**h, "resident": f"{h['resident'] / 2**20:.0f} MB"} for h in held])
    assert len(set(outputs)) == 1
    for what, most in (("resident", 48 * 2**20), ("descriptors", 4), ("threads", 4)):
        growth = statistics.mean(h[what] for h in held[-2:]) - held[1][what]
        assert growth < most, f"{what} grew by {growth:.0f}: {[h[what] for h in held]}"
