"""SmoothQuant on a decoder block: search scales and fold them into norms and Linears.

`algorithms/smoothquant.py` finds the scale of Linears that share an input. `scale_folding.py` finds
the norm or Linear that can take it up. The block's output must stay the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.algorithms.layer_group import Needs
from quantkit.algorithms.smoothquant import Smoothing, search_smoothing
from quantkit.calibration.block_run import BlockChanges, BlockRun
from quantkit.calibration.input_sums import sample_inputs
from quantkit.calibration.scale_folding import (
    STORED_TOLERANCE,
    BlockProbe,
    ScaleFolding,
    find_foldings,
    folded_parameters,
)
from quantkit.checkpoint.units import counted
from quantkit.schemes.algorithms import Description, Table
from quantkit.schemes.recipe import Algorithm

# A scale is searched on so many rows of each input, drawn from all batches, and at most so many
# values.
SEARCH_ROWS, SEARCH_NUMBERS = 16384, 1 << 28


def needs(settings: Algorithm) -> Needs:
    return Needs(token_importance=True)


def change_block(block_run: BlockRun, settings: Algorithm) -> BlockChanges:
    """Search a scale for each folding of the block; every rank gets the same scales."""
    probe = block_run.probe() if block_run.ranks.is_first else None
    foldings, reasons = block_run.ranks.broadcast_from_first(
        lambda: find_foldings(_on_first(probe))
    )
    refused = [
        {"linear": block_run.names.linears.get(path, path), "reason": reason}
        for path, reason in reasons.items()
        if path in block_run.schemes
    ]
    if not foldings:
        return BlockChanges(described={"refused": refused})
    before = (
        dict(probe.block.named_parameters())
        if probe
        else {path: each.data.float() for path, each in block_run.block.named_parameters()}
    )
    found = _searched(block_run, foldings, before, settings["strength"])
    after, entries, dtypes = dict(before), [], block_run.stored_dtypes()
    for folding, smoothing in zip(foldings, found):
        if smoothing is None:
            continue
        scale = _of_producer(folding, smoothing.scale)
        changed = folded_parameters(folding, after, scale, dtypes)
        foreign = [path for path in changed if path not in block_run.names.parameters]
        if foreign:
            refused += _refused(block_run, [folding], f"{foreign[0]} isn't one tensor on disk")
            continue
        after |= changed
        entries.append(_described(block_run, folding, smoothing))
    changed = {path: tensor for path, tensor in after.items() if tensor is not before[path]}
    change = block_run.ranks.broadcast_from_first(lambda: _change(_on_first(probe), changed))
    if not change < STORED_TOLERANCE:
        reason = (
            f"with scales rounded as they are stored, the block's output changes by {change:.1%}"
        )
        return BlockChanges(described={"refused": refused + _refused(block_run, foldings, reason)})
    return BlockChanges(changed, {"folds": entries, "refused": refused})


def _on_first(probe: BlockProbe | None) -> BlockProbe:
    assert probe is not None, "rank 0 has a probe, and it alone asks"
    return probe


def _searched(
    block_run: BlockRun,
    foldings: Sequence[ScaleFolding],
    weights: Mapping[str, Tensor],
    strength: float | None,
) -> list[Smoothing | None]:
    """A scale for each folding, or None where none helps. Foldings scale different columns, so that
    each is searched on the original weights.

    weights: the block's parameters by path, float32.
    strength: α, or None to search it.
    """
    first = [folding.consumers[0] for folding in foldings]
    width = max(block_run.linear(path).in_features for path in first)
    samples, importance = sample_inputs(block_run, first, min(SEARCH_ROWS, SEARCH_NUMBERS // width))

    def search(index: int) -> Smoothing | None:
        folding = foldings[index]
        consumers = [path for path in folding.consumers if path in block_run.schemes]
        rows = samples[folding.consumers[0]]
        if not consumers or not rows.numel():
            return None
        return search_smoothing(
            rows,
            [weights[f"{path}.weight"].float() for path in consumers],
            [block_run.schemes[path] for path in consumers],
            strength,
            folding.channels,
            importance.get(folding.consumers[0]),
        )

    return block_run.workers.shared(search, range(len(foldings)))


def _change(probe: BlockProbe, changed: Mapping[str, Tensor]) -> float:
    with probe.changed(changed):
        return probe.change()


def _of_producer(folding: ScaleFolding, scale: Tensor) -> Tensor:
    """The scale of the consumers' input channels as a scale of the producer's output channels.

    Input channels that follow one output channel have equal scales.
    """
    if folding.channels is None:
        return scale
    found = torch.empty(int(folding.channels.max()) + 1, device=scale.device)
    found[folding.channels] = scale
    return found


def _refused(
    block_run: BlockRun, foldings: Sequence[ScaleFolding], reason: str
) -> list[dict[str, Any]]:
    return [
        {"linear": block_run.names.linears.get(path, path), "reason": reason}
        for folding in foldings
        for path in folding.consumers
    ]


def _described(block_run: BlockRun, folding: ScaleFolding, found: Smoothing) -> dict[str, Any]:
    return {
        "into": block_run.names.parameters[f"{folding.producer}.weight"].removesuffix(".weight"),
        "linears": [block_run.names.linears[path] for path in folding.consumers],
        "strength": found.strength,
        "measure": found.measure,
        "error": found.error,
        "plain_error": found.plain_error,
        "largest_scale": float(found.scale.max()),
        "smallest_scale": float(found.scale.min()),
    }


# ---- Remarks and tables.


def describe(report: Mapping[str, Any]) -> Description:
    return Description(tuple(_remarks(report)), tuple(_tables(report)))


def _remarks(report: Mapping[str, Any]) -> Iterator[str]:
    strengths = sorted({folding["strength"] for folding in report["folds"]})
    span = f", strengths {strengths[0]:g} to {strengths[-1]:g}" if strengths else ""
    yield (
        f"smoothquant: {counted(len(report['folds']), 'scale')} folded into norms and Linears{span}"
    )
    for reason, count in Counter(entry["reason"] for entry in report["refused"]).items():
        first = next(entry["linear"] for entry in report["refused"] if entry["reason"] == reason)
        others = f" and {count - 1} others" if count > 1 else ""
        yield f"smoothquant skipped the inputs of {first}{others}: {reason}"


def _tables(report: Mapping[str, Any]) -> Iterator[Table]:
    if report["folds"]:
        rows = [
            [
                folding["into"],
                str(len(folding["linears"])),
                f"{folding['strength']:g} ({folding['measure']})",
                f"{folding['plain_error']:.3g}",
                f"{folding['error']:.3g}",
            ]
            for folding in report["folds"]
        ]
        yield (
            "scales folded by smoothquant; squared errors relative to the Linears' outputs",
            ("folded into", "Linears", "strength", "squared error without", "with"),
            rows,
            (1, 3, 4),
        )
    if report["refused"]:
        yield (
            "inputs that smoothquant skipped",
            ("input of", "why"),
            [[entry["linear"], entry["reason"]] for entry in report["refused"]],
            (),
        )
