"""The summary of a calibration for the terminal: counts, speed, and warnings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.calibration.describe import algorithm_remarks, is_unsettled
from quantkit.calibration.options import CalibrationOptions
from quantkit.checkpoint.reader import Checkpoint
from quantkit.models.hidden_states import peak_memory_bytes
from quantkit.models.tensor_roles import linears_of
from quantkit.schemes.pattern import covering_patterns


@dataclass(frozen=True)
class CalibrationSummary:
    """What a run did.

    path: of CALIB.
    windows: windows of text that were used.
    seq_len: tokens per window.
    requested: windows that were asked for.
    inputs: measured inputs.
    linears: Linears that read them.
    seconds: wall time.
    tokens_per_second: tokens over wall time.
    peak_memory_bytes: of this process.
    unsettled: inputs whose amax still grew in the last quarter of the data.
    starved: experts with too few tokens.
    unread: other Linears that no token reached; they have no static scale.
    refused: parameters that `export` can't quantize.
    ignore: patterns that match exactly these, under "unread" and "refused".
    was_finished: an earlier run had finished, nothing was measured.
    chosen: what algorithms did, in sentences.
    """

    path: Path
    windows: int
    seq_len: int
    requested: int
    inputs: int
    linears: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    unsettled: tuple[str, ...] = ()
    starved: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    ignore: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    was_finished: bool = False
    chosen: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(self).items()
        }


def summary_of(
    options: CalibrationOptions,
    checkpoint: Checkpoint,
    description: Mapping[str, Any],
    seconds: float,
    was_finished: bool = False,
) -> CalibrationSummary:
    inputs = description["inputs"]
    # Experts that saw no token have their scale estimated.
    without_tokens = {
        linear
        for entry in inputs
        if not entry["tokens"] and not entry["estimated"]
        for linear in entry["linears"]
    }
    infos = linears_of(checkpoint).roles.values()
    refused = [info.tensor for info in infos if info.kind == "unreached"]
    linears = [info.name for info in infos if info.kind == "linear"]
    observed = {linear for entry in inputs for linear in entry["linears"]}
    unread = [name for name in linears if name in without_tokens or name not in observed]
    ignore = {
        "unread": tuple(covering_patterns(unread, set(linears).difference(unread))),
        "refused": tuple(covering_patterns(refused, linears)),
    }
    return CalibrationSummary(
        options.output,
        description["windows"],
        description["seq_len"],
        description["windows_requested"],
        len(inputs),
        sum(len(entry["linears"]) for entry in inputs),
        seconds,
        description["tokens"] / seconds if seconds else 0.0,
        peak_memory_bytes(),
        tuple(entry["name"] for entry in inputs if is_unsettled(entry)),
        tuple(
            f"{entry['module']}.{number}"
            for entry in description["experts"]
            for number in entry["starved"]
        ),
        tuple(unread),
        tuple(refused),
        ignore,
        was_finished,
        tuple(algorithm_remarks(description)),
    )
