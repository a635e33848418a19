"""The scheme that `quantize` takes where none is named: the one that can be served in the most
places, by the catalogue, the runtimes' rules and this model's shapes.

Only schemes with a `default_rank` are asked, since the others need data. Without a runtime or
hardware in mind, what counts is how many runtimes load the checkpoint, then on how much hardware it
is served, then on how much of that natively; with hardware in mind, whether that is native comes
first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.checkpoint.formats import DEFAULT_FORMAT, FORMATS, Format
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.stream import block_scales
from quantkit.errors import RecipeError
from quantkit.exporter.runtimes import hardware_mode, runtime_problems
from quantkit.models.assignment import QuantizedLinearInfo
from quantkit.models.tensor_roles import linears_of
from quantkit.schemes.scheme import CATALOGUE, SCHEMES, QuantScheme
from quantkit.schemes.serving import HARDWARE, NATIVE, RUNTIMES, WEIGHTS


@dataclass(frozen=True)
class DefaultChoice:
    """scheme, and why in a few words."""

    scheme: QuantScheme
    reason: str


@dataclass(frozen=True)
class _Reach:
    """Where a scheme can be served. unfit: Linears whose shape it doesn't fit."""

    scheme: QuantScheme
    runtimes: tuple[str, ...]
    native: tuple[str, ...]
    weights_only: tuple[str, ...]
    unfit: int

    def key(self, hardware: str | None) -> tuple[int, ...]:
        wide = (
            -self.unfit,
            len(self.runtimes),
            len(self.native) + len(self.weights_only),
            len(self.native),
        )
        # Weights alone save memory and no time, so that being native makes them no better.
        return (
            (hardware in self.native and self.scheme.input is not None, *wide) if hardware else wide
        )


def default_scheme(
    checkpoint: Checkpoint,
    runtime: str | None = None,
    hardware: str | None = None,
    file_format: str = DEFAULT_FORMAT,
) -> DefaultChoice:
    """Raises RecipeError where nothing that needs no data can be served so."""
    form = FORMATS[file_format]
    if form.only_scheme is not None:
        return DefaultChoice(form.only_scheme, f"the one scheme that --format {form.name} holds")
    if block_scales(checkpoint):
        return DefaultChoice(
            SCHEMES["fp8-block"], "the model is in FP8 blocks already, whose codes stay as they are"
        )
    tensors = linears_of(checkpoint)
    linears = {
        name: (role.shape, tensors.is_transposed(name))
        for name, role in tensors.modules("linear").items()
    }
    ranked = [
        (row.default_rank, row.scheme) for row in CATALOGUE.values() if row.default_rank is not None
    ]
    reaches = [
        _reach(scheme, linears, form)
        for _, scheme in sorted(ranked, key=lambda pair: pair[0])
        if form.obstacle([scheme], False) is None
    ]
    fitting = [
        reach
        for reach in reaches
        if (runtime is None or runtime in reach.runtimes)
        and (hardware is None or hardware in (*reach.native, *reach.weights_only))
        and reach.unfit < len(linears)
    ]
    if not fitting:
        where = " on ".join(name for name in (runtime, hardware) if name)
        raise RecipeError(
            "no scheme that needs no calibration is known to serve this"
            f" model{f' with {where}' if where else ''}; name one with --scheme"
        )
    best = max(fitting, key=lambda reach: reach.key(hardware))  # of equals the first
    return DefaultChoice(best.scheme, _reason(best, hardware))


def _reach(
    scheme: QuantScheme, shapes: dict[str, tuple[tuple[int, ...], bool]], file_format: Format
) -> _Reach:
    """shapes: Linear → its shape, and whether it is stored transposed."""
    linears = [
        QuantizedLinearInfo(name, (shape[0], shape[1]), scheme, is_transposed)
        for name, (shape, is_transposed) in shapes.items()
        if file_format.shape_obstacle(scheme, shape) is None
    ]
    runtimes = tuple(
        runtime
        for runtime in RUNTIMES
        if not runtime_problems(runtime, linears, (), file_format.name)
    )
    modes = {hardware: hardware_mode(scheme, hardware) for hardware in HARDWARE}
    native, weights_only = (
        tuple(hardware for hardware, mode in modes.items() if mode == wanted)
        for wanted in (NATIVE, WEIGHTS)
    )
    return _Reach(scheme, runtimes, native, weights_only, len(shapes) - len(linears))


def _reason(reach: _Reach, hardware: str | None) -> str:
    loads = (
        f"{_listed(reach.runtimes)} {'loads' if len(reach.runtimes) == 1 else 'load'} it with these"
        " shapes"
    )
    if hardware:
        is_native = hardware in reach.native
        how = "it natively" if is_native else "with its weights, inputs as they are"
        return f"{loads}; {hardware} computes {how}; it needs no calibration"
    rest = f", {_listed(reach.weights_only)} as W8A16" if reach.weights_only else ""
    return f"{loads}; {_listed(reach.native)} compute it natively{rest}; it needs no calibration"


def _listed(names: Sequence[str]) -> str:
    return (
        " and ".join((", ".join(names[:-1]), names[-1]))
        if len(names) > 1
        else names[0]
        if names
        else "no runtime"
    )
