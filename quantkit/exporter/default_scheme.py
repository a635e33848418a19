"""The scheme that `quantize` uses if the user names none: the one with the widest support for this
model, by the catalogue, the rules of runtimes and the model's shapes.

Candidates are the schemes with a `default_rank`, which need no calibration. They are compared by:

1. if hardware is named: whether that runs the scheme natively
2. Linears whose shapes the scheme fits
3. number of runtimes that load the checkpoint
4. number of kinds of hardware that run it
5. number of these that run it natively
6. `default_rank`
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
    """The chosen scheme.

    scheme: the scheme.
    reason: why it was chosen, for the user.
    """

    scheme: QuantScheme
    reason: str


@dataclass(frozen=True)
class _SchemeSupport:
    """Where a scheme can serve this model.

    scheme: the scheme.
    runtimes: runtimes that load the checkpoint.
    native: hardware that runs the scheme natively.
    weights_only: hardware that runs it as W8A16.
    unfit: number of Linears whose shape the scheme doesn't fit.
    """

    scheme: QuantScheme
    runtimes: tuple[str, ...]
    native: tuple[str, ...]
    weights_only: tuple[str, ...]
    unfit: int

    def key(self, hardware: str | None) -> tuple[int, ...]:
        """The sort key: greater is better."""
        width = (
            -self.unfit,
            len(self.runtimes),
            len(self.native) + len(self.weights_only),
            len(self.native),
        )
        # A weight-only scheme saves memory but no time, so running it natively is no advantage.
        return (
            (hardware in self.native and self.scheme.input is not None, *width)
            if hardware
            else width
        )


def default_scheme(
    checkpoint: Checkpoint,
    runtime: str | None = None,
    hardware: str | None = None,
    file_format: str = DEFAULT_FORMAT,
) -> DefaultChoice:
    """Choose a scheme for a model.

    runtime: a runtime that must load the checkpoint, or None.
    hardware: hardware that must run it, or None.
    file_format: name of the checkpoint format.

    Raises RecipeError if no scheme without calibration has that support.
    """
    form = FORMATS[file_format]
    if form.only_scheme is not None:
        return DefaultChoice(form.only_scheme, f"the one scheme that `format={form.name!r}` holds")
    if block_scales(checkpoint):
        return DefaultChoice(
            SCHEMES["fp8-block"], "the model is already in FP8 blocks, and their codes are copied"
        )
    tensors = linears_of(checkpoint)
    linears = {
        name: (role.shape, tensors.is_transposed(name))
        for name, role in tensors.modules("linear").items()
    }
    ranked = [
        (row.default_rank, row.scheme) for row in CATALOGUE.values() if row.default_rank is not None
    ]
    supports = [
        _support(scheme, linears, form)
        for _, scheme in sorted(ranked, key=lambda pair: pair[0])
        if form.obstacle([scheme], False) is None
    ]
    fitting = [
        support
        for support in supports
        if (runtime is None or runtime in support.runtimes)
        and (hardware is None or hardware in (*support.native, *support.weights_only))
        and support.unfit < len(linears)
    ]
    if not fitting:
        where = " on ".join(name for name in (runtime, hardware) if name)
        raise RecipeError(
            "no scheme without calibration is known to work for this"
            f" model{f' with {where}' if where else ''}",
            hint="name one with `recipe`",
        )
    # Of equal schemes, max returns the first, which has the lowest rank.
    best = max(fitting, key=lambda support: support.key(hardware))
    return DefaultChoice(best.scheme, _reason(best, hardware))


def _support(
    scheme: QuantScheme, shapes: dict[str, tuple[tuple[int, ...], bool]], file_format: Format
) -> _SchemeSupport:
    """shapes: Linear → its weight's shape, and whether that is stored transposed."""
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
    return _SchemeSupport(scheme, runtimes, native, weights_only, len(shapes) - len(linears))


def _reason(support: _SchemeSupport, hardware: str | None) -> str:
    """Why a scheme was chosen, for the user."""
    verb = "loads" if len(support.runtimes) == 1 else "load"
    loads = f"{_listed(support.runtimes)} {verb} it with these shapes"
    if hardware:
        how = "natively" if hardware in support.native else "as W8A16, with unquantized inputs"
        return f"{loads}; {hardware} runs it {how}; it needs no calibration"
    rest = f", {_listed(support.weights_only)} as W8A16" if support.weights_only else ""
    return f"{loads}; {_listed(support.native)} run it natively{rest}; it needs no calibration"


def _listed(names: Sequence[str]) -> str:
    """ "a, b and c", or "no runtime"."""
    return (
        " and ".join((", ".join(names[:-1]), names[-1]))
        if len(names) > 1
        else names[0]
        if names
        else "no runtime"
    )
