"""The result of `sensitivity`, as dataclasses. They are written as JSON and read back.

The names of fields are the keys of the JSON, in order, unless `key` gives another. A field with a
default may be missing in a file. Places are numbers of layer groups, in the order of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantkit.checkpoint.files import finite
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.units import counted, format_bytes
from quantkit.errors import EvaluationError, NotComparableError
from quantkit.evaluation import json_values
from quantkit.evaluation.intervals import Interval
from quantkit.evaluation.json_values import INLINE, OMIT_NONE, key
from quantkit.evaluation.result import TextSources
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.layer_sensitivity.choices import RECIPE
from quantkit.layer_sensitivity.noise_floor import NoiseFloor
from quantkit.layer_sensitivity.options import KEEP
from quantkit.models.tensor_roles import linears_of
from quantkit.schemes.mixed_recipe import mixed_recipe
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme

SCHEMA_VERSION = 1
WORST_SHOWN = 3  # layer groups that `repr` names


@dataclass(frozen=True, kw_only=True)
class VariantMetrics:
    """The metrics of a variant of the model.

    kld: mean KL(model‖variant), nats.
    kld_low, kld_high: its 95 % interval; None if there is only one window.
    ppl_delta_pct: change of the perplexity, %.
    """

    kld: float
    kld_low: float | None
    kld_high: float | None
    ppl_delta_pct: Interval

    @classmethod
    def of(cls, kld: Interval, ppl_delta_pct: Interval) -> VariantMetrics:
        return cls(kld=kld.value, kld_low=kld.low, kld_high=kld.high, ppl_delta_pct=ppl_delta_pct)


@dataclass(frozen=True, kw_only=True)
class GroupChoice:
    """A choice for a layer group: to keep it, or to quantize it.

    bytes: size of its Linears.
    metrics: those of the model with this group alone quantized; None if it is kept.
    own_kld: its KL above the noise floor, nats; 0 if it is kept.
    """

    bytes: int
    metrics: VariantMetrics | None = field(default=None, metadata=INLINE)
    own_kld: float = 0.0

    def to_json(self) -> dict[str, Any]:
        content = json_values.fields_to_json(self)
        if self.metrics is None:
            del content["own_kld"]
        return content


@dataclass(frozen=True, kw_only=True)
class LinearSqnr:
    """The signal-to-quantization-noise ratios of one Linear, quantized as in the recipe.

    name: its name in the checkpoint.
    weight_sqnr_db: that of its weight, dB; infinity (null in JSON) if it is exact.
    output_sqnr_db: that of its output for inputs of the unquantized model, dB; None if it got no
        inputs.
    """

    name: str
    weight_sqnr_db: float
    output_sqnr_db: float | None = field(default=None, metadata=OMIT_NONE)

    @classmethod
    def from_json(cls, content: Any) -> LinearSqnr:
        items = dict(content).items()
        return json_values.fields_from_json(
            cls, {name: math.inf if item is None else item for name, item in items}
        )


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A layer group that is kept in an otherwise quantized model.

    metrics: those of that model.
    gain: how much lower its KL is than that of the quantized model, nats.
    """

    metrics: VariantMetrics = field(metadata=INLINE)
    gain: float


@dataclass(frozen=True, kw_only=True)
class ScoredGroup:
    """The scores of one layer group.

    name: its name, with the shell's braces: model.layers.3.self_attn.{q,k,v}_proj.
    block: number of its block.
    kind: its role in the block, such as "q+k+v".
    linears: names of its Linears in the checkpoint.
    choices: "keep", "recipe" or another scheme → its size and loss; only those that it can have.
    layers: the errors of its Linears.
    restored: the quantized model with this group kept; measured for the worst groups only.
    """

    name: str
    block: int
    kind: str
    linears: tuple[str, ...]
    choices: Mapping[str, GroupChoice]
    layers: tuple[LinearSqnr, ...] = ()
    restored: Restored | None = field(default=None, metadata=OMIT_NONE)

    @property
    def own_kld(self) -> float:
        """KL of quantizing this group alone as in the recipe, above the noise floor, nats."""
        return self.choices[RECIPE].own_kld


@dataclass(frozen=True, kw_only=True)
class Additivity:
    """How well the sum of the groups' KLs predicts the KL of all together.

    sum: of the groups' KLs above the noise floor, nats.
    whole: KL of the model with all groups quantized, above the noise floor, nats.
    factor: by which sums are multiplied to predict.
    additive: whether the factor is near enough to 1 for a budget.
    """

    sum: float
    whole: float
    factor: float
    additive: bool


@dataclass(frozen=True, kw_only=True)
class CheckpointBytes:
    """Sizes of the checkpoint's tensors.

    all_kept: of the unquantized model.
    all_quantized: with all groups quantized as in the recipe.
    untied: of the output head that an algorithm unties, part of `all_quantized`.
    """

    all_kept: int
    all_quantized: int
    untied: int = 0


@dataclass(frozen=True, kw_only=True)
class GroupScores:
    """What was measured of the layer groups, and the sizes of checkpoints.

    groups: in the order of the model.
    whole: "recipe" or another scheme → metrics of the model with all groups quantized to it.
    noise_floor: KL that any change causes, by depth.
    additivity: for the schemes of `whole`.
    bytes: sizes of the checkpoint's tensors.
    """

    groups: tuple[ScoredGroup, ...] = field(metadata=key("sets"))
    whole: Mapping[str, VariantMetrics]
    noise_floor: NoiseFloor = field(metadata=key("floor"))
    additivity: Mapping[str, Additivity]
    bytes: CheckpointBytes


@dataclass(frozen=True, kw_only=True)
class ParetoPoint:
    """The model with some groups changed.

    k: how many; the worst ones.
    bytes: size of the checkpoint's tensors.
    kld_predicted: predicted KL, nats.
    measured: its metrics; None if it wasn't run.
    """

    k: int
    bytes: int
    kld_predicted: float
    measured: VariantMetrics | None = field(default=None, metadata=OMIT_NONE)


@dataclass(frozen=True, kw_only=True)
class ParetoLine:
    """Size and KL when more and more of the worst groups are changed.

    to: the choice that they get: "keep" or another scheme.
    order: places of the groups that can have it, the one that gains most first.
    measured: the k whose points are run.
    points: by k, from 0 to all groups in `order`.
    """

    to: str
    order: tuple[int, ...]
    measured: tuple[int, ...]
    points: tuple[ParetoPoint, ...]


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The optimal choices within a budget, by predictions.

    max_size: the budget's size, as the user wrote it; None without one.
    max_size_bytes: the same in bytes.
    max_kld: the budget's mean KL, nats; None without one.
    choices: by group: "keep", "recipe" or another scheme.
    bytes: size of the checkpoint's tensors.
    kld_predicted: predicted KL, nats.
    moved: how many groups aren't quantized as in the recipe.
    measured: metrics of the model with these choices; None if it wasn't run.
    """

    max_size: str | None
    max_size_bytes: int | None
    max_kld: float | None
    choices: tuple[str, ...]
    bytes: int
    kld_predicted: float
    moved: int
    measured: VariantMetrics | None = field(default=None, metadata=OMIT_NONE)


@dataclass(frozen=True, kw_only=True)
class ScoredModel:
    """The unquantized model.

    path: its directory.
    fingerprint: hash of samples of its files.
    bytes: size of its tensors.
    """

    path: str
    fingerprint: str
    bytes: int


@dataclass(frozen=True, kw_only=True, repr=False)
class Sensitivity:
    """The result of `sensitivity`.

    schema_version: version of the JSON.
    quantkit_version: version of quantkit that wrote it.
    model: the unquantized model.
    base_recipe: how all layer groups are quantized; "recipe" in the JSON.
    alternatives: other choices that a budget may use for a group: "keep", or schemes.
    calibration: directory of the calibration; None without one.
    data: the text.
    seq_len: tokens of a window.
    windows: number of windows.
    tokens_scored: number of scored tokens.
    fingerprint: everything that the result depends on.
    scores: what was measured of the layer groups.
    order: places of the groups, the one with the largest KL first; "ranking" in the JSON.
    pareto: for each other choice, size and KL when the worst groups get it.
    solution: the best choices within the budget; None without a budget.
    remarks: sentences for the reader of the result.
    block_runs: how often blocks ran over all windows.
    block_runs_without_sharing: how often they would have, if each variant had run alone.
    seconds: how long the run took; None if nothing was run.
    peak_memory_bytes: peak memory of the process; None if nothing was run.
    was_finished: whether an earlier run had already written this result.
    """

    schema_version: int
    quantkit_version: str | None = None
    model: ScoredModel
    base_recipe: Recipe = field(metadata=key("recipe"))
    alternatives: tuple[str, ...]
    calibration: str | None = None
    data: TextSources
    seq_len: int
    windows: int
    tokens_scored: int
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    scores: GroupScores = field(metadata=INLINE)
    order: tuple[int, ...] = field(metadata=key("ranking"))
    pareto: tuple[ParetoLine, ...]
    solution: Solution | None = None
    remarks: tuple[str, ...] = ()
    block_runs: int
    block_runs_without_sharing: int
    seconds: float | None = field(default=None, metadata=OMIT_NONE)
    peak_memory_bytes: int | None = field(default=None, metadata=OMIT_NONE)
    was_finished: bool = False

    @property
    def ranking(self) -> tuple[ScoredGroup, ...]:
        """The layer groups, the one with the largest KL first."""
        return tuple(self.scores.groups[place] for place in self.order)

    def as_stored(self) -> Sensitivity:
        """The result as it is stored: without the fields that differ from run to run."""
        return replace(self, seconds=None, peak_memory_bytes=None, was_finished=False)

    def to_json(self) -> dict[str, Any]:
        """What `quantkit sensitivity` prints as JSON."""
        content = json_values.fields_to_json(self)
        if not self.was_finished:
            del content["was_finished"]
        # An exact Linear has an infinite SQNR.
        return finite(content)

    @classmethod
    def from_json(cls, content: Any) -> Sensitivity:
        """Raises KeyError, TypeError or ValueError if `content` isn't the JSON of a result, and
        RecipeError if this version doesn't know its recipe.
        """
        result: Sensitivity = json_values.fields_from_json(cls, content)
        result._require_whole()
        return result

    def _require_whole(self) -> None:
        """Raise ValueError if parts are missing or don't fit together."""
        groups, solution = self.scores.groups, self.solution
        every_choice = {RECIPE, *self.alternatives, KEEP}
        fits = (
            len(groups) > 0
            and sorted(self.order) == list(range(len(groups)))
            and RECIPE in self.scores.additivity
            and all({KEEP, RECIPE} <= group.choices.keys() <= every_choice for group in groups)
            and all(0 <= group.block < len(self.scores.noise_floor.values) for group in groups)
            and (
                solution is None
                or len(solution.choices) == len(groups)
                and all(name in group.choices for name, group in zip(solution.choices, groups))
            )
        )
        if not fits:
            raise ValueError("parts of the result don't fit together")

    def require_model(self, checkpoint: Checkpoint, source: str = "the result") -> None:
        """Raises NotComparableError if the result is of another model.

        source: what the message calls the result.
        """
        if self.model.fingerprint != checkpoint.fingerprint():
            raise NotComparableError(
                f"{source} was made from another model ({self.model.path}) than"
                f" {checkpoint.path}, or its files have changed since",
                hint="run sensitivity on this one",
            )

    def solve(
        self,
        max_size: str | int | None = None,
        max_kld: float | None = None,
        alternatives: Sequence[str] = (),
    ) -> Sensitivity:
        """This result with the solution of another budget. Nothing is run.

        max_size: bytes, "150MB", "65%" (of the model), or "+5%" (more than all quantized).
        max_kld: mean KL, nats.
        alternatives: those that the solution may use; all that were scored if none is named.

        Raises EvaluationError for an alternative that wasn't scored, or if no choice meets the
        budget.
        """
        from quantkit.layer_sensitivity.advice import solve_again

        return solve_again(self, None if max_size is None else str(max_size), max_kld, alternatives)

    def to_html(self) -> str:
        """A self-contained page with a heat map. Raises EvaluationError without matplotlib."""
        from quantkit.layer_sensitivity.html import sensitivity_html

        return sensitivity_html(self)

    def _repr_html_(self) -> str:
        from quantkit.layer_sensitivity.html import sensitivity_fragment

        return sensitivity_fragment(self)

    def recipe(self, model: str | Path | None = None) -> Recipe:
        """The recipe of the budget's solution. Its export has the solution's size.

        model: directory of the unquantized model; None for the path that was scored.

        Raises EvaluationError without a solution, NotComparableError for another model.
        """
        if self.solution is None:
            raise EvaluationError(
                "there is no solution, because no budget was given",
                hint="give `max_size` or `max_kld`",
            )
        checkpoint = Checkpoint.open(Path(self.model.path if model is None else model))
        self.require_model(checkpoint)
        taken = [
            (name, choice)
            for group, choice in zip(self.scores.groups, self.solution.choices)
            for name in group.linears
        ]
        modules = linears_of(checkpoint).modules()
        kept = [name for name, choice in taken if choice == KEEP]
        moved = {
            name: QuantScheme.parse(choice)
            for name, choice in taken
            if choice not in (KEEP, RECIPE)
        }
        made = mixed_recipe(self.base_recipe, kept, moved, modules)
        if set(self.solution.choices) != {KEEP}:
            nowhere = checkpoint.path.with_name(checkpoint.path.name + "-sensitivity")
            options = ExportOptions(checkpoint.path, nowhere, made)
            # A plan without a calibration lacks the output head that an algorithm unties.
            expected = self.solution.bytes - self.scores.bytes.untied
            plan = plan_export(options, calibration_follows=True, checkpoint=checkpoint)
            found = plan.bytes_after
            assert found == expected, f"the recipe gives {found} bytes, not {expected}"
        return made

    def __repr__(self) -> str:
        worst = ", ".join(group.name for group in self.ranking[:WORST_SHOWN])
        found = "no budget"
        if self.solution is not None:
            found = (
                f"solution: {counted(self.solution.moved, 'group')} changed,"
                f" {format_bytes(self.solution.bytes)},"
                f" predicted KL {self.solution.kld_predicted:.4f}"
            )
        return (
            f"<Sensitivity of {self.model.path} in {self.base_recipe.scheme.name}:"
            f" {counted(len(self.order), 'layer group')}, worst {worst}; {found}>"
        )
