"""Hostile files: thousands of mutations of every file a checkpoint is read from, each ending in a typed error
or a whole load.
"""

from __future__ import annotations

import gc
import json
import random
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lance_core import config
from lance_core.checkpoint import tiny
from lance_core.checkpoint.checkpoint import PARTS, Checkpoint
from lance_core.checkpoint.convert import convert
from lance_core.checkpoint.tensor_files import SafetensorsFile, TorchFile
from lance_core.errors import CheckpointError, LanceError

ROUNDS = 11_000  # in all, over the kinds of file below
SHARES = {"header": 4000, "file": 2500, "single": 1500, "json": 2000, "torch": 1000}
assert sum(SHARES.values()) == ROUNDS

VALUES = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 2**64, 10**30, 1e308, "", "F32", "\x00", "../../etc/passwd",
    [], [[]], [-1], [2**62], {}, {"a": {}},
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    llm = config.LLMConfig(32, 64, 2, 4, 2, 8, 288, 1e6, (1, 1, 2), 1e-6)
    vit = config.ViTConfig(1, 16, 20, 2, 32, fullatt_block_indexes=(0,))
    vae = config.VAEConfig((8, 8), (8, 8), 1, 1, (True,))
    folder = tiny.write(tmp_path_factory.mktemp("fuzz") / "m", llm=llm, vit=vit, vae=vae)
    convert(folder / "Lance_3B", folder / "one.safetensors", "int8")
    return folder


def scramble_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, lengthen, repeat or overwrite."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 50])):
        at = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.randrange(1, 40))
        elif kind == 4:
            data[at : at + 8] = rng.choice(
                [b"\xff" * 8, b"\x00" * 8, struct.pack("<Q", rng.randrange(2**64)), b"[" * 400]
            )
        else:
            del data[at : at + rng.randrange(1, 200)]
    return bytes(data)


def scramble_json(value, rng: random.Random, depth: int = 0):
    """Replace, drop, rename or duplicate something somewhere inside."""
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.8):
        key = rng.choice(list(value))
        kind = rng.randrange(6)
        copy = dict(value)
        if kind == 0:
            del copy[key]
        elif kind == 1:
            copy[rng.choice(["", "__metadata__", key + "x", key.upper(), "\u0000", key * 50])] = copy.pop(key)
        elif kind == 2:
            copy[rng.choice(list(value))] = copy[key]
        else:
            copy[key] = scramble_json(copy[key], rng, depth + 1)
        return copy
    if isinstance(value, list) and value and rng.random() < 0.7:
        copy = list(value)
        at = rng.randrange(len(copy))
        if rng.random() < 0.3:
            del copy[at]
        else:
            copy[at] = scramble_json(copy[at], rng, depth + 1)
        return copy
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice([-1, 1, 7, -value, value, 2**40])
    return rng.choice(VALUES)


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header is still JSON but says something else."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for _ in range(rng.choice([1, 1, 2, 4])):
        header = scramble_json(header, rng)
    text = json.dumps(header).encode()
    said = (
        len(text)
        if rng.random() < 0.9
        else rng.choice([0, 1, len(text) - 1, len(text) + 1, 2**40, 2**64 - 1])
    )
    return struct.pack("<Q", said) + text + data[8 + length :]


def use(path: Path) -> None:
    """Open and, if that works, load every part: nothing but LanceError may come of it."""
    try:
        checkpoint = Checkpoint(path)
        for part in PARTS:
            if checkpoint.parts[part].tensors:
                checkpoint.load(part, dtype=torch.float32)
    except LanceError as error:
        assert str(error)


def rounds(kind: str, folder: Path, file: Path, mutate, path: Path) -> None:
    """Mutate `file` again and again and use the checkpoint at `path`; memory must not grow past twice the
    files.
    """
    rng = random.Random(f"lance {kind}")
    original = file.read_bytes()
    total = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    use(path)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for _ in range(SHARES[kind]):
        file.write_bytes(mutate(original, rng))
        use(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert grown < 2 * total + (200 << 20)  # the interpreter's own comings and goings beside it


@pytest.fixture
def copy(root, tmp_path):
    return Path(shutil.copytree(root, tmp_path / "m"))


def test_headers(copy):
    rounds("header", copy, copy / "Lance_3B" / "model.safetensors", mutate_header, copy / "Lance_3B")


def test_bytes_of_weight_files(copy):
    def mutate(data, rng):
        head = 8 + int.from_bytes(data[:8], "little")
        return (
            scramble_bytes(data[:head], rng) + data[head:]
            if rng.random() < 0.8
            else scramble_bytes(data, rng)
        )

    rounds("file", copy, copy / "Lance_3B" / "model.safetensors", mutate, copy / "Lance_3B")


def test_single_files(copy):
    def mutate(data, rng):
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        metadata = header["__metadata__"]
        if rng.random() < 0.7:  # what the file says of itself, one level deeper
            metadata["lance"] = json.dumps(scramble_json(json.loads(metadata["lance"]), rng))
        else:
            header = scramble_json(header, rng)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    rounds("single", copy, copy / "one.safetensors", mutate, copy / "one.safetensors")


def test_configurations_and_tokenisers(copy):
    names = [
        "llm_config.json",
        "tokenizer.json",
        "../Qwen2.5-VL-ViT/config.json",
        "vocab.json",
        "added_tokens.json",
        "merges.txt",
    ]
    rng = random.Random("lance json")
    folder = copy / "Lance_3B"
    (copy / "held.json").write_bytes((folder / "tokenizer.json").read_bytes())
    for i in range(SHARES["json"]):
        name = names[i % len(names)]
        file, original = folder / name, (folder / name).read_bytes()
        if name in ("vocab.json", "added_tokens.json", "merges.txt"):
            (folder / "tokenizer.json").unlink(missing_ok=True)  # so that these are read
        if name.endswith(".json") and rng.random() < 0.8:
            file.write_text(json.dumps(scramble_json(json.loads(original), rng)))
        else:
            file.write_bytes(scramble_bytes(original, rng))
        try:
            checkpoint = Checkpoint(folder)
            checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("a <|im_end|> 猫\n"))
            checkpoint.load("vit", dtype=torch.float32)
        except LanceError as error:
            assert str(error)
        file.write_bytes(original)
        (folder / "tokenizer.json").write_bytes((copy / "held.json").read_bytes())


def test_torch_archives(copy):
    file = copy / "Wan2.2_VAE.pth"
    rng = random.Random("lance torch")
    original = file.read_bytes()
    for _ in range(SHARES["torch"]):
        file.write_bytes(scramble_bytes(original, rng))
        try:
            read = TorchFile(file)
            for name in read.shapes:
                read.read(name).clone()
        except CheckpointError as error:
            assert str(error)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100])
def test_stubs(tmp_path, length):
    (tmp_path / "x.safetensors").write_bytes(b"\x00" * length)
    with pytest.raises(CheckpointError):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_a_header_that_promises_terabytes_allocates_nothing(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["a"] |= {"shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(CheckpointError, match="truncated"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_a_layer_number_from_a_stranger_builds_nothing(copy):
    file = copy / "Lance_3B" / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].replace(b"layers.1.mlp.up_proj", b"layers.99999999.mlp.up_proj")
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(CheckpointError, match="not numbered"):
        Checkpoint(copy / "Lance_3B")


def test_a_depth_from_a_stranger_builds_nothing(copy):
    for path in (copy / "Qwen2.5-VL-ViT" / "config.json", copy / "Lance_3B" / "llm_config.json"):
        original = path.read_text()
        path.write_text(original.replace('"depth": 1', '"depth": 9999999'))
        if path.name == "config.json":
            with pytest.raises(CheckpointError, match="9999999 blocks"):
                Checkpoint(copy / "Lance_3B")
            path.write_text(original)
