"""Where block scales lie in memory: in rows, or swizzled as the tensor cores of Blackwell read them.

Swizzled: tiles of 128 rows x 4 scales, row-major over tiles, 512 bytes each; within a tile the scale of row r, column c
is at ``(r % 32) 16 + (r // 32) 4 + c``, so that 32 lanes load 16 bytes each.  Rows and columns are padded with zeros to
whole tiles.  A scale of more than one row (16 x 16 blocks) is repeated for each of its rows.
"""

import triton
import triton.language as tl


@triton.jit
def swizzled_offset(row, column, columns):
    """Offset of a scale in a matrix of `columns` scales a row."""
    tile = (row // 128).to(tl.int64) * ((columns + 3) // 4) + column // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + column % 4


def swizzled_size(rows: int, columns: int) -> int:
    """Bytes of the swizzled scales of a matrix with `columns` scales in each of `rows` rows."""
    return -(-rows // 128) * -(-columns // 4) * 512
