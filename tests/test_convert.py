"""The single file: what is written, what it costs, and that everything reads it back. (Of the formats:
test_formats.py.)
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import lance_core
from lance_core import config, files
from lance_core.checkpoint import tiny
from lance_core.checkpoint.checkpoint import Checkpoint
from lance_core.checkpoint.convert import DTYPES, convert, report
from lance_core.checkpoint.quantize import FORMATS
from lance_core.checkpoint.tensor_files import SafetensorsFile
from lance_core.cli.main import main
from lance_core.errors import CheckpointError, RequestError

ROOT = Path(__file__).resolve().parents[1]
# Relative drift of a 4-step t2i latent from float32 on these random weights: about twice what was measured.
DRIFT = {"fp32": 0, "fp16": 0.001, "bf16": 0.01, "int8": 0.014, "fp8": 0.045, "int4": 0.14, "nvfp4": 0.14}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny checkpoint wide enough for groups of 64."""
    llm = config.LLMConfig(128, 256, 3, 4, 2, 32, 288, 1e6, (4, 6, 6), 1e-6)
    vit = config.ViTConfig(3, 32, 68, 2, 128, fullatt_block_indexes=(1,))
    return tiny.write(tmp_path_factory.mktemp("models") / "tiny", llm=llm, vit=vit)


def draw(path, **kwargs):
    lance = lance_core.load(path, dtype=torch.float32, **kwargs)
    return lance.generate("t2i", "a cat", width=64, height=64, steps=4).latent


@pytest.fixture(scope="module")
def reference(root):
    return draw(root / "Lance_3B_Video")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_loads_and_drifts_within_bounds(root, reference, tmp_path, dtype):
    done = convert(root / "Lance_3B_Video", tmp_path / "x.safetensors", dtype)
    assert done["bytes"] == (tmp_path / "x.safetensors").stat().st_size
    error = (draw(tmp_path / "x.safetensors") - reference).norm() / reference.norm()
    assert error <= DRIFT[dtype]
    if DRIFT[dtype]:
        assert error > 0


def test_what_was_done_is_told_part_by_part(root, tmp_path):
    done = convert(
        root / "Lance_3B", tmp_path / "x.safetensors", "fp8", understanding="int4", generation="nvfp4"
    )
    assert done["dtypes"] == {"und": "int4", "gen": "nvfp4", "vit": "bf16", "vae": "bf16"}
    assert set(Checkpoint(tmp_path / "x.safetensors").parts["vit"].dtypes.values()) == {torch.bfloat16}
    assert (
        "scaled_fp8" not in SafetensorsFile(tmp_path / "x.safetensors").dtypes
    )  # ComfyUI's sign of a file with fp8 layers


def test_smaller_is_smaller(root, tmp_path):
    dtypes = ("fp32", "bf16", "fp8", "int4", "nvfp4")
    parts = {
        d: convert(root / "Lance_3B_Video", tmp_path / f"{d}.safetensors", d)["parts"]["gen"] for d in dtypes
    }
    assert parts["fp32"] == 2 * parts["bf16"]
    assert parts["bf16"] > parts["fp8"] > max(parts["int4"], parts["nvfp4"])


def test_formats_hold_as_many_weights(root, tmp_path):
    counts = {name: part.parameters for name, part in Checkpoint(root / "Lance_3B").parts.items()}
    for name in FORMATS:
        convert(root / "Lance_3B", tmp_path / f"{name}.safetensors", name)
        assert {
            name: part.parameters for name, part in Checkpoint(tmp_path / f"{name}.safetensors").parts.items()
        } == counts


def test_experts_can_differ_and_precise_tensors_stay(root, tmp_path):
    path = tmp_path / "mixed.safetensors"
    convert(root / "Lance_3B", path, "bf16", understanding="int4")
    parts = Checkpoint(path).parts
    assert {f.name for f in parts["und"].formats.values()} == {"int4"}
    assert not parts["gen"].formats
    precise = {n: d for n, d in parts["und"].dtypes.items() if not n.startswith("layers.") or "norm" in n}
    assert set(precise.values()) == {torch.bfloat16}
    assert {"embed_tokens.weight", "lm_head.weight", "norm.weight"} <= precise.keys()


def test_the_file_is_the_same_bytes_each_time_and_what_others_read(root, tmp_path):
    for name in "ab":
        convert(root / "Lance_3B", tmp_path / f"{name}.safetensors", "int8")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with safe_open(str(tmp_path / "a.safetensors"), "pt") as file:
        layer = "language_model.model.layers.1.mlp_moe_gen.up_proj."
        assert file.get_tensor(layer + "weight").dtype == torch.int8
        assert file.get_tensor(layer + "weight_scale").shape == (256, 1)
        told = json.loads(bytes(file.get_tensor(layer + "comfy_quant").tolist()))
    assert told == {"format": "int8_tensorwise", "full_precision_matrix_mult": True}


def test_fp8_is_in_the_form_old_and_new_hosts_read(root, tmp_path):
    convert(root / "Lance_3B", tmp_path / "f.safetensors", "fp8")
    names = SafetensorsFile(tmp_path / "f.safetensors").dtypes
    assert names["scaled_fp8"] == torch.float8_e4m3fn  # of two elements: see test_formats.py
    assert names["language_model.model.layers.1.self_attn.q_proj.scale_weight"] == torch.float32
    assert not any("comfy_quant" in n for n in names)


def test_the_experts_may_be_in_two_formats(root, tmp_path):
    convert(root / "Lance_3B", tmp_path / "x.safetensors", understanding="nvfp4", generation="fp8")
    parts = Checkpoint(tmp_path / "x.safetensors").parts
    assert {f.name for f in parts["und"].formats.values()} == {"nvfp4"} and {
        f.name for f in parts["gen"].formats.values()
    } == {"fp8"}
    assert torch.isfinite(draw(tmp_path / "x.safetensors")).all()


@pytest.mark.parametrize(
    ("name", "leaf", "dtype"), [("nvfp4", "weight", torch.int8), ("nvfp4", "weight_scale", torch.uint8)]
)
def test_quantised_tensors_of_another_dtype_are_refused(root, tmp_path, name, leaf, dtype):
    from safetensors.torch import load_file, save_file

    convert(root / "Lance_3B", tmp_path / "x.safetensors", name)
    tensors = load_file(tmp_path / "x.safetensors")
    key = f"language_model.model.layers.1.self_attn.q_proj.{leaf}"
    wanted = tensors[key].dtype
    tensors[key] = tensors[key].view(dtype)
    save_file(tensors, tmp_path / "y.safetensors", SafetensorsFile(tmp_path / "x.safetensors").metadata)
    with pytest.raises(CheckpointError, match=rf"q_proj\.{leaf} is {dtype}, expected {wanted}"):
        Checkpoint(tmp_path / "y.safetensors")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_named_and_not_hidden_by_rounding(root, tmp_path, name, value):
    from safetensors.torch import load_file, save_file

    shutil.copytree(root, tmp_path / "models")
    path = tmp_path / "models" / "Lance_3B" / "model.safetensors"
    tensors, key = load_file(path), "language_model.model.layers.1.mlp_moe_gen.down_proj.weight"
    tensors[key][3, 5] = value
    save_file(tensors, path)
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp_moe_gen\.down_proj\.weight has NaN or infinity"
    ):
        convert(path.parent, tmp_path / "x.safetensors", name)
    assert [p.name for p in tmp_path.iterdir()] == ["models"]


def test_what_was_not_there_is_told(root, tmp_path):
    shutil.copytree(root / "Lance_3B", tmp_path / "Lance_3B")
    done = convert(tmp_path / "Lance_3B", tmp_path / "x.safetensors")
    assert set(done["parts"]) == {"und", "gen"} == set(done["dtypes"])
    assert "vit  not in it" in report(done) and "vae  not in it" in report(done)
    shutil.rmtree(tmp_path / "Lance_3B")
    assert "not in it" not in report(convert(root / "Lance_3B", tmp_path / "x.safetensors"))


def test_without_vae_it_is_looked_for_beside(root, tmp_path, reference):
    done = convert(root / "Lance_3B_Video", tmp_path / "x.safetensors", "fp32", include_vae=False)
    assert "vae" not in done["parts"]
    assert lance_core.load(tmp_path / "x.safetensors").config.vae is None
    with pytest.raises(CheckpointError, match="no VAE"):
        draw(tmp_path / "x.safetensors")
    assert torch.equal(draw(tmp_path / "x.safetensors", vae=root / "Wan2.2_VAE.pth"), reference)


def test_questions_survive(root, tmp_path):
    from skimage import data

    convert(root / "Lance_3B", tmp_path / "x.safetensors", "fp32")
    ask = {"image": data.astronaut(), "max_new_tokens": 6, "resolution": "image_256res"}
    answers = [
        lance_core.load(p, dtype=torch.float32).understand("Who?", **ask).token_ids
        for p in (root / "Lance_3B", tmp_path / "x.safetensors")
    ]
    assert answers[0] == answers[1]


def test_variant_is_kept(root, tmp_path):
    for name, variant in (("Lance_3B", "image"), ("Lance_3B_Video", "video")):
        convert(root / name, tmp_path / f"{name}.safetensors", "bf16")
        (tmp_path / f"{name}.safetensors").rename(tmp_path / "renamed.safetensors")
        assert Checkpoint(tmp_path / "renamed.safetensors").config.variant == variant


@pytest.mark.parametrize(
    ("target", "options", "says"),
    [
        ("x.safetensors", {"dtype": "int3"}, "int3"),
        ("x.safetensors", {"generation": "q4"}, "q4"),
        ("x.bin", {}, "safetensors"),
        ("missing/x.safetensors", {}, "does not exist"),
    ],
)
def test_wrong_requests(root, tmp_path, target, options, says):
    with pytest.raises(RequestError, match=says):
        convert(root / "Lance_3B", tmp_path / target, **options)
    assert not list(tmp_path.iterdir())


def test_the_source_is_never_overwritten(root):
    before = (root / "Lance_3B" / "model.safetensors").read_bytes()
    with pytest.raises(RequestError, match="choose another name"):
        convert(root / "Lance_3B", root / "Lance_3B" / "model.safetensors")
    assert (root / "Lance_3B" / "model.safetensors").read_bytes() == before


def test_quantised_files_are_not_quantised_again(root, tmp_path):
    convert(root / "Lance_3B", tmp_path / "a.safetensors", "int8")
    with pytest.raises(RequestError, match="convert the original"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "int4")


def test_a_full_disk_is_told_before_writing(root, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match="make room"):
        convert(root / "Lance_3B", tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_nothing_half_written(root, tmp_path):
    def stop(what, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(root / "Lance_3B", tmp_path / "a.safetensors", progress=stop)
    assert not list(tmp_path.iterdir())


def test_other_tools_files_are_read_when_they_say_enough(root, tmp_path):
    from safetensors.torch import load_file, save_file

    convert(root / "Lance_3B", tmp_path / "a.safetensors", "fp32")
    told = json.loads(SafetensorsFile(tmp_path / "a.safetensors").metadata["lance"])
    tensors = load_file(tmp_path / "a.safetensors")
    raw = told["llm_config"] | {"vision_config": told["vit_config"]}
    save_file(
        tensors,
        tmp_path / "b.safetensors",
        {"config": json.dumps(raw), "tokenizer.json": json.dumps(told["tokenizer"])},
    )
    assert torch.equal(draw(tmp_path / "b.safetensors"), draw(tmp_path / "a.safetensors"))
    save_file(tensors, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match=r"without llm_config and tokenizer.*convert"):
        draw(tmp_path / "c.safetensors")


def test_the_configuration_may_be_a_tensor_of_bytes(root, tmp_path):
    """Where another program writes the metadata, as ComfyUI's save nodes do."""
    from safetensors.torch import load_file, save_file

    convert(root / "Lance_3B", tmp_path / "a.safetensors")
    told = SafetensorsFile(tmp_path / "a.safetensors").metadata["lance"]
    tensors = load_file(tmp_path / "a.safetensors")

    def written(text: bytes) -> Path:
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        save_file({**tensors, "lance_config": data}, tmp_path / "b.safetensors", {"prompt": "{}"})
        return tmp_path / "b.safetensors"

    one, other = Checkpoint(tmp_path / "a.safetensors"), Checkpoint(written(told.encode()))
    assert other.config == one.config and other.tokenizer.definition == one.tokenizer.definition
    for text in (b"\xff\xfe{", b"[" * 100_000, b"[1]"):
        with pytest.raises(CheckpointError, match="get the file again"):
            Checkpoint(written(text))
    with pytest.raises(CheckpointError, match="without llm_config"):
        Checkpoint(written(b"{}"))


def test_command_line(root, tmp_path, capsys):
    target = str(tmp_path / "cli.safetensors")
    assert (
        main(
            [
                "convert",
                str(root / "Lance_3B"),
                target,
                "--dtype",
                "bf16",
                "--understanding",
                "int4",
                "--json",
                "-q",
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["dtypes"] == {"und": "int4", "gen": "bf16", "vit": "bf16", "vae": "bf16"}
    assert main(["info", target]) == 0
    assert "int4" in capsys.readouterr().out
    assert main(["convert", str(root / "Lance_3B"), str(tmp_path / "x.bin")]) == 2


def test_killed_conversions_are_made_good_by_the_next(root, tmp_path):
    command = [sys.executable, "-c", _SLOW, str(root / "Lance_3B"), str(tmp_path / "k.safetensors")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = 0
    for attempt in range(10):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        process.stdout.readline()  # writing has begun
        time.sleep(0.01 * attempt)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        assert not (tmp_path / "k.safetensors").exists()
    assert killed == 10
    convert(root / "Lance_3B", tmp_path / "k.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["k.safetensors"]
    Checkpoint(tmp_path / "k.safetensors")


_SLOW = """
import sys, time
from lance_core.checkpoint.convert import convert
def slow(what, done, total):
    print(done, flush=True)
    time.sleep(0.01)
convert(sys.argv[1], sys.argv[2], progress=slow)
"""


# -- several writers, killed ones, and targets that cannot be written ----------------------------------------


def test_two_conversions_to_one_target_do_not_mix(root, tmp_path):
    """The second begins while the first writes; each ends with a whole file of its own."""
    target, wanted = tmp_path / "x.safetensors", {}
    for dtype in ("fp32", "bf16"):
        convert(root / "Lance_3B", tmp_path / f"{dtype}.safetensors", dtype)
        wanted[dtype] = (tmp_path / f"{dtype}.safetensors").read_bytes()

    def midway(what, done, total):
        if done > total / 2 and not target.exists():
            convert(root / "Lance_3B", target, "bf16")
            assert target.read_bytes() == wanted["bf16"]

    convert(root / "Lance_3B", target, "fp32", progress=midway)
    assert target.read_bytes() == wanted["fp32"]
    assert len(list(tmp_path.iterdir())) == 3


def test_processes_that_convert_to_one_target_leave_a_whole_file(root, tmp_path):
    command = [sys.executable, "-c", _SLOW, str(root / "Lance_3B"), str(tmp_path / "k.safetensors")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for _ in range(3)]
    time.sleep(2)
    both[0].send_signal(signal.SIGKILL)
    assert [p.wait() for p in both[1:]] == [0, 0]
    both[0].wait()
    convert(root / "Lance_3B", tmp_path / "other.safetensors")
    assert (tmp_path / "k.safetensors").read_bytes() == (tmp_path / "other.safetensors").read_bytes()
    convert(root / "Lance_3B", tmp_path / "k.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k.safetensors", "other.safetensors"]


def test_a_part_is_swept_only_if_its_writer_is_gone(tmp_path):
    path = tmp_path / "x.bin"
    with files.written(path) as first:
        first.write(b"first")
        (tmp_path / f"x.bin.{'0' * 16}.part").write_bytes(b"a killed writer's")
        (tmp_path / "x.bin.mine.part").write_bytes(b"of another kind")
        (tmp_path / f"other.bin.{'0' * 16}.part").write_bytes(b"of another name")
        (tmp_path / f"x.bin.{'1' * 16}.part").symlink_to(tmp_path / "x.bin.mine.part")
        with files.written(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    left = {"x.bin", "x.bin.mine.part", f"other.bin.{'0' * 16}.part", f"x.bin.{'1' * 16}.part"}
    assert {p.name for p in tmp_path.iterdir()} == left


@pytest.mark.skipif(os.name == "nt", reason="FIFOs")
def test_targets_that_are_no_files_are_sentences(root, tmp_path):
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "mine")
    for name, kind in (("fifo", "a FIFO"), ("folder", "a folder")):
        with pytest.raises(CheckpointError, match=f"cannot be written.*is {kind}"):
            convert(root / "Lance_3B", tmp_path / f"{name}.safetensors")
    convert(root / "Lance_3B", tmp_path / "link.safetensors")
    assert (tmp_path / "mine").read_bytes() == b"mine", "the link is replaced, its target is not written to"


@pytest.mark.skipif(os.name == "nt", reason="FIFOs")
def test_tiny_refuses_targets_that_are_no_folders(tmp_path):
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    for name, kind in (("file", "is a file, no folder"), ("fifo", "a FIFO")):
        with pytest.raises(RequestError, match=kind):
            tiny.write(tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be written"):
        tiny.write(tmp_path / "file" / "inside")
    with pytest.raises(CheckpointError, match="cannot be written"):
        tiny.write(tmp_path / ("x" * 300))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("there", [False, True])
def test_tiny_on_a_full_disk_leaves_nothing_and_can_be_tried_again(tmp_path, monkeypatch, there):
    target, made = tmp_path / "t", tiny._write_json

    def full(path, data):
        if path.parent.name == "Lance_3B_Video":
            raise OSError(28, "No space left on device")
        made(path, data)

    if there:
        target.mkdir()
        (target / "mine").write_text("mine")
    monkeypatch.setattr(tiny, "_write_json", full)
    with pytest.raises(CheckpointError, match="No space left"):
        tiny.write(target)
    assert [p.name for p in tmp_path.rglob("*")] == (["t", "mine"] if there else [])
    monkeypatch.setattr(tiny, "_write_json", made)
    Checkpoint(tiny.write(target) / "Lance_3B")


def test_a_killed_tiny_leaves_no_checkpoint_and_is_swept_by_the_next(tmp_path):
    script = (
        "import os, signal, sys; from lance_core.checkpoint import tiny\n"
        "tiny._write_tokenizer = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "tiny.write(sys.argv[1])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "t")], env=environment)
    assert not (tmp_path / "t").exists() and list(tmp_path.iterdir())
    tiny.write(tmp_path / "t")
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
