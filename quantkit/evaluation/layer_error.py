"""The error that quantization causes in each Linear: in its weight, its input and its output.

The errors are measured while the quantized model runs over the windows, block by block:

1. A hook on each quantized Linear keeps some rows of its input.
2. After the block's last window, the base model's weight is read a few rows at a time and compared
   with the dequantized weight.
3. Both weights are multiplied with the kept input rows. The difference is the error that the layer
   adds by itself, because both products have the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
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
from quantkit.models.hooks import capture
from quantkit.models.linear_views import as_linear_views
from quantkit.models.threads import each_batch
from quantkit.models.weight_map import names_on_disk
from quantkit.ops.linear import QuantizedLinear
from quantkit.ops.reference import QuantizedTensor, expand_scale, power_ratio_db, quantize
from quantkit.schemes.number_formats import NumberFormat

# Input rows that are kept of each Linear: so many windows, so many positions each, evenly spread.
SAMPLED_WINDOWS, SAMPLED_POSITIONS = 8, 32
# Lower bound of the spread of a model's layers, so that tiny differences don't count as outliers.
LEAST_SPREAD_DB = 0.5
MOST_DB = 200.0  # an exact layer, of infinite SQNR, counts as this


def worst_first(layers: Sequence[LayerError]) -> list[LayerError]:
    """Layers sorted by how far they are below the model's other layers, in SQNR of the weight or of
    the output, whichever is further.

    Sound layers differ by less than 1 dB in their weights, but by 10 dB and more in their outputs.
    Each distance is therefore divided by its spread, the median absolute deviation.
    """
    deviations = zip(
        _deviations([layer.weight_sqnr_db for layer in layers]),
        _deviations([layer.output_sqnr_db for layer in layers]),
    )
    worst = [min(0.0, *each) for each in deviations]
    return [layers[place] for _, place in sorted(zip(worst, range(len(layers))))]


def _deviations(decibels: Sequence[float | None]) -> list[float]:
    """Distances from the median, in median absolute deviations; 0 for values that are None."""
    known = [min(value, MOST_DB) for value in decibels if value is not None]
    if not known:
        return [0.0] * len(decibels)
    middle = median(known)
    spread = max(median(abs(value - middle) for value in known), LEAST_SPREAD_DB)
    return [0.0 if value is None else (min(value, MOST_DB) - middle) / spread for value in decibels]


# The number of the window that runs on this thread.
_window: ContextVar[int | None] = ContextVar("window", default=None)


@contextmanager
def _running(number: int) -> Iterator[None]:
    token = _window.set(number)
    try:
        yield
    finally:
        _window.reset(token)


class LayerProbe:
    """Measures the errors of a quantized model's Linears while it runs.

    model: the quantized model.
    base: checkpoint of the base model.
    numbers: numbers of the windows that this process runs.
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
        hooks = ExitStack()
        hooks.enter_context(capture(linears, before=self._keep_rows))

        def finish() -> None:
            hooks.close()
            names, device = list(linears), self._model.blocks.device
            errors = each_batch(
                lambda index: self._error_of(names[index], linears[names[index]]),
                range(len(names)),
                device,
                torch.get_num_threads(),
            )
            with closing(errors):
                for error in errors:
                    self._add(error)
            self._inputs = {}

        return finish

    def _error_of(self, name: str, module: QuantizedLinear) -> LayerError | None:
        kept = self._inputs[name]
        rows = torch.cat([kept[window] for window in sorted(kept)]) if kept else None
        return self._compare(name, module.weight(), module, rows)

    def _add(self, error: LayerError | None) -> None:
        if error is not None:
            self._errors[error.name] = error

    def _keep_rows(self, name: str, inputs: Tensor) -> None:
        """Keep some rows of a Linear's input, if its window is sampled."""
        window = _window.get()
        if window is not None and window in self._sampled:
            rows = inputs.reshape(-1, inputs.shape[-1])
            count = min(SAMPLED_POSITIONS, rows.shape[0])
            places = torch.linspace(0, rows.shape[0] - 1, count).long()
            self._inputs[name][window] = rows[places.to(rows.device)]

    def finish(self) -> list[LayerError]:
        """The errors of all layers, the worst first. Weights that no hook has seen (a quantized
        lm_head, stacked experts) are compared now, without inputs.
        """
        for name, suffixes in self._stored.items():
            if name in self._errors or not self._comparable(name):
                continue
            config = self._config
            assert config is not None, "a checkpoint with quantized weights says how"
            scheme = config.scheme_of(name)
            assert scheme is not None, f"{name} has codes but no scheme"
            tensors = {suffix: self._candidate.read(f"{name}.{suffix}") for suffix in suffixes}
            values = config.file_format.decode(tensors, scheme, name)[0]
            self._add(self._compare(name, values, None, None))
        self._base.close()
        return worst_first(list(self._errors.values()))

    def _comparable(self, module: str) -> bool:
        """Whether the base model has the same weight unquantized. A weight that an algorithm
        changed is not comparable: its inputs changed with it.
        """
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
        """The error of one Linear; None if the base model has no weight to compare it with.

        weight: the quantized weight, [out_features, in_features].
        module: the Linear, None if only its weight is compared.
        inputs: rows of its input, [rows, in_features].
        """
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
        """The error of a weight, read a few rows at a time.

        tensor: name of the base model's weight.
        inputs: [rows, in_features], or None.

        Returns fields of a LayerError, and the outputs of the base model's weight for the inputs,
        [rows, out_features].
        """
        values = ops.dequantize(weight)
        device, out_features = values.device, values.shape[0]
        signal, noise = (
            torch.zeros(out_features, device=device),
            torch.zeros(out_features, device=device),
        )
        float_inputs, expected = None, None
        if inputs is not None:
            float_inputs = inputs.float()
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
            if float_inputs is not None and expected is not None:
                expected[:, first:last] = float_inputs @ original.T
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
    """The error of the output: that of the quantized Linear against `expected`, the output of the
    base model's weight for unquantized inputs.

    inputs: [rows, in_features].
    expected: [rows, out_features], without the bias.

    Returns fields of a LayerError.
    """
    if module.bias is not None:
        expected = expected + module.bias.float()
    difference = expected - module(inputs).float()
    total, channels = _sqnr(expected.square().sum(0), difference.square().sum(0))
    return {"output_sqnr_db": total, "output_channel_sqnr_db": channels}


def _input_error(module: QuantizedLinear, inputs: Tensor) -> dict[str, Any]:
    """The error of quantized inputs, as fields of a LayerError; none if inputs stay unquantized.

    inputs: [rows, in_features].
    """
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
    """Signal to quantization noise in dB: of the whole tensor, and over its channels.

    signal, noise: sums of squares of each channel, [channels].
    """
    by_channel = power_ratio_db(signal, noise)
    return (
        float(power_ratio_db(signal.double().sum(), noise.double().sum())),
        ChannelSqnr(float(by_channel.median()), float(by_channel.min())),
    )


def _count_clipped(values: Tensor, scale: Tensor, number_format: NumberFormat) -> int:
    """How many values are beyond the number format's range.

    values: [rows, columns].
    scale: [rows, columns], or broadcast to it.
    """
    bounds = scale * number_format.clips_above
    if bounds.shape[1] == 1:
        # If no row's largest value is clipped, nothing is: one pass that allocates nothing.
        low, high = values.aminmax(dim=1, keepdim=True)
        if not (torch.maximum(-low, high) > bounds).any():
            return 0
    return int(torch.count_nonzero(values.abs() > bounds))


def _count_underflowed(values: Tensor, rounded: Tensor) -> int:
    """How many nonzero values were rounded to zero."""
    return max(0, int(torch.count_nonzero(values)) - int(torch.count_nonzero(rounded)))
