"""torch.ops.quantkit.*: each op's schema, its compiled CPU kernel where there is one (cpu.py), its
reference everywhere else (fallback.py), its fake. CUDA kernels: cuda.py.

    block_amax(values, block_rows, block_columns) -> amax
    encode_blocks(values, scale, block_rows, block_columns, format) -> codes
    quantize_blocks(values, block_rows, block_columns, format, rule) -> (codes, scale)
    dequantize_blocks(codes, scale, block_rows, block_columns, dtype=float32) -> values
    quantize_rows(rows, group, format, rule) -> (codes, scale): activations, each row cut into
    groups; a group as long as a row is per token observe_rows(rows, above, channel_amax,
    channel_sum_of_squares, histogram, token_histogram, extremes, counts): adds what calibration
    keeps quantize_kv(states, scale, format) -> codes: keys and values [batch, heads, tokens, width]
    by static scales, [1] or [heads] pack_weight(codes, packing) -> packed
    matmul_int8(activations, activation_scale, packed, weight_scale, group, zero_point, weight_sums,
    bias, dtype) -> output matmul_fp8(activations, activation_scale, packed, weight_scale, group,
    powers_of_two, bias, dtype) -> output
    matmul_weight_only(inputs, packed, packing, weight_scale, group, powers_of_two, bias, dtype) ->
    output
    matmul_bf16(inputs, packed, out_features, bias, dtype) -> output

A matrix [rows, columns] is cut into blocks of block_rows × block_columns, the last ones as large as
what is left; amax and scale are [block rows, block columns] float32. format: a NumberFormat's name.
rule, how a scale follows from an amax: "stored" (rounded to bfloat16 for a file), "power_of_two"
(E8M0) or "dynamic" (a server's, with its floor). Kernels: kernels/cpu/quantize_blocks.cpp, equal to
reference.py bit for bit for finite values; NaN gives NaN scales. They run in the calling thread
without Python's lock, so callers may use several threads. observe_rows:
kernels/cpu/observe_rows.cpp.

Multiplications: activations are codes, or bfloat16 `inputs`, [tokens, in_features]; packed is a
weight as pack_weight arranged it (PACKINGS, and QkPacking in kernels/cpu/matmul.h; on CUDA as it
is, rows padded to 16 bytes); output is [tokens, out_features] in `dtype`, bfloat16, float16 or
float32. activation_scale: [tokens or 1, groups or 1] float32; weight_scale: [groups or 1,
out_features] float32; group: in_features that share scales, a multiple of 4 if there are several
groups. powers_of_two: all scales are (MX). bias: [out_features] float32. zero_point: [tokens] or
[1] int32, of the activations; then weight_sums, [out_features] int32, the sum of each output
feature's codes, and one group. Sums are int32, exact below 131072 in_features, or float32. They run
on torch.get_num_threads() threads. Kernels: kernels/cpu/matmul_*.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantkit.ops import cpu, cuda, fallback, reference
from quantkit.ops.arguments import (
    FORMATS,
    check_codes,
    check_states,
    out_features_of,
    packed_dtype,
    scale_shape,
)
from quantkit.ops.fallback import check_statistics, packed_shape
from quantkit.ops.reference import QuantizedTensor
from quantkit.schemes.number_formats import E8M0
from quantkit.schemes.scheme import QuantSpec

# ---- Schemas, and how a QuantSpec speaks to them.

_library = torch.library.Library("quantkit", "DEF")
_library.define("block_amax(Tensor values, int block_rows, int block_columns) -> Tensor")
_library.define(
    "encode_blocks(Tensor values, Tensor scale, int block_rows, int block_columns, str format) ->"
    " Tensor"
)
_library.define(
    "quantize_blocks(Tensor values, int block_rows, int block_columns, str format, str rule) ->"
    " (Tensor, Tensor)"
)
_library.define(
    "dequantize_blocks(Tensor codes, Tensor scale, int block_rows, int block_columns, ScalarType?"
    " dtype=None) -> Tensor"
)
_library.define(
    "observe_rows(Tensor rows, float above, Tensor(a!) channel_amax, Tensor(b!)"
    " channel_sum_of_squares, Tensor(c!) histogram, Tensor(d!) token_histogram, Tensor(e!)"
    " extremes, Tensor(f!) counts) -> ()"
)

_library.define("quantize_rows(Tensor rows, int group, str format, str rule) -> (Tensor, Tensor)")
_library.define("quantize_kv(Tensor states, Tensor scale, str format) -> Tensor")
_library.define("pack_weight(Tensor codes, str packing) -> Tensor")
_library.define(
    "matmul_int8(Tensor activations, Tensor activation_scale, Tensor packed, Tensor weight_scale,"
    " int group, Tensor? zero_point, Tensor? weight_sums, Tensor? bias, ScalarType dtype) -> Tensor"
)
_library.define(
    "matmul_fp8(Tensor activations, Tensor activation_scale, Tensor packed, Tensor weight_scale,"
    " int group, bool powers_of_two, Tensor? bias, ScalarType dtype) -> Tensor"
)
_library.define(
    "matmul_weight_only(Tensor inputs, Tensor packed, str packing, Tensor weight_scale, int group,"
    " bool powers_of_two, Tensor? bias, ScalarType dtype) -> Tensor"
)
_library.define(
    "matmul_bf16(Tensor inputs, Tensor packed, int out_features, Tensor? bias, ScalarType dtype) ->"
    " Tensor"
)


def quantize(values: Tensor, spec: QuantSpec, amax: Tensor | None = None) -> QuantizedTensor:
    """values [rows, columns] under `spec`, with scales from the values' own amax or from the one
    given (shared by a fused set).
    """
    blocks = spec.granularity.block_shape(*values.shape)
    if amax is None:
        codes, scale = torch.ops.quantkit.quantize_blocks(
            values, *blocks, spec.format.name, scale_rule(spec)
        )
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


# ---- Fakes: shapes and dtypes only.


def _fake_block_amax(values: Tensor, block_rows: int, block_columns: int) -> Tensor:
    return values.new_empty(scale_shape(values, block_rows, block_columns), dtype=torch.float32)


def _fake_encode_blocks(
    values: Tensor, scale: Tensor, block_rows: int, block_columns: int, format: str
) -> Tensor:
    return values.new_empty(values.shape, dtype=getattr(torch, FORMATS[format].torch_name))


def _fake_quantize_blocks(
    values: Tensor, block_rows: int, block_columns: int, format: str, rule: str
) -> tuple[Tensor, Tensor]:
    codes = values.new_empty(values.shape, dtype=getattr(torch, FORMATS[format].torch_name))
    return codes, values.new_empty(
        scale_shape(values, block_rows, block_columns), dtype=torch.float32
    )


def _fake_dequantize_blocks(
    codes: Tensor,
    scale: Tensor,
    block_rows: int,
    block_columns: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype or torch.float32)


def _fake_observe_rows(rows: Tensor, above: float, *statistics: Tensor) -> None:
    check_statistics(rows, *statistics)


def _fake_quantize_rows(rows: Tensor, group: int, format: str, rule: str) -> tuple[Tensor, Tensor]:
    return _fake_quantize_blocks(rows, 1, group, format, rule)


def _fake_quantize_kv(states: Tensor, scale: Tensor, format: str) -> Tensor:
    check_states(states, scale)
    return states.new_empty(states.shape, dtype=getattr(torch, FORMATS[format].torch_name))


def _fake_pack_weight(codes: Tensor, packing: str) -> Tensor:
    check_codes(codes, packing)
    return codes.new_empty(
        packed_shape(*codes.shape, codes.device.type), dtype=packed_dtype(packing)
    )


def _fake_matmul_int8(
    activations: Tensor, activation_scale: Tensor, packed: Tensor, weight_scale: Tensor, *rest: Any
) -> Tensor:
    return activations.new_empty(
        activations.shape[0], out_features_of(packed, weight_scale), dtype=rest[-1]
    )


def _fake_matmul_fp8(
    activations: Tensor, activation_scale: Tensor, packed: Tensor, weight_scale: Tensor, *rest: Any
) -> Tensor:
    return activations.new_empty(
        activations.shape[0], out_features_of(packed, weight_scale), dtype=rest[-1]
    )


def _fake_matmul_weight_only(
    inputs: Tensor, packed: Tensor, packing: str, weight_scale: Tensor, *rest: Any
) -> Tensor:
    return inputs.new_empty(inputs.shape[0], out_features_of(packed, weight_scale), dtype=rest[-1])


def _fake_matmul_bf16(
    inputs: Tensor, packed: Tensor, out_features: int, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return inputs.new_empty(inputs.shape[0], out_features, dtype=dtype)


def _kernel_or_reference(
    kernel: Callable[..., Any], reference_of: Callable[..., Any]
) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        result = kernel(*arguments)
        return reference_of(*arguments) if result is None else result

    return run


for _name in (
    "block_amax",
    "encode_blocks",
    "quantize_blocks",
    "dequantize_blocks",
    "observe_rows",
    "quantize_rows",
    "quantize_kv",
    "pack_weight",
    "matmul_int8",
    "matmul_fp8",
    "matmul_weight_only",
    "matmul_bf16",
):
    _library.impl(_name, getattr(fallback, f"reference_{_name}"), "CompositeExplicitAutograd")
    _library.impl(_name, getattr(cpu, f"cpu_{_name}"), "CPU")
    torch.library.register_fake(f"quantkit::{_name}", globals()[f"_fake_{_name}"], lib=_library)
    if _name in cuda.KERNELS:
        _library.impl(
            _name,
            _kernel_or_reference(cuda.KERNELS[_name], getattr(fallback, f"reference_{_name}")),
            "CUDA",
        )
