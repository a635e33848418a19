"""The ops computed by the reference arithmetic (reference.py, score_logits.py), on every device.

They run where no kernel is compiled or none supports the arguments. Each function has the name and
the arguments of its op, which torch_ops.py documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from quantkit.ops import reference
from quantkit.ops.arguments import (
    PANEL,
    SCALE_BLOCK,
    check_codes,
    check_states,
    out_features_of,
    packed_shape,
    packing_named,
)
from quantkit.ops.score_logits import VOCABULARY_PER_CHUNK, LogitsChunk, TokenScores, score_parts
from quantkit.schemes.number_formats import E8M0, NUMBER_FORMATS
from quantkit.schemes.quant_spec import QuantSpec, block

# The tensors that observe_rows updates → their dtypes.
STATISTICS = {
    "channel_amax": torch.float32,
    "channel_sum_of_squares": torch.float64,
    "histogram": torch.int64,
    "token_histogram": torch.int64,
    "extremes": torch.float32,
    "counts": torch.int64,
}

# |x| is binned by the top bits of its float32, 8 of the exponent and 4 of the mantissa. This gives
# 16 bins per octave, from 2^-32 to 2^32. Bins are fixed, so histograms can be added.
HISTOGRAM_BINS = 1024
HISTOGRAM_SHIFT = 19
HISTOGRAM_OFFSET = (127 - 32) << 4
_CHUNK = 64  # rows whose squares are summed in float32 before they are added in float64


def histogram_edges() -> Tensor:
    """The lower edge of each bin of |x|, [HISTOGRAM_BINS] float32.

    The first bin also holds all smaller values, the last one all larger values and NaN.
    """
    edges = (
        torch.arange(HISTOGRAM_BINS, dtype=torch.int32) + HISTOGRAM_OFFSET << HISTOGRAM_SHIFT
    ).view(torch.float32)
    edges[0] = 0.0
    return edges


def _spec(format_name: str, rule: str, block_rows: int, block_columns: int) -> QuantSpec:
    return QuantSpec(
        NUMBER_FORMATS[format_name],
        block(block_rows, block_columns),
        rule == "dynamic",
        E8M0 if rule == "power_of_two" else None,
    )


def block_amax(values: Tensor, block_rows: int, block_columns: int) -> Tensor:
    return reference.block_amax(values, block(block_rows, block_columns))


def encode_blocks(
    values: Tensor, scale: Tensor, block_rows: int, block_columns: int, format: str
) -> Tensor:
    return reference.quantize(
        values, _spec(format, "stored", block_rows, block_columns), scale
    ).qdata


def quantize_blocks(
    values: Tensor, block_rows: int, block_columns: int, format: str, rule: str
) -> tuple[Tensor, Tensor]:
    quantized = reference.quantize(values, _spec(format, rule, block_rows, block_columns))
    return quantized.qdata, quantized.scale


def dequantize_blocks(
    codes: Tensor,
    scale: Tensor,
    block_rows: int,
    block_columns: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return reference.dequantize(codes, scale, block(block_rows, block_columns)).to(
        dtype or torch.float32
    )


def observe_rows(
    rows: Tensor,
    above: float,
    channel_amax: Tensor,
    channel_sum_of_squares: Tensor,
    histogram: Tensor,
    token_histogram: Tensor,
    extremes: Tensor,
    counts: Tensor,
) -> None:
    """Add the statistics of rows [tokens, features], of any floating-point dtype, to tensors in
    place.

    above: threshold for counts[1].
    channel_amax: [features] float32, largest |x|. A NaN makes it NaN.
    channel_sum_of_squares: [features] float64. Chunks of 64 rows, counted from the first row of
        this call, are summed row by row in float32.
    histogram: [HISTOGRAM_BINS] int64 of |x|; NaN is in the last bin.
    token_histogram: [HISTOGRAM_BINS] int64 of each row's largest |x|.
    extremes: [2] float32, minimum and maximum; -0.0 becomes 0.0. A NaN makes both NaN.
    counts: [2] int64, number of rows, and of |x| > above, compared in float32; NaN isn't counted.
    """
    check_statistics(
        rows, channel_amax, channel_sum_of_squares, histogram, token_histogram, extremes, counts
    )
    counts[0] += rows.shape[0]
    if not rows.numel():
        return
    values = rows.detach().float()
    magnitudes = values.abs()
    torch.maximum(channel_amax, magnitudes.amax(0), out=channel_amax)
    chunks = torch.nn.functional.pad(values.square(), (0, 0, 0, -rows.shape[0] % _CHUNK)).unflatten(
        0, (-1, _CHUNK)
    )
    for chunk_sum in sum(chunks.unbind(1)):
        channel_sum_of_squares += chunk_sum
    histogram += _count_bins(magnitudes)
    token_histogram += _count_bins(magnitudes.amax(1))
    low, high = values.aminmax()
    extremes.copy_(
        torch.stack([torch.minimum(extremes[0], low + 0.0), torch.maximum(extremes[1], high + 0.0)])
    )
    counts[1] += (magnitudes > torch.tensor(above, dtype=torch.float32)).sum()


def _count_bins(magnitudes: Tensor) -> Tensor:
    """The histogram of |x|, [HISTOGRAM_BINS] int64."""
    # A NaN keeps its sign bit through abs().
    keys = (magnitudes.contiguous().view(torch.int32) & 0x7FFFFFFF) >> HISTOGRAM_SHIFT
    return torch.bincount(
        (keys - HISTOGRAM_OFFSET).clamp_(0, HISTOGRAM_BINS - 1).flatten(), minlength=HISTOGRAM_BINS
    )


def check_statistics(rows: Tensor, *statistics: Tensor) -> None:
    """Raise ValueError unless observe_rows can update these tensors, given in the order of
    STATISTICS.
    """
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ValueError(
            f"the rows are {rows.dtype} {list(rows.shape)}, not a floating-point matrix"
        )
    features = rows.shape[1]
    for (name, dtype), length, tensor in zip(
        STATISTICS.items(), (features, features, HISTOGRAM_BINS, HISTOGRAM_BINS, 2, 2), statistics
    ):
        if tensor.shape != (length,) or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; needed is a contiguous {dtype}"
                f" [{length}]"
            )


def quantize_rows(rows: Tensor, group: int, format: str, rule: str) -> tuple[Tensor, Tensor]:
    return quantize_blocks(rows, 1, group, format, rule)


def quantize_kv(states: Tensor, scale: Tensor, format: str) -> Tensor:
    check_states(states, scale)
    return reference.encode_codes(
        states.float() / scale.float().reshape(1, -1, 1, 1), NUMBER_FORMATS[format]
    )


def pack_weight(codes: Tensor, packing: str) -> Tensor:
    """[panels of 16 output features, in_features padded to a multiple of 64, 16].

    QkPacking in kernels/cpu/matmul.h describes the order within a panel. On CUDA: see plain_weight.
    """
    check_codes(codes, packing)
    if codes.device.type == "cuda":
        return plain_weight(codes, packing)
    panels, inner, _ = packed_shape(codes.shape[0], codes.shape[1])
    padding = (0, inner - codes.shape[1], 0, panels * PANEL - codes.shape[0])
    arrangement = packing_named(packing)
    padded = torch.nn.functional.pad(codes.view(arrangement.dtype), padding)
    if packing == "int8_dot":
        padded = padded ^ 0x80  # code + 128
    return (
        padded.reshape(panels, PANEL, inner // arrangement.side_by_side, arrangement.side_by_side)
        .transpose(1, 2)
        .reshape(panels, inner, PANEL)
    )


def plain_weight(codes: Tensor, packing: str) -> Tensor:
    """A weight as pack_weight arranges it on CUDA, for every packing.

    Returns the codes' bytes [out_features, in_features padded with zeros to a multiple of 16].
    """
    check_codes(codes, packing)
    width = packed_shape(codes.shape[0], codes.shape[1], "cuda")[1]
    return torch.nn.functional.pad(
        codes.view(packing_named(packing).dtype), (0, width - codes.shape[1])
    ).contiguous()


def unpack_weight(packed: Tensor, packing: str, out_features: int, in_features: int) -> Tensor:
    """The codes of a packed weight, [out_features, in_features]."""
    arrangement = packing_named(packing)
    if packed.dim() == 2:
        return packed[:, :in_features].contiguous().view(arrangement.code_dtype)
    panels, inner, _ = packed.shape
    codes = (
        packed.reshape(panels, inner // arrangement.side_by_side, PANEL, arrangement.side_by_side)
        .transpose(1, 2)
        .reshape(panels * PANEL, inner)[:out_features, :in_features]
    )
    if packing == "int8_dot":
        codes = codes ^ 0x80
    return codes.contiguous().view(arrangement.code_dtype)


def scale_per_feature(weight_scale: Tensor, packed: Tensor) -> Tensor:
    """The weight scale [groups or 1, out_features].

    On CUDA, one scale may apply to a block of 128 output features; it is repeated here.
    """
    features = out_features_of(packed, weight_scale)
    return (
        weight_scale
        if weight_scale.shape[1] == features
        else weight_scale.repeat_interleave(SCALE_BLOCK, 1)[:, :features]
    )


def _product(
    inputs: Tensor, input_scale: Tensor | None, weight: Tensor, weight_scale: Tensor, group: int
) -> Tensor:
    """inputs [tokens, in_features] times weight [out_features, in_features] transposed, each with
    its scales, float32.
    """
    if group >= inputs.shape[1]:
        return (
            inputs.float()
            @ weight.float().T
            * (1.0 if input_scale is None else input_scale)
            * weight_scale
        )
    groups = block(1, group)
    values = (
        inputs.float() if input_scale is None else reference.dequantize(inputs, input_scale, groups)
    )
    return values @ reference.dequantize(weight, weight_scale.T, groups).T


def _with_bias(output: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The output plus the bias, rounded to `dtype`."""
    return (output if bias is None else output + bias).to(dtype)


def matmul_int8(
    activations: Tensor,
    activation_scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    group: int,
    zero_point: Tensor | None,
    weight_sums: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    weight_scale = scale_per_feature(weight_scale, packed)
    codes = unpack_weight(packed, "int8_dot", weight_scale.shape[1], activations.shape[1])
    if group < activations.shape[1]:
        return _with_bias(
            _product(activations, activation_scale, codes, weight_scale, group), bias, dtype
        )
    # float64 holds every sum of fewer than 2^37 products of two bytes exactly.
    sums = activations.double() @ codes.double().T
    if zero_point is not None:
        assert weight_sums is not None, "a zero point needs weight_sums"
        sums -= zero_point.reshape(-1, 1).double() * weight_sums.double()
    return _with_bias(sums.float() * activation_scale * weight_scale, bias, dtype)


def matmul_fp8(
    activations: Tensor,
    activation_scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    group: int,
    powers_of_two: bool,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    weight_scale = scale_per_feature(weight_scale, packed)
    codes = unpack_weight(packed, "e4m3", weight_scale.shape[1], activations.shape[1])
    return _with_bias(
        _product(activations, activation_scale, codes, weight_scale, group), bias, dtype
    )


def matmul_weight_only(
    inputs: Tensor,
    packed: Tensor,
    packing: str,
    weight_scale: Tensor,
    group: int,
    powers_of_two: bool,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    weight_scale = scale_per_feature(weight_scale, packed)
    codes = unpack_weight(packed, packing, weight_scale.shape[1], inputs.shape[1])
    return _with_bias(_product(inputs, None, codes, weight_scale, group), bias, dtype)


def matmul_bf16(
    inputs: Tensor, packed: Tensor, out_features: int, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    weight = unpack_weight(packed, "bf16", out_features, inputs.shape[1])
    return _with_bias(inputs.float() @ weight.float().T, bias, dtype)


def score_logits(
    hidden: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    vocabulary: int,
    own_hidden: Tensor | None = None,
    own_packed: Tensor | None = None,
    own_bias: Tensor | None = None,
) -> TokenScores:
    weight = unpack_weight(packed, "bf16", vocabulary, hidden.shape[1])
    own_weight = None
    if own_hidden is not None:
        assert own_packed is not None, "the candidate's hidden states need its lm_head"
        own_weight = unpack_weight(own_packed, "bf16", vocabulary, own_hidden.shape[1])

    def logits(states: Tensor, rows: Tensor, shift: Tensor | None, part: slice) -> Tensor:
        return torch.nn.functional.linear(
            states.float(), rows[part].float(), None if shift is None else shift[part]
        )

    def chunks() -> Iterator[LogitsChunk]:
        for start in range(0, vocabulary, VOCABULARY_PER_CHUNK):
            part = slice(start, start + VOCABULARY_PER_CHUNK)
            make_own = None
            if own_hidden is not None and own_weight is not None:
                make_own = partial(logits, own_hidden, own_weight, own_bias, part)
            yield start, logits(hidden, weight, bias, part), make_own

    return score_parts(chunks(), targets)
