"""The compiled kernels: which libraries are there, and which instruction set of the CPU's runs.

Functions take raw pointers and sizes (kernels/cpu/dispatch.cpp, kernels/cuda/*.cu) and are called
without Python's lock. The environment variable QUANTKIT_KERNELS chooses a level of the CPU's, or
"reference" for no kernels at all, instead of the best that this machine has.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import quantkit
from quantkit.errors import QuantkitError

LIBRARY_NAME, LIBRARY_VERSION = "libquantkit_cpu.so", 5
CUDA_LIBRARY_NAME, CUDA_LIBRARY_VERSION = "libquantkit_cuda.so", 1
# The order of the enum in kernels/cpu/dispatch.cpp. "avx512vnni" has VNNI too, "avx512bf16" also
# VBMI and BF16, "amx" also AMX's tiles.
LEVELS = ("scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx")
# Those in which kernels other than multiplications differ.
ELEMENTWISE_LEVELS = ("scalar", "avx2", "avx512")


@cache
def cpu_kernels() -> ctypes.CDLL | None:
    """The compiled CPU kernels, or None where they weren't built, are of another version, or
    QUANTKIT_KERNELS says so.
    """
    wanted = os.environ.get("QUANTKIT_KERNELS", "")
    if wanted not in ("", "reference", *LEVELS):
        raise QuantkitError(
            f"QUANTKIT_KERNELS is '{wanted}'; choose one of {', '.join(LEVELS)}, reference"
        )
    found = _find(LIBRARY_NAME)
    if wanted == "reference" or not found:
        if wanted in LEVELS:
            raise QuantkitError(
                f"QUANTKIT_KERNELS asks for {wanted}, but the kernels weren't built; install"
                " quantkit where there is a C++ compiler"
            )
        return None
    import torch  # noqa: F401  (brings libgomp.so.1, which the library shares with it)

    library = ctypes.CDLL(str(found))
    if library.qk_cpu_version() != LIBRARY_VERSION:
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    matrix = [size] * 5
    library.qk_block_amax.argtypes = [pointer, number, *matrix, pointer]
    library.qk_encode_blocks.argtypes = [pointer, number, *matrix, number, pointer, pointer]
    library.qk_quantize_blocks.argtypes = [
        pointer,
        number,
        *matrix,
        number,
        number,
        pointer,
        pointer,
    ]
    library.qk_dequantize_blocks.argtypes = [pointer, number, *matrix, pointer, number, pointer]
    library.qk_observe_rows.argtypes = [
        pointer,
        number,
        *[size] * 4,
        ctypes.c_float,
        *[pointer] * 6,
    ]
    library.qk_count_magnitudes.argtypes = [pointer, size, size, pointer]
    library.qk_pack_weight.argtypes = [number, pointer, size, size, size, pointer]
    # output: bias, values, type, threads
    activations, weight, output = (
        [pointer, size, size, size],
        [pointer, size],
        [pointer, pointer, number, number],
    )
    library.qk_matmul_int8.argtypes = [
        *activations,
        pointer,
        size,
        size,
        *weight,
        size,
        *weight,
        *output,
        *weight,
        pointer,
    ]
    library.qk_matmul_fp8.argtypes = [
        *activations,
        pointer,
        size,
        size,
        *weight,
        size,
        *weight,
        *output,
        number,
    ]
    library.qk_matmul_weight_only.argtypes = [
        *activations,
        pointer,
        number,
        size,
        size,
        *weight,
        *output,
        number,
    ]
    library.qk_matmul_bf16.argtypes = [*activations, pointer, size, *output]
    model = [pointer, size, *[pointer] * 5]  # hidden states, their stride, weight, bias, figures
    library.qk_score_logits.argtypes = [size, size, size, pointer, *model, *model, number]
    if wanted and library.qk_select_cpu_level(LEVELS.index(wanted)) != 0:
        raise QuantkitError(
            f"QUANTKIT_KERNELS asks for {wanted}, which this processor doesn't have"
        )
    return library


def cpu_level() -> str:
    """The instruction set whose kernels run here: one of LEVELS, or "reference"."""
    library = cpu_kernels()
    return LEVELS[library.qk_cpu_level()] if library else "reference"


def elementwise_level() -> str:
    """The instruction set of all kernels but multiplications: one of ELEMENTWISE_LEVELS, or
    "reference".
    """
    level = cpu_level()
    return (
        level
        if level == "reference"
        else [name for name in ELEMENTWISE_LEVELS if LEVELS.index(name) <= LEVELS.index(level)][-1]
    )


class Product(ctypes.Structure):
    """What a CUDA multiplication is given: kernels/cuda/multiply.h has the meaning of each."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("activations", "weight")),
        *((name, ctypes.c_int) for name in ("tokens", "features", "inner", "group")),
        ("row_stride", ctypes.c_int64),
        ("activation_scale", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("activation_row_step", "activation_group_step")),
        ("weight_scale", ctypes.c_void_p),
        ("weight_group_step", ctypes.c_int64),
        ("scale_columns", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("bias", "zero_point")),
        ("zero_point_step", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("weight_sums", "output")),
        ("output_type", ctypes.c_int),
    ]


@cache
def cuda_kernels() -> ctypes.CDLL | None:
    """The compiled CUDA kernels, or None where they weren't built, are of another version, or
    QUANTKIT_KERNELS says so. Needs no GPU: it loads anywhere.
    """
    found = _find(CUDA_LIBRARY_NAME)
    return (
        open_cuda_library(found)
        if found and os.environ.get("QUANTKIT_KERNELS") != "reference"
        else None
    )


def open_cuda_library(path: Path) -> ctypes.CDLL | None:
    """The library with its functions' types, or None if it is of another version."""
    library = ctypes.CDLL(str(path))
    if library.qk_cuda_version() != CUDA_LIBRARY_VERSION:
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.qk_cuda_architectures.restype = library.qk_cuda_error.restype = ctypes.c_char_p
    library.qk_cuda_quantize_rows.argtypes = [
        pointer,
        number,
        *[size] * 4,
        number,
        number,
        pointer,
        pointer,
        pointer,
    ]
    library.qk_cuda_quantize_kv.argtypes = [
        pointer,
        number,
        *[size] * 7,
        pointer,
        size,
        number,
        pointer,
        pointer,
    ]
    library.qk_cuda_dequantize.argtypes = [
        pointer,
        number,
        *[size] * 5,
        pointer,
        number,
        pointer,
        pointer,
    ]
    library.qk_cuda_matmul_int8.argtypes = library.qk_cuda_matmul_fp8.argtypes = [
        ctypes.POINTER(Product),
        pointer,
    ]
    library.qk_cuda_matmul_weight_only.argtypes = [ctypes.POINTER(Product), number, pointer]
    return library


def cuda_architectures() -> list[str]:
    """What the CUDA library holds machine code for: "80", "90a" and so on; empty without the
    library.
    """
    library = cuda_kernels()
    return library.qk_cuda_architectures().decode().split() if library else []


def _find(name: str) -> Path | None:
    # An editable install keeps libraries beside the installed package, not in the source tree: look
    # in all of the package's directories.
    return next(
        (path for directory in quantkit.__path__ if (path := Path(directory) / name).is_file()),
        None,
    )
