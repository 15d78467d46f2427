"""Checkpoints in other places and forms than the released folder, and files that are none: shards, the
Hugging Face cache, FIFOs, archives that claim what they have not.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lance_core
from lance_core import CheckpointError
from lance_core.checkpoint import finding
from lance_core.checkpoint.checkpoint import Checkpoint
from lance_core.checkpoint.convert import convert
from lance_core.checkpoint.tensor_files import SafetensorsFile, TorchFile

VAE = "Wan2.2_VAE.pth"


def refused(path, *words: str, **options) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path, **options)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert len(message) < 500 + 3 * len(str(path))


def draw(path) -> torch.Tensor:
    lance = lance_core.load(path, dtype=torch.float32)
    return lance.generate("t2i", "a fox", width=48, height=32, steps=1).latent


# -- shards --------------------------------------------------------------------------------------------------


def into_shards(folder: Path, count: int = 3) -> Path:
    """Split a folder's model.safetensors as transformers does; returns the index."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    placed = {}
    for i in range(count):
        name = f"model-{i + 1:05}-of-{count:05}.safetensors"
        keys = sorted(tensors)[i::count]
        save_file({key: tensors[key] for key in keys}, folder / name)
        placed |= dict.fromkeys(keys, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    return index


def test_shards_are_one_model(checkpoint_copy):
    expected = draw(checkpoint_copy)
    into_shards(checkpoint_copy)
    assert torch.equal(draw(checkpoint_copy), expected)
    assert finding.is_checkpoint(checkpoint_copy)
    names = {p.name for p in Checkpoint(checkpoint_copy).files}
    assert {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)} <= names


@pytest.mark.parametrize("name", [
    "../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors", "C:x.safetensors",
    "x.safetensors\0", "model.bin", "", "..",
])  # fmt: skip
def test_an_index_names_files_beside_it_only(checkpoint_copy, name):
    index = into_shards(checkpoint_copy)
    told = json.loads(index.read_text())
    told["weight_map"]["llm2vae.bias"] = name
    index.write_text(json.dumps(told))
    refused(checkpoint_copy, "plain names of safetensors files beside it")


def test_shards_that_do_not_fit_are_named(checkpoint_copy):
    index = into_shards(checkpoint_copy)
    told = json.loads(index.read_text())
    for damaged in (5, [], {}, {"a": 3}, None):
        index.write_text(json.dumps({"weight_map": damaged}))
        refused(checkpoint_copy, "no weight_map")
    other = json.loads(json.dumps(told))
    other["weight_map"]["no.such.tensor"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(other))
    refused(checkpoint_copy, "no tensor 'no.such.tensor'")
    other = json.loads(json.dumps(told))
    del other["weight_map"]["llm2vae.bias"]
    index.write_text(json.dumps(other))
    refused(checkpoint_copy, "has a tensor 'llm2vae.bias'")
    index.write_text(json.dumps(told))
    (checkpoint_copy / "model-00002-of-00003.safetensors").unlink()
    refused(checkpoint_copy, "lacks 1 of the 3 shards", "model-00002-of-00003.safetensors")


# -- the Hugging Face cache ----------------------------------------------------------------------------------


def into_cache(source: Path, root: Path, commit: str = "a" * 40) -> Path:
    """Lay files out as huggingface_hub's cache does; returns models--… in it."""
    base = root / "models--bytedance-research--Lance"
    (base / "blobs").mkdir(parents=True, exist_ok=True)
    for file in (f for f in source.rglob("*") if f.is_file()):
        link = base / "snapshots" / commit / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = base / "blobs" / f"{abs(hash(str(file))):064x}"
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (base / "refs").mkdir(exist_ok=True)
    (base / "refs" / "main").write_text(commit)
    return base


def test_a_checkpoint_in_the_cache_opens_by_its_folder(checkpoint_copy, tmp_path):
    base = into_cache(checkpoint_copy.parent, tmp_path / "hub")
    folder = base / "snapshots" / ("a" * 40) / "Lance_3B"
    assert torch.equal(draw(folder), draw(checkpoint_copy))


def test_the_cache_above_a_checkpoint_says_which_folder_to_give(checkpoint_copy, tmp_path):
    base = into_cache(checkpoint_copy.parent, tmp_path / "hub")
    folder = base / "snapshots" / ("a" * 40) / "Lance_3B"
    for path in (base, folder.parent, folder.parent.parent, tmp_path / "hub", tmp_path):
        refused(path, "not a Lance checkpoint", f"Did you mean {folder}?")


def test_a_repository_that_is_one_checkpoint_opens_by_its_root(checkpoint_copy, tmp_path):
    vit, vae = checkpoint_copy.parent / "Qwen2.5-VL-ViT", checkpoint_copy.parent / VAE
    shutil.copytree(vit, checkpoint_copy / vit.name)
    shutil.copy(vae, checkpoint_copy)
    old = into_cache(checkpoint_copy.parent, tmp_path / "hub", "b" * 40)
    shutil.rmtree(old / "snapshots" / ("b" * 40))
    (old / "snapshots" / ("b" * 40)).mkdir()  # a snapshot without files
    base = into_cache(checkpoint_copy, tmp_path / "hub", "a" * 40)
    opened = Checkpoint(base)
    assert opened.path == base / "snapshots" / ("a" * 40) and set(opened.parts["vae"].tensors)
    before = finding.fingerprint(base)
    (base / "refs" / "main").write_text("b" * 40)
    assert finding.fingerprint(base) != before
    refused(base, "not a Lance checkpoint")
    (base / "refs" / "main").write_text("../../..")  # no name of a snapshot: the newest is taken
    os.utime(base / "snapshots" / ("a" * 40), (2e9, 2e9))
    assert Checkpoint(base).path == opened.path


def test_a_name_on_the_hub_is_no_folder():
    refused("bytedance-research/Lance", "does not exist", "python -m lance_core download")


# -- what was looked at --------------------------------------------------------------------------------------


def test_the_fingerprint_knows_every_file_and_every_place(checkpoint_copy, tmp_path):
    root = checkpoint_copy.parent
    seen = {finding.fingerprint(checkpoint_copy)}

    def changed(what: str) -> None:
        now = finding.fingerprint(checkpoint_copy)
        assert now == finding.fingerprint(checkpoint_copy)
        assert now not in seen, what
        seen.add(now)

    for path in [p for p in root.rglob("*") if p.is_file() and p.name != "special_tokens_map.json"]:
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 7))
        changed(f"{path} changed")
    shutil.move(root / "Qwen2.5-VL-ViT", tmp_path / "elsewhere")
    changed("the ViT went")
    shutil.move(root / VAE, tmp_path / VAE)
    changed("the VAE went")
    (checkpoint_copy / "Qwen2.5-VL-ViT").mkdir()
    shutil.copy(tmp_path / "elsewhere" / "vit.safetensors", checkpoint_copy / "Qwen2.5-VL-ViT")
    changed("a ViT came, inside")
    shutil.copy(tmp_path / VAE, root / "Wan2.2_VAE.safetensors")
    changed("a VAE came, of another name")
    into_shards(checkpoint_copy)
    changed("shards came")


def test_an_opened_checkpoint_says_what_it_opened_and_looked_for(checkpoint_copy):
    root = checkpoint_copy.parent
    opened = Checkpoint(checkpoint_copy)
    assert {checkpoint_copy / "model.safetensors", checkpoint_copy / "llm_config.json", root / VAE} <= set(
        opened.files
    )
    assert {checkpoint_copy / "ema.safetensors", checkpoint_copy / VAE} <= set(opened.candidates)
    used = {file.path for part in opened.parts.values() for file, _ in part.tensors.values()}
    assert used <= set(opened.files) <= set(opened.candidates)
    vit = root / "Qwen2.5-VL-ViT" / "vit.safetensors"
    given = finding.candidates(checkpoint_copy, vit, root / VAE)
    assert vit in given and vit.with_name("config.json") in given
    assert set(finding.candidates(checkpoint_copy, vit.parent, root / VAE)) == set(given)


def test_a_file_that_lies_elsewhere_finds_its_vit_and_vae_where_it_is_told(checkpoint_copy, tmp_path):
    root, alone = checkpoint_copy.parent, tmp_path / "alone" / "file.safetensors"
    alone.parent.mkdir()
    convert(checkpoint_copy, alone, include_vae=False)
    assert Checkpoint(alone).config.vae is None
    opened = Checkpoint(alone, also=[tmp_path / "nothing", root])
    assert opened.config.vae is not None and root / VAE in opened.files
    before = finding.fingerprint(alone, also=[root])
    (root / VAE).unlink()
    assert finding.fingerprint(alone, also=[root]) != before, "and is opened again when that goes"
    (alone.parent / VAE).write_bytes(b"no archive")
    refused(alone, VAE, also=[root])  # what is beside it comes first


# -- no regular files ----------------------------------------------------------------------------------------


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name must be short
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path.name)
    finally:
        os.chdir(here)


SPECIAL = {
    "a FIFO": fifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a socket": listening,
}


@pytest.mark.skipif(os.name == "nt", reason="FIFOs")
@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", [
    "Lance_3B/model.safetensors", "Lance_3B/llm_config.json", "Lance_3B/tokenizer.json",
    "Qwen2.5-VL-ViT/vit.safetensors", "Qwen2.5-VL-ViT/config.json", VAE, "one.safetensors",
])  # fmt: skip
def test_what_is_no_regular_file_is_refused_and_blocks_nothing(checkpoint_copy, kind, name):
    path = checkpoint_copy.parent / name
    path.unlink(missing_ok=True)
    SPECIAL[kind](path)
    refused(path if name == "one.safetensors" else checkpoint_copy, path.name, f"it is {kind}")
    for opened in (SafetensorsFile, TorchFile):
        with pytest.raises(CheckpointError, match=f"it is {kind}"):
            opened(path)


def test_a_path_that_can_be_none_is_a_sentence(tmp_path):
    for path in ("x" * 5000, "a\0b", str(tmp_path / "/".join("y" * 3000))):
        with pytest.raises(CheckpointError):
            Checkpoint(path)


# -- torch archives ------------------------------------------------------------------------------------------


CLAIMS = {
    "strides of 0": (lambda: torch.zeros(1).expand(1 << 20, 1 << 20), "spread out (strides [0, 0])"),
    "some strides of 0": (lambda: torch.zeros(4).expand(1 << 30, 4), "spread out"),
    "columns first": (lambda: torch.zeros(3, 4).T, "spread out"),
    "sparse": (lambda: torch.eye(3).to_sparse(), ("can run code", "sparse")),
    "meta": (lambda: torch.empty(1 << 40, device="meta"), ("can run code", "without contents")),
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "can run code"),
    "complex": (lambda: torch.zeros(3, dtype=torch.complex64), "a torch.complex64"),
}


@pytest.mark.parametrize("make, words", CLAIMS.values(), ids=list(CLAIMS))
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_plain_are_refused(tmp_path, make, words):
    torch.save({"a": torch.ones(2), "b": make()}, tmp_path / VAE)
    with pytest.raises(CheckpointError) as caught:
        TorchFile(tmp_path / VAE)
    assert any(word in str(caught.value) for word in ([words] if isinstance(words, str) else words))


def test_many_names_for_one_tensor_claim_no_more_than_the_file_has(tmp_path):
    tensor = torch.zeros(1000)
    torch.save({f"n{i}": tensor for i in range(100)}, tmp_path / VAE)
    with pytest.raises(CheckpointError, match=r"claims tensors of .* GB in a file of"):
        TorchFile(tmp_path / VAE)
    torch.save({"a": tensor, "tied": tensor, "b": torch.ones(1000)}, tmp_path / VAE)
    assert torch.equal(TorchFile(tmp_path / VAE).read("tied"), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_plain_tensors_are_read(tmp_path, dtype):
    torch.save({"a": torch.nn.Parameter(torch.ones(3)), "b": torch.ones(2, 3).to(dtype)}, tmp_path / VAE)
    read = TorchFile(tmp_path / VAE)
    assert read.dtypes["b"] is dtype and torch.equal(read.read("b").float(), torch.ones(2, 3))


@pytest.mark.parametrize("value", [
    {"a": {"b": torch.ones(1)}}, {"a": [torch.ones(1)]}, [torch.ones(1)], torch.ones(1), {1: torch.ones(1)},
    {"a": torch.ones(1), "epoch": 3}, {"a": None}, {"a": torch.Size([1])}, {"a": "text"},
], ids=str)  # fmt: skip
def test_other_objects_are_refused(tmp_path, value):
    torch.save(value, tmp_path / VAE)
    with pytest.raises(CheckpointError, match="plain state dict|can run code"):
        TorchFile(tmp_path / VAE)


def test_a_packed_archive_is_refused(tmp_path):
    """A few kilobytes may unpack to terabytes."""
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as old, zipfile.ZipFile(tmp_path / VAE, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="no archive as torch writes it"):
        TorchFile(tmp_path / VAE)


# -- configurations ------------------------------------------------------------------------------------------

LLM = [
    ("rope_theta", math.nan), ("rope_theta", math.inf), ("rope_theta", 10**400), ("rope_theta", [1e6]),
    ("rope_theta", True), ("rope_theta", 1e-300), ("rms_norm_eps", -1e-6), ("rms_norm_eps", math.nan),
    ("rms_norm_eps", 1e-320), ("rms_norm_eps", 10**30), ("num_attention_heads", 4.0),
    ("num_attention_heads", 2**24), ("num_attention_heads", 10**4000), ("num_key_value_heads", True),
    ("num_key_value_heads", [2]), ("num_key_value_heads", -2), ("rope_scaling", [2, 3, 3]),
    ("rope_scaling", {"mrope_section": [True, 3, 4]}), ("rope_scaling", {"mrope_section": [2, 3, -3]}),
    ("rope_scaling", {"mrope_section": [2, 3, 10**400]}), ("rope_scaling", {"mrope_section": "233"}),
    ("hidden_size", [64]), ("hidden_size", math.nan), ("num_hidden_layers", {}),
]  # fmt: skip
VIT = [
    ("fullatt_block_indexes", [99, -5]), ("fullatt_block_indexes", [3]), ("fullatt_block_indexes", [-1]),
    ("fullatt_block_indexes", [True]), ("fullatt_block_indexes", [1.0]), ("fullatt_block_indexes", {}),
    ("fullatt_block_indexes", [10**400]), ("depth", 10**400), ("depth", math.nan), ("depth", True),
    ("patch_size", 2**24), ("temporal_patch_size", 2**24), ("in_channels", 4), ("window_size", 1),
    ("window_size", -112), ("spatial_merge_size", 10**9), ("tokens_per_second", math.nan),
    ("tokens_per_second", 10**400), ("tokens_per_second", 1e300), ("tokens_per_second", [2]),
    ("tokens_per_second", False), ("num_heads", 16),
]  # fmt: skip


def shown(pair) -> str:
    return f"{pair[0]}-{str(pair[1])[:20]}"


@pytest.mark.parametrize("pair", LLM, ids=shown)
def test_values_a_decoder_cannot_have_are_refused_by_name(checkpoint_copy, pair):
    path = checkpoint_copy / "llm_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict([pair])))
    refused(checkpoint_copy, "mrope_section" if pair[0] == "rope_scaling" else pair[0])


@pytest.mark.parametrize("pair", VIT, ids=shown)
def test_values_a_vision_tower_cannot_have_are_refused_by_name(checkpoint_copy, pair):
    path = checkpoint_copy.parent / "Qwen2.5-VL-ViT" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict([pair])))
    refused(checkpoint_copy, "heads are 2 wide" if pair[0] == "num_heads" else pair[0])


@pytest.mark.parametrize("value", [5, [1], "x", True, None])
def test_a_vision_config_that_is_no_object(checkpoint_copy, value):
    path = checkpoint_copy.parent / "Qwen2.5-VL-ViT" / "config.json"
    path.write_text(json.dumps({"vision_config": value}))
    refused(checkpoint_copy, "the ViT's configuration is")


def test_more_layers_than_a_model_has_are_refused_before_they_are_built(tmp_path, checkpoint_copy):
    path = checkpoint_copy / "model.safetensors"
    tensors = load_file(path)
    prefix = "language_model.model.layers."
    tensors |= {f"{prefix}{i}.input_layernorm.weight": torch.ones(64) for i in range(5000)}
    save_file(tensors, path)
    refused(checkpoint_copy, "5000 layers, more than 1024")


def test_shapes_larger_than_any_models_are_refused_before_they_are_built(checkpoint_copy):
    """A sparse file holds any size: what is built from it must be possible."""
    path = checkpoint_copy / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    end = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
    name = "language_model.model.layers.0.self_attn.q_norm.weight"
    other = header.pop(name)
    header["gap"] = other  # keeps its bytes
    header[name] = {"dtype": "F32", "shape": [1 << 28], "data_offsets": [end, end + (1 << 30)]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data[8 + length :])
        file.truncate(8 + len(text) + end + (1 << 30))
    refused(checkpoint_copy, "q_norm.weight has shape [268435456]")
