"""Triton kernels: one idea a file, each equal to the definition in :mod:`lowprec.numerics` bit for bit.

What a tile goes through: `blocks` reads it and finds block maxima, `rotate` turns it, `scales` sizes blocks (`choose`
picks among candidates, `level` is the tensor's part), `codes` rounds to elements, `noise` draws the random bits of a
`Stream`, `pairs` does two fp32 operations at once, `layout` says where scales lie.

Kernels: `quantize` (with rotation, rows and columns in one pass), `eden` (MS-EDEN), `gemm` (products), `wire` (rows for
the network), `update` (AdamW on bf16 weights); `eights` are the tiles of the last two.

Host side: `recipe` is a format as the kernels take it, `launch` chooses and starts what a tensor needs, `memory` lays
out what goes in and comes out, `variants` lists what is compiled for the report.

They are proved by :mod:`lowprec.kernels.testing`; their speed on a GPU has not been measured by us.  Nothing outside of
this folder imports Triton.
"""
