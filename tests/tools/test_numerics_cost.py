"""What recipes cost: against storage, and against counts by hand."""

import math

import pytest
import torch

from lowprec.linear import BF16, load_precision, load_recipe
from lowprec.numerics import FORMATS
from lowprec.tools.numerics_cost import SHAPE, cost, format_bits, hadamard_flops, model_low_frac

T, K, N = SHAPE


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.bits in (4, 8)])
def test_bits_are_those_of_storage(name: str) -> None:
    """Elements of 4 and 8 bits are stored without gaps, so the count is what a quantised tensor occupies, but for one
    number that a format may have for all tensors (a guard)."""
    q = FORMATS[name].quantize(torch.randn(256, 512, generator=torch.Generator().manual_seed(0)))
    stored = 8 * q.nbytes() / q.codes.numel()
    assert format_bits(FORMATS[name], 256, 512) == pytest.approx(stored, abs=32 / q.codes.numel())


def test_nvfp4_by_hand() -> None:
    """x and dy along both axes, w once (square blocks, reused); rotated tensors have maxima of their own."""
    c = cost(load_recipe("nvfp4"))
    assert c.copies == c.roundings == {"x": 2, "w": 1, "dy": 2}
    assert c.amax_passes == {"x": 2, "w": 1, "dy": 2}
    assert c.hadamard_frac == pytest.approx((math.log2(16) + 1) * (N * T + K * T) / (6 * T * K * N))
    assert (c.low8_frac, c.low4_frac, c.extra_gemm_frac) == (1, 1, 0)
    assert c.bits["fprop.x"] == pytest.approx(4.5, abs=1e-5) and c.saved_codes_bits == c.bits["wgrad.x"]
    assert c.bits["fprop.w"] == c.bits["dgrad.w"] == pytest.approx(4 + 8 / 256, abs=1e-5)


def test_mxfp8_fp8_and_bf16_by_hand() -> None:
    """Block scales need two copies of all three and no pass for a maximum; one scale a tensor the opposite."""
    mx, fp8, bf16 = cost(load_recipe("mxfp8")), cost(load_recipe("fp8_tensorwise")), cost(BF16)
    assert mx.copies == {"x": 2, "w": 2, "dy": 2} and mx.amax_passes == {"x": 0, "w": 0, "dy": 0}
    assert fp8.copies == fp8.amax_passes == {"x": 1, "w": 1, "dy": 1}
    assert (mx.low8_frac, mx.low4_frac) == (1, 0)
    assert bf16.copies == bf16.amax_passes == {"x": 0, "w": 0, "dy": 0} and set(bf16.bits.values()) == {16.0}
    assert (bf16.low8_frac, bf16.hadamard_frac, bf16.saved_codes_bits) == (0, 0, 16)


def test_candidates_memory_and_splits_by_hand() -> None:
    """4-over-6 rounds each copy twice, remembered maxima need no pass, a residual is its share of a product."""
    assert cost(load_recipe("nvfp4_4over6")).roundings == {"x": 4, "w": 4, "dy": 2}
    assert cost(load_recipe("fp8_delayed")).amax_passes == {"x": 0, "w": 0, "dy": 0}
    chon = cost(load_recipe("chon"))
    assert chon.extra_gemm_frac == pytest.approx(0.09 / 3)
    assert chon.bits["fprop.x"] == pytest.approx(1.09 * 4.5, abs=1e-4)


def test_rotations_of_halo2_by_hand() -> None:
    """arXiv:2501.02625: forward along K on both operands; dx: dy along tokens and back, and back along K; dw back."""
    turn_K, turn_T = math.log2(K) + 1, math.log2(T) + 1
    by_hand = turn_K * (T * K + N * K) + turn_T * (T * N + T * K) + turn_K * T * K + turn_K * N * K
    assert hadamard_flops(load_recipe("halo2_int8")) == pytest.approx(by_hand)


def test_share_over_a_model_follows_rules_and_schedule() -> None:
    """nvfp4 leaves the first 2 and last 2 of 12 blocks and the head in bf16; a switch of the forward takes a third."""
    precision = load_precision("nvfp4")
    block, head = 2 * 768 * 768 + 2 * 768 * 256 + 3 * 768 * 2048, 768 * 32768
    share = 8 * block / (12 * block + head)
    assert model_low_frac(precision, 4) == pytest.approx(share)
    node = {
        "linear": {"r": {"fprop": {"x": "nvfp4", "w": "nvfp4"}, "dgrad": {"dy": "mxfp8", "w": "nvfp4"}}},
        "rules": [{"match": "lm_head", "recipe": "bf16"}, {"match": "*", "recipe": "r"}],
        "schedule": [{"from": 0.8, "set": {"r.fprop": "bf16"}}],
    }
    whole = 12 * block / (12 * block + head)
    assert model_low_frac(load_precision(node), 4) == pytest.approx(whole * 0.8 / 3)
    assert model_low_frac(load_precision(node), 8) == pytest.approx(whole * (0.8 * 2 / 3 + 0.2 / 3))
