"""The inputs of a block's Linears over all batches and ranks: their sums, and samples of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor

from quantkit.algorithms.layer_group import InputSums, Needs
from quantkit.calibration.block_run import BlockRun
from quantkit.errors import CalibrationError
from quantkit.models.hooks import capture_inputs
from quantkit.models.workers import Workers
from quantkit.ops.reference import quantize
from quantkit.schemes.quant_spec import QuantSpec


def sum_inputs(
    block_run: BlockRun, specs: Mapping[str, QuantSpec | None], needs: Needs
) -> dict[str, InputSums | None]:
    """Sums of the inputs of Linears that share an input, by path; None where no token reached it.
    Raises CalibrationError where an input isn't finite.

    specs: how each Linear quantizes its input, by path; None where it doesn't.
    """
    linear = next(iter(specs))
    known = {
        spec: _sum_inputs_of(block_run, linear, spec, needs)
        for spec in dict.fromkeys(specs.values())
    }
    return {path: known[spec] for path, spec in specs.items()}


def _sum_inputs_of(
    block_run: BlockRun, linear: str, spec: QuantSpec | None, needs: Needs
) -> InputSums | None:
    def sums_of(batch: int) -> list[Tensor] | None:
        inputs = inputs_of(lambda: block_run.run(batch)).get(linear)
        if inputs is None or not inputs.numel():
            return None
        importance = block_run.importance(linear, batch, len(inputs))
        root = 1.0 if importance is None else importance.sqrt()
        exact = inputs.float() * root
        seen = exact if spec is None else quantize(inputs, spec).dequantize() * root
        weights = torch.ones(len(inputs), 1, device=inputs.device) * root
        sums = [
            weights.square().sum(),
            (exact * weights).sum(0),
            (seen * weights).sum(0),
            seen.square().sum(0),
        ]
        if needs.gram:
            sums.append(seen.T @ seen)
        if needs.gram and needs.deviation and spec is not None:
            sums.append((exact - seen).T @ seen)
        return sums

    total: list[Tensor] | None = None
    module = block_run.block.get_submodule(linear)
    with (
        capture_inputs({linear: module}) as inputs_of,
        torch.inference_mode(),
        closing(block_run.workers.each(sums_of, block_run.batches)) as results,
    ):
        for sums in results:
            if sums is not None:
                total = (
                    sums
                    if total is None
                    else [mine.add_(other) for mine, other in zip(total, sums)]
                )
    total = _added_up(total, block_run.workers)
    if total is None:
        return None
    sum_of_squares, name = total[3], block_run.names.linears[linear]

    def require_finite() -> None:
        if not torch.isfinite(sum_of_squares).all():
            raise CalibrationError(
                f"the input of {name} holds NaN or infinity; the model overflows on this text or"
                " its weights are damaged"
            )

    block_run.ranks.on_first(require_finite)
    count, exact, seen, squares, *grams = total
    return InputSums(exact / count, seen / count, squares / count, *grams)


def _added_up(sums: list[Tensor] | None, workers: Workers) -> list[Tensor] | None:
    """The sums over all ranks; None for a rank that saw no token."""
    ranks = workers.ranks
    if ranks.count == 1:
        return sums
    gathered = ranks.all_gather(sums and [tuple(each.shape) for each in sums])
    shapes = next((shapes for shapes in gathered if shapes), None)
    if shapes is None:
        return None
    sums = sums or [torch.zeros(shape, device=workers.device) for shape in shapes]
    return [ranks.reduce([each], "sum")[0] for each in sums]


def sample_inputs(
    block_run: BlockRun, linears: Sequence[str], rows: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random rows of these Linears' inputs, drawn from all batches on all ranks.

    Returns the rows by path, [rows, in_features], and their importance by path, [rows, 1]. A Linear
    whose rows count alike has no importance.
    """
    each = -(-rows // sum(block_run.ranks.all_gather(len(block_run.batches))))

    def drawn(batch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        kept, counts = {}, {}
        for path, inputs in inputs_of(lambda: block_run.run(batch)).items():
            # Random, not evenly spaced: that could take the first position of every window, which
            # is an outlier in many models.
            places = torch.randint(
                inputs.shape[0],
                (min(each, inputs.shape[0]),),
                generator=torch.Generator().manual_seed(batch),
            ).to(inputs.device)
            kept[path] = inputs[places]
            importance = block_run.importance(path, batch, len(inputs))
            if importance is not None:
                counts[path] = importance[places]
        return kept, counts

    with capture_inputs(
        {path: block_run.block.get_submodule(path) for path in linears}
    ) as inputs_of:
        shares = block_run.ranks.all_gather(
            dict(zip(block_run.batches, block_run.workers.each(drawn, block_run.batches)))
        )
    by_batch = {batch: kept for share in shares for batch, kept in share.items()}
    found = [by_batch[batch] for batch in sorted(by_batch)]
    samples, counts = (
        {path: [entry[side][path] for entry in found if path in entry[side]] for path in linears}
        for side in (0, 1)
    )
    return {path: torch.cat(samples[path] or [torch.empty(0)]) for path in linears}, {
        path: torch.cat(counts[path]) for path in linears if counts[path]
    }
