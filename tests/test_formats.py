"""Quantised formats: their bytes by hand, their accuracy, and against comfy-kitchen, whose kernels newer
ComfyUI runs them with.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from lance_core import config
from lance_core.checkpoint import quantize, tiny
from lance_core.checkpoint.convert import convert
from lance_core.checkpoint.quantize import FORMATS
from lance_core.checkpoint.tensor_files import SafetensorsFile

try:
    from comfy_kitchen import tensor as kitchen
except ImportError:
    kitchen = None

needs_kitchen = pytest.mark.skipif(
    kitchen is None,
    reason="comfy-kitchen is not installed: formats are not checked against ComfyUI's own kernels",
)
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((256, 2048), (48, 192), (144, 208))  # the last two are no whole tiles of nvfp4
FITTING = [(name, shape) for name, format in FORMATS.items() for shape in SHAPES if format.fits(*shape)]
HOST_NAME = {"fp8": "float8_e4m3fn"} | {name: format.host for name, format in FORMATS.items() if format.host}


def weight(n: int = 48, k: int = 192, spread: float = 3.0) -> Tensor:
    """Rows of different sizes, as bfloat16 has them."""
    drawn = (
        torch.randn(n, k, generator=torch.Generator().manual_seed(1))
        * torch.linspace(0.1, spread, n)[:, None]
    )
    return drawn.bfloat16().float()


def error(decoded: Tensor, wanted: Tensor) -> float:
    return float((decoded.float() - wanted).norm() / wanted.norm())


# -- by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bound"), [("fp8", 0.03), ("int8", 0.012), ("int4", 0.12), ("nvfp4", 0.1)])
def test_formats_are_near(name, bound):
    assert 0 < quantize.error_of(weight(), FORMATS[name]) < bound


@pytest.mark.parametrize(("name", "shape"), FITTING)
def test_layouts_say_what_encode_makes(name, shape):
    made = FORMATS[name].encode(weight(*shape))
    assert {k: (t.dtype, tuple(t.shape)) for k, t in made.items()} == FORMATS[name].layout(*shape)
    assert made["weight"].nbytes * FORMATS[name].per_byte == shape[0] * shape[1]
    assert FORMATS[name].decode(made, torch.float16).shape == shape


@pytest.mark.parametrize("name", FORMATS)
def test_layers_are_told_by_their_tensors(name):
    dtypes = {
        f"layers.1.up_proj.{leaf}": dtype for leaf, (dtype, _) in FORMATS[name].layout(256, 256).items()
    }
    assert quantize.formats_of(dtypes | {"layers.1.norm.weight": torch.bfloat16}) == {
        "layers.1.up_proj": FORMATS[name]
    }


def test_what_does_not_fit_is_not_quantised():
    assert [n for n, f in FORMATS.items() if f.fits(16, 64)] == ["fp8", "int8", "int4", "nvfp4"]
    assert [n for n, f in FORMATS.items() if f.fits(24, 64)] == ["fp8", "int8", "int4"]
    assert [n for n, f in FORMATS.items() if f.fits(16, 48)] == ["fp8", "int8", "nvfp4"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nvfp4_is_exact_in_narrow_dtypes(dtype):
    made = FORMATS["nvfp4"].encode(weight())
    assert torch.equal(
        FORMATS["nvfp4"].decode(made, dtype).float(), FORMATS["nvfp4"].decode(made, torch.float32)
    )


def test_int8_is_rounded_once():
    made = FORMATS["int8"].encode(weight())
    assert torch.equal(
        FORMATS["int8"].decode(made, torch.bfloat16), FORMATS["int8"].decode(made, torch.float32).bfloat16()
    )


def test_int4_is_two_levels_to_a_byte_low_nibble_first():
    w = weight(2, 64)
    made = FORMATS["int4"].encode(w)
    low = made["weight"].view(torch.uint8)[1, 3] & 15
    s, z = made["weight_scale"][0, 1].float(), made["weight_zeros"][0, 1].float()
    assert abs((low.float() - 8) * s + z - w[1, 6]) <= s * 0.51
    torch.testing.assert_close(FORMATS["int4"].decode(made, torch.float32)[1, 6], (low.float() - 8) * s + z)


def test_nvfp4_is_two_values_to_a_byte_high_nibble_first():
    w = torch.zeros(16, 16)
    w[0, :8] = torch.tensor([6, -0.5, 1, -1.5, 2, 3, -4, 0])  # every magnitude float4_e2m1 has
    made = FORMATS["nvfp4"].encode(w)
    assert made["weight"][0, :4].tolist() == [0x79, 0x2B, 0x45, 0xE0]
    assert float(made["weight_scale_2"]) == 2**-8 and float(made["weight_scale"][0, 0]) == 2**8
    assert torch.equal(FORMATS["nvfp4"].decode(made, torch.float32), w)


def test_nvfp4_scales_lie_in_tiles_of_32_by_4_by_4():
    w = torch.full((256, 128), 6.0)  # 2 x 2 tiles
    w[128 + 37, 6 * 16 : 7 * 16] = 3.0  # row 37, block 2 of the last tile
    flat = FORMATS["nvfp4"].encode(w)["weight_scale"].float().flatten()
    assert (flat != flat[0]).nonzero().tolist() == [[3 * 512 + (37 % 32) * 16 + 37 // 32 * 4 + 2]]


def test_nvfp4_takes_the_better_of_two_scales_for_each_block():
    w = torch.tensor([[4.0, 3.0, *[0.0] * 14], [6.0, 4.0, *[0.0] * 14]]).repeat(8, 1)
    # Exact only with the first row's largest as a 4 (as a 6, its 3 would be 2.75), and the second row's as a
    # 6.
    assert torch.equal(FORMATS["nvfp4"].decode(FORMATS["nvfp4"].encode(w), torch.float32), w)


def test_constant_and_zero_rows_survive():
    w = weight(16, 64)
    w[0], w[1] = 0, 2.5
    for format in FORMATS.values():
        decoded = format.decode(format.encode(w), torch.float32)
        assert torch.isfinite(decoded).all()
        assert decoded[0].abs().max() < 0.01
        assert (decoded[1] - 2.5).abs().max() < 0.1
        assert not format.decode(format.encode(torch.zeros(16, 64)), torch.float32).abs().max() > 1e-12


# -- against comfy-kitchen -----------------------------------------------------------------------------------


def as_kernels_take_it(name: str, parts: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype):
    """comfy-kitchen's tensor over our bytes, built as ComfyUI's mixed_precision_ops builds it."""
    layout, scales = {
        "fp8": ("TensorCoreFP8Layout", lambda p: {"scale": p["weight_scale"]}),
        "int8": ("TensorWiseINT8Layout", lambda p: {"scale": p["weight_scale"]}),
        "int4": (
            "TensorCoreAWQW4A16Layout",
            lambda p: {"scale": p["weight_scale"], "zeros": p["weight_zeros"]},
        ),
        "nvfp4": (
            "TensorCoreNVFP4Layout",
            lambda p: {"scale": p["weight_scale_2"], "block_scale": p["weight_scale"]},
        ),
    }[name]
    params = getattr(kitchen, layout).Params(**scales(parts), orig_dtype=dtype, orig_shape=tuple(shape))
    return kitchen.QuantizedTensor(parts["weight"], layout, params)


@needs_kitchen
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "shape"), FITTING)
def test_the_kernels_read_what_we_write(name, shape, dtype):
    made = FORMATS[name].encode(weight(*shape))
    theirs = as_kernels_take_it(name, made, shape, dtype).dequantize()
    assert theirs.dtype == dtype and torch.equal(theirs, FORMATS[name].decode(made, dtype))


@needs_kitchen
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "options"),
    [("fp8", {}), ("int8", {"per_channel": True}), ("int8", {"per_channel": False}), ("nvfp4", {})],
)
def test_we_read_what_the_kernels_write(name, options, dtype):
    w = weight(144, 208)
    layout = {"fp8": "TensorCoreFP8Layout", "int8": "TensorWiseINT8Layout", "nvfp4": "TensorCoreNVFP4Layout"}[
        name
    ]
    made = kitchen.QuantizedTensor.from_float(w, layout, **options)
    parts = {
        f"weight{suffix}": tensor
        for suffix, tensor in made.layout_cls.state_dict_tensors(made._qdata, made._params).items()
    }
    theirs = as_kernels_take_it(name, parts, w.shape, dtype).dequantize()
    assert torch.equal(FORMATS[name].decode(parts, dtype), theirs)


@needs_kitchen
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spread", [0.1, 3.0, 100.0])
def test_nvfp4_levels_are_theirs_and_scales_better(shape, spread):
    w = weight(*shape, spread)
    theirs = kitchen.QuantizedTensor.from_float(w, "TensorCoreNVFP4Layout")
    beside = {"weight_scale": theirs._params.block_scale, "weight_scale_2": theirs._params.scale}
    assert torch.equal(FORMATS["nvfp4"].levels(w, beside), theirs._qdata)
    assert quantize.error_of(w, FORMATS["nvfp4"]) < 0.95 * error(theirs.dequantize(), w)


@needs_kitchen
def test_int8_and_fp8_lose_no_more_than_theirs():
    w = weight(256, 512)
    theirs = kitchen.QuantizedTensor.from_float(w, "TensorWiseINT8Layout", per_channel=True)
    made = FORMATS["int8"].encode(w)
    assert torch.equal(made["weight"], theirs._qdata) and torch.equal(
        made["weight_scale"], theirs._params.scale
    )
    theirs = kitchen.QuantizedTensor.from_float(w, "TensorCoreFP8Layout")
    assert quantize.error_of(w, FORMATS["fp8"]) < 1.001 * error(theirs.dequantize(), w)


@needs_kitchen
@pytest.mark.parametrize("name", FORMATS)
def test_converted_files_say_and_hold_what_the_kernels_read(name, tmp_path):
    """Every quantised layer of a file, found by its marker as ComfyUI finds it, against the weights it was
    made from.
    """
    llm = config.LLMConfig(128, 256, 3, 4, 2, 32, 288, 1e6, (4, 6, 6), 1e-6)
    vit = config.ViTConfig(3, 32, 68, 2, 128, fullatt_block_indexes=(1,))
    source = tiny.write(tmp_path / "tiny", llm=llm, vit=vit) / "Lance_3B"
    convert(source, tmp_path / "x.safetensors", name)
    file, original = (
        SafetensorsFile(tmp_path / "x.safetensors"),
        SafetensorsFile(source / "model.safetensors"),
    )
    if name == "fp8":  # ComfyUI makes the markers of the older form itself, from these
        assert file.shapes["scaled_fp8"] == (2,), "two elements: weight-only"
        told = {
            key.removesuffix(".scale_weight"): {"format": "float8_e4m3fn"}
            for key in file.shapes
            if key.endswith(".scale_weight")
        }
    else:
        told = {
            key.removesuffix(".comfy_quant"): json.loads(bytes(file.read(key).tolist()))
            for key in file.shapes
            if key.endswith(".comfy_quant")
        }
        assert all(entry["full_precision_matrix_mult"] is True for entry in told.values())
    assert len(told) == 2 * 7 and {entry["format"] for entry in told.values()} == {HOST_NAME[name]}
    bound = 1.1 * quantize.error_of(
        torch.randn(128, 128, generator=torch.Generator().manual_seed(0)), FORMATS[name]
    )
    for layer in told:
        wanted = original.read(f"{layer}.weight", torch.float32)
        leaves = {
            leaf: quantize.ON_DISK.get(name, {}).get(leaf, leaf)
            for leaf in FORMATS[name].layout(*wanted.shape)
        }
        parts = {leaf: file.read(f"{layer}.{stored}") for leaf, stored in leaves.items()}
        assert (
            error(as_kernels_take_it(name, parts, wanted.shape, torch.float32).dequantize(), wanted) < bound
        )
