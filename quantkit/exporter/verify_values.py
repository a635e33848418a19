"""The part of `verify` that reads every value: it finds NaN, infinity and scales that ruin a layer,
and compares each tensor with the base model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import as_completed
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantkit import ops
from quantkit.checkpoint.files import cores
from quantkit.checkpoint.formats import KV_SUFFIXES, QuantizationConfig, weight_scale_suffixes
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.run_control import Progress, ShouldStop, stop_if_asked
from quantkit.checkpoint.stream import WeightStream
from quantkit.exporter.verification import Findings, QuantizedLinears
from quantkit.models.threads import pool_of_single_threads
from quantkit.ops.packing import decode_scales
from quantkit.ops.reference import QuantizedTensor, power_ratio_db_of_floats
from quantkit.schemes.number_formats import holds_codes
from quantkit.schemes.quant_spec import TENSOR

# Rounding to 8 bits gives 30 dB or more. A weight below this is not a rounded one, but another one.
LEAST_PLAUSIBLE_SQNR_DB = 15.0
# Names of other scales than those of weights.
_OTHER_SCALES = {
    "input_scale",
    "activation_scale",
    "output_scale",
    "q_scale",
    "prob_scale",
    *KV_SUFFIXES,
}


def check_values(
    found: Findings,
    checkpoint: Checkpoint,
    base: Checkpoint | None,
    config: QuantizationConfig | None,
    stored: Mapping[str, list[str]],
    linears: QuantizedLinears,
    progress: Progress,
    should_stop: ShouldStop,
) -> None:
    """Check the values of all tensors, and add what is found to `found`.

    base: the model that the checkpoint was made from, or None.
    config: the checkpoint's quantization config, or None.
    stored: module with quantized tensors → suffixes of its tensors.
    linears: the quantized Linears whose tensors are complete.
    progress: told of the tensors that are done, and all tensors.
    should_stop: asked after each tensor; Interrupted is raised if it says so.

    Each thread, one for each core, has a few rows in memory.
    """
    units = [[f"{module}.{suffix}" for suffix in suffixes] for module, suffixes in stored.items()]
    units += [[name] for name in checkpoint.tensors if name.rpartition(".")[0] not in stored]
    done = 0
    with ExitStack() as opened:
        stream = opened.enter_context(closing(WeightStream(checkpoint, dequantizing=False)))
        base_stream = opened.enter_context(closing(WeightStream(base))) if base else None
        reader = _ValueReader(found, stream, base_stream, config, stored, linears)
        pool = opened.enter_context(pool_of_single_threads(cores()))
        futures = {pool.submit(reader.check, unit): unit for unit in units}
        for future in as_completed(futures):
            for tensor, message in future.result():
                found.fault(tensor, message)
            done += len(futures[future])
            progress("tensors", done, found.tensors)
            stop_if_asked(
                should_stop, f"with {done} of {found.tensors} tensors read", can_resume=False
            )
    # Sorted, because threads finish in any order.
    order = {name: number for number, name in enumerate(checkpoint.tensors)}
    found.faults.sort(key=lambda fault: order.get(fault[0], -1))
    if reader.differing:
        others = f" (and {len(reader.differing) - 1} more)" if len(reader.differing) > 1 else ""
        first = min(reader.differing, key=order.__getitem__)
        found.warnings.append(f"{first} isn't quantized, but differs from the base's{others}")
    found.warnings.sort()


@dataclass
class _ValueReader:
    """Checks the values of a Linear's tensors, or of one tensor.

    found: the result of `verify`; only `sqnr_db` is changed.
    stream: the checkpoint's tensors, as they are stored.
    base: the base model's tensors, or None.
    config: the checkpoint's quantization config, or None.
    stored: module with quantized tensors → suffixes of its tensors.
    linears: the quantized Linears whose tensors are complete.
    differing: tensors that aren't quantized and differ a little from the base's; filled here.
    """

    found: Findings
    stream: WeightStream
    base: WeightStream | None
    config: QuantizationConfig | None
    stored: Mapping[str, list[str]]
    linears: QuantizedLinears
    differing: list[str] = field(default_factory=list)

    def check(self, names: list[str]) -> list[tuple[str, str]]:
        """Faults of a Linear's tensors, or of one tensor: (tensor, message)."""
        faults = []
        for name in names:
            message = self._values_fault(name)
            if message:
                faults.append((name, message))
        module = names[0].rpartition(".")[0]
        if self.base is not None and module in self.stored:
            faults += (
                self._against_base(module, f"{module}.weight", self.base)
                if not faults and module in self.linears
                else []
            )
        elif self.base is not None and names[0] in self.base.checkpoint.tensors and not faults:
            faults += self._unquantized_against_base(names[0], self.base)
        return faults

    def _values_fault(self, name: str) -> str | None:
        """The fault in a tensor's values; None if there is none."""
        suffix = name.rpartition(".")[2]
        # Only these: a model may have parameters named scale, which may be negative.
        is_scale = suffix in _OTHER_SCALES or suffix in weight_scale_suffixes()
        for first, last in self.stream.steps(name):
            with self.stream.stored_rows(name, first, last) as rows:
                if is_scale and rows.dtype == torch.uint8:
                    if (rows == 255).any():
                        return "holds NaN scales (the byte 255)"
                elif is_scale:
                    if not torch.isfinite(rows.float()).all():
                        return "holds NaN or infinite scales"
                    if (rows.float() <= 0).any():
                        return "holds scales that are zero or negative"
                elif rows.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
                    if _has_nonfinite_codes(rows):
                        return "holds NaN or infinite codes"
                elif rows.is_floating_point() and not torch.isfinite(rows).all():
                    return "holds NaN or infinity"
        return None

    def _unquantized_against_base(self, name: str, base: WeightStream) -> list[tuple[str, str]]:
        """Compare a tensor that isn't quantized with the base's. A small difference, as algorithms
        cause, is only a warning.
        """
        ours, theirs = self.stream.checkpoint.tensors[name], base.checkpoint.tensors[name]
        if ours.shape != theirs.shape:
            return [(name, f"has the shape {list(ours.shape)}; the base has {list(theirs.shape)}")]
        if holds_codes(ours.dtype) or name in self.found.changed:
            # Codes without scales are a fault already, and algorithms change tensors on purpose.
            return []
        signal = noise = 0.0
        for first, last in base.steps(name):
            with (
                self.stream.stored_rows(name, first, last) as rows,
                base.rows(name, first, last) as expected,
            ):
                if not torch.equal(rows, expected.to(rows.dtype)):
                    expected, difference = expected.double(), rows.double() - expected.double()
                    noise += float(difference.square().sum())
                signal += float(expected.double().square().sum())
        sqnr = power_ratio_db_of_floats(signal, noise)
        if not sqnr > LEAST_PLAUSIBLE_SQNR_DB:
            return [
                (
                    name,
                    f"isn't quantized but is {sqnr:.1f} dB from the base's: it is another tensor",
                )
            ]
        if noise or ours.dtype != theirs.dtype and name not in base.block_scales:
            self.differing.append(name)
        return []

    def _against_base(self, module: str, name: str, base: WeightStream) -> list[tuple[str, str]]:
        original = base.checkpoint.tensors.get(name)
        scheme, shape = self.linears[module]
        if original is None:
            return []
        if original.shape != shape:
            return [
                (name, f"stands for the shape {list(shape)}; the base has {list(original.shape)}")
            ]
        if name in self.found.changed:
            return []
        sqnr = self.found.sqnr_db[module] = self._sqnr_db(module, name, base)
        if not sqnr > LEAST_PLAUSIBLE_SQNR_DB:
            return [
                (
                    name,
                    (
                        f"is {sqnr:.1f} dB from the base's weight; rounding to 8 bits leaves 30 dB"
                        " or more"
                    ),
                )
            ]
        return []

    def _sqnr_db(self, module: str, name: str, base: WeightStream) -> float:
        """Signal-to-quantization-noise ratio of a weight, dB. name: the base's weight."""
        assert self.config is not None, "a quantized Linear comes with a config"
        (scheme, shape), file_format = self.linears[module], self.config.file_format
        signal = noise = 0.0
        block_rows = scheme.weight.granularity.rows or 1
        # Scales are a megabyte at most and are read at once; codes are read in steps.
        stored_scales = self.stream.checkpoint.read(f"{module}.{file_format.scale_suffix}")
        scales = decode_scales(stored_scales).reshape(scheme.weight.granularity.scale_shape(*shape))
        codes_name = f"{module}.{file_format.codes_suffix(scheme)}"
        for first, last in base.steps(name, block_rows):
            scale = (
                scales
                if scales.shape[0] == 1 and scheme.weight.granularity == TENSOR
                else scales[first // block_rows : -(-last // block_rows)]
            )
            with (
                self.stream.stored_rows(codes_name, first, last) as stored,
                base.rows(name, first, last) as expected,
            ):
                codes = file_format.decode_codes(stored, scheme, shape[1])
                values = expected.float()
                rounded = ops.dequantize(QuantizedTensor(codes, scale, scheme.weight))
                # float32 within a step and float64 over the steps are accurate to 0.001 dB.
                signal += float(torch.dot(values.flatten(), values.flatten()))
                difference = (
                    values.sub_(rounded).flatten()
                    if values is not expected
                    else (values - rounded).flatten()
                )
                noise += float(torch.dot(difference, difference))
        return power_ratio_db_of_floats(signal, noise)


def _has_nonfinite_codes(tensor: Tensor) -> bool:
    magnitude = tensor.view(torch.uint8) & 0x7F
    # Without the sign bit, E4M3 has NaN at 0x7F; E5M2 has infinity at 0x7C and NaN above.
    return bool((magnitude >= (0x7F if tensor.dtype == torch.float8_e4m3fn else 0x7C)).any())
