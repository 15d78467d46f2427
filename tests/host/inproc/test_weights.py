"""Converted files and downloads through Lance Loader: same sockets, LoRAs and partial loading as the released
folders.
"""

from __future__ import annotations

from pathlib import Path

import graphs
import pytest
import small
import torch
from graphs import GOLDEN, node

# Relative L2 drift of the t2i latent from the float32 folder, about twice what was measured.
DRIFT = {"fp32": 1e-6, "bf16": 0.04, "int8": 0.06, "fp8": 0.15, "nvfp4": 0.5, "int4": 0.5}


@pytest.fixture(scope="module")
def files(comfy, base):
    """One converted file a dtype, in models/lance_files, registered as a second lance folder."""
    import folder_paths

    convert = small.module(comfy, "lance_core.checkpoint.convert").convert
    folder = Path(base) / "models" / "lance_files"
    folder.mkdir()
    for dtype in DRIFT:
        convert(GOLDEN / "checkpoint" / "Lance_3B", folder / f"{dtype}.safetensors", dtype)
    folder_paths.add_model_folder_path("lance", str(folder))
    return folder


def graph(checkpoint, **changes):
    made = graphs.sampled("t2i", **changes)
    made["loader"]["inputs"]["checkpoint"] = checkpoint
    return made


def latent(comfy, checkpoint, **changes):
    return comfy.value(graph(checkpoint, **changes), "sampler")["samples"]


def drift(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("dtype", DRIFT)
def test_converted_files_sample(comfy, files, dtype):
    away = drift(latent(comfy, f"{dtype}.safetensors"), latent(comfy, "Lance_3B"))
    assert away <= DRIFT[dtype]


def test_the_list_has_folders_and_files(comfy, files):
    listed = comfy.nodes["LanceLoader"].INPUT_TYPES()["required"]["checkpoint"][1]["options"]
    assert {"Lance_3B", "Lance_3B_Video", "bf16.safetensors", "int8.safetensors"} <= set(listed)
    assert not any("vit.safetensors" in name or "model.safetensors" in name for name in listed)


@pytest.mark.parametrize("dtype", ["int8", "fp8", "nvfp4", "int4"])
def test_quantised_layers_take_loras_and_partial_loading(comfy, files, tmp_path, dtype, monkeypatch):
    import folder_paths
    from safetensors.torch import save_file

    name = f"{dtype}.safetensors"
    plain = latent(comfy, name)
    a, b = (
        torch.randn(4, 64, generator=torch.Generator().manual_seed(0)),
        torch.randn(64, 4, generator=torch.Generator().manual_seed(1)),
    )
    layer = "diffusion_model.layers.1.self_attn.q_proj"
    (tmp_path / "loras").mkdir()
    save_file(
        {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b * 0.2},
        tmp_path / "loras" / "quant.safetensors",
    )
    folder_paths.add_model_folder_path("loras", str(tmp_path / "loras"))
    with_lora = graph(name)
    with_lora["lora"] = node(
        "LoraLoaderModelOnly", model=["loader", 0], lora_name="quant.safetensors", strength_model=1.0
    )
    with_lora["sampler"]["inputs"]["model"] = ["lora", 0]
    full = comfy.value(with_lora, "sampler")["samples"]
    assert drift(full, plain) > 1e-3
    comfy.forget()
    assert torch.equal(latent(comfy, name), plain)  # the LoRA is gone with its graph
    comfy.forget()
    with small.partial_loading(monkeypatch, 0.0):
        assert drift(comfy.value(graph(name), "sampler")["samples"], plain) < 1e-5
        partial = comfy.value(with_lora, "sampler")["samples"]
    assert drift(partial, full) < 1e-4


def test_a_damaged_file_is_refused_by_name(comfy, files):
    import shutil

    shutil.copy(files / "bf16.safetensors", files / "cut.safetensors")
    latent(comfy, "cut.safetensors")
    with open(files / "cut.safetensors", "r+b") as file:
        file.truncate(100_000)
    with pytest.raises(Exception, match="cut.safetensors"):
        latent(comfy, "cut.safetensors", seed=9)


def test_nothing_is_downloaded_unless_chosen(comfy, monkeypatch, tmp_path):
    checkpoints = small.module(comfy, "nodes.checkpoints")
    monkeypatch.setattr(checkpoints.folder_paths, "get_folder_paths", lambda name: [str(tmp_path)])
    options = checkpoints.choices()
    assert options[0] == checkpoints.CHOOSE
    assert [o.split(" (")[0] for o in options[1:]] == ["Lance_3B", "Lance_3B_Video"]
    assert all("download" in o and "GB" in o for o in options[1:])
    assert "By hand" in checkpoints.refusal(checkpoints.CHOOSE)
    assert "download" in checkpoints.refusal("Lance_3B")
    assert checkpoints.refusal(options[1]) is None


def test_choosing_downloads_and_then_loads(comfy, monkeypatch, tmp_path):
    import shutil

    checkpoints = small.module(comfy, "nodes.checkpoints")
    monkeypatch.setattr(checkpoints.folder_paths, "get_folder_paths", lambda name: [str(tmp_path)])
    asked = []

    def fetched(name, root, progress, check):
        asked.append((name, root))
        for i in range(3):
            progress("Lance_3B/model.safetensors", i, 2)
            check()
        shutil.copytree(GOLDEN / "checkpoint", root, dirs_exist_ok=True)

    monkeypatch.setattr(checkpoints.download, "download", fetched)
    label = checkpoints.download.label("Lance_3B")
    got = comfy.run(graph(label), [("sampler", 0)])
    assert asked == [("Lance_3B", str(tmp_path))]
    assert any(n == "loader" and v == 2 for n, v, _ in got.progress)
    latent(comfy, label, seed=5)
    assert len(asked) == 1  # there by now
    monkeypatch.undo()
    assert drift(got.values[0]["samples"], latent(comfy, "Lance_3B")) == 0
