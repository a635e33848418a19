"""Warnings before an export starts: about skipped shapes, runtimes that can't load the checkpoint,
and observers without effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantkit.errors import RuntimeLimitError
from quantkit.exporter.runtimes import runtime_problems
from quantkit.models.assignment import SHAPE, Assignment, QuantizedLinearInfo, more
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.serving import RUNTIMES


def plan_warnings(
    recipe: Recipe,
    assignment: Assignment,
    skipped: Sequence[str],
    file_format: str,
    runtime: str | None,
) -> list[str]:
    """All warnings, one sentence each.

    skipped: names of the Linears that are not quantized.
    file_format: name of the checkpoint format.
    runtime: the runtime that must load the checkpoint; None warns of those that can't.

    Raises RuntimeLimitError if `runtime` can't load the checkpoint.
    """
    return [
        *_shape_warnings(assignment.reasons),
        *_runtime_warnings(assignment, skipped, file_format, runtime),
        *_observer_warnings(recipe, assignment.linears),
    ]


def _shape_warnings(reasons: Mapping[str, str]) -> list[str]:
    """One sentence for all Linears that are skipped because of their shape."""
    skipped = [tensor for tensor, reason in reasons.items() if reason.startswith(SHAPE)]
    if not skipped:
        return []
    return [f"{skipped[0]}{more(len(skipped))} stays unquantized, {reasons[skipped[0]]}"]


def _runtime_warnings(
    assignment: Assignment, skipped: Sequence[str], file_format: str, runtime: str | None
) -> list[str]:
    linears = assignment.linears.values()
    if runtime is not None:
        problems = runtime_problems(runtime, linears, skipped, file_format, assignment.checkpoint)
        if problems:
            raise RuntimeLimitError(problems[0] + more(len(problems)))
        return []
    return [
        problem
        for name in RUNTIMES
        for problem in runtime_problems(name, linears, skipped, file_format)
    ]


def _observer_warnings(recipe: Recipe, linears: Mapping[str, QuantizedLinearInfo]) -> list[str]:
    if recipe.observer.kind == "absmax":
        return []
    inputs = [linear.scheme.input for linear in linears.values()]
    static = [spec for spec in inputs if spec is not None and not spec.dynamic]
    if not static:
        return [
            f"the observer {recipe.observer} has no effect: no scheme here has static input scales"
        ]
    if recipe.observer.kind == "percentile" and any(spec.format.kind == "float" for spec in static):
        return [
            f"the observer {recipe.observer} clips inputs that FP8 could represent; absmax or mse"
            " usually loses less"
        ]
    return []
