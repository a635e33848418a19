"""The inputs of a block's Linears over all batches and ranks: their sums, and samples of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    work: BlockRun, specs: Mapping[str, QuantSpec | None], needs: Needs
) -> dict[str, InputSums | None]:
    """The inputs of Linears that share one, by path; None where no token reached them. specs: how
    each Linear quantizes its input, by path.
    """
    linear = next(iter(specs))
    known = {
        spec: _sum_inputs_of(work, linear, spec, needs) for spec in dict.fromkeys(specs.values())
    }
    return {path: known[spec] for path, spec in specs.items()}


def _sum_inputs_of(
    work: BlockRun, linear: str, spec: QuantSpec | None, needs: Needs
) -> InputSums | None:
    def sums_of(batch: int) -> list[Tensor] | None:
        inputs = inputs_of(lambda: work.run(batch)).get(linear)
        if inputs is None or not inputs.numel():
            return None
        importance = work.importance(linear, batch, len(inputs))
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
    module = work.block.get_submodule(linear)
    with capture_inputs({linear: module}) as inputs_of, torch.inference_mode():
        for sums in work.workers.each(sums_of, work.batches):
            if sums is not None:
                total = (
                    sums
                    if total is None
                    else [mine.add_(other) for mine, other in zip(total, sums)]
                )
    total = _added_up(total, work.workers)
    if total is None:
        return None
    sum_of_squares, name = total[3], work.names.linears[linear]

    def require_finite() -> None:
        if not torch.isfinite(sum_of_squares).all():
            raise CalibrationError(
                f"the input of {name} holds NaN or infinity; the model overflows on this text or"
                " its weights are damaged"
            )

    work.ranks.on_first(require_finite)
    count, exact, seen, squares, *grams = total
    return InputSums(exact / count, seen / count, squares / count, *grams)


def _added_up(sums: list[Tensor] | None, workers: Workers) -> list[Tensor] | None:
    """Over the ranks, of which some may have seen no token (None)."""
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
    work: BlockRun, linears: Sequence[str], rows: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rows of these Linears' inputs, [rows, in_features] by path, drawn from all batches; and how
    much each counts, [rows, 1], for those Linears whose rows don't count alike.
    """
    each = -(-rows // sum(work.ranks.all_gather(len(work.batches))))

    def drawn(batch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        kept, counts = {}, {}
        for path, inputs in inputs_of(lambda: work.run(batch)).items():
            # Drawn, not at equal distances: every window's first position among them would
            # count far more than it does in any text.
            places = torch.randint(
                inputs.shape[0],
                (min(each, inputs.shape[0]),),
                generator=torch.Generator().manual_seed(batch),
            ).to(inputs.device)
            kept[path] = inputs[places]
            importance = work.importance(path, batch, len(inputs))
            if importance is not None:
                counts[path] = importance[places]
        return kept, counts

    with capture_inputs({path: work.block.get_submodule(path) for path in linears}) as inputs_of:
        shares = work.ranks.all_gather(
            dict(zip(work.batches, work.workers.each(drawn, work.batches)))
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
