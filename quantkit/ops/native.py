"""Loading the compiled kernels: which libraries are installed, and which CPU instruction set is
used.

Their functions take raw pointers and sizes (kernels/cpu/dispatch.cpp, kernels/cuda/*.cu) and run
without Python's GIL. By default they use the best instruction set of this machine. The environment
variable QUANTKIT_KERNELS selects another one, or "reference" for no kernels at all.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import quantkit
from quantkit.errors import QuantkitError

LIBRARY_NAME, LIBRARY_VERSION = "libquantkit_cpu.so", 5
CUDA_LIBRARY_NAME, CUDA_LIBRARY_VERSION = "libquantkit_cuda.so", 1
# Instruction sets, in the order of the enum in kernels/cpu/dispatch.cpp. Each contains the earlier
# ones: "avx512vnni" adds VNNI, "avx512bf16" VBMI and BF16, "amx" AMX's tiles.
LEVELS = ("scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx")
# The ones for which kernels other than multiplications are compiled separately.
ELEMENTWISE_LEVELS = ("scalar", "avx2", "avx512")

_POINTER: type[ctypes._SimpleCData[Any]] = ctypes.c_void_p
_SIZE: type[ctypes._SimpleCData[Any]] = ctypes.c_int64
_NUMBER: type[ctypes._SimpleCData[Any]] = ctypes.c_int


@cache
def cpu_kernels() -> ctypes.CDLL | None:
    """The compiled CPU kernels.

    None if they weren't built, have another version, or QUANTKIT_KERNELS is "reference". Raises
    QuantkitError if it names an instruction set that is unknown or not available.
    """
    wanted = os.environ.get("QUANTKIT_KERNELS", "")
    if wanted not in ("", "reference", *LEVELS):
        raise QuantkitError(
            f"QUANTKIT_KERNELS is '{wanted}'; choose one of {', '.join(LEVELS)}, reference"
        )
    found = find_library(LIBRARY_NAME)
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
    _declare_cpu_functions(library)
    if wanted and library.qk_select_cpu_level(LEVELS.index(wanted)) != 0:
        raise QuantkitError(
            f"QUANTKIT_KERNELS asks for {wanted}, which this processor doesn't have"
        )
    return library


def _declare_cpu_functions(library: ctypes.CDLL) -> None:
    """Declare the argument types of kernels/cpu/dispatch.cpp."""
    # Values and their dtype; rows, columns, row stride, rows and columns of a block.
    matrix = (_POINTER, _NUMBER, *[_SIZE] * 5)
    library.qk_block_amax.argtypes = (*matrix, _POINTER)
    library.qk_encode_blocks.argtypes = (*matrix, _NUMBER, _POINTER, _POINTER)
    library.qk_quantize_blocks.argtypes = (*matrix, _NUMBER, _NUMBER, _POINTER, _POINTER)
    library.qk_dequantize_blocks.argtypes = (*matrix, _POINTER, _NUMBER, _POINTER)
    library.qk_observe_rows.argtypes = (
        *(_POINTER, _NUMBER, *[_SIZE] * 4),
        ctypes.c_float,
        *[_POINTER] * 6,
    )
    library.qk_count_magnitudes.argtypes = (_POINTER, _SIZE, _SIZE, _POINTER)
    library.qk_pack_weight.argtypes = (_NUMBER, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER)
    activations = (_POINTER, _SIZE, _SIZE, _SIZE)  # values, rows, columns, row stride
    activation_scale, weight_scale = (_POINTER, _SIZE, _SIZE), (_POINTER, _SIZE)  # and their steps
    features_and_group = (_SIZE, _SIZE)
    output = (_POINTER, _POINTER, _NUMBER, _NUMBER)  # bias, values, dtype, threads
    library.qk_matmul_int8.argtypes = (
        *(*activations, _POINTER, *features_and_group, *activation_scale, *weight_scale, *output),
        *(_POINTER, _SIZE, _POINTER),  # zero point, its step, weight sums
    )
    library.qk_matmul_fp8.argtypes = (
        *(*activations, _POINTER, *features_and_group, *activation_scale, *weight_scale, *output),
        _NUMBER,  # powers_of_two
    )
    library.qk_matmul_weight_only.argtypes = (
        *(*activations, _POINTER, _NUMBER, *features_and_group, *weight_scale, *output),
        _NUMBER,  # powers_of_two
    )
    library.qk_matmul_bf16.argtypes = (*activations, _POINTER, _SIZE, *output)
    # Hidden states, their stride, lm_head, its bias, three results.
    model = (_POINTER, _SIZE, *[_POINTER] * 5)
    library.qk_score_logits.argtypes = (_SIZE, _SIZE, _SIZE, _POINTER, *model, *model, _NUMBER)


def cpu_level() -> str:
    """The instruction set whose kernels run: one of LEVELS, or "reference"."""
    library = cpu_kernels()
    return LEVELS[library.qk_cpu_level()] if library else "reference"


class Product(ctypes.Structure):
    """The arguments of a CUDA multiplication, documented in kernels/cuda/multiply.h."""

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
    """The compiled CUDA kernels. They can be loaded without a GPU.

    None if they weren't built, have another version, or QUANTKIT_KERNELS is "reference".
    """
    found = find_library(CUDA_LIBRARY_NAME)
    return (
        open_cuda_library(found)
        if found and os.environ.get("QUANTKIT_KERNELS") != "reference"
        else None
    )


def open_cuda_library(path: Path) -> ctypes.CDLL | None:
    """The library with its argument types declared, or None if it has another version."""
    library = ctypes.CDLL(str(path))
    if library.qk_cuda_version() != CUDA_LIBRARY_VERSION:
        return None
    library.qk_cuda_architectures.restype = library.qk_cuda_error.restype = ctypes.c_char_p
    # The last pointer of each is the stream.
    library.qk_cuda_quantize_rows.argtypes = (
        *(_POINTER, _NUMBER, *[_SIZE] * 4, _NUMBER, _NUMBER),
        *[_POINTER] * 3,
    )
    library.qk_cuda_quantize_kv.argtypes = (
        *(_POINTER, _NUMBER, *[_SIZE] * 7, _POINTER, _SIZE, _NUMBER),
        *[_POINTER] * 2,
    )
    library.qk_cuda_dequantize.argtypes = (
        *(_POINTER, _NUMBER, *[_SIZE] * 5, _POINTER, _NUMBER),
        *[_POINTER] * 2,
    )
    product = ctypes.POINTER(Product)
    library.qk_cuda_matmul_int8.argtypes = (product, _POINTER)
    library.qk_cuda_matmul_fp8.argtypes = (product, _POINTER)
    library.qk_cuda_matmul_weight_only.argtypes = (product, _NUMBER, _POINTER)
    return library


def cuda_architectures() -> list[str]:
    """The architectures that the CUDA library contains machine code for, such as "80" and "90a";
    empty without the library.
    """
    library = cuda_kernels()
    return library.qk_cuda_architectures().decode().split() if library else []


def find_library(name: str) -> Path | None:
    """The path of an installed library, or None."""
    # An editable install has its libraries in the installed package, not in the source tree, so
    # all directories of the package are searched.
    return next(
        (path for directory in quantkit.__path__ if (path := Path(directory) / name).is_file()),
        None,
    )
