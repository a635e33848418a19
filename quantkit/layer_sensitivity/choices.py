"""The choices for a layer group (kept in its stored dtype, quantized as in the recipe, or quantized
to another scheme) and the bytes of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from quantkit.checkpoint.formats import read_quantization_config
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError, EvaluationError
from quantkit.exporter.plan import ExportOptions, ExportPlan, ParameterPlan, plan_export
from quantkit.layer_sensitivity.options import KEEP, SensitivityOptions
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme

RECIPE = "recipe"  # the choice of quantizing as in the recipe
KEEP_NUMBER, RECIPE_NUMBER = 0, 1  # of these two in `Choices.names`; other schemes follow


@dataclass(frozen=True)
class Choices:
    """The choices that each layer group has.

    recipe: the plan with all groups quantized as in the recipe.
    alternatives: for each other scheme, the plan with all groups in this scheme.
    may_keep: whether a budget may keep a group in its stored dtype.
    """

    recipe: ExportPlan
    alternatives: tuple[ExportPlan, ...] = ()
    may_keep: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        return KEEP, RECIPE, *(scheme_name(plan) for plan in self.alternatives)

    @property
    def allowed(self) -> list[str]:
        """The names of choices that a budget may use, other than the recipe's."""
        return [name for name in self.names if name != RECIPE and (name != KEEP or self.may_keep)]

    def plan(self, choice: int) -> ExportPlan:
        """choice: the number of a choice that quantizes."""
        return self._plans[choice - RECIPE_NUMBER]

    def bytes_of(self, linears: Sequence[str], choice: int) -> int | None:
        """Bytes of the Linears on disk; None if one of them can't have this choice."""
        if choice == KEEP_NUMBER:
            return sum(self._rows[0][name].bytes_before for name in linears)
        rows = [self._rows[choice - RECIPE_NUMBER][name] for name in linears]
        if any(row.status != "quantized" for row in rows):
            return None
        return sum(row.bytes_after for row in rows)

    @property
    def _plans(self) -> tuple[ExportPlan, ...]:
        return self.recipe, *self.alternatives

    @cached_property
    def _rows(self) -> list[dict[str, ParameterPlan]]:
        return [
            {row.name.removesuffix(".weight"): row for row in plan.parameters}
            for plan in self._plans
        ]


def scheme_name(plan: ExportPlan) -> str:
    return plan.options.recipe.scheme.name


def open_choices(options: SensitivityOptions) -> tuple[Choices, list[str]]:
    """The plans of all choices, and remarks. Raises what `export` would raise."""
    checkpoint, remarks, recipe = Checkpoint.open(options.model), [], options.recipe
    if read_quantization_config(checkpoint.config) is not None:
        raise CheckpointError(
            f"{options.model} is quantized already; sensitivity measures the loss from quantizing,"
            " so give the original model"
        )
    if recipe.quantizes_weights and options.calibration is None:
        names = " and ".join(algorithm.name for algorithm in recipe.algorithms)
        remarks.append(
            f"the weights are rounded to nearest, not quantized by {names}; give"
            " `calibration='CALIB'` to score the weights that it holds"
        )
        recipe = replace(recipe, algorithms=())
    if recipe.kv_cache:
        remarks.append(
            "the KV cache is not quantized while layer groups are scored; the recipe for a budget"
            " includes it"
        )

    def planned(recipe: Recipe, calibration: Path | None) -> ExportPlan:
        nowhere = options.model.with_name(options.model.name + "-sensitivity")
        return plan_export(
            ExportOptions(options.model, nowhere, recipe, calibration), checkpoint=checkpoint
        )

    plan = planned(replace(recipe, kv_cache=None), options.calibration)
    has_quantized_weights = plan.calibration is not None and bool(plan.calibration.weights)
    alternatives: list[ExportPlan] = []
    for name in options.alternatives:
        if name == KEEP:
            continue
        other = Recipe(QuantScheme.parse(name), ignore=recipe.ignore, observer=recipe.observer)
        # Weights that algorithms quantized are in the recipe's scheme, and so is their calibration.
        alternatives.append(planned(other, None if has_quantized_weights else options.calibration))
        found = scheme_name(alternatives[-1])
        if found in map(scheme_name, alternatives[:-1]):
            raise EvaluationError(f"the alternative {found} is named twice; leave one out")
    return Choices(plan, tuple(alternatives), KEEP in options.alternatives), remarks
