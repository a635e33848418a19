"""Arithmetic on one tensor: the reference, torch.ops.quantkit, the CPU and CUDA kernels, and the
quantized Linear.
"""

from quantkit.ops.arguments import packed_shape
from quantkit.ops.fallback import (
    HISTOGRAM_BINS,
    HISTOGRAM_OFFSET,
    HISTOGRAM_SHIFT,
    histogram_edges,
    unpack_weight,
)
from quantkit.ops.torch_ops import dequantize, quantize, scale_rule

__all__ = [
    "HISTOGRAM_BINS",
    "HISTOGRAM_OFFSET",
    "HISTOGRAM_SHIFT",
    "dequantize",
    "histogram_edges",
    "packed_shape",
    "quantize",
    "scale_rule",
    "unpack_weight",
]
