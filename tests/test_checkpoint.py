"""Files on disk: what is found where, what damage is named how, and what never happens (code run, memory
wasted).
"""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lance_core
from lance_core import CheckpointError
from lance_core.bench import loading
from lance_core.bench.case import RELEASED
from lance_core.checkpoint import convert, describe
from lance_core.checkpoint.checkpoint import Checkpoint
from lance_core.checkpoint.tensor_files import SafetensorsFile, TorchFile, open_weights
from lance_core.model.joined import joined_rows, named_weights

LAYER = "language_model.model.layers.1."


def opens(folder: Path, **options) -> lance_core.Lance:
    return lance_core.load(folder, dtype=torch.float32, **options)


def draw(lance: lance_core.Lance) -> torch.Tensor:
    return lance.generate("t2i", "a fox", width=48, height=32, steps=1).latent


def refused(folder: Path, *words: str, **options) -> str:
    """Loading must fail with all the words in the message."""
    with pytest.raises(CheckpointError) as caught:
        opens(folder, **options)
    message = str(caught.value)
    assert all(word in message for word in words), message
    return message


# -- finding -------------------------------------------------------------------------------------------------


def test_a_missing_folder(tmp_path):
    refused(tmp_path / "nowhere", "nowhere does not exist", "checkpoint folder")


def test_a_file_is_no_folder(checkpoint_copy):
    refused(
        checkpoint_copy / "model.safetensors",
        "single file without llm_config and tokenizer",
        "released folder",
    )


def test_a_folder_that_is_no_checkpoint(tmp_path):
    assert "mean" not in refused(tmp_path, "not a Lance checkpoint", "model.safetensors or ema.safetensors")


def test_the_folder_above_a_checkpoint(checkpoint_copy):
    refused(checkpoint_copy.parent, "not a Lance checkpoint", f"Did you mean {checkpoint_copy}?")


def test_ema_weights_may_stand_in(checkpoint_copy):
    expected = draw(opens(checkpoint_copy))
    (checkpoint_copy / "model.safetensors").rename(checkpoint_copy / "ema.safetensors")
    assert torch.equal(draw(opens(checkpoint_copy)), expected)


@pytest.mark.parametrize("variant", ["Lance_3B", "Lance_3B_Video"])
def test_the_variant_is_told(opened, variant):
    assert opened(variant).config.variant == {"Lance_3B": "image", "Lance_3B_Video": "video"}[variant]


def test_the_vit_is_found_inside_or_beside(opened, golden, tmp_path):
    """The video checkpoint carries its own ViT; the image one has it beside."""
    inside, beside = (
        opened(n).checkpoint.parts["vit"].tensors["merger.ln_q.weight"]
        for n in ("Lance_3B_Video", "Lance_3B")
    )
    assert inside[1] == "vit_model.merger.ln_q.weight" and inside[0].path.parent.name == "Lance_3B_Video"
    assert beside[1] == "merger.ln_q.weight" and beside[0].path.parent.name == "Qwen2.5-VL-ViT"
    alone = tmp_path / "Lance_3B_Video"
    shutil.copytree(golden / "checkpoint" / "Lance_3B_Video", alone)
    lance = opens(alone)
    assert lance.understand(
        "?", image=torch.zeros(9, 9, 3), resolution="image_256res", max_new_tokens=1
    ).token_ids
    with pytest.raises(CheckpointError, match=r"no VAE.*Wan2\.2_VAE\.pth"):
        draw(lance)


def test_without_a_vit_only_what_needs_it_fails(checkpoint_copy):
    shutil.rmtree(checkpoint_copy.parent / "Qwen2.5-VL-ViT")
    lance = opens(checkpoint_copy)
    assert lance.config.vit is None and draw(lance).shape == (1, 2, 3, 48)
    with pytest.raises(CheckpointError, match=r"no vision tower.*vit\.safetensors.*vit="):
        lance.understand("?", image=torch.zeros(9, 9, 3))


@pytest.mark.parametrize("what", ["vit", "vae"])
def test_vit_and_vae_may_be_given(checkpoint_copy, tmp_path, what):
    root, elsewhere = checkpoint_copy.parent, tmp_path / "elsewhere"
    elsewhere.mkdir()
    name = {"vit": "Qwen2.5-VL-ViT", "vae": "Wan2.2_VAE.pth"}[what]
    shutil.move(root / name, elsewhere / name)
    ask = {"image": torch.zeros(9, 9, 3), "resolution": "image_256res", "steps": 1}
    with pytest.raises(CheckpointError):
        opens(checkpoint_copy).generate("image_edit", "a", **ask)
    given_ = [elsewhere / name] + ([elsewhere / name / "vit.safetensors"] if what == "vit" else [])
    for path in given_:
        assert opens(checkpoint_copy, **{what: path}).generate("image_edit", "a", **ask).latent.shape == (
            1,
            16,
            16,
            48,
        )
    refused(checkpoint_copy, f"given as {what}=", **{what: elsewhere / "none"})


def test_the_vae_as_safetensors(checkpoint_copy):
    expected = opens(checkpoint_copy).generate("t2i", "a", width=32, height=32, steps=1).frames
    path = checkpoint_copy.parent / "Wan2.2_VAE.pth"
    save_file(torch.load(path, weights_only=True), path.with_suffix(".safetensors"))
    path.unlink()
    assert torch.equal(
        opens(checkpoint_copy).generate("t2i", "a", width=32, height=32, steps=1).frames, expected
    )


# -- tensors -------------------------------------------------------------------------------------------------


def reshape(name: str):
    return lambda t: t.update({name: t[name][:-1].clone()})


DAMAGE = {
    "missing": (
        "model.safetensors",
        lambda t: t.pop(LAYER + "self_attn.q_proj_moe_gen.weight"),
        ("missing tensor layers.1.self_attn.q_proj.weight of the gen part",),
    ),
    "missing bias": (
        "model.safetensors",
        lambda t: t.pop(LAYER + "self_attn.k_proj.bias"),
        ("missing tensor layers.1.self_attn.k_proj.bias", "und"),
    ),
    "missing head": (
        "model.safetensors",
        lambda t: t.pop("language_model.lm_head.weight"),
        ("missing tensor lm_head.weight",),
    ),
    "missing embeddings": (
        "model.safetensors",
        lambda t: t.pop("language_model.model.embed_tokens.weight"),
        ("embed_tokens.weight",),
    ),
    "unexpected": (
        "model.safetensors",
        lambda t: t.update({"extra.weight": torch.ones(2)}),
        ("unexpected tensor extra.weight",),
    ),
    "unexpected bias": (
        "model.safetensors",
        lambda t: t.update({LAYER + "self_attn.o_proj.bias": torch.ones(64)}),
        ("unexpected tensor", LAYER + "self_attn.o_proj.bias"),
    ),
    "misshapen": (
        "model.safetensors",
        reshape("llm2vae.weight"),
        ("llm2vae.weight has shape [47, 64], expected [48, 64]",),
    ),
    "misshapen layer": (
        "model.safetensors",
        reshape(LAYER + "mlp.up_proj.weight"),
        (LAYER + "mlp.up_proj.weight has shape [95, 64]",),
    ),
    "whole numbers": (
        "model.safetensors",
        lambda t: t.update({"vae2llm.bias": torch.ones(64, dtype=torch.int32)}),
        ("vae2llm.bias is torch.int32, expected float32",),
    ),
    "ViT missing": (
        "../Qwen2.5-VL-ViT/vit.safetensors",
        lambda t: t.pop("merger.ln_q.weight"),
        ("missing tensor merger.ln_q.weight of the vit",),
    ),
    "ViT misshapen": (
        "../Qwen2.5-VL-ViT/vit.safetensors",
        reshape("merger.ln_q.weight"),
        ("merger.ln_q.weight has shape [31]",),
    ),
    "VAE missing": (
        "../Wan2.2_VAE.pth",
        lambda t: t.pop("conv1.bias"),
        ("missing tensor conv1.bias of the vae",),
    ),
    "VAE misshapen": (
        "../Wan2.2_VAE.pth",
        reshape("decoder.head.2.bias"),
        ("decoder.head.2.bias has shape [11], expected [12]",),
    ),
    "VAE of another model": (
        "../Wan2.2_VAE.pth",
        lambda t: [t.pop(k) for k in list(t) if "upsamples" in k],
        ("not a Wan2.2 VAE",),
    ),
    "VAE with another latent": (
        "../Wan2.2_VAE.pth",
        lambda t: t.update({"conv2.weight": torch.ones(16, 16, 1, 1, 1)}),
        ("16 latent channels", "48"),
    ),
}


@pytest.mark.parametrize("file, action, words", DAMAGE.values(), ids=list(DAMAGE))
def test_wrong_tensors_are_named(checkpoint_copy, edit_tensors, file, action, words):
    edit_tensors(checkpoint_copy / file, action)
    refused(checkpoint_copy, *words)


def test_many_wrong_tensors_are_counted(checkpoint_copy, edit_tensors):
    edit_tensors(
        checkpoint_copy / "model.safetensors", lambda t: t.update({f"x{i}": torch.ones(1) for i in range(12)})
    )
    refused(checkpoint_copy, "unexpected tensor x0", "and 9 more")


@pytest.mark.parametrize(
    "table",
    [None, torch.zeros(1, 1), torch.full((64, 64, 7), float("nan")), torch.ones(4096, 64, dtype=torch.int32)],
)
def test_the_stored_position_table_is_ignored(checkpoint_copy, edit_tensors, table, image_lance):
    name = "latent_pos_embed.pos_embed"
    edit_tensors(
        checkpoint_copy / "model.safetensors",
        lambda t: t.pop(name) if table is None else t.update({name: table}),
    )
    assert torch.equal(draw(opens(checkpoint_copy)), draw(image_lance))


# -- configuration -------------------------------------------------------------------------------------------

CONFIGS = {
    "layers": ({"num_hidden_layers": 4}, ("num_hidden_layers is 4 in the configuration, 3 in the weights",)),
    "hidden": ({"hidden_size": 128}, ("hidden_size is 128", "64 in the weights")),
    "inner": ({"intermediate_size": 97}, ("intermediate_size is 97", "96 in the weights")),
    "heads": ({"num_attention_heads": 8}, ("q_proj.bias has shape [64], expected [128]",)),
    "kv heads": ({"num_key_value_heads": 4}, ("k_proj.weight has shape [32, 64], expected [64, 64]",)),
    "uneven heads": ({"num_key_value_heads": 3}, ("4 query heads", "3 key/value heads")),
    "heads that are none": ({"num_attention_heads": "4"}, ("num_attention_heads is '4'", "positive integer")),
    "no heads": ({"num_attention_heads": None}, ("num_attention_heads is None",)),
    "mrope sum": ({"rope_scaling": {"mrope_section": [2, 3, 4]}}, ("[2, 3, 4] cover 9", "width 16 have 8")),
    "mrope shape": ({"rope_scaling": {"mrope_section": [4, 4]}}, ("mrope_section is [4, 4]", "three")),
    "no mrope": ({"rope_scaling": None}, ("mrope_section is None",)),
    "theta": ({"rope_theta": 0}, ("rope_theta is 0", "positive number")),
    "eps": ({"rms_norm_eps": "small"}, ("rms_norm_eps is 'small'",)),
}


@pytest.mark.parametrize("changes, words", CONFIGS.values(), ids=list(CONFIGS))
def test_configurations_that_disagree(checkpoint_copy, changes, words):
    path = checkpoint_copy / "llm_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(checkpoint_copy, *words)


VIT_CONFIGS = {
    "depth": ({"depth": 4}, ("says 4 blocks", "its file has 3")),
    "width": ({"hidden_size": 64}, ("expected [64",)),
    "out": ({"out_hidden_size": 32}, ("width 32", "64", "two models")),
    "heads": ({"num_heads": 5}, ("32 does not divide into 5 heads",)),
    "no patch": ({"patch_size": 0}, ("patch_size is 0",)),
    "full blocks": ({"fullatt_block_indexes": "1"}, ("fullatt_block_indexes is '1'",)),
}


@pytest.mark.parametrize("changes, words", VIT_CONFIGS.values(), ids=list(VIT_CONFIGS))
def test_vit_configurations_that_disagree(checkpoint_copy, changes, words):
    path = checkpoint_copy.parent / "Qwen2.5-VL-ViT" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(checkpoint_copy, *words)


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", ("cannot be read as JSON",)),
        ("[]", ("JSON list, expected an object",)),
        (None, ("does not exist",)),
    ],
)
def test_a_damaged_configuration_file(checkpoint_copy, content, words):
    path = checkpoint_copy / "llm_config.json"
    path.unlink() if content is None else path.write_text(content)
    refused(checkpoint_copy, "llm_config.json", *words)


def test_a_tokeniser_larger_than_the_embeddings(checkpoint_copy, edit_tensors):
    def shorten(t):
        for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            t[name] = t[name][:397].clone()

    edit_tensors(checkpoint_copy / "model.safetensors", shorten)
    refused(checkpoint_copy, "398 tokens", "397 rows")


# -- safetensors ---------------------------------------------------------------------------------------------


def raw(path: Path, header: bytes | dict, data: bytes = b"", length: int | None = None) -> Path:
    """A file in safetensors' layout with whatever header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int, end: int, shape=(2,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


BYTES = {
    "empty": (lambda p: p.write_bytes(b""), "truncated (0 bytes)"),
    "seven bytes": (lambda p: p.write_bytes(b"1234567"), "truncated (7 bytes)"),
    "header length beyond the file": (lambda p: raw(p, {}, length=1 << 40), "truncated"),
    "header length beyond the limit": (lambda p: raw(p, {}, length=(1 << 64) - 1), "not a safetensors file"),
    "a torch file": (lambda p: torch.save({"a": torch.ones(2)}, p), "not a safetensors file"),
    "a web page": (lambda p: p.write_bytes(b"<!doctype html><html>404</html>"), "not a safetensors file"),
    "no JSON": (lambda p: raw(p, b"{]" * 10), "damaged header"),
    "no text": (lambda p: raw(p, b"\xff\xfe" * 10), "damaged header"),
    "JSON without end": (lambda p: raw(p, b"[" * 100_000), "damaged header"),
    "a list": (lambda p: raw(p, b"[1, 2]"), "not a JSON object"),
    "metadata": (lambda p: raw(p, {"__metadata__": {"a": 1}}), "damaged metadata"),
    "no entry": (lambda p: raw(p, {"a": 3}), "entry for 'a' is damaged"),
    "unknown dtype": (
        lambda p: raw(p, {"a": entry(0, 8, dtype="F99")}, b"x" * 8),
        "'a' is damaged or of an unknown type",
    ),
    "no offsets": (lambda p: raw(p, {"a": {"dtype": "F32", "shape": [2]}}, b"x" * 8), "entry for 'a'"),
    "negative shape": (lambda p: raw(p, {"a": entry(0, 8, (-1, -2))}, b"x" * 8), "entry for 'a'"),
    "shape of words": (lambda p: raw(p, {"a": entry(0, 8, ("2",))}, b"x" * 8), "entry for 'a'"),
    "shape beyond memory": (
        lambda p: raw(p, {"a": entry(0, 8, (1 << 40, 1 << 40))}, b"x" * 8),
        "entry for 'a'",
    ),
    "size unlike the shape": (lambda p: raw(p, {"a": entry(0, 12)}, b"x" * 12), "entry for 'a'"),
    "offsets backwards": (lambda p: raw(p, {"a": entry(8, 0)}, b"x" * 8), "entry for 'a'"),
    "overlap": (lambda p: raw(p, {"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12), "'b' overlap"),
    "gap": (
        lambda p: raw(p, {"a": entry(0, 8), "b": entry(12, 20)}, b"x" * 20),
        "'b' overlap others or leave a gap",
    ),
    "too short": (lambda p: raw(p, {"a": entry(0, 8)}, b"x" * 7), "is truncated"),
    "too long": (lambda p: raw(p, {"a": entry(0, 8)}, b"x" * 9), "longer than its header says"),
}


@pytest.mark.parametrize("make, words", BYTES.values(), ids=list(BYTES))
def test_damaged_safetensors(tmp_path, make, words):
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    assert words in str(caught.value) and "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_download(checkpoint_copy, share):
    path = checkpoint_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(checkpoint_copy, "model.safetensors", "truncated")


def test_a_file_that_shrinks_while_it_is_read(checkpoint_copy):
    lance = opens(checkpoint_copy)
    path = checkpoint_copy / "model.safetensors"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="shorter while it was read"):
        draw(lance)


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 60))
def test_any_damage_to_a_header_is_a_checkpoint_error(tmp_path_factory, at, byte, cut):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    save_file(
        {"a": torch.arange(6.0).view(2, 3), "b.c": torch.ones(3, dtype=torch.bfloat16)}, path, {"who": "us"}
    )
    data = bytearray(path.read_bytes())
    data[at % len(data)] = byte
    path.write_bytes(data[: len(data) - cut])
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    assert all(file.read(name).shape == shape for name, shape in file.shapes.items())


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.int8,
        torch.bool,
    ],
)
def test_what_is_written_is_read(tmp_path, dtype):
    tensors = {
        "x": torch.arange(-6, 6).view(3, 4).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "none": torch.ones(0, 3, dtype=dtype),
    }
    save_file(tensors, tmp_path / "a.safetensors", {"who": "us"})
    file = open_weights(tmp_path / "a.safetensors")
    assert file.metadata == {"who": "us"} and set(file.shapes) == set(tensors)
    for name, tensor in tensors.items():
        assert file.dtypes[name] == dtype and file.shapes[name] == tuple(tensor.shape)
        assert torch.equal(file.read(name).float(), tensor.float())


# -- torch archives ------------------------------------------------------------------------------------------


class Attack:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "bare pickle"])
def test_pickled_code_is_refused_and_not_run(checkpoint_copy, tmp_path, legacy):
    path, trace = checkpoint_copy.parent / "Wan2.2_VAE.pth", tmp_path / "was here"
    state = {"conv1.weight": torch.ones(2), "x": Attack(trace)}
    path.write_bytes(pickle.dumps(state["x"], protocol=2)) if legacy else torch.save(state, path)
    refused(checkpoint_copy, "Wan2.2_VAE.pth", "was not loaded", "can run code")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Attack(trace))).close()
    assert trace.exists()  # it would have been


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: p.write_bytes(b""), "Wan2.2_VAE.pth"),
        (lambda p: p.write_bytes(b"<html>not found</html>"), "Wan2.2_VAE.pth"),
        (lambda p: p.write_bytes(p.read_bytes()[:100_000]), "Wan2.2_VAE.pth"),
        (lambda p: torch.save([torch.ones(2)], p), "not a plain state dict"),
        (lambda p: torch.save({"a": 3}, p), "not a plain state dict"),
        (lambda p: torch.save({"state_dict": {"a": torch.ones(1)}}, p), "not a plain state dict"),
    ],
    ids=["empty", "a web page", "cut off", "a list", "numbers", "nested"],
)
def test_damaged_torch_files(checkpoint_copy, make, words):
    make(checkpoint_copy.parent / "Wan2.2_VAE.pth")
    refused(checkpoint_copy, words)


def test_a_torch_file_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        TorchFile(tmp_path / "a.pth")


# -- loading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_those_of_the_file_in_the_dtype_asked_for(golden, dtype):
    checkpoint = Checkpoint(golden / "checkpoint" / "Lance_3B_Video")
    tensors = load_file(checkpoint.path / "model.safetensors") | torch.load(
        golden / "checkpoint" / "Wan2.2_VAE.pth", weights_only=True
    )
    used = set()
    for part in ("und", "gen", "vit", "vae"):
        module = checkpoint.load(part, dtype=dtype)
        for name, weight in named_weights(module):
            key = checkpoint.parts[part].tensors[name][1]
            used.add(key)
            assert weight.dtype == dtype and not weight.requires_grad and weight.device.type == "cpu"
            assert torch.equal(weight, tensors[key].to(dtype))
        assert not module.training and not any(b.is_meta for b in module.buffers())
        assert checkpoint.parts[part].parameters == sum(p.numel() for p in module.parameters())
    assert used == set(tensors) - {"latent_pos_embed.pos_embed"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["as stored", "converted"])
@pytest.mark.parametrize("part", ["vae", "gen"])
def test_loaded_weights_do_not_hang_on_their_file(checkpoint_copy, part, dtype):
    """No mapped archive stays behind: whatever happens to the file, the weights are ours."""
    module = Checkpoint(checkpoint_copy).load(part, dtype=dtype)
    before = [p.clone() for p in module.parameters()]
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in module.parameters())
    for path in (checkpoint_copy.parent / "Wan2.2_VAE.pth", checkpoint_copy / "model.safetensors"):
        with open(path, "r+b") as file:
            file.write(b"\0" * path.stat().st_size)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))


def test_loading_holds_the_result_and_one_piece(golden, monkeypatch):
    """Peak memory is the result and a piece of the file: a tensor is cast as it is read, never held in both
    dtypes.
    """
    from lance_core.checkpoint import tensor_files

    asked: list[int] = []

    def counted(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            asked.append(tensor.nbytes)
            return tensor

        return made

    monkeypatch.setattr(tensor_files, "CHUNK", 256)
    file = SafetensorsFile(golden / "checkpoint" / "Lance_3B" / "model.safetensors")
    monkeypatch.setattr(torch, "empty", counted(torch.empty))
    monkeypatch.setattr(tensor_files, "_mapped", counted(tensor_files._mapped))
    for name in file.entries:
        for dtype in (torch.float32, None):
            asked.clear()
            tensor = file.read(name, dtype)
            assert asked[0] == tensor.nbytes
            assert asked[1:] == ([] if dtype is None else [min(256, file.entries[name].nbytes)])


def test_reading_in_pieces_is_reading_whole(golden, monkeypatch):
    from safetensors.torch import load_file

    from lance_core.checkpoint import tensor_files

    path = golden / "checkpoint" / "Lance_3B" / "model.safetensors"
    whole = load_file(path)
    monkeypatch.setattr(tensor_files, "CHUNK", 64)
    file = SafetensorsFile(path)
    for name, tensor in whole.items():
        assert torch.equal(file.read(name), tensor)
        assert torch.equal(file.read(name, torch.float64), tensor.double())


def test_parts_load_when_first_needed_and_only_once(checkpoint_copy):
    seen = []
    lance = lance_core.load(
        checkpoint_copy,
        dtype=torch.float32,
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    assert seen == []
    assert lance.components.gen is lance.components.gen
    total = len(list(lance.components.gen.parameters()))
    assert seen == [("loading gen", i + 1, total) for i in range(total)]


# -- opening costs what reading the names costs --------------------------------------------------------------


@pytest.fixture(scope="module")
def released_layout(tmp_path_factory):
    """released_layout(name) -> a checkpoint with the released names, shapes and dtypes and no contents (a
    sparse file).
    """
    base = tmp_path_factory.mktemp("released")
    cases = {case.name: case for case in loading.CASES}
    known: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in known:
            known[name] = loading.write_case(base / name, cases[name], RELEASED)
        return known[name]

    return write


def steps_of(function) -> int:
    """Lines of lance_core that a call runs, a comprehension's line once for each of its items: work, not
    time.
    """
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if "lance_core" not in frame.f_code.co_filename:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    ("name", "tensors"), [("image", 1021), ("video", 1411), ("fp8", 2131), ("int4", 2131)]
)
def test_opening_takes_a_few_steps_a_tensor(released_layout, name, tensors):
    """It was one pass over all tensors for each tensor: 21 seconds at the released size."""
    path = released_layout(name)
    model = path if path.is_file() else path / "model.safetensors"
    count = len(SafetensorsFile(model).entries)
    if path.is_dir():
        assert count == tensors
    parts = sum(len(part.tensors) for part in Checkpoint(path).parts.values())
    assert steps_of(lambda: describe.describe(path)) < 120 * max(parts, count)


def test_planning_a_conversion_takes_a_few_steps_a_tensor(released_layout):
    checkpoint = Checkpoint(released_layout("video"))
    for part in ("und", "gen"):
        count = len(checkpoint.parts[part].tensors)
        for dtype in ("bf16", "int4"):
            assert steps_of(lambda: convert._plan_part(checkpoint, part, dtype)) < 120 * count  # noqa: B023
        assert steps_of(lambda: list(joined_rows(checkpoint.build(part)))) < 120 * count  # noqa: B023
        quantised = Checkpoint(released_layout("int4"))
        assert steps_of(lambda: quantised.build(part)) < 120 * len(quantised.parts[part].tensors)  # noqa: B023
