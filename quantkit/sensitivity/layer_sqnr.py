"""What quantizing does to each Linear by itself: the signal-to-noise ratio of its weight, and of
its output on some rows of the inputs that the unquantized model gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.models.distributed import Ranks
from quantkit.models.threads import one_thread
from quantkit.ops.linear import QuantizedLinear
from quantkit.ops.reference import QuantizedTensor, sqnr_db
from quantkit.sensitivity.base_model import BaseModel

# Rows of each Linear's input: of so many windows, so many positions each.
SAMPLED_WINDOWS, SAMPLED_POSITIONS = 4, 64


class LayerSqnr:
    """`sample` comes before `compare`, block by block.

    known_blocks, known: how many blocks an earlier run compared, and its `by_place`, as JSON keeps
    it.
    """

    def __init__(
        self,
        ranks: Ranks,
        known_blocks: int = 0,
        known: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    ) -> None:
        self._ranks, self._known_blocks = ranks, known_blocks
        self._found: dict[int, dict[str, dict[str, Any]]] = {
            int(place): {entry["name"]: dict(entry) for entry in entries}
            for place, entries in (known or {}).items()
        }
        # Of the block that was sampled last: name on disk → [rows, in_features]. None where its
        # Linears are known already.
        self._inputs: dict[str, Tensor] | None = None

    def sample(
        self,
        base: BaseModel,
        number: int,
        block: nn.Module,
        run: Callable[[int], object],
        windows: Sequence[int],
    ) -> None:
        """Keep some rows of the inputs of a block's Linears, as the unquantized model has them: of
        the first windows, on whichever rank they run.

        run: a window through the block. windows: those of this rank.
        """
        self._inputs = None
        if number < self._known_blocks:
            return
        prefix, rows = base.blocks.block_name(number), _SampledRows()
        of_window: dict[int, dict[str, Tensor]] = {}
        hooks = []
        for path, module in block.named_modules():
            name = base.linear_name(f"{prefix}.{path}") if isinstance(module, nn.Linear) else None
            if name is not None:
                hooks.append(module.register_forward_pre_hook(rows.hook(name)))
        try:
            with one_thread():
                for window in windows:
                    if window < SAMPLED_WINDOWS:
                        run(window)
                        of_window[window] = rows.taken()
        finally:
            for hook in hooks:
                hook.remove()
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
        """place: of the Linear's group. linear, made: without and with quantization. codes: of its
        weight.
        """
        if self._inputs is None:
            return
        weight_db = float(sqnr_db(linear.weight, codes.dequantize()))
        entry: dict[str, Any] = {"name": name, "weight_sqnr_db": weight_db}
        rows = self._inputs.get(name)
        if rows is not None and rows.shape[0]:
            rows = rows.to(linear.weight.device)
            with one_thread():  # on one thread the result doesn't depend on how many there are
                entry["output_sqnr_db"] = float(sqnr_db(linear(rows), made(rows)))
        self._found.setdefault(place, {})[name] = entry

    def by_place(self) -> dict[int, list[dict[str, Any]]]:
        """By the group's place: weight and output SQNR of each of its Linears."""
        return {place: list(linears.values()) for place, linears in self._found.items()}


class _SampledRows:
    """Rows of the inputs of modules, evenly spread over each call."""

    def __init__(self) -> None:
        self._rows: dict[str, Tensor] = {}

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            rows = arguments[0].reshape(-1, arguments[0].shape[-1])
            count = min(SAMPLED_POSITIONS, rows.shape[0])
            places = torch.linspace(0, rows.shape[0] - 1, count).long().to(rows.device)
            before = [self._rows[name]] if name in self._rows else []
            self._rows[name] = torch.cat([*before, rows[places]])

        return keep

    def taken(self) -> dict[str, Tensor]:
        """What was kept since the last time."""
        rows, self._rows = self._rows, {}
        return {name: kept.cpu() for name, kept in rows.items()}
