"""What quantization did to each Linear: its weight against the base's, and its output for the
inputs that reach it.

All of it comes from the pass that evaluates the candidate. While a block is in memory, some rows
of each quantized Linear's input are kept; after its windows the base's weight is read a few rows at
a time and compared with the codes' values, and both are multiplied with the kept rows: the error
that the layer adds by itself, whatever came before it. Nothing of the base stays in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from quantkit import ops
from quantkit.checkpoint.finished_output import changed_tensors
from quantkit.checkpoint.formats import read_quantization_config, stored_linears
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.stream import WeightStream
from quantkit.evaluation.final_hidden_states import Watch
from quantkit.evaluation.quantized_model import QuantizedModel
from quantkit.evaluation.result import ChannelSqnr, LayerError
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
MOST_DB = 200.0  # what is exact counts as this


def worst_first(layers: Sequence[LayerError]) -> list[LayerError]:
    """Layers by how far they fall behind the model's others, in weight or in output, whichever
    shows it more.

    Outputs of sound layers differ by 10 dB and more, weights by less than 1: each is measured by
    its own spread (distance from the median over the median distance).
    """
    falls = zip(
        _falls([layer.weight_sqnr_db for layer in layers]),
        _falls([layer.output_sqnr_db for layer in layers]),
    )
    worst = [min(0.0, *each) for each in falls]
    return [layers[place] for _, place in sorted(zip(worst, range(len(layers))))]


def _falls(decibels: Sequence[float | None]) -> list[float]:
    """How far each lies from the median, in spreads; 0 for what isn't known."""
    known = [min(value, MOST_DB) for value in decibels if value is not None]
    if not known:
        return [0.0] * len(decibels)
    middle = median(known)
    spread = max(median(abs(value - middle) for value in known), LEAST_SPREAD_DB)
    return [0.0 if value is None else (min(value, MOST_DB) - middle) / spread for value in decibels]


# The window that runs on this thread.
_window: ContextVar[int | None] = ContextVar("window", default=None)


@contextmanager
def _running(number: int) -> Iterator[None]:
    token = _window.set(number)
    try:
        yield
    finally:
        _window.reset(token)


class LayerProbe:
    """The errors of a candidate's quantized Linears, made while it runs. numbers: of the windows
    that this process runs.
    """

    def __init__(self, model: QuantizedModel, base: Checkpoint, numbers: Sequence[int]) -> None:
        base = as_linear_views(base)
        self._model, self._candidate = model, as_linear_views(model.checkpoint)
        self._base = WeightStream(base)
        self._is_quantized = {module for module in stored_linears(base.tensors)} - {
            name.rpartition(".")[0] for name in self._base.block_scales
        }
        self._config = read_quantization_config(self._candidate.config)
        self._stored = stored_linears(self._candidate.tensors) if self._config else {}
        self._changed = changed_tensors(self._candidate.path)
        step = max(1, len(numbers) // SAMPLED_WINDOWS)
        self._sampled = set(list(numbers)[::step][:SAMPLED_WINDOWS])
        self._inputs: dict[str, dict[int, Tensor]] = {}
        self._errors: dict[str, LayerError] = {}

    @property
    def watch(self) -> Watch:
        return Watch(self._watch_block, _running)

    def _watch_block(self, number: int, block: nn.Module) -> Callable[[], None]:
        prefix = self._model.blocks.block_name(number)
        paths = {
            f"{prefix}.{path}": module
            for path, module in block.named_modules()
            if isinstance(module, QuantizedLinear)
        }
        linears = {
            names_on_disk(self._model.blocks.sources(f"{path}.weight"), path)[0]: module
            for path, module in paths.items()
        }
        self._inputs = {name: {} for name in linears}
        hooks = [
            module.register_forward_pre_hook(self._keeper(name)) for name, module in linears.items()
        ]

        def finish() -> None:
            for hook in hooks:
                hook.remove()
            names, device = list(linears), self._model.blocks.device
            for error in each_batch(
                lambda index: self._error_of(names[index], linears[names[index]]),
                range(len(names)),
                device,
                torch.get_num_threads(),
            ):
                self._keep(error)
            self._inputs = {}

        return finish

    def _error_of(self, name: str, module: QuantizedLinear) -> LayerError | None:
        kept = self._inputs[name]
        rows = torch.cat([kept[window] for window in sorted(kept)]) if kept else None
        return self._compare(name, module.weight(), module, rows)

    def _keep(self, error: LayerError | None) -> None:
        if error is not None:
            self._errors[error.name] = error

    def _keeper(self, name: str) -> Callable[..., None]:
        def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            window = _window.get()
            if window is not None and window in self._sampled:
                rows = arguments[0].reshape(-1, arguments[0].shape[-1])
                places = torch.linspace(
                    0, rows.shape[0] - 1, min(SAMPLED_POSITIONS, rows.shape[0])
                ).long()
                self._inputs[name][window] = rows[places.to(rows.device)]

        return keep

    def finish(self) -> list[LayerError]:
        """Weights that no block has shown (a quantized lm_head, stacked experts), then all layers,
        worst first.
        """
        for name, suffixes in self._stored.items():
            if name in self._errors or not self._comparable(name):
                continue
            scheme = self._config.scheme_of(name) if self._config else None
            assert scheme is not None, name
            tensors = {suffix: self._candidate.read(f"{name}.{suffix}") for suffix in suffixes}
            self._keep(
                self._compare(
                    name, self._config.file_format.decode(tensors, scheme, name)[0], None, None
                )
            )
        self._base.close()
        return worst_first(list(self._errors.values()))

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
    ) -> LayerError | None:
        """None where the base has no such weight to compare with."""
        if not self._comparable(name) or self._base.checkpoint.tensors[
            f"{name}.weight"
        ].shape != tuple(weight.qdata.shape):
            return None
        of_weight, expected = self._weight_error(f"{name}.weight", weight, inputs)
        of_output: dict[str, Any] = {}
        if module is not None and inputs is not None and expected is not None:
            of_output = _output_error(module, inputs, expected) | _input_error(module, inputs)
        return LayerError(name=name, **of_weight, **of_output)

    def _weight_error(
        self, tensor: str, weight: QuantizedTensor, inputs: Tensor | None
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Fields of a LayerError, and the outputs of the base's weight, [rows, out_features].
        inputs: [rows, in_features].
        """
        values = ops.dequantize(weight)
        device, out_features = values.device, values.shape[0]
        signal, noise = (
            torch.zeros(out_features, device=device),
            torch.zeros(out_features, device=device),
        )
        reads, expected = None, None
        if inputs is not None:
            reads = inputs.float()
            expected = torch.empty(inputs.shape[0], out_features, device=device)
        clipped = underflowed = 0
        scale = expand_scale(weight.scale, weight.spec.granularity, *values.shape)
        for first, last in self._base.steps(tensor):
            with self._base.rows(tensor, first, last) as rows:
                original = rows.to(device).float()
            signal[first:last] = torch.linalg.vecdot(original, original)
            part = scale[first:last] if scale.shape[0] > 1 else scale
            clipped += _count_clipped(original, part, weight.spec.format)
            underflowed += _count_underflowed(original, values[first:last])
            if reads is not None and expected is not None:
                expected[:, first:last] = reads @ original.T
            difference = original - values[first:last]
            noise[first:last] = torch.linalg.vecdot(difference, difference)
        total, channels = _sqnr(signal, noise)
        return {
            "weight_sqnr_db": total,
            "weight_channel_sqnr_db": channels,
            "weight_clipped": clipped / max(1, values.numel()),
            "weight_underflowed": underflowed / max(1, values.numel()),
        }, expected


def _output_error(module: QuantizedLinear, inputs: Tensor, expected: Tensor) -> dict[str, Any]:
    """The output of the quantized Linear against that of the base's weight and unquantized inputs,
    as fields of a LayerError. inputs: [rows, in_features]; expected: [rows, out_features].
    """
    if module.bias is not None:
        expected = expected + module.bias.float()
    difference = expected - module(inputs).float()
    total, channels = _sqnr(expected.square().sum(0), difference.square().sum(0))
    return {"output_sqnr_db": total, "output_channel_sqnr_db": channels}


def _input_error(module: QuantizedLinear, inputs: Tensor) -> dict[str, Any]:
    """Fields of a LayerError, none where inputs aren't quantized. inputs: [rows, in_features]."""
    spec = module.scheme.input
    if spec is None:
        return {}
    static = module.input_scale if module.scheme.needs_calibration else None
    quantized = quantize(inputs, spec, None if static is None else static.reshape(1, 1).float())
    values, original = quantized.dequantize(), inputs.float()
    difference = original - values
    total, channels = _sqnr(original.square().sum(0), difference.square().sum(0))
    scale = expand_scale(quantized.scale, spec.granularity, *inputs.shape)
    clipped = _count_clipped(original, scale, spec.format)
    return {
        "input_sqnr_db": total,
        "input_channel_sqnr_db": channels,
        "input_clipped": clipped / max(1, original.numel()),
        "input_underflowed": _count_underflowed(original, values) / max(1, original.numel()),
    }


def _sqnr(signal: Tensor, noise: Tensor) -> tuple[float, ChannelSqnr]:
    """In dB, of all and over channels. signal, noise: sums of squares by channel, [channels]."""
    by_channel = power_ratio_db(signal, noise)
    return (
        float(power_ratio_db(signal.double().sum(), noise.double().sum())),
        ChannelSqnr(float(by_channel.median()), float(by_channel.min())),
    )


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
