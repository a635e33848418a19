"""The SQNR (signal to quantization noise ratio) of each Linear's weight, and of its output on some
rows of its inputs in the unquantized model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from quantkit.layer_sensitivity.base_model import BaseModel
from quantkit.layer_sensitivity.progress import ComparedLayers
from quantkit.layer_sensitivity.result import LinearSqnr
from quantkit.models.distributed import Ranks
from quantkit.models.hooks import capture
from quantkit.models.threads import one_thread
from quantkit.ops.linear import QuantizedLinear
from quantkit.ops.reference import QuantizedTensor, sqnr_db

# Rows of each Linear's input: so many positions of each of so many windows.
SAMPLED_WINDOWS, SAMPLED_POSITIONS = 4, 64


class LayerSqnr:
    """Measures block by block: `sample` first, then `compare`.

    known: what an earlier run compared.
    """

    def __init__(self, ranks: Ranks, known: ComparedLayers) -> None:
        self._ranks, self._known_blocks = ranks, known.blocks
        self._found = {
            place: {linear.name: linear for linear in linears}
            for place, linears in known.by_place.items()
        }
        # Inputs of the last sampled block, by name on disk: [rows, in_features]. None if an earlier
        # run compared this block.
        self._inputs: dict[str, Tensor] | None = None

    def sample(
        self,
        base: BaseModel,
        number: int,
        block: nn.Module,
        run: Callable[[int], object],
        windows: Sequence[int],
    ) -> None:
        """Store some rows of the inputs of a block's Linears in the unquantized model.

        The rows are of the first windows, on whichever rank these run.

        run: runs a window through the block.
        windows: those of this rank.
        """
        self._inputs = None
        if number < self._known_blocks:
            return
        prefix, rows = base.blocks.block_name(number), _SampledRows()
        of_window: dict[int, dict[str, Tensor]] = {}
        linears = {
            name: module
            for path, module in block.named_modules()
            if isinstance(module, nn.Linear)
            and (name := base.linear_name(f"{prefix}.{path}")) is not None
        }
        with capture(linears, before=rows.keep), one_thread():
            for window in windows:
                if window < SAMPLED_WINDOWS:
                    run(window)
                    of_window[window] = rows.taken()
        self._inputs = self._gathered(of_window)

    def _gathered(self, of_window: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The rows of all ranks, in the order of the windows."""
        found: dict[int, Mapping[str, Tensor]] = {}
        for share in self._ranks.all_gather(of_window):
            found |= share
        inputs: dict[str, list[Tensor]] = {}
        for window in sorted(found):
            for name, rows in found[window].items():
                inputs.setdefault(name, []).append(rows)
        return {name: torch.cat(rows) for name, rows in inputs.items()}

    def compare(
        self,
        place: int,
        name: str,
        linear: nn.Linear,
        codes: QuantizedTensor,
        made: QuantizedLinear,
    ) -> None:
        """Measure the SQNR of a Linear's weight and output.

        place: of the Linear's group.
        linear, made: the Linear without and with quantization.
        codes: of its weight.
        """
        if self._inputs is None:
            return
        weight_db = float(sqnr_db(linear.weight, codes.dequantize()))
        output_db, rows = None, self._inputs.get(name)
        if rows is not None and rows.shape[0]:
            rows = rows.to(linear.weight.device)
            with one_thread():  # on one thread, the result doesn't depend on their number
                output_db = float(sqnr_db(linear(rows), made(rows)))
        self._found.setdefault(place, {})[name] = LinearSqnr(
            name=name, weight_sqnr_db=weight_db, output_sqnr_db=output_db
        )

    def by_place(self) -> dict[int, tuple[LinearSqnr, ...]]:
        """The weight and output SQNR of each Linear, by the place of its group."""
        return {place: tuple(linears.values()) for place, linears in self._found.items()}


class _SampledRows:
    """Rows of the inputs of modules, evenly spread over each call."""

    def __init__(self) -> None:
        self._rows: dict[str, Tensor] = {}

    def keep(self, name: str, inputs: Tensor) -> None:
        """Add some rows of a module's input."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        count = min(SAMPLED_POSITIONS, rows.shape[0])
        places = torch.linspace(0, rows.shape[0] - 1, count).long().to(rows.device)
        before = [self._rows[name]] if name in self._rows else []
        self._rows[name] = torch.cat([*before, rows[places]])

    def taken(self) -> dict[str, Tensor]:
        """The rows that were stored since the last call."""
        rows, self._rows = self._rows, {}
        return {name: kept.cpu() for name, kept in rows.items()}
