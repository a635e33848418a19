"""SmoothQuant on a decoder block: which scales are folded into which norm or Linear.

`algorithms/smoothquant.py` finds a scale for the Linears that read one input; `scale_folding.py`
finds what can take it up. Here both are put together, and the block must return what it did.
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
    Fold,
    find_folds,
    folded,
)
from quantkit.checkpoint.units import counted
from quantkit.schemes.algorithms import Description, Table
from quantkit.schemes.recipe import Algorithm

# Rows of each input on which a scale is searched, drawn from all batches, and how many numbers they
# may be.
SEARCH_ROWS, SEARCH_NUMBERS = 16384, 1 << 28


def needs(settings: Algorithm) -> Needs:
    return Needs(token_importance=True)


def change_block(work: BlockRun, settings: Algorithm) -> BlockChanges:
    """Search a scale for each fold of the block, on every rank the same."""
    probe = work.probe() if work.ranks.is_first else None
    folds, reasons = work.ranks.broadcast_from_first(lambda: find_folds(_on_first(probe)))
    refused = [
        {"linear": work.names.linears.get(path, path), "reason": reason}
        for path, reason in reasons.items()
        if path in work.schemes
    ]
    if not folds:
        return BlockChanges(described={"refused": refused})
    before = (
        dict(probe.block.named_parameters())
        if probe
        else {path: each.data.float() for path, each in work.block.named_parameters()}
    )
    found = _searched(work, folds, before, settings["strength"])
    after, entries = dict(before), []
    for fold, smoothing in zip(folds, found):
        if smoothing is None:
            continue
        scale = _of_producer(fold, smoothing.scale)
        changed = folded(fold, after, scale, work.stored_dtypes())
        foreign = [path for path in changed if path not in work.names.parameters]
        if foreign:
            refused += _refused(work, [fold], f"{foreign[0]} isn't one tensor on disk")
            continue
        after |= changed
        entries.append(_described(work, fold, smoothing))
    changed = {path: tensor for path, tensor in after.items() if tensor is not before[path]}
    change = work.ranks.broadcast_from_first(lambda: _change(_on_first(probe), changed))
    if not change < STORED_TOLERANCE:
        reason = f"with the scales as they are stored the block's output changes by {change:.1%}"
        return BlockChanges(described={"refused": refused + _refused(work, folds, reason)})
    return BlockChanges(changed, {"folds": entries, "refused": refused})


def _on_first(probe: BlockProbe | None) -> BlockProbe:
    assert probe is not None, "rank 0 has a probe, and it alone asks"
    return probe


def _searched(
    work: BlockRun, folds: Sequence[Fold], weights: Mapping[str, Tensor], strength: float | None
) -> list[Smoothing | None]:
    """A scale for each fold, or None where none helps. weights: the block's, float32 by path. Each
    fold scales other columns, so that none changes what another is searched on.
    """
    first = [fold.consumers[0] for fold in folds]
    width = max(work.linear(path).in_features for path in first)
    samples, importance = sample_inputs(work, first, min(SEARCH_ROWS, SEARCH_NUMBERS // width))

    def search(index: int) -> Smoothing | None:
        fold = folds[index]
        consumers = [path for path in fold.consumers if path in work.schemes]
        rows = samples[fold.consumers[0]]
        if not consumers or not rows.numel():
            return None
        return search_smoothing(
            rows,
            [weights[f"{path}.weight"].float() for path in consumers],
            [work.schemes[path] for path in consumers],
            strength,
            fold.channels,
            importance.get(fold.consumers[0]),
        )

    return work.workers.shared(search, range(len(folds)))


def _change(probe: BlockProbe, changed: Mapping[str, Tensor]) -> float:
    with probe.changed(changed):
        return probe.change()


def _of_producer(fold: Fold, scale: Tensor) -> Tensor:
    """A scale of the consumers' inputs as one of the producer's channels; equal where several read
    one channel.
    """
    if fold.channels is None:
        return scale
    found = torch.empty(int(fold.channels.max()) + 1, device=scale.device)
    found[fold.channels] = scale
    return found


def _refused(work: BlockRun, folds: Sequence[Fold], reason: str) -> list[dict[str, Any]]:
    return [
        {"linear": work.names.linears.get(path, path), "reason": reason}
        for fold in folds
        for path in fold.consumers
    ]


def _described(work: BlockRun, fold: Fold, found: Smoothing) -> dict[str, Any]:
    return {
        "into": work.names.parameters[f"{fold.producer}.weight"].removesuffix(".weight"),
        "linears": [work.names.linears[path] for path in fold.consumers],
        "strength": found.strength,
        "measure": found.measure,
        "error": found.error,
        "plain_error": found.plain_error,
        "largest_scale": float(found.scale.max()),
        "smallest_scale": float(found.scale.min()),
    }


# ---- For people.


def describe(chosen: Mapping[str, Any]) -> Description:
    return Description(tuple(_remarks(chosen)), tuple(_tables(chosen)))


def _remarks(chosen: Mapping[str, Any]) -> Iterator[str]:
    strengths = sorted({fold["strength"] for fold in chosen["folds"]})
    span = f", strengths {strengths[0]:g} to {strengths[-1]:g}" if strengths else ""
    yield (
        f"smoothquant: {counted(len(chosen['folds']), 'scale')} folded into what comes before{span}"
    )
    for reason, count in Counter(entry["reason"] for entry in chosen["refused"]).items():
        first = next(entry["linear"] for entry in chosen["refused"] if entry["reason"] == reason)
        others = f" and {count - 1} others" if count > 1 else ""
        yield f"smoothquant left the inputs of {first}{others} alone: {reason}"


def _tables(chosen: Mapping[str, Any]) -> Iterator[Table]:
    if chosen["folds"]:
        rows = [
            [
                fold["into"],
                str(len(fold["linears"])),
                f"{fold['strength']:g} ({fold['measure']})",
                f"{fold['plain_error']:.3g}",
                f"{fold['error']:.3g}",
            ]
            for fold in chosen["folds"]
        ]
        yield (
            "scales folded by smoothquant; errors of the Linears' outputs, over their squares",
            ("folded into", "Linears", "strength", "squared error without", "with"),
            rows,
            (1, 3, 4),
        )
    if chosen["refused"]:
        yield (
            "inputs that smoothquant left alone",
            ("input of", "why"),
            [[entry["linear"], entry["reason"]] for entry in chosen["refused"]],
            (),
        )
