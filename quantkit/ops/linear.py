"""A quantized Linear: computed by a compiled kernel if its scheme has one, else by the reference
arithmetic.

Both agree bit for bit if INT8 codes have one scale per token and per output feature. Otherwise they
add the products in a different order, and agree within float32 rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.ops import cuda, fallback, native, torch_ops
from quantkit.ops.arguments import LEAST_UNSAFE_INNER, SCALE_BLOCK
from quantkit.ops.reference import QuantizedTensor, quantized_linear
from quantkit.schemes.number_formats import E8M0, FP8_E4M3, INT8
from quantkit.schemes.quant_spec import QuantSpec
from quantkit.schemes.scheme import QuantScheme

OPS = torch.ops.quantkit


@dataclass(frozen=True)
class _Kernels:
    """The kernels that multiply codes of one number format.

    op: multiplies them by quantized activations of the same format.
    packing: of a weight for that op.
    weight_only_packing: of a weight for matmul_weight_only, which takes bfloat16 activations.
    """

    op: str
    packing: str
    weight_only_packing: str


# By name of the format. The reference multiplies formats that aren't listed.
_KERNELS = {
    INT8.name: _Kernels("matmul_int8", "int8_dot", "int8"),
    FP8_E4M3.name: _Kernels("matmul_fp8", "e4m3", "e4m3"),
}


def kernel_for(
    weight: QuantSpec,
    inputs: QuantSpec | None,
    in_features: int,
    dtype: torch.dtype,
    device: str | torch.device,
) -> tuple[str | None, str]:
    """The name of the op that multiplies by such a weight, or None and the reason why there is
    none.

    weight, inputs: how the scheme quantizes weights and activations; inputs is None if it doesn't.
    dtype: of the activations.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        return None, f"there are no kernels for {kind}"
    missing = cuda.missing_reason(device) if kind == "cuda" else _missing_on_cpu()
    if missing:
        return None, missing
    group, unit = _group(weight, inputs, in_features), cuda.GROUP_UNIT if kind == "cuda" else 4
    if group is None or (group < in_features and group % unit):
        reason = "no kernel has groups of activations and of weights of different sizes, or of no"
        return None, f"{reason} multiple of {unit}"
    kernels = _KERNELS.get(weight.format.name)
    if kernels is None or (inputs is not None and inputs.format != weight.format):
        activations = inputs.format.name if inputs else dtype
        return (
            None,
            f"no kernel multiplies {weight.format.name} weights by {activations} activations",
        )
    if inputs is None and dtype != torch.bfloat16:
        reason = "weights alone are quantized, and their kernel takes bfloat16 activations, not"
        return None, f"{reason} {dtype}"
    if inputs is None:
        return "matmul_weight_only", ""
    if weight.format == INT8 and in_features >= LEAST_UNSAFE_INNER:
        return None, "int32 doesn't hold sums over 131072 input features or more"
    return kernels.op, ""


def _missing_on_cpu() -> str | None:
    return (
        None
        if native.cpu_kernels()
        else "this installation has no compiled kernels, or QUANTKIT_KERNELS switches them off"
    )


def _group(weight: QuantSpec, inputs: QuantSpec | None, in_features: int) -> int | None:
    """The number of input features that share scales, or None if weight and activations have groups
    of different sizes.
    """
    sizes = {
        spec.granularity.block_shape(1, in_features)[1]
        for spec in (weight, inputs)
        if spec is not None
    } - {in_features}
    return in_features if not sizes else sizes.pop() if len(sizes) == 1 else None


class QuantizedLinear(nn.Module):
    """A Linear whose weight is quantized, and whose inputs are if the scheme says so.

    weight: codes [out_features, in_features] and scales.
    scheme: how weight and inputs are quantized.
    input_scale: [1] for a static scheme, else None.
    bias: [out_features] or None.
    dtype: expected dtype of the inputs, which decides whether a kernel supports them.
    use_kernel: False always runs the reference.

    The attribute `kernel` is the name of the op that runs, or None if the reference does. With a
    kernel, memory holds the codes only once, packed for that kernel.
    """

    def __init__(
        self,
        weight: QuantizedTensor,
        scheme: QuantScheme,
        input_scale: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
        use_kernel: bool = True,
    ) -> None:
        super().__init__()
        codes = weight.qdata
        self.out_features, self.in_features = codes.shape
        self.spec, self.scheme, self.input_scale, self.bias = weight.spec, scheme, input_scale, bias
        self.kernel = (
            kernel_for(weight.spec, scheme.input, self.in_features, dtype, codes.device)[0]
            if use_kernel
            else None
        )
        if self.kernel is None:
            # bfloat16 holds every E4M3 value exactly, and torch converts it tens of times faster.
            self.codes = codes.bfloat16() if codes.dtype == torch.float8_e4m3fn else codes
            self.scale = weight.scale
            return
        kernels = _KERNELS[weight.spec.format.name]
        self.packing = kernels.weight_only_packing if scheme.input is None else kernels.packing
        self.packed = OPS.pack_weight(codes, self.packing)
        self.group = _group(weight.spec, scheme.input, self.in_features)
        self.scale = self._scale_per_group(weight)
        self.powers_of_two = all(
            spec.scale_format == E8M0 for spec in (weight.spec, scheme.input) if spec is not None
        )
        self.kernel_bias = None if bias is None else bias.float()

    def _scale_per_group(self, weight: QuantizedTensor) -> Tensor:
        """The weight's scales as kernels read them, [groups, out_features] float32.

        On CUDA, 128 output features may share a scale: [groups, blocks].
        """
        rows = weight.spec.granularity.block_shape(self.out_features, self.in_features)[0]
        if rows == SCALE_BLOCK and weight.scale.is_cuda:
            return weight.scale.float().T.contiguous()
        scale = (
            weight.scale.float().repeat_interleave(rows, dim=0)[: self.out_features]
            if weight.scale.shape[0] < self.out_features
            else weight.scale.float()
        )
        return scale.T.contiguous()

    def forward(self, inputs: Tensor) -> Tensor:
        """The Linear's output.

        inputs: [..., in_features].

        Returns [..., out_features] in the dtype of the inputs.
        """
        rows = inputs.reshape(-1, self.in_features)
        takes = (
            (torch.bfloat16,)
            if self.scheme.input is None
            else (torch.bfloat16, torch.float16, torch.float32)
        )
        if self.kernel is not None and inputs.dtype in takes and rows.shape[0]:
            output = self._by_kernel(rows)
        else:
            input_scale = self.input_scale if self.scheme.needs_calibration else None
            output = quantized_linear(
                rows, self.weight(), self.scheme.input, input_scale, self.bias
            )
        return output.reshape(*inputs.shape[:-1], self.out_features)

    def weight(self) -> QuantizedTensor:
        """The codes [out_features, in_features] and their scales, not packed."""
        if self.kernel is None:
            return QuantizedTensor(self.codes, self.scale, self.spec)
        codes = fallback.unpack_weight(
            self.packed, self.packing, self.out_features, self.in_features
        )
        rows = (
            self.spec.granularity.block_shape(self.out_features, self.in_features)[0]
            if self.scale.shape[1] == self.out_features
            else 1
        )
        return QuantizedTensor(codes, self.scale.T[::rows].contiguous(), self.spec)

    def _by_kernel(self, rows: Tensor) -> Tensor:
        spec, ends = self.scheme.input, (self.kernel_bias, rows.dtype)
        if spec is None:
            return OPS.matmul_weight_only(
                rows, self.packed, self.packing, self.scale, self.group, self.powers_of_two, *ends
            )
        if self.scheme.needs_calibration:
            assert self.input_scale is not None, "a static scheme has an input scale"
            scale = self.input_scale.reshape(1, 1).float()
            codes = OPS.encode_blocks(rows, scale, *rows.shape, spec.format.name)
        else:
            codes, scale = OPS.quantize_rows(
                rows,
                spec.granularity.block_shape(*rows.shape)[1],
                spec.format.name,
                torch_ops.scale_rule(spec),
            )
        if self.kernel == "matmul_int8":
            return OPS.matmul_int8(
                codes, scale, self.packed, self.scale, self.group, None, None, *ends
            )
        return OPS.matmul_fp8(
            codes, scale, self.packed, self.scale, self.group, self.powers_of_two, *ends
        )
