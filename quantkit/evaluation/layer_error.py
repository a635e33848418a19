"""What quantization did to each Linear: its weight against the base's, and its output for the
inputs that reach it.

All of it comes from the pass that judges the candidate. While a block is in memory, some rows of
each quantized Linear's input are kept; behind its windows the base's weight is read a few rows at a
time and compared with the codes' values, and both are multiplied with the kept rows: what the layer
adds to the error by itself, whatever came before it. Nothing of the base stays in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from quantkit import ops
from quantkit.checkpoint.finished_output import changed_tensors
from quantkit.checkpoint.formats import read_quantization_config, stored_linears
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.stream import WeightStream
from quantkit.evaluation.final_states import Watch
from quantkit.evaluation.quantized_model import ServedModel
from quantkit.models.linear_views import as_linear_views
from quantkit.models.threads import each_batch
from quantkit.models.weight_map import names_on_disk
from quantkit.ops.linear import QuantizedLinear
from quantkit.ops.reference import QuantizedTensor, expand_scale, power_ratio_db, quantize
from quantkit.schemes.number_formats import NumberFormat

# Rows of each input that are kept: of so many windows, evenly spread, so many positions each.
SAMPLED_WINDOWS, SAMPLED_POSITIONS = 8, 32


# Layers of one model differ by about this much, or by their median distance from the median where
# that is more.
LEAST_SPREAD_DB = 0.5


def worst_first(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layers by how far they fall behind the model's others, in weight or in output, whichever
    shows it more.

    Outputs of sound layers differ by 10 dB and more, weights by less than 1: each is measured by
    its own spread (distance from the median over the median distance).
    """
    falls = [[0.0] * len(rows)]
    for key in ("weight_sqnr_db", "output_sqnr_db"):
        known = [min(row[key], 200.0) for row in rows if key in row]
        if known:
            middle = median(known)
            spread = max(median(abs(value - middle) for value in known), LEAST_SPREAD_DB)
            falls.append(
                [(min(row[key], 200.0) - middle) / spread if key in row else 0.0 for row in rows]
            )
    worst = [min(each) for each in zip(*falls)]
    return [row for _, _, row in sorted(zip(worst, range(len(rows)), rows))]


class LayerProbe:
    """The figures of a candidate's quantized Linears, made while it runs. numbers: of the windows
    that this process runs.
    """

    def __init__(self, served: ServedModel, base: Checkpoint, numbers: Sequence[int]) -> None:
        base = as_linear_views(base)
        self._served, self._candidate = served, as_linear_views(served.checkpoint)
        self._base = WeightStream(base)
        self._is_quantized = {module for module in stored_linears(base.tensors)} - {
            name.rpartition(".")[0] for name in self._base.block_scales
        }
        self._config = read_quantization_config(self._candidate.config)
        self._stored = stored_linears(self._candidate.tensors) if self._config else {}
        self._changed = changed_tensors(self._candidate.path)
        step = max(1, len(numbers) // SAMPLED_WINDOWS)
        self._sampled = set(list(numbers)[::step][:SAMPLED_WINDOWS])
        self._here = threading.local()
        self._inputs: dict[str, dict[int, Tensor]] = {}
        self.rows: dict[str, dict[str, Any]] = {}

    @property
    def watch(self) -> Watch:
        return Watch(self._watch_block, self._watch_batch)

    @contextmanager
    def _watch_batch(self, number: int) -> Iterator[None]:
        self._here.number = number
        try:
            yield
        finally:
            self._here.number = None

    def _watch_block(self, number: int, block: nn.Module) -> Callable[[], None]:
        prefix = self._served.blocks.block_name(number)
        paths = {
            f"{prefix}.{path}": module
            for path, module in block.named_modules()
            if isinstance(module, QuantizedLinear)
        }
        linears = {
            names_on_disk(self._served.blocks.sources(f"{path}.weight"), path)[0]: module
            for path, module in paths.items()
        }
        self._inputs = {name: {} for name in linears}
        hooks = [
            module.register_forward_pre_hook(self._keeper(name)) for name, module in linears.items()
        ]

        def finish() -> None:
            for hook in hooks:
                hook.remove()
            names, device = list(linears), self._served.blocks.device
            for _ in each_batch(
                lambda index: self._compare_linear(names[index], linears[names[index]]),
                range(len(names)),
                device,
                torch.get_num_threads(),
            ):
                pass
            self._inputs = {}

        return finish

    def _compare_linear(self, name: str, module: QuantizedLinear) -> None:
        kept = self._inputs[name]
        rows = torch.cat([kept[window] for window in sorted(kept)]) if kept else None
        self._compare(name, module.weight(), module, rows)

    def _keeper(self, name: str) -> Callable[..., None]:
        def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            window = getattr(self._here, "number", None)
            if window in self._sampled:
                rows = arguments[0].reshape(-1, arguments[0].shape[-1])
                places = torch.linspace(
                    0, rows.shape[0] - 1, min(SAMPLED_POSITIONS, rows.shape[0])
                ).long()
                self._inputs[name][window] = rows[places.to(rows.device)]

        return keep

    def finish(self) -> list[dict[str, Any]]:
        """Weights that no block's turn has shown (a quantized lm_head, experts that are stacked),
        then all layers, worst first.
        """
        for module, suffixes in self._stored.items():
            if module in self.rows or not self._comparable(module):
                continue
            tensors = {suffix: self._candidate.read(f"{module}.{suffix}") for suffix in suffixes}
            self._compare(
                module,
                self._config.file_format.decode(tensors, self._config.scheme_of(module), module)[0],
                None,
                None,
            )
        self._base.close()
        return worst_first(list(self.rows.values()))

    def _comparable(self, module: str) -> bool:
        """Not where an algorithm changed the weight and with it what its input means."""
        name = f"{module}.weight"
        return (
            name in self._base.checkpoint.tensors
            and module not in self._is_quantized
            and name not in self._changed
        )

    def _compare(
        self,
        name: str,
        weight: QuantizedTensor,
        module: QuantizedLinear | None,
        inputs: Tensor | None,
    ) -> None:
        if not self._comparable(name) or self._base.checkpoint.tensors[
            f"{name}.weight"
        ].shape != tuple(weight.qdata.shape):
            return
        self.rows[name] = {"name": name} | self._figures(f"{name}.weight", weight, module, inputs)

    def _figures(
        self,
        tensor: str,
        weight: QuantizedTensor,
        module: QuantizedLinear | None,
        inputs: Tensor | None,
    ) -> dict[str, Any]:
        values = ops.dequantize(weight)
        device, out_features = values.device, values.shape[0]
        signal, noise = (
            torch.zeros(out_features, device=device),
            torch.zeros(out_features, device=device),
        )
        expected = (
            None if inputs is None else torch.empty(inputs.shape[0], out_features, device=device)
        )
        reads = None if inputs is None else inputs.float()
        clipped = underflowed = 0
        scale = expand_scale(weight.scale, weight.spec.granularity, *values.shape)
        for first, last in self._base.steps(tensor):
            with self._base.rows(tensor, first, last) as rows:
                original = rows.to(device).float()
            signal[first:last] = torch.linalg.vecdot(original, original)
            part = scale[first:last] if scale.shape[0] > 1 else scale
            clipped += _count_clipped(original, part, weight.spec.format)
            underflowed += _count_underflowed(original, values[first:last])
            if expected is not None:
                expected[:, first:last] = reads @ original.T
            difference = original - values[first:last]
            noise[first:last] = torch.linalg.vecdot(difference, difference)
        per_channel = power_ratio_db(signal, noise)
        figures: dict[str, Any] = {
            "weight_sqnr_db": float(power_ratio_db(signal.double().sum(), noise.double().sum())),
            "weight_channel_sqnr_db": {
                "median": float(per_channel.median()),
                "min": float(per_channel.min()),
            },
            "weight_clipped": clipped / max(1, values.numel()),
            "weight_underflowed": underflowed / max(1, values.numel()),
        }
        if expected is not None and module is not None:
            figures |= _output_figures(module, inputs, expected)
        return figures


def _output_figures(module: QuantizedLinear, inputs: Tensor, expected: Tensor) -> dict[str, Any]:
    """The output as served against that of the base's weight and unquantized inputs, both for the
    kept rows [rows, in_features].
    """
    if module.bias is not None:
        expected = expected + module.bias.float()
    difference = expected - module(inputs).float()
    signal, noise = expected.square().sum(0), difference.square().sum(0)
    figures: dict[str, Any] = {
        "output_sqnr_db": float(power_ratio_db(signal.double().sum(), noise.double().sum())),
        "output_channel_sqnr_db": {
            "median": float(power_ratio_db(signal, noise).median()),
            "min": float(power_ratio_db(signal, noise).min()),
        },
    }
    spec = module.scheme.input
    if spec is not None:
        quantized = quantize(
            inputs,
            spec,
            module.input_scale.reshape(1, 1).float() if module.scheme.needs_calibration else None,
        )
        values, original = quantized.dequantize(), inputs.float()
        difference = original - values
        signal, noise = original.square().sum(0), difference.square().sum(0)
        scale = expand_scale(quantized.scale, spec.granularity, *inputs.shape)
        figures |= {
            "input_sqnr_db": float(power_ratio_db(signal.double().sum(), noise.double().sum())),
            "input_channel_sqnr_db": {
                "median": float(power_ratio_db(signal, noise).median()),
                "min": float(power_ratio_db(signal, noise).min()),
            },
            "input_clipped": (
                _count_clipped(original, scale, spec.format) / max(1, original.numel())
            ),
            "input_underflowed": _count_underflowed(original, values) / max(1, original.numel()),
        }
    return figures


def _count_clipped(values: Tensor, scale: Tensor, number_format: NumberFormat) -> int:
    bounds = scale * number_format.clips_above
    if bounds.shape[1] == 1:
        # Where no row's largest value is clipped, no other is: one pass over the values without
        # memory of its own.
        low, high = values.aminmax(dim=1, keepdim=True)
        if not (torch.maximum(-low, high) > bounds).any():
            return 0
    return int(torch.count_nonzero(values.abs() > bounds))


def _count_underflowed(values: Tensor, rounded: Tensor) -> int:
    """How many values other than zero have become zero; zero stays zero."""
    return max(0, int(torch.count_nonzero(values)) - int(torch.count_nonzero(rounded)))
