"""What the benchmark says its time goes to."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from benching import suite
from test_bench_suite import ROWS

from lance_core.bench import run as bench_run
from lance_core.bench.profile import BETWEEN, COUNTED, NAMES, REST, kind_of, profile, shares, summary

pytestmark = pytest.mark.usefixtures("small_rates")
CPU = torch.device("cpu")
NONE, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


def event(name: str, took: float = 0.0, parent=None, device=NONE, **more) -> SimpleNamespace:
    """As torch's profiler has them, times in microseconds."""
    span = SimpleNamespace(elapsed_us=lambda: took)
    return SimpleNamespace(
        name=name, device_type=device, self_cpu_time_total=took, time_range=span, cpu_parent=parent, **more
    )


@pytest.mark.parametrize(
    "kind, names",
    [
        (
            "matrix products",
            "aten::mm aten::addmm aten::bmm aten::mkldnn_linear nvjet_tst_128x256 sm90_xmma_gemm_bf16 "
            "cutlass::Kernel2 gemv2T",
        ),
        (
            "attention",
            "aten::_scaled_dot_product_flash_attention_for_cpu pytorch_flash::flash_fwd_kernel "
            "cudnn_generated_fort_native_sdpa",
        ),
        (
            "convolutions",
            "aten::mkldnn_convolution cudnn::cnn::conv2d_grouped sm80_xmma_fprop_implicit_gemm_bf16",
        ),
        ("norms", "aten::_fused_rms_norm aten::linalg_vector_norm vectorized_layer_norm_kernel"),
        (
            "copies",
            "aten::copy_ aten::cat aten::clone aten::index_copy_ aten::_to_copy CatArrayBatchedCopy "
            "aten::fill_",
        ),
        (REST, "aten::mul aten::silu_ aten::add_ triton_poi_fused_mul_silu_0 aten::comm aten::concordance"),
    ],
)
def test_names_of_operators_and_kernels_have_their_kind(kind, names):
    assert {name: kind_of(event(name)) for name in names.split()} == dict.fromkeys(names.split(), kind)


def test_a_part_counts_for_the_nearest_that_has_a_kind():
    norm = event("aten::rms_norm", parent=event("aten::linear"))
    assert kind_of(event("aten::mul", parent=event("aten::mean", parent=norm))) == "norms"
    assert kind_of(event("aten::copy_", parent=event("aten::convolution"))) == "copies"


def test_a_cpu_counts_operators_and_a_gpu_kernels():
    mm = event("aten::mm", 3e5)
    events = [
        mm,
        event("aten::mul", 1e5),
        event("aten::mul", 1e5),
        event("sm90_gemm", 2e5, device=CUDA),
        event("vec_mul", 1e5, device=CUDA),
    ]
    events.append(event("step", 9e5, device=CUDA, is_user_annotation=True))
    here, there = summary(events, 1.0, CPU), summary(events, 1.0, torch.device("cuda"))
    assert here["kinds"] == pytest.approx(
        dict.fromkeys(NAMES, 0.0) | {"matrix products": 0.3, REST: 0.2, BETWEEN: 0.5}
    )
    assert there["kinds"] == pytest.approx(
        dict.fromkeys(NAMES, 0.0) | {"matrix products": 0.2, REST: 0.1, BETWEEN: 0.7}
    )
    assert here["operations"] == [["aten::mm", "matrix products", 0.3, 1], ["aten::mul", REST, 0.2, 2]]
    assert shares(there)["matrix products"] == pytest.approx(0.2)
    busy = summary(events, 0.1, CPU)  # two streams at once may take longer than the clock says
    assert busy["kinds"][BETWEEN] == 0 and sum(shares(busy).values()) == pytest.approx(1)


def test_a_call_is_taken_apart():
    calls = []
    x, weight = torch.randn(600, 600), torch.randn(8, 8, 3, 3)
    picture = torch.randn(4, 8, 200, 200)

    def call():
        calls.append(1)
        (x @ x).sin_()
        F.conv2d(picture, weight)
        time.sleep(0.2)

    found = profile(call, CPU)
    assert len(calls) == 2 and {"matrix products", "convolutions", REST} <= {
        kind for kind, took in found["kinds"].items() if took > 0
    }
    assert found["kinds"][BETWEEN] > 0.15 and sum(found["kinds"].values()) == pytest.approx(found["seconds"])
    assert (
        found["operations"][0][2] == max(took for _, _, took, _ in found["operations"])
        and len(found["operations"]) <= 12
    )


def test_the_suite_says_what_its_time_goes_to(smaller):
    result = bench_run.run(
        suite(
            "small",
            "--profile",
            "--skip",
            "baseline",
            "growth",
            "t2i_batch4",
            "t2v",
            "decode_video",
            "encode_video",
        )
    )
    for row in result["rows"]:
        part = shares(row["profile"])
        assert set(part) == set(NAMES) and sum(part.values()) == pytest.approx(1), row["name"]
        assert part["convolutions" if row["kind"] in ("encode", "decode") else "matrix products"] > 0, row[
            "name"
        ]
    text = bench_run.report(result)
    first = result["rows"][0]
    rate = first["share_of_limit"] / sum(shares(first["profile"])[kind] for kind in COUNTED)
    assert "What the time goes to" in text and f"{rate:.0%} of the limit's rate" in text
    quiet = bench_run.run(suite("small", "--skip", "baseline", "growth", *ROWS[1:]))
    assert "profile" not in quiet["rows"][0] and "What the time goes to" not in bench_run.report(quiet)
    assert "What the time goes to" in bench_run.markdown(result) and "| convolutions |" in bench_run.markdown(
        result
    )
