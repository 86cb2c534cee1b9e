"""FORMATS: the formats that recipes may name. A precision file can add its own under ``formats:``."""

from __future__ import annotations

from typing import Any

from lowprec.numerics.format import Format


def _nvfp4(name: str, block: tuple[int, int] = (1, 16), tensor_scale: bool | str | int = True, **fields: Any) -> Format:
    return Format(name, "e2m1", block, "e4m3", tensor_scale, **fields)


def _four_over_six(name: str, **fields: Any) -> Format:  # in the order of operations it has in TransformerEngine
    return _nvfp4(name, targets=(6.0, 4.0), scale_rounding="te_2_14", **fields)


FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        # NVFP4, arXiv:2509.25149: activations and gradients; weights
        _nvfp4("nvfp4"),
        _nvfp4("nvfp4_2d", (16, 16)),
        _nvfp4("nvfp4_row", tensor_scale="row"),
        # stochastic rounding that never clips: an e4m3 scale rounds down by at most 1/17
        _nvfp4("nvfp4_sr", guard=17 / 16),
        # 4-over-6, arXiv:2512.02010
        _four_over_six("nvfp4_46", tensor_max=256.0),
        # MS-EDEN, arXiv:2601.22813: block scales stay far enough below 448 to be corrected upwards
        _nvfp4("nvfp4_eden", guard=1.0625 * 0.93, tensor_max=255.99, zero="one"),
        _four_over_six("nvfp4_eden_46", tensor_max=192.0, zero="one"),
        # double block, arXiv:2510.27527
        _nvfp4("nvfp4_double", tensor_scale=128, zero="min"),
        # unsigned five-exponent-bit scales, arXiv:2609.02846
        Format("nvfp4_ue5m3", "e2m1", (1, 16), "ue5m3", tensor_scale=True, zero="one"),
        Format("nvfp4_ue5m3_2d", "e2m1", (16, 16), "ue5m3", tensor_scale=True, zero="one"),
        # FP4 or INT4 per block, arXiv:2603.28765
        _nvfp4("if4", tensor_max=384.0, second="if4_int"),
        # uniform four-bit grid, arXiv:2606.20381
        Format("ufp4", "e1m2", (1, 16)),
        # OCP MX v1.0; scales rounded up unless the name says otherwise
        Format("mxfp4", "e2m1", (1, 32), "e8m0"),
        Format("mxfp4_floor", "e2m1", (1, 32), "e8m0", scale_rounding="floor"),
        Format("mxfp4_sr", "e2m1", (1, 32), "e8m0", scale_rounding="floor", guard=4 / 3),  # arXiv:2502.20586
        Format("mxfp6_e3m2", "e3m2", (1, 32), "e8m0"),
        Format("mxfp6_e2m3", "e2m3", (1, 32), "e8m0"),
        Format("mxfp8", "e4m3", (1, 32), "e8m0"),
        Format("mxfp8_floor", "e4m3", (1, 32), "e8m0", scale_rounding="floor"),
        Format("mxfp8_ceil", "e4m3", (1, 32), "e8m0", scale_rounding="ceil"),
        Format("mxfp8_even", "e4m3", (1, 32), "e8m0", scale_rounding="even"),
        Format("mxfp8_e5m2", "e5m2", (1, 32), "e8m0"),
        # FP8: one current scale for the tensor; one a row; DeepSeek-V3 (arXiv:2412.19437) activations and weights
        Format("fp8_tensor", "e4m3", (0, 0)),
        Format("fp8_tensor_e5m2", "e5m2", (0, 0)),
        Format("fp8_tensor_pow2", "e4m3", (0, 0), "pow2"),
        Format("fp8_tensor_e5m2_pow2", "e5m2", (0, 0), "pow2"),
        Format("fp8_row", "e4m3", (1, 0)),
        Format("fp8_row_e5m2", "e5m2", (1, 0)),
        Format("fp8_1x128", "e4m3", (1, 128)),
        Format("fp8_128x128", "e4m3", (128, 128)),
        Format("fp8_1x128_pow2", "e4m3", (1, 128), "pow2"),
        Format("fp8_128x128_pow2", "e4m3", (128, 128), "pow2"),
        # FP6 and integers
        Format("fp6_tensor", "e3m2", (0, 0)),
        Format("fp6_tensor_e2m3", "e2m3", (0, 0)),
        Format("int8_tensor", "int8", (0, 0)),
        Format("int8_row", "int8", (1, 0)),
        Format("int8_1x32_pow2", "int8", (1, 32), "pow2"),
        Format("int4_row", "int4", (1, 0)),
        Format("int4_1x32_pow2", "int4", (1, 32), "pow2"),
        # BitNet b1.58 weights: arXiv:2402.17764; with the median, arXiv:2407.09527
        Format("ternary_mean", "ternary", (0, 0), rule="mean"),
        Format("ternary_median", "ternary", (0, 0), rule="median"),
        # QuEST, arXiv:2502.05003: row RMS, coefficients that minimise the error of Gaussian data
        Format("quest_int4", "midrise4", (1, 0), rule="rms", coef=2.51393058),
        Format("quest_fp4", "e2m1", (1, 0), rule="rms", coef=2.92247856),
    )
}
"""Every format by its name."""
