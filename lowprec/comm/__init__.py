"""comm: low precision on the wire. Codecs, collectives that sum in fp32, FSDP2's extension points, error feedback,
byte counts.

>>> codec = replace(CODECS["int4"], rotation=64, rounding="stochastic")
>>> payload = codec.encode(x_RN, stream, "gradient/0")            # (R, codec.payload_bytes(N)) uint8
>>> y_RN = codec.decode(payload, N)
>>> part_N = reduce_scatter(x_WN, group, codec, meter)            # (N,) fp32, summed in rank order
"""

from lowprec.comm.activations import copy_to, gather_sequence, scatter_sequence
from lowprec.comm.codec import CODECS, Codec
from lowprec.comm.collectives import (
    Nodes,
    all_gather,
    all_reduce,
    max_all_reduce,
    reduce_scatter,
    two_level_reduce_scatter,
)
from lowprec.comm.config import CommConfig, FeedbackKind, GradientRounding
from lowprec.comm.feedback import Feedback
from lowprec.comm.fsdp import GradientReduceScatter, MeteredAllGather, all_reduce_hook
from lowprec.comm.meter import Meter

__all__ = [
    "CODECS",
    "Codec",
    "CommConfig",
    "Feedback",
    "FeedbackKind",
    "GradientReduceScatter",
    "GradientRounding",
    "Meter",
    "MeteredAllGather",
    "Nodes",
    "all_gather",
    "all_reduce",
    "all_reduce_hook",
    "copy_to",
    "gather_sequence",
    "max_all_reduce",
    "reduce_scatter",
    "scatter_sequence",
    "two_level_reduce_scatter",
]
