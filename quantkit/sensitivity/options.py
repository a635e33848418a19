"""What `sensitivity` is asked: the sets of Linears that can't be split, and the schemes that each
may take.
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
from quantkit.models.tensor_roles import fused_sets
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme
from quantkit.sensitivity.advice import KEEP, RECIPE


@dataclass(frozen=True)
class SensitivityOptions:
    """recipe: what all sets are quantized with; alternatives: what single sets may be given
    instead, names of schemes or "keep".

    max_size: bytes, or None; max_kld: nats, or None. A calibration that holds weights chosen by
    algorithms has them scored as they were chosen.
    output: the JSON file to write, beside which finished scores are kept for `resume` while the run
    lasts. overwrite: start again where an interrupted run was left.
    """

    model: Path
    recipe: Recipe
    alternatives: tuple[str, ...] = (KEEP,)
    calibration: Path | None = None
    data: tuple[str, ...] = ()
    max_tokens: int = 2048
    seq_len: int | None = None
    max_size: str | None = None
    max_kld: float | None = None
    seed: int = 0
    device: str = "auto"
    trust_remote_code: bool = False
    output: Path | None = None
    resume: bool = False
    overwrite: bool = False

    @property
    def keeps(self) -> bool:
        """Whether an interrupted run can be continued: not where the result goes to a device or a
        pipe.
        """
        return self.output is not None and (self.output.is_file() or not self.output.exists())


@dataclass(frozen=True)
class LinearSet:
    """Linears that get one choice. kind: what it is in its block, as "q+k+v"."""

    block: int
    kind: str
    linears: tuple[str, ...]


def linear_sets(linears_of_blocks: Sequence[Sequence[str]]) -> list[LinearSet]:
    """The sets of each block, in the order of its Linears. linears_of_blocks: for each block the
    names on disk of those that are quantized.
    """
    sets = []
    for block, linears in enumerate(linears_of_blocks):
        experts = tuple(name for name in linears if ".experts." in name)
        others = [name for name in linears if name not in set(experts)]
        fused = {members[0]: members for members in fused_sets(others)}
        members_of_others = {member for members in fused.values() for member in members[1:]}
        groups = [fused.get(name, (name,)) for name in others if name not in members_of_others] + (
            [experts] if experts else []
        )
        kinds = ["experts" if group is experts else _kind(group) for group in groups]
        # A shared expert has a gate and an up beside those of others.
        named = [
            _parent(group) + " " + kind if kinds.count(kind) > 1 else kind
            for group, kind in zip(groups, kinds)
        ]
        sets += [LinearSet(block, kind, group) for group, kind in zip(groups, named)]
    return sets


def _kind(group: Sequence[str]) -> str:
    return "+".join(name.rpartition(".")[2].removesuffix("_proj") for name in group)


def _parent(group: Sequence[str]) -> str:
    return group[0].split(".")[-2]


# ---- Plans: what is quantized, and how many bytes each choice takes.


@dataclass(frozen=True)
class Choices:
    """What a set may become. names: "keep", "recipe", then schemes; plans: of a model whose sets
    all take that choice, None for "keep". may_keep: whether a budget may.
    """

    names: tuple[str, ...]
    plans: tuple[ExportPlan | None, ...]
    may_keep: bool

    def bytes_of(self, linears: Sequence[str], choice: int) -> int | None:
        """What the Linears take on disk, None where this choice can't hold one of them."""
        rows = self._rows[choice or 1]
        if self.plans[choice] is None:
            return sum(rows[name].bytes_before for name in linears)
        return (
            sum(rows[name].bytes_after for name in linears)
            if all(rows[name].status == "quantized" for name in linears)
            else None
        )

    @cached_property
    def _rows(self) -> list[dict[str, ParameterPlan]]:
        return [
            {row.name.removesuffix(".weight"): row for row in plan.parameters} if plan else {}
            for plan in self.plans
        ]

    @property
    def allowed(self) -> list[str]:
        """What a budget may give a set instead of the recipe's scheme."""
        return [name for name in self.names if name != RECIPE and (name != KEEP or self.may_keep)]


def open_choices(options: SensitivityOptions) -> tuple[Choices, list[str]]:
    """The plans of all choices, which refuse what `export` would refuse; and remarks."""
    checkpoint, remarks, recipe = Checkpoint.open(options.model), [], options.recipe
    if read_quantization_config(checkpoint.config) is not None:
        raise CheckpointError(
            f"{options.model} is quantized already; sensitivity asks what quantizing costs, so give"
            " the original model"
        )
    if recipe.chooses_weights and options.calibration is None:
        names = " and ".join(algorithm.name for algorithm in recipe.algorithms)
        remarks.append(
            f"scored with weights rounded to nearest: what {names} choose is scored with"
            " --calibration CALIB"
        )
        recipe = replace(recipe, algorithms=())
    if recipe.kv_cache:
        remarks.append(
            "the KV cache is left as it is while sets are scored; the written recipe has it"
        )
    plans: list[ExportPlan | None] = [
        None,
        plan_export(
            _plan_options(options, replace(recipe, kv_cache=None), options.calibration),
            checkpoint=checkpoint,
        ),
    ]
    has_chosen = plans[1].calibration is not None and bool(plans[1].calibration.weights)
    schemes = [name for name in options.alternatives if name != KEEP]
    for name in schemes:
        alternative = Recipe(
            QuantScheme.parse(name), ignore=recipe.ignore, observer=recipe.observer
        )
        plans.append(
            plan_export(
                _plan_options(options, alternative, None if has_chosen else options.calibration),
                checkpoint=checkpoint,
            )
        )
    names = [plan.options.recipe.scheme.name for plan in plans[2:]]
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise EvaluationError(f"the alternative {twice} is named twice; leave one out")
    return Choices((KEEP, RECIPE, *names), tuple(plans), KEEP in options.alternatives), remarks


def _plan_options(
    options: SensitivityOptions, recipe: Recipe, calibration: Path | None
) -> ExportOptions:
    return ExportOptions(
        options.model,
        options.model.with_name(options.model.name + "-sensitivity"),
        recipe,
        calibration,
    )
