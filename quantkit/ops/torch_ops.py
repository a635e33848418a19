"""torch.ops.quantkit: one table of all ops, each with its schema, reference, fake and kernels.

    block_amax(values, block_rows, block_columns) -> amax
    encode_blocks(values, scale, block_rows, block_columns, format) -> codes
    quantize_blocks(values, block_rows, block_columns, format, rule) -> (codes, scale)
    dequantize_blocks(codes, scale, block_rows, block_columns, dtype=float32) -> values
    quantize_rows(rows, group, format, rule) -> (codes, scale)
    quantize_kv(states, scale, format) -> codes
    observe_rows(rows, above, channel_amax, channel_sum_of_squares, histogram, token_histogram,
        extremes, counts)
    pack_weight(codes, packing) -> packed
    matmul_int8(activations, activation_scale, packed, weight_scale, group, zero_point,
        weight_sums, bias, dtype) -> output
    matmul_fp8(activations, activation_scale, packed, weight_scale, group, powers_of_two, bias,
        dtype) -> output
    matmul_weight_only(inputs, packed, packing, weight_scale, group, powers_of_two, bias,
        dtype) -> output
    matmul_bf16(inputs, packed, out_features, bias, dtype) -> output
    score_logits(hidden, packed, bias, targets, vocabulary, own_hidden, own_packed, own_bias)
        -> (nll, index, confidence, own_nll, own_index, kld)

Quantization: a matrix [rows, columns] is cut into blocks of block_rows × block_columns, smaller at
    its ends.

amax, scale: [block rows, block columns] float32.
format: name of a NumberFormat.
rule: how a scale follows from an amax: "stored" (rounded to bfloat16 for a file), "power_of_two"
    (E8M0) or "dynamic" (a runtime's formula for activations, with its lower limit).
quantize_rows: for activations; each row is cut into groups. A group as long as a row is per token.
quantize_kv: for keys and values [batch, heads, tokens, head size], by static scales [1] or [heads].
observe_rows: adds the statistics of calibration; fallback.observe_rows documents each tensor.

Kernels equal reference.py bit for bit for finite values; NaN gives NaN scales. They run in the
calling thread without Python's GIL, so callers may use several threads.

Multiplications: output [tokens, out_features] = activations times the transposed weight.

activations, inputs: codes or bfloat16, [tokens, in_features].
packed: a weight as pack_weight arranged it (arguments.PACKINGS, and QkPacking in
    kernels/cpu/matmul.h); on CUDA bytes [out_features, in_features padded to a multiple of 16].
activation_scale: [tokens or 1, groups or 1] float32.
weight_scale: [groups or 1, out_features] float32.
group: in_features that share scales; with several groups a multiple of 4, on CUDA of 32.
powers_of_two: whether all scales are powers of two (MX).
bias: [out_features] float32, or None.
zero_point: of the activations, [tokens] or [1] int32, or None; needs weight_sums and a single
    group.
weight_sums: the sum of each output feature's codes, [out_features] int32, or None.
dtype: of the output: bfloat16, float16 or float32.

Sums are float32, or int32, which is exact below 131072 in_features. Kernels run on
torch.get_num_threads() threads.

Scores: log-probabilities of the next tokens, and how a candidate's distribution differs from the
    base's.

hidden: final hidden states [positions, hidden size] bfloat16.
packed: `lm_head` for `vocabulary` tokens, packed as bf16.
bias: [vocabulary] float32, or None.
targets: the next tokens, [positions] int64.
own_hidden, own_packed, own_bias: the candidate's; without them own_nll, own_index and kld are
    empty.
nll, own_nll: negative log-likelihood of the target, [positions] float64.
index, own_index: the most likely token, [positions] int64; the lowest of equal ones.
confidence: probability of the most likely token, [positions] float64.
kld: KL(base‖candidate), [positions] float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.ops import cpu, cuda, fallback, reference
from quantkit.ops.arguments import (
    check_codes,
    check_states,
    out_features_of,
    packed_shape,
    packing_named,
    scale_shape,
)
from quantkit.ops.reference import QuantizedTensor, code_dtype
from quantkit.ops.score_logits import TokenScores
from quantkit.schemes.number_formats import E8M0, NUMBER_FORMATS
from quantkit.schemes.quant_spec import QuantSpec


def quantize(values: Tensor, spec: QuantSpec, amax: Tensor | None = None) -> QuantizedTensor:
    """Quantize a matrix.

    values: [rows, columns].
    amax: [block rows, block columns], from which the scales follow; None takes that of the values.
        Fused layers share one.
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
    """The values that the codes represent, [rows, columns] float32."""
    blocks = quantized.spec.granularity.block_shape(*quantized.qdata.shape)
    return torch.ops.quantkit.dequantize_blocks(quantized.qdata, quantized.scale, *blocks)


def scale_rule(spec: QuantSpec) -> str:
    """The ops' `rule` by which a spec's scales follow from an amax."""
    if spec.scale_format == E8M0:
        return "power_of_two"
    return "dynamic" if spec.dynamic else "stored"


# ---- Fakes: they return only shapes and dtypes.


def _fake_block_amax(values: Tensor, block_rows: int, block_columns: int) -> Tensor:
    return values.new_empty(scale_shape(values, block_rows, block_columns), dtype=torch.float32)


def _fake_encode_blocks(
    values: Tensor, scale: Tensor, block_rows: int, block_columns: int, format: str
) -> Tensor:
    return values.new_empty(values.shape, dtype=code_dtype(NUMBER_FORMATS[format]))


def _fake_quantize_blocks(
    values: Tensor, block_rows: int, block_columns: int, format: str, rule: str
) -> tuple[Tensor, Tensor]:
    codes = values.new_empty(values.shape, dtype=code_dtype(NUMBER_FORMATS[format]))
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
    fallback.check_statistics(rows, *statistics)


def _fake_quantize_rows(rows: Tensor, group: int, format: str, rule: str) -> tuple[Tensor, Tensor]:
    return _fake_quantize_blocks(rows, 1, group, format, rule)


def _fake_quantize_kv(states: Tensor, scale: Tensor, format: str) -> Tensor:
    check_states(states, scale)
    return states.new_empty(states.shape, dtype=code_dtype(NUMBER_FORMATS[format]))


def _fake_pack_weight(codes: Tensor, packing: str) -> Tensor:
    check_codes(codes, packing)
    shape = packed_shape(codes.shape[0], codes.shape[1], codes.device.type)
    return codes.new_empty(shape, dtype=packing_named(packing).dtype)


def _fake_matmul(
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


def _fake_score_logits(
    hidden: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    vocabulary: int,
    own_hidden: Tensor | None = None,
    *_: Tensor | None,
) -> TokenScores:
    def floats(count: int) -> Tensor:
        return targets.new_empty(count, dtype=torch.float64)

    def indices(count: int) -> Tensor:
        return targets.new_empty(count, dtype=torch.int64)

    count = hidden.shape[0]
    own = 0 if own_hidden is None else count
    return floats(count), indices(count), floats(count), floats(own), indices(own), floats(own)


# ---- The ops.


@dataclass(frozen=True)
class Op:
    """One op of torch.ops.quantkit.

    name: also the name of its kernel: kernels/cpu/NAME.cpp or its family, tests/kernels/.
    schema: arguments and results in torch's schema language.
    reference: computes the op on any device; kernels are tested against it.
    fake: shapes and dtypes of the results, for torch.compile and meta tensors.
    cpu, cuda: call the compiled kernel, or return NotImplemented for arguments that it doesn't
        support; the reference then runs. None if there is no kernel.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    cpu: Callable[..., Any] | None = None
    cuda: Callable[..., Any] | None = None


ALL_OPS = (
    Op(
        "block_amax",
        "(Tensor values, int block_rows, int block_columns) -> Tensor",
        fallback.block_amax,
        _fake_block_amax,
        cpu=cpu.block_amax,
    ),
    Op(
        "encode_blocks",
        "(Tensor values, Tensor scale, int block_rows, int block_columns, str format) -> Tensor",
        fallback.encode_blocks,
        _fake_encode_blocks,
        cpu=cpu.encode_blocks,
        cuda=cuda.encode_blocks,
    ),
    Op(
        "quantize_blocks",
        "(Tensor values, int block_rows, int block_columns, str format, str rule) -> (Tensor, "
        "Tensor)",
        fallback.quantize_blocks,
        _fake_quantize_blocks,
        cpu=cpu.quantize_blocks,
        cuda=cuda.quantize_blocks,
    ),
    Op(
        "dequantize_blocks",
        "(Tensor codes, Tensor scale, int block_rows, int block_columns, ScalarType? "
        "dtype=None) -> Tensor",
        fallback.dequantize_blocks,
        _fake_dequantize_blocks,
        cpu=cpu.dequantize_blocks,
        cuda=cuda.dequantize_blocks,
    ),
    Op(
        "quantize_rows",
        "(Tensor rows, int group, str format, str rule) -> (Tensor, Tensor)",
        fallback.quantize_rows,
        _fake_quantize_rows,
        cpu=cpu.quantize_rows,
        cuda=cuda.quantize_rows,
    ),
    Op(
        "quantize_kv",
        "(Tensor states, Tensor scale, str format) -> Tensor",
        fallback.quantize_kv,
        _fake_quantize_kv,
        cpu=cpu.quantize_kv,
        cuda=cuda.quantize_kv,
    ),
    Op(
        "observe_rows",
        "(Tensor rows, float above, Tensor(a!) channel_amax, Tensor(b!) channel_sum_of_squares, "
        "Tensor(c!) histogram, Tensor(d!) token_histogram, Tensor(e!) extremes, Tensor(f!) "
        "counts) -> ()",
        fallback.observe_rows,
        _fake_observe_rows,
        cpu=cpu.observe_rows,
    ),
    Op(
        "pack_weight",
        "(Tensor codes, str packing) -> Tensor",
        fallback.pack_weight,
        _fake_pack_weight,
        cpu=cpu.pack_weight,
        cuda=cuda.pack_weight,
    ),
    Op(
        "matmul_int8",
        "(Tensor activations, Tensor activation_scale, Tensor packed, Tensor weight_scale, int "
        "group, Tensor? zero_point, Tensor? weight_sums, Tensor? bias, ScalarType dtype) -> "
        "Tensor",
        fallback.matmul_int8,
        _fake_matmul,
        cpu=cpu.matmul_int8,
        cuda=cuda.matmul_int8,
    ),
    Op(
        "matmul_fp8",
        "(Tensor activations, Tensor activation_scale, Tensor packed, Tensor weight_scale, int "
        "group, bool powers_of_two, Tensor? bias, ScalarType dtype) -> Tensor",
        fallback.matmul_fp8,
        _fake_matmul,
        cpu=cpu.matmul_fp8,
        cuda=cuda.matmul_fp8,
    ),
    Op(
        "matmul_weight_only",
        "(Tensor inputs, Tensor packed, str packing, Tensor weight_scale, int group, bool "
        "powers_of_two, Tensor? bias, ScalarType dtype) -> Tensor",
        fallback.matmul_weight_only,
        _fake_matmul_weight_only,
        cpu=cpu.matmul_weight_only,
        cuda=cuda.matmul_weight_only,
    ),
    Op(
        "matmul_bf16",
        "(Tensor inputs, Tensor packed, int out_features, Tensor? bias, ScalarType dtype) -> "
        "Tensor",
        fallback.matmul_bf16,
        _fake_matmul_bf16,
        cpu=cpu.matmul_bf16,
    ),
    Op(
        "score_logits",
        "(Tensor hidden, Tensor packed, Tensor? bias, Tensor targets, int vocabulary, Tensor? "
        "own_hidden=None, Tensor? own_packed=None, Tensor? own_bias=None) -> (Tensor, Tensor, "
        "Tensor, Tensor, Tensor, Tensor)",
        fallback.score_logits,
        _fake_score_logits,
        cpu=cpu.score_logits,
    ),
)


def _register(library: torch.library.Library, op: Op) -> None:
    library.define(op.name + op.schema)
    library.impl(op.name, op.reference, "CompositeExplicitAutograd")
    for key, kernel in (("CPU", op.cpu), ("CUDA", op.cuda)):
        if kernel is not None:
            library.impl(op.name, _kernel_or_reference(kernel, op.reference), key)
    torch.library.register_fake(f"quantkit::{op.name}", op.fake, lib=library)


def _kernel_or_reference(
    kernel: Callable[..., Any], reference_of: Callable[..., Any]
) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        result = kernel(*arguments)
        return reference_of(*arguments) if result is NotImplemented else result

    return run


_library = torch.library.Library("quantkit", "DEF")
for _op in ALL_OPS:
    _register(_library, _op)
