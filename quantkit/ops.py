"""torch.ops.quantkit.*: each op's schema, its compiled CPU kernel where there is one, its reference everywhere else, its fake.

    block_amax(values, block_rows, block_columns) -> amax
    encode_blocks(values, scale, block_rows, block_columns, format) -> codes
    quantize_blocks(values, block_rows, block_columns, format, rule) -> (codes, scale)
    dequantize_blocks(codes, scale, block_rows, block_columns) -> values
    observe_rows(rows, above, channel_amax, channel_sum_of_squares, histogram, token_histogram, extremes, counts): adds what calibration keeps

A matrix [rows, columns] is cut into blocks of block_rows × block_columns, the last ones as large as what is left; amax and scale are
[block rows, block columns] float32. format: a NumberFormat's name. rule, how a scale follows from an amax: "stored" (rounded to bfloat16 for a
file), "power_of_two" (E8M0) or "dynamic" (a server's, with its floor). Kernels: kernels/cpu/quantize_blocks.cpp, equal to quantize.py bit for
bit for finite values; NaN gives NaN scales. They run in the calling thread without Python's lock, so callers may use several threads. observe_rows:
kernels/cpu/observe_rows.cpp.

The environment variable QUANTKIT_KERNELS chooses "avx512", "avx2", "scalar" or "reference" instead of the best that this machine has.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import quantkit
from quantkit import quantize as reference
from quantkit.errors import QuantkitError
from quantkit.formats import E8M0, FP8_E4M3, INT8
from quantkit.quantize import QuantizedTensor
from quantkit.scheme import QuantSpec, block

LIBRARY_NAME, LIBRARY_VERSION = "libquantkit_cpu.so", 2
LEVELS = ("scalar", "avx2", "avx512")
FORMATS = {number_format.name: number_format for number_format in (INT8, FP8_E4M3)}
# The order of the enums in kernels/cpu/quantize_blocks.h.
_INPUTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_FORMATS = {"INT8": 0, "FP8_E4M3": 1}
_RULES = {"stored": 0, "power_of_two": 1, "dynamic": 2}
_STATISTICS = {
    "channel_amax": torch.float32,
    "channel_sum_of_squares": torch.float64,
    "histogram": torch.int64,
    "token_histogram": torch.int64,
    "extremes": torch.float32,
    "counts": torch.int64,
}

# |x| is binned by the top bits of its float32: 8 of exponent, 4 of mantissa, so 16 bins an octave, from 2^-32 to 2^32. Fixed bins, so histograms add.
HISTOGRAM_BINS = 1024
HISTOGRAM_SHIFT = 19
HISTOGRAM_OFFSET = (127 - 32) << 4
_CHUNK = 64  # rows whose squares are summed in float32 before they go to float64


# ---- The compiled library.


@cache
def cpu_kernels() -> ctypes.CDLL | None:
    """The compiled CPU kernels, or None where they weren't built, are of another version, or QUANTKIT_KERNELS says so."""
    wanted = os.environ.get("QUANTKIT_KERNELS", "")
    if wanted not in ("", "reference", *LEVELS):
        raise QuantkitError(f"QUANTKIT_KERNELS is '{wanted}'; choose one of {', '.join(LEVELS)}, reference")
    # An editable install keeps the library beside the installed package, not in the source tree: look in all of the package's directories.
    found = [path for directory in quantkit.__path__ if (path := Path(directory) / LIBRARY_NAME).is_file()]
    if wanted == "reference" or not found:
        if wanted in LEVELS:
            raise QuantkitError(f"QUANTKIT_KERNELS asks for {wanted}, but the kernels weren't built; install quantkit where there is a C++ compiler")
        return None
    library = ctypes.CDLL(str(found[0]))
    if library.qk_cpu_version() != LIBRARY_VERSION:
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    matrix = [size] * 5
    library.qk_block_amax.argtypes = [pointer, number, *matrix, pointer]
    library.qk_encode_blocks.argtypes = [pointer, number, *matrix, number, pointer, pointer]
    library.qk_quantize_blocks.argtypes = [pointer, number, *matrix, number, number, pointer, pointer]
    library.qk_dequantize_blocks.argtypes = [pointer, number, *matrix, pointer, pointer]
    library.qk_observe_rows.argtypes = [pointer, number, *[size] * 4, ctypes.c_float, *[pointer] * 6]
    library.qk_count_magnitudes.argtypes = [pointer, size, size, pointer]
    if wanted and library.qk_select_cpu_level(LEVELS.index(wanted)) != 0:
        raise QuantkitError(f"QUANTKIT_KERNELS asks for {wanted}, which this processor doesn't have")
    return library


def cpu_level() -> str:
    """The instruction set whose kernels run here: one of LEVELS, or "reference"."""
    library = cpu_kernels()
    return LEVELS[library.qk_cpu_level()] if library else "reference"


# ---- Schemas, and how a QuantSpec speaks to them.

_library = torch.library.Library("quantkit", "DEF")
_library.define("block_amax(Tensor values, int block_rows, int block_columns) -> Tensor")
_library.define("encode_blocks(Tensor values, Tensor scale, int block_rows, int block_columns, str format) -> Tensor")
_library.define("quantize_blocks(Tensor values, int block_rows, int block_columns, str format, str rule) -> (Tensor, Tensor)")
_library.define("dequantize_blocks(Tensor codes, Tensor scale, int block_rows, int block_columns) -> Tensor")
_library.define(
    "observe_rows(Tensor rows, float above, Tensor(a!) channel_amax, Tensor(b!) channel_sum_of_squares, Tensor(c!) histogram, "
    "Tensor(d!) token_histogram, Tensor(e!) extremes, Tensor(f!) counts) -> ()"
)


def quantize(values: Tensor, spec: QuantSpec, amax: Tensor | None = None) -> QuantizedTensor:
    """values [rows, columns] under `spec`, with scales from the values' own amax or from the one given (shared by a fused set)."""
    blocks = spec.granularity.block_shape(*values.shape)
    if amax is None:
        codes, scale = torch.ops.quantkit.quantize_blocks(values, *blocks, spec.format.name, scale_rule(spec))
    else:
        scale = reference.choose_scale(amax, spec)
        codes = torch.ops.quantkit.encode_blocks(values, scale, *blocks, spec.format.name)
    return QuantizedTensor(codes, scale, spec)


def dequantize(quantized: QuantizedTensor) -> Tensor:
    """The values the codes stand for, [rows, columns] float32."""
    blocks = quantized.spec.granularity.block_shape(*quantized.qdata.shape)
    return torch.ops.quantkit.dequantize_blocks(quantized.qdata, quantized.scale, *blocks)


def scale_rule(spec: QuantSpec) -> str:
    if spec.scale_format is E8M0:
        return "power_of_two"
    return "dynamic" if spec.dynamic else "stored"


def histogram_edges() -> Tensor:
    """Lower edge of each bin of |x|, [HISTOGRAM_BINS] float32. The first bin holds all below its end, the last all from its edge on, and NaN."""
    edges = (torch.arange(HISTOGRAM_BINS, dtype=torch.int32) + HISTOGRAM_OFFSET << HISTOGRAM_SHIFT).view(torch.float32)
    edges[0] = 0.0
    return edges


# ---- Reference, for every device and for what the kernels don't take.


def _spec(format_name: str, rule: str, block_rows: int, block_columns: int) -> QuantSpec:
    return QuantSpec(FORMATS[format_name], block(block_rows, block_columns), rule == "dynamic", E8M0 if rule == "power_of_two" else None)


def _reference_block_amax(values: Tensor, block_rows: int, block_columns: int) -> Tensor:
    return reference.block_amax(values, block(block_rows, block_columns))


def _reference_encode_blocks(values: Tensor, scale: Tensor, block_rows: int, block_columns: int, format: str) -> Tensor:
    return reference.quantize(values, _spec(format, "stored", block_rows, block_columns), scale).qdata


def _reference_quantize_blocks(values: Tensor, block_rows: int, block_columns: int, format: str, rule: str) -> tuple[Tensor, Tensor]:
    quantized = reference.quantize(values, _spec(format, rule, block_rows, block_columns))
    return quantized.qdata, quantized.scale


def _reference_dequantize_blocks(codes: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> Tensor:
    return reference.dequantize(codes, scale, block(block_rows, block_columns))


def _reference_observe_rows(
    rows: Tensor,
    above: float,
    channel_amax: Tensor,
    channel_sum_of_squares: Tensor,
    histogram: Tensor,
    token_histogram: Tensor,
    extremes: Tensor,
    counts: Tensor,
) -> None:
    """Add the statistics of rows [tokens, features], of any floating-point type, to:

    channel_amax: [features] float32, of |x|. A NaN makes it NaN.
    channel_sum_of_squares: [features] float64. Chunks of 64 rows, counted from the first of this call, are summed row by row in float32.
    histogram: [HISTOGRAM_BINS] int64 of |x|; NaN is in the last bin.
    token_histogram: [HISTOGRAM_BINS] int64 of each row's largest |x|.
    extremes: [2] float32, minimum and maximum, without the sign of zeros. A NaN makes both NaN.
    counts: [2] int64, rows, and how many |x| > above, compared in float32; NaN is not above.
    """
    _check_statistics(rows, channel_amax, channel_sum_of_squares, histogram, token_histogram, extremes, counts)
    counts[0] += rows.shape[0]
    if not rows.numel():
        return
    values = rows.detach().float()
    magnitudes = values.abs()
    torch.maximum(channel_amax, magnitudes.amax(0), out=channel_amax)
    chunks = torch.nn.functional.pad(values.square(), (0, 0, 0, -rows.shape[0] % _CHUNK)).unflatten(0, (-1, _CHUNK))
    for chunk_sum in sum(chunks.unbind(1)):
        channel_sum_of_squares += chunk_sum
    histogram += _count_bins(magnitudes)
    token_histogram += _count_bins(magnitudes.amax(1))
    low, high = values.aminmax()
    extremes.copy_(torch.stack([torch.minimum(extremes[0], low + 0.0), torch.maximum(extremes[1], high + 0.0)]))
    counts[1] += (magnitudes > torch.tensor(above, dtype=torch.float32)).sum()


def _count_bins(magnitudes: Tensor) -> Tensor:
    """[HISTOGRAM_BINS] int64."""
    # A NaN keeps its sign bit through abs().
    keys = (magnitudes.contiguous().view(torch.int32) & 0x7FFFFFFF) >> HISTOGRAM_SHIFT
    return torch.bincount((keys - HISTOGRAM_OFFSET).clamp_(0, HISTOGRAM_BINS - 1).flatten(), minlength=HISTOGRAM_BINS)


def _check_statistics(rows: Tensor, *statistics: Tensor) -> None:
    """Refuse what a kernel would write beyond."""
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ValueError(f"the rows are {rows.dtype} {list(rows.shape)}, not a floating-point matrix")
    features = rows.shape[1]
    for (name, dtype), length, tensor in zip(_STATISTICS.items(), (features, features, HISTOGRAM_BINS, HISTOGRAM_BINS, 2, 2), statistics):
        if tensor.shape != (length,) or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; needed is a contiguous {dtype} [{length}]")


# ---- CPU kernels.


def _matrix(values: Tensor, block_rows: int, block_columns: int) -> tuple[int, ...]:
    rows, columns = values.shape
    return rows, columns, max(values.stride(0), columns) if rows > 1 else columns, block_rows, block_columns


def _scale_shape(values: Tensor, block_rows: int, block_columns: int) -> tuple[int, int]:
    return block(block_rows, block_columns).scale_shape(*values.shape)


def _is_ready(values: Tensor) -> bool:
    """Whether a kernel takes this: a matrix of a known type that has elements."""
    return cpu_kernels() is not None and values.dim() == 2 and values.numel() > 0 and values.dtype in _INPUTS


def _rows_dense(values: Tensor) -> Tensor:
    """The same matrix with the elements of each row side by side, and rows that don't overlap."""
    return values if values.stride(1) == 1 and (values.shape[0] < 2 or values.stride(0) >= values.shape[1]) else values.contiguous()


def _ran(status: int) -> None:
    if status != 0:
        raise AssertionError("a kernel refused its arguments")


def _cpu_block_amax(values: Tensor, block_rows: int, block_columns: int) -> Tensor:
    if not _is_ready(values):
        return _reference_block_amax(values, block_rows, block_columns)
    values = _rows_dense(values)
    amax = torch.empty(_scale_shape(values, block_rows, block_columns), dtype=torch.float32)
    _ran(cpu_kernels().qk_block_amax(values.data_ptr(), _INPUTS[values.dtype], *_matrix(values, block_rows, block_columns), amax.data_ptr()))
    return amax


def _cpu_encode_blocks(values: Tensor, scale: Tensor, block_rows: int, block_columns: int, format: str) -> Tensor:
    if not _is_ready(values):
        return _reference_encode_blocks(values, scale, block_rows, block_columns, format)
    values, scale = _rows_dense(values), scale.float().contiguous()
    if tuple(scale.shape) != _scale_shape(values, block_rows, block_columns):
        raise ValueError(f"the scale has the shape {list(scale.shape)}, the blocks need {list(_scale_shape(values, block_rows, block_columns))}")
    codes = torch.empty(values.shape, dtype=getattr(torch, FORMATS[format].torch_name))
    arguments = (values.data_ptr(), _INPUTS[values.dtype], *_matrix(values, block_rows, block_columns), _FORMATS[format])
    _ran(cpu_kernels().qk_encode_blocks(*arguments, scale.data_ptr(), codes.data_ptr()))
    return codes


def _cpu_quantize_blocks(values: Tensor, block_rows: int, block_columns: int, format: str, rule: str) -> tuple[Tensor, Tensor]:
    if not _is_ready(values):
        return _reference_quantize_blocks(values, block_rows, block_columns, format, rule)
    values = _rows_dense(values)
    codes = torch.empty(values.shape, dtype=getattr(torch, FORMATS[format].torch_name))
    scale = torch.empty(_scale_shape(values, block_rows, block_columns), dtype=torch.float32)
    arguments = (values.data_ptr(), _INPUTS[values.dtype], *_matrix(values, block_rows, block_columns), _FORMATS[format], _RULES[rule])
    _ran(cpu_kernels().qk_quantize_blocks(*arguments, scale.data_ptr(), codes.data_ptr()))
    return codes, scale


def _cpu_dequantize_blocks(codes: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> Tensor:
    number_format = {torch.int8: 0, torch.float8_e4m3fn: 1}.get(codes.dtype)
    if cpu_kernels() is None or number_format is None or codes.dim() != 2 or not codes.numel():
        return _reference_dequantize_blocks(codes, scale, block_rows, block_columns)
    codes, scale = _rows_dense(codes), scale.float().contiguous()
    if tuple(scale.shape) != _scale_shape(codes, block_rows, block_columns):
        raise ValueError(f"the scale has the shape {list(scale.shape)}, the blocks need {list(_scale_shape(codes, block_rows, block_columns))}")
    values = torch.empty(codes.shape, dtype=torch.float32)
    matrix = _matrix(codes, block_rows, block_columns)
    _ran(cpu_kernels().qk_dequantize_blocks(codes.data_ptr(), number_format, *matrix, scale.data_ptr(), values.data_ptr()))
    return values


def _cpu_observe_rows(
    rows: Tensor,
    above: float,
    channel_amax: Tensor,
    channel_sum_of_squares: Tensor,
    histogram: Tensor,
    token_histogram: Tensor,
    extremes: Tensor,
    counts: Tensor,
) -> None:
    statistics = (channel_amax, channel_sum_of_squares, histogram, token_histogram, extremes, counts)
    if not _is_ready(rows):
        return _reference_observe_rows(rows, above, *statistics)
    _check_statistics(rows, *statistics)
    rows = _rows_dense(rows)
    tokens, features = rows.shape
    stride = max(rows.stride(0), features) if tokens > 1 else features
    magnitudes = torch.empty(tokens, dtype=torch.float32)
    pointers = [tensor.data_ptr() for tensor in (channel_amax, channel_sum_of_squares, histogram, extremes, counts[1:], magnitudes)]
    _ran(cpu_kernels().qk_observe_rows(rows.data_ptr(), _INPUTS[rows.dtype], tokens, stride, 0, features, above, *pointers))
    _ran(cpu_kernels().qk_count_magnitudes(magnitudes.data_ptr(), 1, tokens, token_histogram.data_ptr()))
    counts[0] += tokens
    return None


# ---- Fakes: shapes and dtypes only.


def _fake_block_amax(values: Tensor, block_rows: int, block_columns: int) -> Tensor:
    return values.new_empty(_scale_shape(values, block_rows, block_columns), dtype=torch.float32)


def _fake_encode_blocks(values: Tensor, scale: Tensor, block_rows: int, block_columns: int, format: str) -> Tensor:
    return values.new_empty(values.shape, dtype=getattr(torch, FORMATS[format].torch_name))


def _fake_quantize_blocks(values: Tensor, block_rows: int, block_columns: int, format: str, rule: str) -> tuple[Tensor, Tensor]:
    codes = values.new_empty(values.shape, dtype=getattr(torch, FORMATS[format].torch_name))
    return codes, values.new_empty(_scale_shape(values, block_rows, block_columns), dtype=torch.float32)


def _fake_dequantize_blocks(codes: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


def _fake_observe_rows(rows: Tensor, above: float, *statistics: Tensor) -> None:
    _check_statistics(rows, *statistics)


for _name in ("block_amax", "encode_blocks", "quantize_blocks", "dequantize_blocks", "observe_rows"):
    _library.impl(_name, globals()[f"_reference_{_name}"], "CompositeExplicitAutograd")
    _library.impl(_name, globals()[f"_cpu_{_name}"], "CPU")
    torch.library.register_fake(f"quantkit::{_name}", globals()[f"_fake_{_name}"], lib=_library)
