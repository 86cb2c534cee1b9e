"""numerics: number systems, block scales, rounding, rotations and random bits. Plain torch; imports nothing else of
ours.

>>> from lowprec.numerics import FORMATS
>>> q = FORMATS["nvfp4"].quantize(torch.randn(64, 128))
>>> q.codes.shape, q.scales.shape, q.tensor_scale      # (64, 128) uint8, (64, 8) float8_e4m3fn, () fp32
>>> x = q.dequantize()
"""

from lowprec.numerics.element import ELEMENTS, Element
from lowprec.numerics.error import sqnr_db
from lowprec.numerics.format import Format
from lowprec.numerics.formats import FORMATS
from lowprec.numerics.hadamard import fixed_signs, hadamard, hadamard_order_refusal, rotate
from lowprec.numerics.qtensor import QTensor
from lowprec.numerics.stream import Clock, Stream, Window

__all__ = [
    "ELEMENTS",
    "FORMATS",
    "Clock",
    "Element",
    "Format",
    "QTensor",
    "Stream",
    "Window",
    "fixed_signs",
    "hadamard",
    "hadamard_order_refusal",
    "rotate",
    "sqnr_db",
]
