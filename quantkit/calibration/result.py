"""The result of `calibrate`: counts, speed, warnings, and what algorithms did."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.calibration.describe import algorithm_remarks, is_unsettled
from quantkit.calibration.options import CalibrationOptions
from quantkit.calibration.reader import Calibration
from quantkit.checkpoint.notebook import html_table
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.units import counted, format_bytes
from quantkit.models.hidden_states import peak_memory_bytes
from quantkit.models.tensor_roles import linears_of
from quantkit.schemes.pattern import covering_patterns


@dataclass(frozen=True)
class CalibrationResult:
    """A calibration that `calibrate` wrote. `export` and `sensitivity` take it as `calibration`.

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
    chosen: what algorithms did, one sentence each.
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

    def __fspath__(self) -> str:
        return str(self.path)

    def open(self) -> Calibration:
        """The statistics. Raises CalibrationError if the files were damaged since."""
        return Calibration.open(self.path)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to do about too little text and about Linears without statistics, one sentence
        each.
        """
        found = []
        has_run_out = self.windows < self.requested
        if has_run_out:
            found.append(
                f"the text holds {counted(self.windows, 'window')} of {self.seq_len} tokens, fewer"
                f" than the {self.requested} requested; give more text as `data`"
            )
        if self.unsettled:
            remedy = "give it as `data`" if has_run_out else "raise `num_samples`"
            found.append(
                f"the largest values of {len(self.unsettled)} of {counted(self.inputs, 'input')}"
                f" still grew in the last quarter of the data ({_first(self.unsettled)}). Static"
                f" scales need more text: {remedy}"
            )
        if self.starved:
            found.append(
                f"{counted(len(self.starved), 'expert')} saw too few tokens"
                f" ({_first(self.starved)}); their scales are estimated from their weights and the"
                " other experts. Give more text, or `all_experts=True`"
            )
        if self.unread:
            found.append(
                f"no token reached {_named(self.unread, 'Linear')}, which transformers doesn't run"
                " as a Linear, so they have no static scale. A static scheme needs these patterns"
                f" in `ignore`: {_listed(self.ignore['unread'])}"
            )
        if self.refused:
            found.append(
                f"export can't quantize {_named(self.refused, 'parameter')}; it refuses the model"
                f" without these patterns in `ignore`: {_listed(self.ignore['refused'])}"
            )
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """What `quantkit calibrate` prints as JSON."""
        content = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(self).items()
        }
        return content | {"warnings": list(self.warnings)}

    def __str__(self) -> str:
        """One sentence."""
        if self.was_finished:
            return f"{self.path} was already complete, with unchanged files; nothing was measured"
        return (
            f"{self.path}: statistics of {counted(self.inputs, 'input')} of"
            f" {counted(self.linears, 'Linear')}, from {counted(self.windows, 'window')} of"
            f" {self.seq_len} tokens; {self.seconds:.1f} s, {self.tokens_per_second:.0f} tokens/s,"
            f" peak memory {format_bytes(self.peak_memory_bytes)}"
        )

    def __repr__(self) -> str:
        return f"<CalibrationResult {self}>"

    def _repr_html_(self) -> str:
        rows = {
            "path": str(self.path),
            "statistics": f"{self.inputs} inputs of {self.linears} Linears",
            "text": f"{self.windows} windows of {self.seq_len} tokens",
            "time": f"{self.seconds:.1f} s, {self.tokens_per_second:.0f} tokens/s",
            "peak memory": format_bytes(self.peak_memory_bytes),
        }
        rows |= {f"algorithms, {number}": text for number, text in enumerate(self.chosen, 1)}
        rows |= {f"warning {number}": text for number, text in enumerate(self.warnings, 1)}
        return html_table("Calibration", rows)


def _first(names: Sequence[str]) -> str:
    return f"{names[0]}{' and others' if len(names) > 1 else ''}"


def _named(names: Sequence[str], what: str) -> str:
    return (
        f"the {what} {names[0]}" if len(names) == 1 else f"{len(names)} {what}s ({_first(names)})"
    )


def _listed(patterns: Sequence[str]) -> str:
    return " ".join(shlex.quote(pattern) for pattern in patterns)


def result_of(
    options: CalibrationOptions,
    checkpoint: Checkpoint,
    description: Mapping[str, Any],
    seconds: float,
    was_finished: bool = False,
) -> CalibrationResult:
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
    return CalibrationResult(
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
