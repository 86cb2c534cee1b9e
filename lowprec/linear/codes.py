"""A matrix that is already codes, as an operand of a product.

Usually a product quantises the layer's tensors itself. A weight may also arrive as codes
(:mod:`lowprec.linear.weight`): then the operand is a :class:`~lowprec.numerics.QTensor`, and what a product does to a
matrix on its way to the backend is done to its codes: here. Nothing is rounded again, so the operand equals what the
product would have made of the matrix, bit for bit.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec.numerics import Format, QTensor

Matrix = Tensor | QTensor


def transposes(format: Format) -> bool:
    """Whether the codes of a matrix are those of its transpose: square blocks, or one scale for all."""
    return format.block[0] == format.block[1] and isinstance(format.tensor_scale, bool)


def transposed(q: QTensor) -> QTensor:
    """The transpose (k, rows) as a view."""
    assert transposes(q.format), q.format.name
    return dataclasses.replace(q, codes=q.codes.T, scales=q.scales.T)


def padded(q: QTensor, rows: int, cols: int) -> QTensor:
    """q with zeros at the edges, (rows, cols), in its memory order: codes 0 under scales 0."""
    if q.shape == (rows, cols):
        return q
    if q.codes.stride(0) < q.codes.stride(1):
        return transposed(padded(transposed(q), cols, rows))
    free, contracted = q.format.block
    grid = (-(-rows // free) if free else 1, -(-cols // contracted) if contracted else 1)
    stored = q.scales if q.scales.dtype == torch.float32 else q.scales.view(torch.uint8)
    level = q.tensor_scale
    if level is not None and level.dim() == 2:  # one per 1 x 128
        level = _zeros_around(level, rows, -(-cols // 128))
    return QTensor(
        _zeros_around(q.codes, rows, cols), _zeros_around(stored, *grid).view(q.scales.dtype), level, q.format
    )


def _zeros_around(t: Tensor, rows: int, cols: int) -> Tensor:
    return F.pad(t, (0, cols - t.shape[1], 0, rows - t.shape[0]))
